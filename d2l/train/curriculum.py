"""A curriculum: needles in stages, each until the questions of the training steps are answered well enough.

What ends a stage is counted in steps and answers, never in seconds: the same config and seed take the same course.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from d2l.config.schema import CurriculumStage

MEMORY = 0.9  # weight of the past in the moving average of exact match: about the last ten steps count


class Curriculum:
    """Which stage a run is in.

    Args:
        stages: in order; at least one. The last one never ends.
    """

    def __init__(self, stages: Sequence[CurriculumStage]) -> None:
        self._passing = [stage.passing for stage in stages]
        self.stage, self.average = 0, 0.0

    def observe(self, exact_match: float) -> bool:
        """Count one step, whose questions had this exact match; whether the stage was passed and the next one begins."""
        self.average = MEMORY * self.average + (1 - MEMORY) * exact_match
        if self.stage == len(self._passing) - 1 or self.average < self._passing[self.stage]:
            return False
        self.stage, self.average = self.stage + 1, 0.0
        return True

    def state(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {"stage": self.stage, "average": self.average}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.stage, self.average = state["stage"], state["average"]
