"""The base answers the data's questions better with their own documents in the prompt than with none or another's.

What it does
------------
Loads the base as the run would, without a LoRA, and compares its loss on the answers of up to 50 records, spread over the
data, in three prompts: the question alone, another record's document before it, and its own.

Why it matters
--------------
The hypernetwork learns to stand in for the document. Where the base knows the answers anyway, there is nothing to learn; where
it answers no better with the document in its prompt, it cannot read it, and a LoRA hardly will teach it. The loss then falls
little or not at all, and nothing is wrong with the run.

How it is detected
------------------
The mean cross-entropy of the answers' tokens, in nats. With its own document it has to be lower by at least a fifth than in
the better one of the other two prompts: another document may tell the form of an answer, or distract from one that is known.
A judgement, so a warning. Questions that with their document exceed `max_packed_inp_len` are left out; on a CPU as many
records are asked as take some ten seconds. Random bases, weights that are not on this machine, and runs without data are not
judged.

How to fix
----------
Ask what only the documents say, such as facts that are newer than the base, and look at the prompts with `d2l data show`. Where
a small base cannot read its documents, take a larger or an instruction-tuned one.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.result import Pass, Result, Skip, Warn
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.trained_values import reckoned_sizes
from checks.training.on_device import ON_CPU, nothing_to_load, nothing_to_train
from d2l.plan.operations import active_weights

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.config.schema import RunConfig
    from d2l.data.records import Record
    from d2l.data.tokenize import Row

RECORDS, FEWEST = 50, 4
SHARE = 0.2  # of the lower loss of the other prompts; of a dozen records, chance alone made .11


def check(subject: "Subject") -> Result:
    """Compare the loss of the answers in the three prompts."""
    if (reason := nothing_to_load(subject)) is not None:
        return reason
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    config = changed(subject.config, loss="ce", curriculum=())
    rows = _rows(subject, config)
    count = len({row.record for row in rows["own"]})
    if count < FEWEST:
        return Skip(f"only {count} records fit a packed row with a document before their questions")
    base = subject.implementation.load_base(Path(config.model_name_or_path), subject.plan)
    model = subject.implementation.build(base, subject.twin_config)
    loss = {prompt: _loss(subject, model, config, some) for prompt, some in rows.items()}
    said = f"{loss['own']:.3g} nats with the document in the prompt, {loss['none']:.3g} without, {loss['other']:.3g} with another"
    evidence = loss | {"records": count}
    if not loss["own"] <= (1 - SHARE) * min(loss["none"], loss["other"]):
        return Warn(
            message="the base answers no better with the document in its prompt",
            expected=f"a loss of the answers that their own document lowers by at least {SHARE:.0%}",
            actual=f"{said}, over {count} records",
            remedy="ask what the documents alone say, in prompts that the base understands, or take a base that can read them",
            evidence=evidence,
        )
    return Pass(said, evidence)


def _rows(subject: "Subject", config: "RunConfig") -> "dict[str, Sequence[Row]]":
    """Return the rows of the same records in each prompt."""
    assert subject.records is not None
    records = subject.records[:: max(1, len(subject.records) // RECORDS)][:RECORDS]
    half = len(records) // 2
    others = [
        replace(it, context=other.context)
        for it, other in zip(records, (*records[half:], *records[:half]), strict=True)
    ]
    asked = subject.implementation.document_in_prompts
    prompts = {"none": records, "other": asked(others), "own": asked(records)}
    rows = {
        prompt: [row for row in subject.implementation.rows(config, subject.chat, some).rows if _fits(row, config)]
        for prompt, some in prompts.items()
    }
    kept = set.intersection(*({row.record for row in some} for some in rows.values()))
    if subject.plan.device.value == "cpu":
        sizes = reckoned_sizes(subject, subject.plan)
        weights = sizes.base.layers * active_weights(sizes) + sizes.base.hidden * sizes.base.vocabulary
        kept = _affordable(kept, [row for some in rows.values() for row in some], ON_CPU / (2 * weights))
    return {prompt: [row for row in some if row.record in kept] for prompt, some in rows.items()}


def _fits(row: "Row", config: "RunConfig") -> bool:
    questions, document = row.size
    return questions <= config.max_packed_inp_len and document <= config.max_packed_ctx_len


def _affordable(records: set[int], rows: "Sequence[Row]", tokens: float) -> set[int]:
    """Return the first of these records, whose rows have at most so many tokens together."""
    found: set[int] = set()
    for record in sorted(records):
        tokens -= sum(row.size[0] for row in rows if row.record == record)
        if tokens < 0:
            break
        found.add(record)
    return found


@torch.no_grad()
def _loss(subject: "Subject", model: Model, config: "RunConfig", rows: "Sequence[Row]") -> float:
    """Return the mean cross-entropy of all label tokens, in nats."""
    total, tokens = 0.0, 0
    for packed in subject.implementation.batches(config, rows):
        batch = packed.to(model.base.device)
        logits = model.logits(batch, None, positions=batch.prediction_positions).float()
        labels = batch.labels[0][batch.label_positions]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += len(labels)
    return total / tokens


def _of_others(healthy: Implementation, records: "Sequence[Record]") -> "Sequence[Record]":
    """Put the next record's document before each question."""
    following = (*records[1:], *records[:1])
    mixed = [replace(record, context=other.context) for record, other in zip(records, following, strict=True)]
    return healthy.document_in_prompts(mixed)


RULE = Rule(
    code="DAT401",
    name="document-adds-nothing",
    stage="device",
    severity="warning",
    sources=("failure mode C16",),
    requires=("ATT101", "LBL101", "DAT301", "LBL301", "DAT302", "ATT401", "BAS401", "BAS402"),
    check=check,
    lasting=True,
    faults=(
        Fault(
            "documents-left-out",
            "prompts without their documents",
            override(nothing_to_train, document_in_prompts=lambda healthy, records: records),
        ),
        Fault(
            "anothers-documents",
            "prompts with the document of the next record",
            override(nothing_to_train, document_in_prompts=_of_others),
        ),
    ),
)
