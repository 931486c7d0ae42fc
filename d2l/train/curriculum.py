"""Curriculum of needles in stages: a stage ends when the exact match on training questions is high enough.

The end of a stage depends on steps and answers, never on time: the same config and seed give the same stages.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from d2l.config.schema import CurriculumStage

EMA_DECAY = 0.9  # of the moving average of exact match: about the last ten steps count


class Curriculum:
    """State of a curriculum: its present stage, and the moving average of exact match in it.

    Args:
        stages: at least one stage, in order; the last one never ends.
    """

    def __init__(self, stages: Sequence[CurriculumStage]) -> None:
        self._passing = [stage.passing for stage in stages]
        self.stage, self.average = 0, 0.0

    def observe(self, exact_match: float) -> bool:
        """Add the exact match of one step; return whether the stage ended and the next one begins."""
        self.average = EMA_DECAY * self.average + (1 - EMA_DECAY) * exact_match
        if self.stage == len(self._passing) - 1 or self.average < self._passing[self.stage]:
            return False
        self.stage, self.average = self.stage + 1, 0.0
        return True

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values, for a checkpoint."""
        return {"stage": self.stage, "average": self.average}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.stage, self.average = state["stage"], state["average"]
