"""Checks that need nothing but the configuration and what is installed, at their bounds."""

from typing import Any

import pytest
from packaging.requirements import Requirement

from checks import machine
from checks.faults import override
from checks.production import make_subject
from checks.result import Outcome
from checks.rules import RULES
from checks.runner import run_checks
from checks.subject import Subject
from d2l.config.schema import RunConfig


def judged(code: str, subject: Subject) -> Outcome:
    (outcome,) = run_checks(subject, RULES, select=(code,)).outcomes
    return outcome


@pytest.mark.parametrize(
    ("values", "outcome", "words"),
    [
        ({"lora_r": 8}, "pass", "rank 16 at most, to be served with --max-lora-rank 16"),
        ({"lora_r": 8, "use_bias": False}, "pass", "rank 8 at most, to be served with --max-lora-rank 8"),
        ({"lora_r": 8, "max_ctx_chunk_len": 100, "max_ctx_chunk_num": 63}, "pass", "rank 512 at most"),
        (
            {"lora_r": 8, "max_ctx_chunk_len": 100, "max_ctx_chunk_num": 64},
            "warn",
            "64 chunks has rank 520, which no server",
        ),
        (
            {"lora_r": 8, "max_ctx_chunk_len": 100, "max_ctx_len": 3_900},
            "pass",
            "served with --max-lora-rank 320",
        ),
        ({"lora_r": 8, "max_ctx_chunk_len": 100, "max_ctx_len": 6_301}, "warn", "has rank 520"),
        ({"lora_r": 8, "max_ctx_chunk_len": 100}, "pass", "adapters of up to 63 chunks"),
        ({"lora_r": 300}, "warn", "an adapter of 1 chunk has rank 600"),
    ],
)
def test_the_rank_of_the_longest_document_is_one_that_servers_load(
    values: dict[str, Any], outcome: str, words: str
) -> None:
    found = judged("EXP202", make_subject(RunConfig(**values)))
    assert (found.outcome, words in found.message) == (outcome, True), found.message


@pytest.mark.parametrize(
    ("installed", "outcome", "words"),
    [
        ({"torch>=2.11": "2.11.0", "peft>=0.18": "1.0rc1"}, "pass", "2 libraries"),
        ({"torch>=2.11": "2.10.1+cu130", "peft>=0.18": "1.0"}, "fail", "older libraries than d2l was made for: torch"),
        ({"torch>=2.11": "2.13", "peft>=0.18": ""}, "fail", "peft"),
        ({}, "skip", "no installed distribution"),
    ],
)
def test_libraries_are_as_new_as_they_have_to_be(installed: dict[str, str], outcome: str, words: str) -> None:
    subject = override(requirements=lambda healthy: installed)(make_subject(RunConfig()))
    found = judged("ENV101", subject)
    assert (found.outcome, words in found.message) == (outcome, True), found.message


def test_what_is_installed_is_what_the_package_needs() -> None:
    """No extra of it, and no marker of another platform."""
    needed = {Requirement(text).name: found for text, found in machine.requirements().items()}
    assert {"torch", "transformers", "peft", "pydantic"} <= needed.keys()
    assert not {"ruff", "mypy", "triton"} & needed.keys()
    assert needed["torch"].startswith("2.")


def test_a_checkout_that_is_not_installed_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DISTRIBUTION", "no-such-distribution")
    assert machine.requirements() == {}
