"""What all figures share: colours, frame, and a file that is the same for the same figure."""

from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The palette of Okabe and Ito, which people of every colour vision can distinguish; without its yellow, pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
SUFFIXES = (".png", ".svg")


def frame(axes: Axes) -> None:
    """Set a pale grid, and a frame that is open above and on the right."""
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, place: Path | IO[bytes], suffix: str | None = None, **settings: Any) -> None:
    """Write a figure in the format of its suffix; the same figure gives the same SVG, byte for byte.

    Args:
        place: a `.png` or `.svg` file, or a binary stream.
        suffix: one of `SUFFIXES`, of a stream.
        settings: of matplotlib, such as `svg.fonttype`, in force while it is written.
    """
    form = (suffix or Path(str(place)).suffix).lower().removeprefix(".")
    metadata = {"Date": None} if form == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "d2l"} | settings):
        figure.savefig(place, format=form, dpi=150, metadata=metadata)
