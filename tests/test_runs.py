"""`d2l status` and `d2l plot`: what a run's folder tells, at every moment and of every version, and never a traceback."""

import fcntl
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.run_folders import make_folder, step_line
from typer.testing import CliRunner, Result

import cli
from d2l.evaluation.curves import MOST_POINTS, PALETTE, PANELS, _draw_panel, smooth, thin
from d2l.io.run_folder import EVALUATIONS
from d2l.train.events import FAILED, STOPPED, note_event, read_events
from d2l.train.history import RunHistory, read_history, read_metrics, series, speeds

OLD = Path(__file__).parent / "fixtures" / "version_0_1_0" / "run"


def d2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments)], prog_name="d2l")


def facts(*places: Path) -> list[dict[str, Any]]:
    result = d2l("status", *places, "--format", "json")
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def written_ago(folder: Path, seconds: float) -> None:
    """Set the time of the last write of every file."""
    then = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


# Status


def test_a_line_for_each_run_and_a_folder_of_runs_is_taken(tmp_path: Path) -> None:
    make_folder(tmp_path / "runs" / "b", steps=10, checkpoints=(8, 10))
    make_folder(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "notes.txt").touch()
    (tmp_path / "runs" / "data").mkdir()
    written_ago(tmp_path / "runs", 7200)
    header, first, second = d2l("status", tmp_path / "runs").stdout.splitlines()
    assert header.split() == ["run", "step", "loss", "held-out", "tokens/s", "eta", "checkpoint", "written", "state"]
    assert first.split() == [
        *(str(tmp_path / "runs" / "a"), "6/10", "1.333", "-", "1k", "-", "step-000004", "2:00:00", "ago", "died?")
    ]
    assert second.split()[1:] == ["10/10", "0.8", "-", "1k", "-", "step-000010", "2:00:00", "ago", "done"]
    assert d2l("status", tmp_path / "runs" / "a", tmp_path / "runs").stdout.count("6/10") == 1


def test_json_has_numbers_and_none_where_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run, empty = facts(make_folder(tmp_path / "run"), tmp_path / "empty")
    assert run | {"written_seconds_ago": 0} == {
        "run": str(tmp_path / "run"),
        "state": "running?",
        "step": 6,
        "max_steps": 10,
        "loss": 8 / 6,
        "heldout_loss": None,
        "tokens_per_second": 1000,
        "eta_seconds": 4,
        "checkpoint": str(tmp_path / "run" / "checkpoints" / "step-000004"),
        "written_seconds_ago": 0,
        "damaged_lines": 0,
        "first_step": None,
    }
    assert 0 <= run["written_seconds_ago"] < 60
    assert empty == dict.fromkeys(run) | {
        "run": str(tmp_path / "empty"),
        "state": "empty",
        "step": 0,
        "damaged_lines": 0,
    }


