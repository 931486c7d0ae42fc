"""Curriculum: the end of a stage, its rows, and its stage after resuming."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.tiny_model import random_rows, run_config, tiny_model

from d2l.build import load_records
from d2l.checkpoint import load_checkpoint, save_checkpoint
from d2l.config.schema import CurriculumStage, RunConfig
from d2l.data.epochs import stage_rows
from d2l.train.curriculum import EMA_DECAY, Curriculum
from d2l.train.loop import Trainer

STAGES = (
    CurriculumStage(pairs=1, digits=1, passing=0.5),
    CurriculumStage(pairs=2, digits=1, passing=0.9, documents=3),
    CurriculumStage(pairs=2, digits=2),
)
OF_STAGE = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2)  # of each record
NEEDLES: dict[str, Any] = {"train_ds_names": ["needle"], "needle_documents": 4, "curriculum": STAGES}


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=80))
def test_a_stage_ends_when_the_weighted_mean_of_its_steps_passes(matches: list[float]) -> None:
    curriculum, stage, since = Curriculum(STAGES), 0, []
    for match in matches:
        since.append(match)
        mean = sum((1 - EMA_DECAY) * EMA_DECAY**age * seen for age, seen in enumerate(reversed(since)))
        passed = stage < 2 and mean >= (0.5, 0.9)[stage]
        if abs(mean - (0.5, 0.9, 2)[stage]) < 1e-9:
            return  # on the very border, where rounding decides
        assert curriculum.observe(match) == passed
        if passed:
            stage, since = stage + 1, []
        assert curriculum.stage == stage


def test_one_good_step_ends_no_stage_and_the_last_stage_never_ends() -> None:
    curriculum = Curriculum(STAGES)
    assert not curriculum.observe(1.0)
    assert [curriculum.observe(1.0) for _ in range(100)].count(True) == 2
    assert curriculum.stage == 2


def test_rows_belong_to_the_stage_of_their_documents() -> None:
    config = RunConfig(**NEEDLES, needle_style="pairs")
    records = load_records(config)
    assert [len(record.prompts) for record in records] == [1] * 4 + [2] * 7
    assert [len(record.responses[0].split()) for record in records] == [2] * 7 + [3] * 4
    rows = [row for record in range(11) for row in [replace(random_rows()[0], record=record)] * (1 + record % 2)]
    ranges = stage_rows(config, rows)
    assert [{OF_STAGE[rows[place].record] for place in stage} for stage in ranges] == [{0}, {1}, {2}]
    assert [place for stage in ranges for place in stage] == list(range(len(rows)))


def test_without_a_curriculum_every_row_is_of_the_only_stage() -> None:
    assert stage_rows(RunConfig(), random_rows()) == [range(len(random_rows()))]


def staged_trainer() -> Trainer:
    config = run_config(**NEEDLES, gradient_accumulation_steps=1, max_packed_inp_len=12, max_packed_ctx_len=20)
    rows = [replace(row, record=number) for number, row in enumerate((random_rows() * 3)[:11])]
    return Trainer(tiny_model(config), rows, config)


def seen_records(trainer: Trainer, steps: int) -> list[set[int]]:
    seen: list[set[int]] = []
    take = trainer._next_batches

    def watched() -> Any:
        batches = take()
        seen.append({record for batch in batches for record in batch.record_ids})
        return batches

    trainer._next_batches = watched  # type: ignore[method-assign]
    for _ in range(steps):
        trainer.step()
    return seen


def test_training_draws_from_the_stage_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step passes its stage, whatever was answered."""
    trainer = staged_trainer()
    steps = iter(range(100))
    observe = trainer.curriculum.observe
    monkeypatch.setattr(trainer.curriculum, "observe", lambda _: observe(10.0 if next(steps) % 2 else 0.0))
    stages = [{OF_STAGE[record] for record in records} for records in seen_records(trainer, 6)]
    assert stages == [{0}, {0}, {1}, {1}, {2}, {2}]


def test_a_resumed_run_continues_in_its_stage(tmp_path: Path) -> None:
    unbroken, stopped, resumed = staged_trainer(), staged_trainer(), staged_trainer()
    for trainer in (unbroken, stopped):
        trainer.curriculum.average = 1.0  # so that the next step passes the first stage
        trainer.step()
        trainer.curriculum.average = 0.25
    save_checkpoint(tmp_path / "step", stopped.checkpoint())
    resumed.restore(load_checkpoint(tmp_path / "step"))
    assert resumed.curriculum.state() == {"stage": 1, "average": 0.25}
    assert seen_records(resumed, 3) == seen_records(unbroken, 3)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"train_ds_names": ["needle", "more.jsonl"]}, "needs train_ds_names"),
        ({"max_train_samples_per_ds": 3}, "remove max_train_samples_per_ds"),
        ({"curriculum": [{"pairs": 1, "digits": 5}]}, "less than or equal to 4"),
        ({"curriculum": [{"pairs": 1, "digits": 1, "passing": 0}]}, "greater than 0"),
        (
            {"curriculum": [{"pairs": 1, "digits": 1, "filler_words": 3, "min_filler_words": 4}]},
            "above filler_words",
        ),
    ],
)
def test_invalid_stages_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        RunConfig(**NEEDLES | values)
