"""TCH301 on configurations of several kinds, and on a teacher of ours that is broken where its parts meet."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_run import tiny_config

from checks.faults import override
from checks.production import make_subject
from checks.result import Outcome
from checks.rules import RULES
from checks.runner import run_checks
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.train import teacher


def judged(config: RunConfig) -> Outcome:
    (outcome,) = run_checks(make_subject(config), RULES, select=("TCH301",)).outcomes
    return outcome


@pytest.mark.parametrize("attention", ["eager", "per_document", "packed_flex"])
@pytest.mark.parametrize("supervision", ["content", "sampled"])
def test_every_attention_and_supervision_is_green(attention: str, supervision: str) -> None:
    outcome = judged(tiny_config(attn_implementation=attention, supervision=supervision))
    assert outcome.outcome == "pass", outcome
    assert outcome.evidence["apart"] < 5e-5


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-0.6B", "gemma-2-2b", "Mistral-7B-v0.3"])
def test_other_families_are_green(name: str) -> None:
    overrides = {
        "model_name_or_path": f"tests/published/{name}.json",
        "train_ds_names": "[needle]",
        "needle_documents": "8",
    }
    config = load_config(None, overrides, tokenizer="configs/models/tiny_gpt_oss")
    outcome = judged(config)
    assert outcome.outcome == "pass", outcome


def _one_place_late(monkeypatch: pytest.MonkeyPatch) -> None:
    places = teacher.PackedBatch.prediction_positions
    monkeypatch.setattr(teacher.PackedBatch, "prediction_positions", property(lambda self: places.fget(self) + 1))


def _packed_questions_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "packed_masks", lambda base, positions: None)


def _of_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.log_softmax
    monkeypatch.setattr(
        torch, "log_softmax", lambda x, dim: whole(x.bfloat16() if x.dtype == torch.float32 else x, dim)
    )


def _counted_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    real = teacher._compute_top_k

    def compute(*arguments: Any) -> list[teacher.TopK]:
        return real(*arguments)[::-1]

    monkeypatch.setattr(teacher, "_compute_top_k", compute)


@pytest.mark.parametrize(
    "damage", [_one_place_late, _packed_questions_see_each_other, _of_half_precision, _counted_wrongly]
)
def test_a_broken_teacher_is_red(damage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch)
    assert judged(tiny_config(attn_implementation="eager")).outcome == "fail"


@pytest.mark.parametrize("ids", [[-1, -2, -3, -4], [10**6, 1, 2, 3], [7, 7, 7, 7], None])
def test_ids_of_no_token_or_of_one_twice_are_a_finding(ids: list[int] | None) -> None:
    """Another implementation's: such a table is no crash of the check."""

    def of(healthy: Any, base: Any, chat: Any, records: Any, top_k: int) -> list[Any]:
        found = healthy.teacher(base, chat, records, top_k)
        tables = [[[ids for _ in table] for table in it.logprobs_indices] for it in found]
        return [
            replace(it, logprobs_indices=None if ids is None else table)
            for it, table in zip(found, tables, strict=True)
        ]

    spoilt = override(teacher=of)(make_subject(tiny_config()))
    (outcome,) = run_checks(spoilt, RULES, select=("TCH301",)).outcomes
    assert outcome.outcome == "fail"
    assert "another number of tokens, or no numbers" in (outcome.actual or "")


def test_without_data_there_is_nothing_to_ask() -> None:
    outcome = judged(load_config(Path("configs/gpt_oss_20b.yaml"), tokenizer="configs/models/tiny_gpt_oss"))
    assert outcome.outcome == "skip"
