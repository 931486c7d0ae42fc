"""Figure of an evaluation: every condition with its confidence intervals, and curves over the size of documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from d2l.evaluation.canvas import frame, save_figure
from d2l.evaluation.scores import LABELS, Condition, Estimate, Group, Score

if TYPE_CHECKING:
    from d2l.evaluation.run import Evaluation

# The palette of Okabe and Ito, which people of every colour vision can distinguish.
STYLES: dict[Condition, tuple[str, str]] = {  # colour, marker
    "document": ("#0072B2", "o"),
    "other": ("#D55E00", "s"),
    "none": ("#999999", "^"),
    "in_prompt": ("#009E73", "D"),
}
METRICS = (("exact", "exact match"), ("f1", "token F1"), ("rouge_l", "ROUGE-L"))
CURVES = METRICS[:2]
BAR_WIDTH = 0.2  # share of the distance between two metrics
MARKER_SHIFT = 1.02  # factor on x between the conditions of one size, so that equal values do not hide each other


def draw_figure(evaluation: "Evaluation", path: Path) -> None:
    """Write the figure in the format of the suffix; the same evaluation gives the same SVG, byte for byte.

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
    _draw_bars(bars, evaluation)
    for row, (metric, label) in enumerate(CURVES, 1):
        for column, (name, groups) in enumerate(curves):
            _draw_curve(figure.add_subplot(grid[row, column]), metric, label, name, groups)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


def _draw_bars(axes: Axes, evaluation: "Evaluation") -> None:
    """Draw a bar for every metric and condition."""
    for place, (condition, score) in enumerate(evaluation.scores.items()):
        colour, _ = STYLES[condition]
        estimates = _get_estimates([score] * len(METRICS), [metric for metric, _ in METRICS])
        at = [metric + (place - 1.5) * BAR_WIDTH for metric in range(len(METRICS))]
        heights = [estimate.value for estimate in estimates]
        errors = _error_lengths(estimates)
        axes.bar(at, heights, BAR_WIDTH, label=LABELS[condition], color=colour, yerr=errors, capsize=3)
    axes.set_xticks(range(len(METRICS)), [label for _, label in METRICS])
    axes.set_title(
        f"{evaluation.documents:,} documents, {evaluation.questions:,} questions; 95% confidence intervals", fontsize=10
    )
    _style_axes(axes)


def _draw_curve(axes: Axes, metric: str, label: str, name: str, groups: Sequence[Group]) -> None:
    """Draw a metric of every condition over the mean size of each group."""
    means = [group.mean for group in groups]
    for place, (condition, (colour, marker)) in enumerate(STYLES.items()):
        estimates = _get_estimates([group.scores[condition] for group in groups], [metric] * len(groups))
        values = [estimate.value for estimate in estimates]
        at = [mean * MARKER_SHIFT ** (place - 1.5) for mean in means]
        axes.errorbar(at, values, yerr=_error_lengths(estimates), color=colour, marker=marker, markersize=4, capsize=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(means, [f"{mean:,.0f}" for mean in means])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{name} (mean of a group)")
    axes.set_ylabel(label)
    _style_axes(axes)


def _get_estimates(scores: Sequence[Score], metrics: Sequence[str]) -> list[Estimate]:
    return [getattr(score, metric) for score, metric in zip(scores, metrics, strict=True)]


def _error_lengths(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Return the distances from each value to the lower and the upper bound of its interval, [2][values]."""
    below = [max(0.0, it.value - it.low) for it in estimates]
    return [below, [max(0.0, it.high - it.value) for it in estimates]]


def _style_axes(axes: Axes) -> None:
    """Set the limits of a share, grid and frame."""
    axes.set_ylim(-0.02, 1.05)
    frame(axes)