def test_the_newest_held_out_loss_is_told(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    lines = [{"step": 2, "document_ce_loss": 3.5}, {"step": 4, "document_ce_loss": 2.25}]
    (folder / EVALUATIONS).write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 6, "docu')
    assert facts(folder)[0]["heldout_loss"] == 2.25
    assert d2l("status", folder).stdout.splitlines()[1].split()[3] == "2.25"


def test_a_run_that_was_asked_to_stop_has_stopped_at_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    note_event(folder, "resumed from step 4")
    written_ago(folder, 5)
    assert facts(folder)[0]["state"] == "running?"
    note_event(folder, f"{STOPPED} 6 by SIGINT")
    assert facts(folder)[0]["state"] == "stopped"
    note_event(folder, "resumed from step 6")
    assert facts(folder)[0]["state"] == "running?"
    note_event(folder, f"{FAILED} 7: RuntimeError: out of memory")
    assert facts(folder)[0]["state"] == "died"


@pytest.mark.parametrize(
    ("made", "seconds", "state"),
    [
        ({"steps": 10, "checkpoints": (8, 10)}, 5, "done"),
        ({"steps": 10, "checkpoints": (8,)}, 5, "running?"),  # the last save is under way
        ({}, 5, "running?"),
        ({}, 70, "died?"),
        ({"lines": [step_line(step, seconds=30.0) for step in (1, 2, 3)]}, 250, "running?"),  # within ten steps
        ({"lines": [step_line(step, seconds=30.0) for step in (1, 2, 3)], "checkpoints": (0,)}, 310, "died?"),
        ({"steps": 6, "checkpoints": (4, 6)}, 70, "stopped"),  # it saved where it stopped
        ({"steps": 0, "checkpoints": ()}, 70, "died?"),
        ({}, -500, "running?"),  # a clock that has jumped back
    ],
)
def test_the_state_without_a_lock(tmp_path: Path, made: dict[str, Any], seconds: float, state: str) -> None:
    folder = make_folder(tmp_path / "run", **made)
    written_ago(folder, seconds)
    (run,) = facts(folder)
    assert run["state"] == state
    assert (run["eta_seconds"] is not None) == (state == "running?")
    assert run["written_seconds_ago"] >= 0


def test_a_lock_tells_who_lives(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    lock = folder / ".lock"
    lock.write_text("{}")
    written_ago(folder, 9000)
    with lock.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert facts(folder)[0]["state"] == "running"
        assert "running" in d2l("status", folder).stdout
    written_ago(folder, 1)
    assert facts(folder)[0]["state"] == "died"
    lock.unlink()
    (folder / "autopsy").mkdir()
    assert facts(folder)[0]["state"] == "stopped"


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1, "ce_loss": 2.0}\n{"step": 2, "ce_lo',
        '{"step": 1, "ce_loss": 2.0}\nnull\n\n',
        '{"step": 1, "ce_loss": 2.0}\n\x00\x00\x00',
        '{"step": 1, "ce_loss": 2.0}\n{"step": "two"}\n',
        '{"step": 1, "ce_loss": 2.0}\n{"step": NaN}\n',
    ],
)
def test_a_torn_line_is_counted_and_skipped(tmp_path: Path, text: str) -> None:
    folder = make_folder(tmp_path / "run", checkpoints=())
    (folder / "metrics.jsonl").write_text(text)
    (run,) = facts(folder)
    assert (run["step"], run["loss"], run["damaged_lines"]) == (1, 2.0, 1)
    assert run["tokens_per_second"] is None
    assert d2l("plot", folder, "-o", tmp_path / "a.svg").exit_code == 0


def test_a_damaged_folder_is_no_crash(tmp_path: Path) -> None:
    generator = random.Random(0)
    for number in range(12):
        folder = make_folder(tmp_path / str(number))
        (folder / "preflight.json").write_text('{"outcomes": [1], "judged": 3}')
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            content = bytearray(path.read_bytes())
            if generator.random() < 0.5:
                content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(bytes(content[: generator.randrange(len(content) + 1)]))
    for name, text in (("list", "[1, 2]"), ("deep", "[" * 100_000), ("binary", "\x00\x01")):
        folder = make_folder(tmp_path / name)
        for file in ("config.yaml", "preflight.json", "metrics.jsonl", "run.json", "events.jsonl"):
            (folder / file).write_text(text)
    assert len(facts(tmp_path)) == 15


def test_steps_are_numbers_and_what_is_no_step_is_no_checkpoint(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", checkpoints=(999_999, 1_000_000), max_steps=2_000_000)
    for name in ("step-best", ".step-000001.partial-7"):
        (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / name / "manifest.json").touch()
    (folder / "checkpoints" / "step-1000001").mkdir()  # half written: no manifest
    (run,) = facts(folder)
    assert run["checkpoint"] == str(folder / "checkpoints" / "step-1000000")
    assert run["step"] == 1_000_000


def test_what_is_no_run_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").touch()
    for place, words in ((tmp_path / "absent", "is no folder"), (tmp_path / "data", "expected config.yaml")):
        result = d2l("status", place)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr
    assert d2l("status").exit_code == 2


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    (run,) = facts(OLD)
    assert (run["state"], run["step"], run["max_steps"]) == ("done", 2, 2)
    assert run["tokens_per_second"] == pytest.approx(571 / 0.15888727499998367)  # there was no such key
    assert d2l("plot", OLD, "-o", tmp_path / "old.svg").exit_code == 0


def test_the_end_of_long_metrics_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(step_line(step))}\n" for step in range(1, 3001)))
    whole, tail = read_metrics(path)[0], read_metrics(path, 2**16)
    assert len(whole) == 3000
    assert tail[1] == 0, "the line that is cut is not damaged"
    assert tail[0] == whole[-len(tail[0]) :]
    assert 100 < len(tail[0]) < 1000


