"""Curves of runs over their steps: losses, gradient norm, learning rate and speed, raw ones pale, smoothed ones strong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from d2l.errors import DataError
from d2l.evaluation.canvas import PALETTE, frame, save_figure
from d2l.io.run_folder import METRICS
from d2l.train.history import RunHistory, heldout_losses, loss_keys, series, speeds

SMOOTHED_SHARE, SMOOTHED_LEAST = 1 / 50, 10  # of a run's steps, and steps, over which its smoothed line forgets
MOST_POINTS = 2000  # of one line: more are not seen, and a run of days has a hundred thousand


@dataclass(frozen=True)
class Panel:
    """One of the plots: its title, what it takes from a run, whether it is smoothed, its scale."""

    title: str
    values: Callable[[RunHistory], list[tuple[int, float]]]
    smooth: bool = True
    logarithmic: bool = False


PANELS = (
    Panel("loss (nats)", lambda run: series(run.records, loss_keys())),
    Panel("held-out loss (nats)", heldout_losses, smooth=False),
    Panel("gradient norm", lambda run: series(run.records, ["grad_norm"]), logarithmic=True),
    Panel("learning rate", lambda run: series(run.records, ["lr"]), smooth=False),
    Panel("tokens a second", lambda run: speeds(run.records)),
)


def draw_curves(
    runs: Sequence[RunHistory],
    place: Path | IO[bytes],
    suffix: str | None = None,
    *,
    panels: Sequence[Panel] = PANELS,
    colour: str = "black",
    **settings: Any,
) -> None:
    """Write the curves of all runs into one figure; what no run has gets no panel.

    Args:
        place, suffix, settings: see `save_figure`.
        panels: those of `PANELS` that are wanted.
        colour: of text and frames; the background is transparent unless it is black.

    Raises:
        DataError: no run has a step with metrics.
    """
    drawn = [(panel, [panel.values(run) for run in runs]) for panel in panels]
    drawn = [(panel, lines) for panel, lines in drawn if any(lines)]
    if not drawn:
        named = ", ".join(str(run.folder / METRICS) for run in runs)
        raise DataError(f"expected steps to draw, found none in {named}; has the run taken its first step?")
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows + 0.4 * (len(runs) > 1)), layout="constrained")
    for number, (panel, lines) in enumerate(drawn, 1):
        _draw_panel(figure.add_subplot(rows, columns, number), panel, lines, colour)
    if len(runs) > 1:
        handles = [Line2D([], [], color=PALETTE[number % len(PALETTE)]) for number in range(len(runs))]
        figure.legend(handles, _names(runs), loc="outside lower center", ncols=3, frameon=False, labelcolor=colour)
    figure.patch.set_alpha(0 if colour != "black" else 1)
    save_figure(figure, place, suffix, **settings)


def _draw_panel(axes: Axes, panel: Panel, lines: Sequence[Sequence[tuple[int, float]]], colour: str) -> None:
    """Draw one value of every run."""
    everything = [value for line in lines for _, value in line]
    if panel.logarithmic and min(everything) > 0:
        axes.set_yscale("log")
    for number, line in enumerate(lines):
        if not line:
            continue
        steps, values = (np.array(column, dtype=float) for column in zip(*line, strict=True))
        strong: dict[str, Any] = {
            "color": PALETTE[number % len(PALETTE)],
            "linewidth": 1.4,
            "marker": "" if len(line) > 1 else "o",
        }
        window = max(min(SMOOTHED_LEAST, len(values) / 4), SMOOTHED_SHARE * len(values))
        smoothed = smooth(values, window) if panel.smooth else values
        if panel.smooth:
            axes.plot(*thin(steps, values), **strong | {"alpha": 0.45, "linewidth": 0.8})
        axes.plot(*thin(steps, smoothed), **strong)
    axes.set_title(panel.title, fontsize=10, color=colour)
    axes.set_xlabel("step", color=colour)
    axes.tick_params(which="both", colors=colour)
    axes.spines[:].set_color(colour)
    axes.patch.set_alpha(0)
    frame(axes)


def smooth(values: np.ndarray, steps: float) -> np.ndarray:
    """Return the exponential moving average over about `steps` values, without a bias to 0 at the start [n]."""
    keep = 1 - 1 / max(1.0, steps)
    averages, average, weight = np.empty(len(values)), 0.0, 0.0
    for place, value in enumerate(values):
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        averages[place] = average / weight
    return averages


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `MOST_POINTS` points of a line: the least and the largest value of each stretch, so no spike is lost."""
    if len(values) <= MOST_POINTS:
        return steps, values
    stretches = np.array_split(np.arange(len(values)), MOST_POINTS // 2)
    kept = {int(place) for it in stretches for place in (it[values[it].argmin()], it[values[it].argmax()])}
    places = sorted(kept)
    return steps[places], values[places]


def _names(runs: Sequence[RunHistory]) -> list[str]:
    """Return the name of each run's folder, or its path where two have the same name."""
    names = [run.folder.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]
