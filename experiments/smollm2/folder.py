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
        self.recipe, self.harm, self.peft = place / "recipe.json", place / "harm.json", place / "peft.json"

    def data(self, name: str) -> Path:
        """Return the file of a stage's documents."""
        return self.place / "data" / f"{name}.jsonl"

    def evaluation(self, name: str) -> Path:
        """Return the file of an evaluation."""
        return self.place / f"evaluation-{name}.json"