def test_of_a_step_that_was_taken_twice_the_later_one_counts(tmp_path: Path) -> None:
    lines = [step_line(step, ce_loss=loss) for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0), (3, 5.0))]
    history = read_history(make_folder(tmp_path / "run", lines=lines))
    assert series(history.records, ["ce_loss"]) == [(1, 9.0), (2, 6.0), (3, 5.0)]


def test_events_are_told_by_time(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    (folder / "checkpoints" / "superseded-step-000006").mkdir()
    os.utime(folder / "checkpoints" / "superseded-step-000006", (100, 100))
    (folder / "autopsy-2").mkdir()
    os.utime(folder / "autopsy-2", (50, 50))
    note_event(folder, "resumed after step 4")
    changes = [{"step": 4, "field": "learning_rate", "was": 0.1, "now": 0.2, "reason": "too slow"}, "torn"]
    (folder / "run.json").write_text(json.dumps({"id": "x", "changes": changes}))
    events = read_events(folder)
    assert [event.time for event in events][:3] == [None, 50, 100]
    assert [event.text for event in events] == [
        "resumed after step 4 with another learning_rate: 0.1 → 0.2 (too slow)",
        "stopped on a value that is not finite: autopsy-2",
        "step-000006 was saved, and superseded: the run went on from an earlier checkpoint",
        "resumed after step 4",
    ]
    assert time.time() - (events[-1].time or 0) < 60


# Plot


def test_runs_lie_over_each_other_raw_and_smoothed(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make_folder(tmp_path / name, steps=steps) for name, steps in (("a", 6), ("b", 3))]
    result = d2l("plot", *runs, "-o", tmp_path / "c.svg")
    assert (result.exit_code, result.stdout) == (0, f"curves  {tmp_path / 'c.svg'}\n")
    ElementTree.parse(tmp_path / "c.svg")
    panels = {axes.get_title(): axes.lines for axes in drawn[0].axes}
    assert list(panels) == ["loss (nats)", "gradient norm", "learning rate", "tokens a second"]
    raw, smoothed, *other = panels["loss (nats)"]
    assert list(raw.get_xdata()) == list(smoothed.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(raw.get_ydata()) == [8 / step for step in range(1, 7)]
    assert raw.get_alpha() < 1
    assert smoothed.get_alpha() is None
    assert list(smoothed.get_ydata()) != list(raw.get_ydata())
    assert list(other[0].get_xdata()) == [1, 2, 3]
    assert raw.get_color() == smoothed.get_color() != other[0].get_color()
    assert len(panels["learning rate"]) == 2  # it is exact: nothing is smoothed
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]


def test_the_loss_of_held_out_documents_is_drawn_where_there_is_one(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make_folder(tmp_path / name) for name in ("a", "b")]
    evaluations = [{"step": step, "document_ce_loss": 2.0 / step, "other_ce_loss": 3.0} for step in (1, 2)]
    (runs[1] / "evaluation.jsonl").write_text("".join(f"{json.dumps(it)}\n" for it in evaluations))
    assert d2l("plot", *runs, "-o", tmp_path / "c.svg").exit_code == 0
    (line,) = {axes.get_title(): axes.lines for axes in drawn[0].axes}["held-out loss (nats)"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [2.0, 1.0])


def test_nothing_is_written_over_and_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    for name in ("a.svg", "b.svg", "a.PNG"):
        assert d2l("plot", run, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "a.svg").read_bytes()
    again = d2l("plot", run, "-o", tmp_path / "a.svg")
    assert (again.exit_code, "never written over" in again.stderr) == (2, True)
    assert (tmp_path / "a.svg").read_bytes() == before
    assert "expected a name that ends in .svg or .png, found .pdf" in d2l("plot", run, "-o", tmp_path / "a.pdf").stderr


def test_a_run_before_its_first_step_has_nothing_to_draw(tmp_path: Path) -> None:
    result = d2l("plot", make_folder(tmp_path / "run", lines=[]), "-o", tmp_path / "a.svg")
    assert result.exit_code == 2
    assert "expected steps to draw, found none" in result.stderr
    assert not (tmp_path / "a.svg").exists()


def test_values_that_are_not_finite_or_absent_are_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = [
        step_line(1),
        step_line(2, ce_loss=float("nan")),
        step_line(3, grad_norm=None),
        {"step": 4, "kl_loss": 2.0},
    ]
    assert d2l("plot", make_folder(tmp_path / "run", lines=lines), "-o", tmp_path / "a.svg").exit_code == 0
    panels = {axes.get_title(): axes.lines[0] for axes in drawn[0].axes}
    assert list(panels["loss (nats)"].get_xdata()) == [1, 3, 4]
    assert list(panels["gradient norm"].get_xdata()) == [1, 2]


def test_smoothing_is_the_weighted_mean_of_what_came_before() -> None:
    values = np.array([3.0, -1.0, 4.0, 1.0, -5.0])
    keep = 1 - 1 / 4
    expected = []
    for place in range(len(values)):
        weights = [keep ** (place - before) for before in range(place + 1)]
        expected.append(sum(weight * value for weight, value in zip(weights, values, strict=False)) / sum(weights))
    np.testing.assert_allclose(smooth(values, 4), expected, rtol=1e-12)
    np.testing.assert_allclose(smooth(values, 1), values, rtol=1e-12)


def test_few_points_are_kept_of_a_long_line_and_no_spike_is_lost() -> None:
    values = np.sin(np.arange(50_000) / 1000)
    values[12_345], values[40_001] = 99, -99
    steps, kept = thin(np.arange(50_000), values)
    assert len(steps) <= MOST_POINTS
    assert (kept.max(), kept.min()) == (99, -99)
    assert (kept == values[steps]).all()
    assert (np.diff(steps) > 0).all()
    assert thin(np.arange(9), values[:9])[0].tolist() == list(range(9))


def test_speeds_of_lines_without_one_follow_from_tokens_and_seconds() -> None:
    lines = [{"step": 1, "tokens": 10, "seconds": 4}, {"step": 2, "tokens_per_second": 7.0}, {"step": 3, "tokens": 1}]
    assert speeds(lines) == [(1, 2.5), (2, 7.0)]


def test_a_history_is_read_while_its_folder_goes_away(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    shutil.rmtree(folder)
    history = read_history(folder)
    assert isinstance(history, RunHistory)
    assert (history.step, history.state(0.0)) == (0, "empty")


def test_a_run_has_its_colour_in_every_panel() -> None:
    """Also behind one that lacks the panel."""
    axes = Figure().add_subplot()
    _draw_panel(axes, PANELS[0], [[], [(1, 2.0), (2, 1.0)]], "black")
    assert {line.get_color() for line in axes.get_lines()} == {PALETTE[1]}


def test_a_page_takes_what_no_file_can_hold(tmp_path: Path) -> None:
    """Half of a pair of UTF-16, which JSON can name: as in the path of a file."""
    run = make_folder(tmp_path / "run")
    (run / "events.jsonl").write_text('{"time": 5, "text": "resumed from \\ud800"}\n', encoding="utf-8")
    result = d2l("report", run, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "resumed from \\ud800" in (tmp_path / "page.html").read_text(encoding="utf-8")
