"""An evaluation as a figure: every condition with its confidence intervals, and curves over the size of documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from d2l.evaluation.scores import Condition, Estimate, Group, Score

if TYPE_CHECKING:
    from d2l.evaluation.run import Evaluation

# The palette of Okabe and Ito, which people of every colour vision can tell apart.
LOOKS: dict[Condition, tuple[str, str, str]] = {  # label, colour, marker
    "document": ("the document's LoRA", "#0072B2", "o"),
    "other": ("another document's LoRA", "#D55E00", "s"),
    "none": ("no document", "#999999", "^"),
    "in_prompt": ("document in the prompt", "#009E73", "D"),
}
METRICS = (("exact", "exact match"), ("f1", "token F1"), ("rouge_l", "ROUGE-L"))
CURVES = METRICS[:2]
BAR = 0.2  # of the distance between two metrics
APART = 1.02  # factor between the conditions of one size, so that equal values do not hide each other


def draw(evaluation: "Evaluation", path: Path) -> None:
    """Write the figure, in the format that the name's ending says; the same evaluation makes the same SVG.

    Args:
        path: a `.png` or `.svg` file.
    """
    sizes = [("tokens of the document", evaluation.by_length), ("chunks of the document", evaluation.by_chunks)]
    curves = [(name, groups) for name, groups in sizes if len(groups) > 1]
    rows = 1 + (len(CURVES) if curves else 0)
    # A figure without pyplot has no window and no global state; its canvas follows from the file's format.
    figure = Figure(figsize=(8, 2.4 * rows + 0.8), layout="constrained")
    grid = figure.add_gridspec(rows, max(1, len(curves)))
    bars = figure.add_subplot(grid[0, :])
    _bars(bars, evaluation)
    for row, (metric, label) in enumerate(CURVES, 1):
        for column, (name, groups) in enumerate(curves):
            _curve(figure.add_subplot(grid[row, column]), metric, label, name, groups)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    reproducible = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "d2l"}):
        figure.savefig(path, dpi=150, metadata=reproducible)


def _bars(axes: Axes, evaluation: "Evaluation") -> None:
    for place, (condition, score) in enumerate(evaluation.scores.items()):
        label, colour, _ = LOOKS[condition]
        estimates = _estimates([score] * len(METRICS), [metric for metric, _ in METRICS])
        at = [metric + (place - 1.5) * BAR for metric in range(len(METRICS))]
        heights = [estimate.value for estimate in estimates]
        axes.bar(at, heights, BAR, label=label, color=colour, yerr=_errors(estimates), capsize=3)
    axes.set_xticks(range(len(METRICS)), [label for _, label in METRICS])
    axes.set_title(
        f"{evaluation.documents:,} documents, {evaluation.questions:,} questions; 95% confidence intervals", fontsize=10
    )
    _frame(axes)


def _curve(axes: Axes, metric: str, label: str, name: str, groups: Sequence[Group]) -> None:
    means = [group.mean for group in groups]
    for place, (condition, (_, colour, marker)) in enumerate(LOOKS.items()):
        estimates = _estimates([group.scores[condition] for group in groups], [metric] * len(groups))
        values = [estimate.value for estimate in estimates]
        beside = [mean * APART ** (place - 1.5) for mean in means]
        axes.errorbar(beside, values, yerr=_errors(estimates), color=colour, marker=marker, markersize=4, capsize=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(means, [f"{mean:,.0f}" for mean in means])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{name} (mean of a group)")
    axes.set_ylabel(label)
    _frame(axes)


def _estimates(scores: Sequence[Score], metrics: Sequence[str]) -> list[Estimate]:
    return [getattr(score, metric) for score, metric in zip(scores, metrics, strict=True)]


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far the interval reaches below and above each value."""
    below = [max(0.0, it.value - it.low) for it in estimates]
    return [below, [max(0.0, it.high - it.value) for it in estimates]]


def _frame(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.05)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
