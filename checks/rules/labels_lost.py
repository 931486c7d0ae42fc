"""After truncation and packing, every question of the run has its whole answer as labels, and nothing else.

What it does
------------
Tokenizes and packs the run's own data, all of it, as the run would, and reads the labels of every question back from the
packed batches. A few records are packed again under tight limits. Where records carry a teacher's logprobs, those beside
the labels are compared too. The report says how many labels of up to 1,000 records stand in each channel (analysis, final).

Why it matters
--------------
A mask that is right on one conversation proves nothing about the batches. Truncation from the right cuts the answer after
the mask was checked, and truncation from the left loses later spans; the loss is 0, gradients are NaN, and the token
counter rises. An answer without its stop token trains a model that never stops; labels on the prompt train to ask.

How it is detected
------------------
In each packed question exactly the answer and its end token must be labelled (with `sampled` supervision, all after the
generation prompt): by the place of the answer in the text that the tokenizer library renders, not by the template's
mask. A question that is none of the data's must at least have a whole answer of the data with an end token as labels.

How to fix
----------
Raise `max_qas_len` and `max_packed_inp_len`, shorten the questions, and never truncate. Mask labels by the span of the
answer, its end token included.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.data.channels import labels_by_channel
from checks.data.epoch import gather
from checks.data.packed import readings
from checks.faults import Override, override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

IGNORE_INDEX = -100
REMEDY = "label each answer with its end token and nothing else; where it is truncated, raise max_qas_len"


def check(subject: "Subject") -> Result:
    """Compare the labels of every packed question with the place of its answer."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    found = readings(subject)
    problems, own = gather(found, "labels"), found[0]
    questions = sum(reading.questions for reading in found)
    evidence = {
        "questions": own.questions,
        "label_tokens": own.label_tokens,
        "tokens": own.tokens,
        "batches": own.batches,
        "label_tokens_by_channel": labels_by_channel(subject.tokenizer, subject.rows.rows),
        "faults": problems.examples,
    }
    if problems.count:
        return Fail(
            message=f"labels are lost or wrong in {problems.count:,} of {questions:,} packed questions",
            expected="each response, whole, with its end token",
            actual=problems.examples[0],
            remedy=REMEDY,
            evidence=evidence,
        )
    share = own.label_tokens / max(own.tokens, 1)
    return Pass(
        f"{own.label_tokens:,} labels ({share:.1%} of tokens) in {own.questions:,} questions of {own.batches} batches",
        evidence,
    )


def _cut_answers(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Truncate questions from the right, behind the mask check: the last third of the answer is gone."""

    def cut(query: Any) -> Any:
        supervised = sum(label != IGNORE_INDEX for label in query.labels)
        keep = len(query.input_ids) - max(supervised // 3, 1)
        return replace(query, input_ids=query.input_ids[:keep], labels=query.labels[:keep])

    return _changed_queries(healthy.rows(config, chat, records), cut)


def _with_labels(change: Callable[[tuple[int, ...], list[int]], dict[int, int]]) -> Override:
    """Make a fault that changes labels: it gets the ids and the labelled places of a question, and returns its labels."""

    def relabelled(query: Any) -> Any:
        places = [place for place, label in enumerate(query.labels) if label != IGNORE_INDEX]
        labels = change(query.input_ids, places)
        made = tuple(labels.get(place, IGNORE_INDEX) for place in range(len(query.input_ids)))
        return replace(query, labels=made, logprobs_vals=None, logprobs_indices=None)

    return override(
        rows=lambda healthy, config, chat, records: _changed_queries(healthy.rows(config, chat, records), relabelled)
    )


def _label(ids: tuple[int, ...], places: Any) -> dict[int, int]:
    """Label these places with their own ids."""
    return {place: ids[place] for place in places}


def _changed_queries(tokenized: Any, change: Any) -> Any:
    rows = tuple(replace(row, queries=tuple(change(query) for query in row.queries)) for row in tokenized.rows)
    return replace(tokenized, rows=rows)


RULE = Rule(
    code="LBL301",
    name="labels-lost",
    stage="data",
    severity="error",
    sources=(
        "fix 8",
        "failure mode F8",
        "failure mode 4",
        "failure mode 7",
        "failure mode 8",
        "failure mode 21",
        "failure mode 39",
        "failure mode C33",
    ),
    requires=("LBL101", "DAT301", "DAT308"),
    check=check,
    faults=(
        Fault("answers-truncated", "truncation from the right, after the mask was made", override(rows=_cut_answers)),
        Fault("labels-all-ignored", "every label is -100", _with_labels(lambda ids, places: {})),
        Fault(
            "labels-on-the-prompt",
            "the question is labelled too",
            _with_labels(lambda ids, places: _label(ids, range(1, len(ids)))),
        ),
        Fault(
            "labels-on-the-header",
            "what stands before the answer is labelled too",
            _with_labels(lambda ids, places: _label(ids, [places[0] - 1, *places])),
        ),
        Fault(
            "stop-token-not-trained",
            "the token that ends an answer has no label",
            _with_labels(lambda ids, places: _label(ids, places[:-1])),
        ),
        Fault(
            "first-label-lost",
            "the first token of each answer has no label",
            _with_labels(lambda ids, places: _label(ids, places[1:])),
        ),
        Fault(
            "labels-shifted",
            "each label is the id of the token before",
            _with_labels(lambda ids, places: {place: ids[place - 1] for place in places}),
        ),
    ),
)
