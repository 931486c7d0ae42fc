"""Random configurations of every base family: clean ones never turn a check red, and each planted fault always does.

`make test` draws a clean one and plants a fault of each rule into one, but for rules of which the kill matrix plants one;
`make fuzz` draws 500 and plants every fault into ten.
A seed is a configuration, so that a failure names the one to look at. (Hypothesis draws many examples from a few by
changing them a little: of its first 40 there were a dozen different models, and none in MXFP4.)
"""

from functools import lru_cache

import pytest
from support.families import BASES
from support.random_runs import described, random_subject
from test_kill_matrix import MATRIX

from checks.report import plain_text
from checks.result import NotApplicable, NotOffered, Outcome
from checks.rule import Fault, Rule
from checks.rules import RULES
from checks.runner import run_checks
from checks.subject import Subject

PLANTED = [(rule, fault) for rule in RULES for fault in rule.faults]
FEW, MANY = 1, 500
TWIN_RULES = [rule for rule in RULES if rule.stage in ("static", "twin")]
# Warnings that say what may be unwise, not that something is broken: targets that carry little, a short schedule.
MAY_WARN = {"TGT102", "OPT101", "QNT103"}  # QNT103: on a machine whose GPU loops over experts


def clean_runs_are_green(seed: int) -> None:
    drawn = random_subject(seed)
    report = run_checks(drawn, TWIN_RULES)
    found = [
        outcome.code
        for outcome in report
        if outcome.outcome not in ("pass", "skip", "inapplicable")
        and not (outcome.outcome == "warn" and outcome.code in MAY_WARN)
    ]
    assert not found, f"{described(drawn)}\n{plain_text(report)}"


@pytest.mark.parametrize("seed", range(FEW))
def test_a_clean_configuration_turns_no_check_red(seed: int) -> None:
    clean_runs_are_green(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FEW, MANY))
def test_a_clean_configuration_turns_no_check_red_500(seed: int) -> None:
    clean_runs_are_green(seed)


def test_the_draw_covers_every_switch() -> None:
    """Every family, and every value of every setting that has a few only, is among the first configurations."""
    drawn = [random_subject(seed) for seed in range(MANY)]
    assert {subject.base_config.model_type for subject in drawn} == BASES.keys()
    heads = {(subject.base_config.num_attention_heads, subject.base_config.num_key_value_heads) for subject in drawn}
    assert len(heads) > 150
    values = {name: {repr(getattr(subject.config, name)) for subject in drawn} for name, _ in drawn[0].config}
    assert {name for name, found in values.items() if len(found) == 1} == NEVER_DRAWN


# Keys that no check of the stages static and twin reads: files, data, output and a GPU's memory; and what a check refuses
# by design.
NEVER_DRAWN = {
    *("model_name_or_path", "tokenizer_name_or_path", "chat_template", "current_date", "output_dir", "remarks"),
    *("train_ds_names", "max_train_samples_per_ds", "needle_documents", "needle_pairs", "needle_digits"),
    *("needle_style", "needle_filler_words", "curriculum", "cache", "cache_dir", "save_steps", "save_total_limit"),
    "grace_seconds",
    *("max_ctx_len", "max_qas_len", "max_qas_per_sample", "max_ctx_chunk_len", "min_ctx_chunk_len"),
    *("max_ctx_chunk_num", "num_chunk_probs", "control_tokens"),
    *("report_to", "logging_steps", "eval_steps", "eval_documents", "val_ds_names"),
    *("device_memory", "expert_transient_gib", "base_sharding", "per_rank_gen", "quantize_ctx_encoder"),
    *("select_checks", "ignore_checks"),
}


FAULTS = [
    pytest.param(index, *planted, id=f"{planted[0].code}-{planted[1].name}") for index, planted in enumerate(PLANTED)
]


def test_packed_experts_wider_than_the_shipped_ones_are_judged_a_layer_at_once_too() -> None:
    outcomes = run_checks(random_subject(1058), RULES, select=("QNT202", "QNT204")).outcomes
    assert [outcome.outcome for outcome in outcomes] == ["pass", "pass"]
    assert "layer 0, a layer at once" in outcomes[0].evidence


drawn_once = lru_cache(maxsize=8)(random_subject)


@lru_cache(maxsize=64)
def clean_outcome(code: str, seed: int) -> tuple[Subject, Outcome]:
    """The check's outcome without a fault, once for all the faults of its rule."""
    drawn = drawn_once(seed)
    (outcome,) = run_checks(drawn, [rule for rule in RULES if rule.code == code]).outcomes
    return drawn, outcome


def turns_red(rule: Rule, fault: Fault, seed: int) -> bool:
    """Plant a fault and demand that its check turns red; returns whether the fault applies to this configuration."""
    drawn, clean = clean_outcome(rule.code, seed)
    if clean.outcome in ("skip", "inapplicable") or (clean.outcome == "warn" and rule.code in MAY_WARN):
        return False
    assert clean.outcome == "pass", f"{rule.code} is red without a fault: {clean.message}: {described(drawn)}"
    try:
        faulty = fault.plant(drawn)
    except (NotApplicable, NotOffered):
        return False
    (outcome,) = run_checks(faulty, [rule]).outcomes
    assert outcome.found_fault, f"{rule.code} {fault.name}: {outcome.outcome}: {outcome.message}: {described(drawn)}"
    return True


def plant(rule: Rule, fault: Fault, first_seed: int, places: int) -> None:
    """The fault turns its check red in so many configurations, the first from that seed on to which it applies."""
    planted, draws = 0, 60 + 50 * places  # the reference's format (IMP201) holds one in thirty
    for seed in range(first_seed, first_seed + draws):
        planted += turns_red(rule, fault, seed)
        if planted == places:
            return
    pytest.fail(f"{rule.code} {fault.name} applies to {planted} of {draws} random configurations, wanted {places}")


IN_MATRIX = {code for _, code, _ in MATRIX.values()}


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        pytest.param(
            rule, fault, id=f"{rule.code}-{fault.name}", marks=pytest.mark.slow if rule.code in IN_MATRIX else ()
        )
        for rule in RULES
        if rule.stage != "device"  # those take seconds; test_rules.py plants them once
        for fault in rule.faults[:1]
    ],
)
def test_a_planted_fault_of_every_rule_turns_its_check_red(rule: Rule, fault: Fault) -> None:
    plant(rule, fault, first_seed=RULES.index(rule) // 8, places=1)  # eight in a row share what is built for them


@pytest.mark.slow
@pytest.mark.parametrize(("index", "rule", "fault"), FAULTS)
def test_every_planted_fault_turns_its_check_red_10(index: int, rule: Rule, fault: Fault) -> None:
    plant(rule, fault, first_seed=1000 + index, places=10)


def test_every_rule_has_a_fault() -> None:
    """So that the tests above speak of every rule."""
    assert {rule.code for rule, _ in PLANTED} == {rule.code for rule in RULES}
