"""Random GPT-OSS configurations: clean ones never turn a check red, planted faults always do.

`make test` takes 40 of the first kind; `make fuzz` takes 200.
"""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig, PreTrainedConfig

from checks.production import make_subject
from checks.report import plain_text
from checks.result import NotApplicable
from checks.rule import Fault, Rule
from checks.rules import RULES
from checks.runner import run_checks
from checks.subject import Subject, changed
from d2l.config.load import load_config

CLEAN = make_subject(load_config())
PLANTED = [(rule, fault) for rule in RULES for fault in rule.faults]
DETERMINISTIC = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}


@st.composite
def base_configs(draw: st.DrawFn) -> PreTrainedConfig:
    """GPT-OSS of any shape: depth, order of layer types, grouped heads, experts, window, rope."""
    layers = draw(st.integers(2, 6))
    types = draw(st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=layers, max_size=layers))
    groups, key_value_heads = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4]))
    top_k = draw(st.integers(1, 4))
    return GptOssConfig(
        num_hidden_layers=layers,
        layer_types=types,
        hidden_size=32 * draw(st.integers(2, 90)),
        intermediate_size=32 * draw(st.integers(2, 90)),
        num_attention_heads=groups * key_value_heads,
        num_key_value_heads=key_value_heads,
        head_dim=draw(st.sampled_from([16, 64, 128])),
        num_local_experts=top_k + draw(st.integers(1, 28)),
        num_experts_per_tok=top_k,
        vocab_size=draw(st.integers(300, 5000)),
        sliding_window=draw(st.integers(4, 512)),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        **({"quantization_config": {"quant_method": "mxfp4"}} if draw(st.booleans()) else {}),
    )


@st.composite
def subjects(draw: st.DrawFn) -> Subject:
    """A run on a random base, with random settings of the hypernetwork and of the loss."""
    config = changed(
        CLEAN.config,
        lora_r=draw(st.integers(1, 16)),
        target_modules=draw(
            st.sampled_from(
                [
                    ("v_proj",),
                    ("v_proj", "o_proj"),
                    ("q_proj", "k_proj", "v_proj", "o_proj"),
                    ("mlp", "v_proj"),
                    ("mlp",),
                ]
            )
        ),
        ctx_encoder_type=draw(st.sampled_from(["per_layer_activations", "early_exit", "concat_layers"])),
        perceiver_query_scale=draw(st.sampled_from([1.0, 10.0])),
        muon_learning_rate=draw(st.sampled_from([None, 1e-3])),
        attn_implementation=draw(st.sampled_from(["eager", "per_document"])),
        per_layer_processing=draw(st.booleans()),
        num_pre_head_layers=draw(st.integers(0, 2)),
        num_self_attn_per_block=draw(st.integers(0, 1)),
        shared_weights=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        use_per_ctx_average_loss=draw(st.booleans()),
        gen_lora_l1_reg_coef=draw(st.sampled_from([0.0, 0.1])),
        gradient_checkpointing=draw(st.booleans()),
        expert_weights=draw(st.sampled_from(["auto", "packed", "dequantize"])),
        supervision=draw(st.sampled_from(["content", "sampled"])),
    )
    return replace(CLEAN, config=config, base_config=draw(base_configs()))


def clean_runs_are_green(subject: Subject) -> None:
    report = run_checks(subject, [rule for rule in RULES if rule.stage in ("static", "twin")])
    assert {outcome.outcome for outcome in report.outcomes} <= {"pass", "skip"}, plain_text(report)


@given(subject=subjects())
@settings(max_examples=40, **DETERMINISTIC)  # type: ignore[arg-type]
def test_clean_configurations_never_turn_red(subject: Subject) -> None:
    clean_runs_are_green(subject)


@pytest.mark.slow
@given(subject=subjects())
@settings(max_examples=200, **DETERMINISTIC)  # type: ignore[arg-type]
def test_clean_configurations_never_turn_red_200(subject: Subject) -> None:
    clean_runs_are_green(subject)


@given(subject=subjects(), planted=st.sampled_from(PLANTED))
@settings(max_examples=60, **DETERMINISTIC)  # type: ignore[arg-type]
def test_planted_faults_always_turn_red(subject: Subject, planted: tuple[Rule, Fault]) -> None:
    rule, fault = planted
    (clean,) = run_checks(subject, [rule]).outcomes
    if clean.outcome == "skip":
        return
    assert clean.outcome == "pass", clean.message
    try:
        faulty = fault.plant(subject)
    except NotApplicable:
        return
    (outcome,) = run_checks(faulty, [rule]).outcomes
    assert outcome.found_fault, f"{rule.code} {fault.name}: {outcome.outcome}: {outcome.message}"
