"""Readings of the run's data, from its files to its packed batches, that the checks of stage data share."""
