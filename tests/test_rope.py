"""Formulas of rotary positions against transformers' own functions, and what the check makes of a base's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CohereConfig, GlmConfig, GptOssConfig, LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from checks.oracles.rope import attention_factor, frequencies
from checks.production import make_subject
from checks.rules import RULES
from checks.runner import run_checks
from d2l.config.schema import RunConfig

YARN = {"rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("head_size", [16, 64, 128])
@pytest.mark.parametrize(
    "values",
    [
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0, "high_freq_factor": 2.5},
        YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},  # gpt-oss
        YARN,
        YARN | {"factor": 1.0},
        YARN | {"beta_fast": 16, "attention_factor": 1.25, "original_max_position_embeddings": 64},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    ],
)
def test_the_formulas_are_those_that_transformers_computes(values: dict[str, Any], head_size: int) -> None:
    config = LlamaConfig(
        hidden_size=2 * head_size,
        num_attention_heads=2,
        head_dim=head_size,
        max_position_embeddings=131_072,
        rope_parameters=values,
    )
    expected, factor = ROPE_INIT_FUNCTIONS[values["rope_type"]](config, "cpu")
    torch.testing.assert_close(frequencies(values, head_size).float(), expected, rtol=3e-5, atol=0)
    assert attention_factor(values) == pytest.approx(factor, rel=1e-6)


def test_plain_positions_turn_by_the_first_paper_formula() -> None:
    assert frequencies({"rope_theta": 10_000.0}, 4).tolist() == pytest.approx([1.0, 0.01])
    assert frequencies({"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}, 8).tolist() == pytest.approx([1.0, 0.01])
    with pytest.raises(ValueError, match="no formula for rope_type longrope"):
        frequencies({"rope_type": "longrope", "rope_theta": 1e4}, 4)


@pytest.mark.parametrize(
    ("rope", "outcome"),
    [
        (GptOssConfig().rope_parameters, "pass"),
        ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}, "inapplicable"),
    ],
)
def test_a_base_is_judged_where_there_is_a_formula(rope: dict[str, Any], outcome: str) -> None:
    subject = make_subject(RunConfig())
    subject.base_config.rope_parameters = rope
    (found,) = run_checks(subject, RULES, select=("ATT203",)).outcomes
    assert found.outcome == outcome, found.message


@pytest.mark.parametrize("family", [LlamaConfig, CohereConfig, GlmConfig])
def test_cosines_may_stand_in_halves_or_beside_each_other(family: type[PreTrainedConfig]) -> None:
    subject = replace(make_subject(RunConfig()), base_config=family())
    (found,) = run_checks(subject, RULES, select=("ATT203",)).outcomes
    assert found.outcome == "pass", found.message
