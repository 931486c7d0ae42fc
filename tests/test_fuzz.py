"""Random configurations of every base family: clean ones never turn a check red, and each planted fault always does.

`make test` draws 40 clean ones and plants every fault into one; `make fuzz` draws 200 and plants every fault into ten.
A seed is a configuration, so that a failure names the one to look at. (Hypothesis draws many examples from a few by
changing them a little: of its first 40 there were a dozen different models, and none in MXFP4.)
"""

from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
from support.families import BASES
from support.sizes import MXFP4, NO_SPECIAL_TOKENS
from transformers import PreTrainedConfig

from checks.faults import override
from checks.production import make_subject
from checks.report import plain_text
from checks.result import NotApplicable
from checks.rule import Fault, Rule
from checks.rules import RULES
from checks.runner import run_checks
from checks.subject import Subject, changed
from d2l.config.load import load_config

# Bytes enough, so that the checks of stage `device` run whatever this machine has.
CLEAN = override(free_memory=lambda healthy: 2**60, free_disk=lambda healthy, config: 2**60)(
    make_subject(load_config())
)
PLANTED = [(rule, fault) for rule in RULES for fault in rule.faults]
TARGETS = [("v_proj",), ("v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("mlp", "v_proj"), ("mlp",)]


def random_base_config(draw: Random) -> PreTrainedConfig:
    """A base of any shape, every second one GPT-OSS: depth, order of layer types, grouped heads, experts, window."""
    base = BASES[draw.choice([*["gpt_oss"] * (len(BASES) - 1), *sorted(BASES.keys() - {"gpt_oss"})])]
    layers, key_value_heads = draw.randint(2, 6), draw.choice([1, 2, 4])
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": 32 * draw.randint(2, 90),
        "intermediate_size": 32 * draw.randint(2, 90),
        "num_attention_heads": key_value_heads * draw.choice([1, 2, 4, 8]),
        "num_key_value_heads": key_value_heads,
        "head_dim": draw.choice([16, 64, 128]),
        "vocab_size": draw.randint(300, 5000),
        "attention_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if "layer_types" in base.settings:
        types = draw.choices(["sliding_attention", "full_attention"], k=layers)
        sizes |= {"layer_types": types, "sliding_window": draw.randint(4, 512)}
    if "num_local_experts" in base.settings:
        top_k = draw.randint(1, 4)
        sizes |= {"num_experts_per_tok": top_k, "num_local_experts": top_k + draw.randint(1, 28)}
        sizes |= MXFP4 if draw.random() < 0.5 else {}
    return base.config(**base.settings | NO_SPECIAL_TOKENS | sizes)


@cache
def subject(seed: int) -> Subject:
    """A run on a random base, with random settings of the hypernetwork and of the loss."""
    draw = Random(seed)
    config = changed(
        CLEAN.config,
        lora_r=draw.randint(1, 16),
        target_modules=draw.choice(TARGETS),
        ctx_encoder_type=draw.choice(["per_layer_activations", "early_exit", "concat_layers"]),
        perceiver_query_scale=draw.choice([1.0, 10.0]),
        muon_learning_rate=draw.choice([None, 1e-3]),
        attn_implementation=draw.choice(["eager", "per_document"]),
        per_layer_processing=draw.random() < 0.5,
        num_pre_head_layers=draw.randint(0, 2),
        num_self_attn_per_block=draw.randint(0, 1),
        shared_weights=draw.random() < 0.5,
        use_bias=draw.random() < 0.5,
        use_per_ctx_average_loss=draw.random() < 0.5,
        gen_lora_l1_reg_coef=draw.choice([0.0, 0.1]),
        gradient_checkpointing=draw.random() < 0.5,
        expert_weights=draw.choice(["auto", "packed", "dequantize"]),
        supervision=draw.choice(["content", "sampled"]),
    )
    return replace(CLEAN, name=f"seed {seed}", config=config, base_config=random_base_config(draw))


def described(drawn: Subject) -> str:
    """What is random about it."""
    config = {name: value for name, value in drawn.config if value != getattr(CLEAN.config, name)}
    return f"{drawn.name}: {config} on {drawn.base_config.to_diff_dict()}"


def clean_runs_are_green(seed: int) -> None:
    drawn = subject(seed)
    report = run_checks(drawn, [rule for rule in RULES if rule.stage in ("static", "twin")])
    kinds = {outcome.outcome for outcome in report.outcomes}
    assert kinds <= {"pass", "skip"}, f"{described(drawn)}\n{plain_text(report)}"


@pytest.mark.parametrize("seed", range(40))
def test_a_clean_configuration_turns_no_check_red(seed: int) -> None:
    clean_runs_are_green(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 200))
def test_a_clean_configuration_turns_no_check_red_200(seed: int) -> None:
    clean_runs_are_green(seed)


each_fault = pytest.mark.parametrize(
    ("index", "rule", "fault"),
    [pytest.param(index, *planted, id=f"{planted[0].code}-{planted[1].name}") for index, planted in enumerate(PLANTED)],
)


def turns_red(rule: Rule, fault: Fault, drawn: Subject) -> bool:
    """Plant a fault and demand that its check turns red; returns whether the fault applies to this configuration."""
    (clean,) = run_checks(drawn, [rule]).outcomes
    if clean.outcome == "skip":
        return False
    assert clean.outcome == "pass", f"{rule.code} is red without a fault: {clean.message}: {described(drawn)}"
    try:
        faulty = fault.plant(drawn)
    except NotApplicable:
        return False
    (outcome,) = run_checks(faulty, [rule]).outcomes
    assert outcome.found_fault, f"{rule.code} {fault.name}: {outcome.outcome}: {outcome.message}: {described(drawn)}"
    return True


def plant(rule: Rule, fault: Fault, first_seed: int, places: int) -> None:
    """The fault turns its check red in so many configurations, the first from that seed on to which it applies."""
    planted, draws = 0, 60 + 10 * places
    for seed in range(first_seed, first_seed + draws):
        planted += turns_red(rule, fault, subject(seed))
        if planted == places:
            return
    pytest.fail(f"{rule.code} {fault.name} applies to {planted} of {draws} random configurations, wanted {places}")


@each_fault
def test_every_planted_fault_turns_its_check_red(index: int, rule: Rule, fault: Fault) -> None:
    plant(rule, fault, first_seed=index, places=1)


@pytest.mark.slow
@each_fault
def test_every_planted_fault_turns_its_check_red_10(index: int, rule: Rule, fault: Fault) -> None:
    plant(rule, fault, first_seed=1000 + index, places=10)


def test_every_rule_has_a_fault() -> None:
    """So that the tests above speak of every rule."""
    assert {rule.code for rule, _ in PLANTED} == {rule.code for rule in RULES}
