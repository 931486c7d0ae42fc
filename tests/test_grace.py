"""What a save takes against the time between a signal and the kill (DSK402): the reckoning, and that nothing is left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import make_run, tiny_config

from checks.faults import override
from checks.machine import save_seconds
from checks.production import make_subject
from checks.result import Outcome
from checks.rules import RULES
from checks.rules.save_outlasts_grace import MOST_TIMES, SAMPLE
from checks.runner import run_checks
from d2l.config.schema import RunConfig
from d2l.io.run_folder import step_folder


def judged(measure: Callable[[int], float], **values: Any) -> Outcome:
    """Judge a run on a disk of that speed."""
    subject = make_subject(tiny_config(**values), with_data=False)
    injected = override(save_seconds=lambda healthy, config, size: measure(size))(subject)
    (outcome,) = run_checks(injected, RULES, select=("DSK402",)).outcomes
    return outcome


def test_the_size_is_that_of_a_real_checkpoint(tmp_path: Path) -> None:
    folder = step_folder(make_run(tmp_path), 1)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    reckoned = judged(lambda size: 0.0).evidence["checkpoint"]
    assert written == pytest.approx(reckoned, rel=0.05)  # headers, counts of steps and the random state come on top
    assert reckoned < written


@pytest.mark.parametrize(("grace", "expected"), [(2.001, "pass"), (1.999, "warn")])
def test_two_saves_have_to_end_in_time(grace: float, expected: str) -> None:
    """A disk that takes 0.25 s for each file's names, and the rest of a second for this run's bytes."""
    size = judged(lambda size: 0.0).evidence["checkpoint"]
    outcome = judged(lambda amount: 0.25 + 0.75 * amount / size, grace_seconds=grace)
    assert outcome.outcome == expected
    assert outcome.evidence["save_seconds"] == pytest.approx(1.0)
    assert ("killed before it has saved" in outcome.message) == (expected == "warn")
    assert "the step that runs, which is not measured" in (outcome.actual or outcome.message)


def test_the_quickest_of_several_counts() -> None:
    size = judged(lambda size: 0.0).evidence["checkpoint"]
    delays = iter([9.0, 9.0, 0.1, 9.0, 9.0, 0.0])  # an empty one and one of some megabytes, in turns
    outcome = judged(lambda amount: 0.5 + amount / size + next(delays))
    assert outcome.evidence["save_seconds"] == pytest.approx(0.6 + (SAMPLE / size - 0.1) * size / SAMPLE)


def test_a_save_is_called_slow_only_after_more_tries() -> None:
    """Other work on the machine: a warning that comes once in nine runs is one that nobody reads."""
    tries = [0]

    def measure(amount: int, quick_at: int) -> float:
        tries[0] += 1
        return 1.0 if tries[0] >= quick_at else 100.0

    assert judged(lambda amount: measure(amount, 15)).outcome == "pass"
    tries[0] = 0
    assert judged(lambda amount: measure(amount, 1000)).outcome == "warn"
    assert tries[0] == 2 * MOST_TIMES


def test_where_nothing_can_be_written_it_is_skipped_with_the_reason() -> None:
    def refuse(size: int) -> float:
        raise OSError(30, "Read-only file system")

    outcome = judged(refuse, output_dir="somewhere/runs")
    assert (outcome.outcome, outcome.message) == (
        "skip",
        "nothing can be written below somewhere/runs: Read-only file system",
    )


@pytest.mark.parametrize("output", [".", "run", "absent/run"])
def test_what_is_measured_is_a_save_beside_or_in_the_runs_folder_and_leaves_nothing(
    tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    saved: list[tuple[Path, int]] = []
    monkeypatch.setattr(
        "checks.machine.save_checkpoint",
        lambda folder, checkpoint: saved.append((folder, sum(it.nbytes for it in checkpoint.hypernet.values()))),
    )
    config = RunConfig(output_dir=str(tmp_path / output))
    before = sorted(tmp_path.rglob("*"))
    assert save_seconds(config, 4096) >= 0
    ((folder, size),) = saved
    place = tmp_path / output if output != "absent/run" else tmp_path
    assert folder.parent.parent == place
    assert size == 4096
    monkeypatch.undo()
    assert save_seconds(config, 4096) > 0
    assert sorted(tmp_path.rglob("*")) == before
