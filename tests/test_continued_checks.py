"""Checks of what a run leaves behind: SAV201 and SAV204 where it goes on, EXP203 where a document is read with it."""

import math
from typing import Any

import pytest
import torch

from checks.faults import override
from checks.implementation import Implementation
from checks.production import make_subject
from checks.rules import RULES
from checks.rules.internalized_otherwise import _distance_from_nearest
from checks.runner import run_checks
from checks.subject import Subject
from d2l.config.load import load_config
from d2l.errors import CheckpointError
from d2l.io.resources import resource


def subject(**values: Any) -> Subject:
    return make_subject(load_config(resource("configs/tiny_gpt_oss.yaml")).model_copy(update=values))


@pytest.mark.parametrize(
    "values",
    [
        {"lora_r": 31, "warmup_steps": 31},
        {"save_steps": 31, "save_total_limit": 31},
        {"max_grad_norm": 1e30, "weight_decay": 1e20, "seed": 2**32 - 1},  # to which nothing can be added
    ],
)
def test_runs_of_any_numbers_are_told_from_others(values: dict[str, float]) -> None:
    (outcome,) = run_checks(subject(**values), RULES, select=("SAV204",)).outcomes
    assert outcome.outcome == "pass"


def test_what_compares_nothing_is_red_for_every_difference() -> None:
    planted = override(changes=lambda healthy, then, now: ())(subject())
    (outcome,) = run_checks(planted, RULES, select=("SAV204",)).outcomes
    named = outcome.evidence["named"]
    alike = {"nothing", "save_steps", "save_total_limit", "logging_steps", "twice the processes, each with half"}
    assert outcome.outcome == "fail"
    assert {line.split(": ")[0] for line in outcome.actual.split("; ")} == named.keys() - alike


def test_a_checkpoint_that_is_written_at_once_alone_is_enough() -> None:
    def trainer(healthy: Implementation, *arguments: Any) -> Any:
        run = healthy.trainer(*arguments)

        class AtOnce:
            model, step, save, resume = run.model, run.step, run.save, run.resume

        return AtOnce

    (outcome,) = run_checks(override(trainer=trainer)(subject()), RULES, select=("SAV201",)).outcomes
    assert outcome.outcome == "pass"


def test_a_checkpoint_that_cannot_be_read_is_called_so() -> None:
    def internalize(*_: Any, **__: Any) -> None:
        raise CheckpointError("hypernet.safetensors: A.q_proj is missing\nand more")

    (outcome,) = run_checks(override(internalize=internalize)(subject()), RULES, select=("EXP203",)).outcomes
    assert (outcome.outcome, outcome.message) == ("fail", "a saved run internalizes no document")
    assert outcome.actual == "hypernet.safetensors: A.q_proj is missing"


@pytest.mark.parametrize(
    ("values", "distance"),
    [
        ((3.0, 2.0, 0.0), 0.0),  # Eckart and Young: the nearest of rank two leaves out the least value
        ((3.0, 0.0, 1.0), (2 - 1) / 14**0.5),
        ((3.0, 2.5, 0.0), (1.25**0.5 - 1) / 14**0.5),
        ((3.0, 2.0, 1.0), math.inf),  # of rank three
    ],
)
def test_the_distance_from_the_nearest_update_of_rank_two(values: tuple[float, ...], distance: float) -> None:
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    expected, found = (turn @ torch.tensor(diagonal).diag() for diagonal in ((3.0, 2.0, 1.0), values))
    assert _distance_from_nearest({"q": found}, {"q": expected}) == pytest.approx(distance, abs=1e-6)
