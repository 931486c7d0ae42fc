"""Every causal language model that transformers ships is diagnosed without a false alarm, or refused by a clear message."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.families import default_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checks import preflight
from checks.report import plain_text
from checks.result import Outcome, Report
from d2l.config.load import load_config
from d2l.errors import ModelError

# Latent attention and experts in groups; several text parts
QUICK = ("deepseek_v3", "musicgen")
WITHOUT_DEFAULTS = {"deepseek_v2", "gemma4_assistant"}  # their defaults make no model: no top-k; refused by their class
MAY_WARN = {"TGT102", "CTX101"}
TARGETS = {"axk1": "o_proj", "deepseek_v3": "o_proj", "glm4_moe_lite": "o_proj", "phi3": "o_proj", "youtu": "o_proj"}


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name not in WITHOUT_DEFAULTS
    ],
)
def test_a_family_with_its_default_config_is_judged_or_refused(model_type: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(default_config(model_type).to_dict(), default=str))
    values = {"model_name_or_path": str(config), "target_modules": [TARGETS.get(model_type, "q_proj")]}
    report = judged_or_refused(values)
    if isinstance(report, str):
        assert re.match(rf".*\b{model_type}\b", report), report
        return
    unexpected = [
        outcome.code
        for outcome in report
        if outcome.outcome not in ("pass", "skip", "inapplicable", "blocked")
        and not (outcome.outcome == "warn" and outcome.code in MAY_WARN)
        and not is_a_refusal(outcome)
    ]
    assert not unexpected, plain_text(report)


def judged_or_refused(values: dict[str, Any]) -> Report | str:
    """The report, or what the refusal says."""
    try:
        return preflight(load_config(None, values), stages=("static", "twin"))
    except ModelError as refusal:
        return str(refusal)


def is_a_refusal(outcome: Outcome) -> bool:
    """Whether a finding says that no run takes this base, or these targets of it."""
    refused = outcome.message == "the run would refuse this configuration" and outcome.evidence["error"] == "ModelError"
    return outcome.outcome == "fail" and (refused or outcome.code == "TGT101")
