"""Trainers and their steps, seen from outside, as the checks of stage twin examine them."""
