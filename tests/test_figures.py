"""The figure of an evaluation: one panel, or curves where sizes differ; reproducible, and without a window."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from d2l.evaluation.figures import _error_lengths, draw_figure
from d2l.evaluation.run import Evaluation
from d2l.evaluation.scores import CONDITIONS, Estimate, GradedAnswer, compute_scores, group_by_chunks, group_by_length


def evaluation(sizes: list[tuple[int, int]]) -> Evaluation:
    """Return an evaluation with one question for each document, given as (tokens, chunks)."""
    answers = tuple(
        GradedAnswer(record, 0, tokens, chunks, condition, "", "", float(record % 2), 0.5, 0.25, 1.0, 1)
        for record, (tokens, chunks) in enumerate(sizes)
        for condition in CONDITIONS
    )
    groups = group_by_length(answers, 0), group_by_chunks(answers, 0)
    return Evaluation(len(sizes), len(sizes), compute_scores(answers, 0), *groups, answers)


@pytest.mark.parametrize(
    ("sizes", "curves"),
    [
        ([(9, 1), (10, 1)], []),
        ([(9, 1), (40, 1)], ["tokens"]),
        ([(9, 1), (10, 2)], ["chunks"]),
        ([(9, 1), (40, 2), (90, 3)], ["tokens", "chunks"]),
    ],
)
def test_curves_are_drawn_where_sizes_differ(
    tmp_path: Path, drawn: list[Figure], sizes: list[tuple[int, int]], curves: list[str]
) -> None:
    result = evaluation(sizes)
    draw_figure(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    bars, *others = drawn[0].axes
    heights = [bar.get_height() for bar in bars.patches]
    expected = [
        value.value for score in result.scores.values() for value in (score.exact, score.f1, score.rouge_l)
    ]  # a condition after the other
    assert heights == pytest.approx(expected)
    assert len(bars.get_legend_handles_labels()[1]) == len(CONDITIONS)
    names = [axes.get_xlabel().split(" ")[0] for axes in others]
    assert names == curves * 2
    assert [axes.get_ylabel() for axes in others] == ["exact match"] * len(curves) + ["token F1"] * len(curves)
    for axes, name in zip(others, names, strict=True):
        groups = result.by_length if name == "tokens" else result.by_chunks
        assert len(axes.lines) >= len(CONDITIONS)
        metric = "exact" if axes.get_ylabel() == "exact match" else "f1"
        values = [getattr(group.scores["document"], metric).value for group in groups]
        assert list(axes.lines[0].get_ydata()) == pytest.approx(values)


def test_the_same_evaluation_gives_the_same_figure(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_figure(evaluation([(9, 1), (40, 2)]), tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert b"<svg" in first


def test_no_window_system_is_used(tmp_path: Path) -> None:
    backend = matplotlib.rcParams._get("backend")
    draw_figure(evaluation([(9, 1), (40, 2)]), tmp_path / "a.png")
    assert matplotlib.rcParams._get("backend") is backend
    code = "import sys, d2l.evaluation.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_error_bars_reach_from_the_lower_to_the_upper_bound() -> None:
    below, above = _error_lengths([Estimate(0.5, low=0.25, high=0.625), Estimate(1.0, low=1.0, high=1.0)])
    assert (below, above) == ([0.25, 0.0], [0.125, 0.0])  # the order of matplotlib's yerr
