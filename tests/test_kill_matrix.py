"""The kill matrix: 22 faults that people met in such runs, each planted, each named before the first step.

Of these a union of six training tools caught 6 (soup-cli 4; the Trainer of transformers 2, TRL 2, Lightning 2, unsloth 2,
axolotl 1), measured at their first step.
"""

from collections.abc import Callable

import pytest

from checks.faults import configure, override
from checks.production import make_subject
from checks.report import plain_text
from checks.rules import RULES
from checks.runner import run_checks
from checks.subject import Subject
from d2l.config.load import load_config

Plant = Callable[[Subject], Subject]


def shipped(code: str, name: str) -> Plant:
    """The fault of that name that the check ships."""
    (fault,) = (fault for rule in RULES if rule.code == code for fault in rule.faults if fault.name == name)
    return fault.plant


def dequantized_on_a_small_gpu(subject: Subject) -> Subject:
    """The experts are dequantized, as happens silently without kernels, on a card that MXFP4 would have fitted."""
    large = make_subject(
        load_config(None, {"model_name_or_path": "openai/gpt-oss-20b", "expert_weights": "dequantize"})
    )
    return override(free_memory=lambda healthy: 40 * 10**9)(large)


MATRIX: dict[str, tuple[Plant, str, str]] = {
    "fix 1: dequantized without a word": (dequantized_on_a_small_gpu, "MEM401", "does not fit into memory"),
    "fix 1: native experts without a backward": (
        configure(expert_weights="native"),
        "QNT101",
        "gradients would not pass through the experts",
    ),
    "fix 2: packed documents leak": (shipped("ATT201", "no-mask"), "ATT201", "packed document"),
    "fix 3: bitsandbytes on MXFP4": (configure(quantize_ctx_encoder=True), "QNT102", "bitsandbytes"),
    "fix 4: base forward bypassed": (shipped("LOR201", "linear-forward"), "LOR201", "bypasses the forward"),
    "fix 5: the aggregator crashes": (configure(per_rank_gen=False), "HYP201", "no LoRA comes out"),
    "fix 5: ranks are broadcast": (shipped("HYP201", "rank-broadcast"), "HYP201", "copies of each other"),
    "fix 6: the checkpoint cannot be read back": (
        shipped("SAV201", "checkpoint-unreadable"),
        "SAV201",
        "cannot be saved and loaded",
    ),
    "fix 7: checkpointing is not handed on": (shipped("GRD202", "not-handed-on"), "GRD202", "checkpointing"),
    "fix 7: reentrant checkpointing": (
        configure(gradient_checkpointing_kwargs={"use_reentrant": True}, gen_lora_l1_reg_coef=0.1),
        "GRD201",
        "do not arrive",
    ),
    "fix 8: no generation tags": (shipped("LBL101", "no-generation-tags"), "LBL101", "no token is supervised"),
    "fix 9: partial targets": (shipped("TGT101", "partial-match"), "TGT101", "left out without a word"),
    "labels lost by truncation": (shipped("LBL301", "answers-truncated"), "LBL301", "labels"),
    "stale cache": (shipped("CCH301", "key-without-template"), "CCH301", "stale rows"),
    "the pad token ends answers": (shipped("LBL301", "stop-token-not-trained"), "LBL301", "labels"),
    "accumulation changes the scale": (shipped("GRD203", "weighed-by-itself"), "GRD203", "micro-batches"),
    "rows dropped without a word": (shipped("DAT303", "question-lost"), "DAT303", "question"),
    "the document is ignored": (shipped("LOR203", "constant-features"), "LOR203", "does not depend on the document"),
    "resume on other batches": (shipped("SAV201", "position-lost"), "SAV201", "goes on differently"),
    "exported with the scale over r": (shipped("EXP201", "alpha-over-r"), "EXP201", "another model"),
    "the disk fills up": (shipped("DSK401", "full-disk"), "DSK401", "do not fit on the disk"),
    "a loss that is not finite": (shipped("STP201", "no-guard"), "STP201", "is taken"),
}


def test_the_matrix_has_its_22_rows() -> None:
    assert len(MATRIX) == 22


@pytest.mark.parametrize("row", MATRIX)
def test_it_is_named_before_the_first_step(row: str) -> None:
    plant, code, words = MATRIX[row]
    subject = plant(make_subject(load_config()))
    report = run_checks(subject, RULES, select=[code, "LBL101"])
    (outcome,) = (outcome for outcome in report if outcome.code == code)
    assert outcome.outcome == "fail", plain_text(report)
    assert words in outcome.message
    assert outcome.remedy
