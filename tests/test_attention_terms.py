"""What ATT205 says of attention that leaves out a term of the model's own: soft caps, sinks, the size of the scores."""

from typing import Any

import pytest
from torch import nn
from transformers import Gemma2PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from checks.faults import override
from checks.production import make_subject
from checks.result import Outcome
from checks.rules import RULES
from checks.runner import run_checks
from checks.subject import Subject
from d2l.config.load import load_config


def judged(subject: Subject) -> Outcome:
    (outcome,) = run_checks(subject, RULES, select=("ATT205",)).outcomes
    return outcome


def of_base(name: str, **values: str) -> Subject:
    overrides = {"model_name_or_path": f"tests/published/{name}.json", **values}
    return make_subject(load_config(None, overrides, tokenizer="configs/models/tiny_gpt_oss"), with_data=False)


def test_soft_caps_that_sdpa_ignores_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers 5.13, which offers SDPA for Gemma 2 and drops the caps."""
    assert judged(of_base("gemma-2-2b")).outcome == "pass"
    sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def uncapped(*arguments: Any, softcap: float | None = None, **named: Any) -> Any:
        assert softcap is not None
        return sdpa(*arguments, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", uncapped)
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    outcome = judged(of_base("gemma-2-2b", attn_implementation="sdpa"))
    assert (outcome.outcome, outcome.evidence["attention"]) == ("fail", "sdpa")
    assert outcome.evidence["apart"] > 0.05


@pytest.mark.parametrize("attention", ["eager", "per_document", "packed_flex"])
def test_sinks_that_are_lost_are_red(attention: str) -> None:
    subject = of_base("gpt-oss-20b", attn_implementation=attention)
    assert judged(subject).outcome == "pass"

    def build(healthy: Any, base: nn.Module, config: Any) -> Any:
        for name, sinks in base.named_parameters():
            if name.endswith(".sinks"):
                sinks.data.fill_(-1e4)
        return healthy.build(base, config)

    assert judged(override(build=build)(subject)).found_fault
