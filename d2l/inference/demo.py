"""The demonstration that is shipped: a trained checkpoint, a document, and questions about it. Read without torch.

`experiments/demo.py` makes its checkpoint, an ordinary one: its manifest is verified when it is loaded.
"""

from pathlib import Path

from d2l.io.resources import resource
from d2l.io.run_folder import is_checkpoint, is_run

DEMO = "demo"
_FOLDER = "configs/demo"


def locate_checkpoint(place: Path) -> Path:
    """Return the path of a checkpoint or run: for `demo` the shipped one, where no run or checkpoint has that path."""
    return resource(_FOLDER) if is_demo(place) else place


def is_demo(place: Path) -> bool:
    """Return whether a path means the shipped demonstration."""
    return place == Path(DEMO) and not is_run(place) and not is_checkpoint(place)


def demo_document() -> Path:
    """Return the shipped document, which shares no pair with those of the training."""
    return resource(f"{_FOLDER}/document.md")


def demo_questions() -> list[str]:
    """Return questions about the shipped document."""
    return resource(f"{_FOLDER}/questions.txt").read_text(encoding="utf-8").splitlines()
