"""The checks of our team."""

from team_checks import rank_above_ours

RULES = (rank_above_ours.RULE,)
