"""Names of the experiment's files, all in one folder."""

from collections.abc import Callable
from pathlib import Path

Report = Callable[[str], None]


class Folder:
    """Names of the files of the experiment."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.gguf, self.base = place / "base.gguf", place / "base"
        self.config, self.run = place / "config.yaml", place / "run"
        self.recipe, self.curve = place / "recipe.json", place / "curve.svg"

    def data(self, name: str) -> Path:
        """Return the file of a stage's documents."""
        return self.place / "data" / f"{name}.jsonl"

    def results(self, step: int) -> Path:
        """Return the folder of what was measured of the checkpoint of a step."""
        return self.place / "results" / f"step-{step:06d}"
