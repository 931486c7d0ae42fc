"""A teacher's log-probabilities are those of the base that reads the document before the question.

What it does
------------
Lets `d2l data teacher` answer for a few of the run's questions, with their documents cut short, on the tiny twin with the
tokenizer's vocabulary, and computes the same from a forward pass for each question alone, with eager attention.

Why it matters
--------------
Under `loss: kl` the hypernetwork learns what the teacher's file says. Log-probabilities of the place before, of another
question, without the document, or scaled to sum to 1 over the top k, train a model at a loss that looks normal.

How it is detected
------------------
For each supervised token, found by rendering the run's template with transformers alone: the token ids are distinct, each
value is the log-softmax over the whole vocabulary at the token before, and the values are the largest, to 1e-4.

How to fix
----------
Ask the base with the document, two line breaks and the question as the user's message; take the logits at the token before
each supervised one, in float32; keep the k largest as they are.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.data.expected import conversation_format
from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from checks.oracles.conversations import Expected
    from checks.subject import Subject
    from d2l.data.records import Record

TOP_K, TOLERANCE = 4, 1e-4  # nats; float32 sums in another order
RECORDS, TEXT = 2, 80  # records that are asked about, and characters of each document


def check(subject: "Subject") -> Result:
    """Compare the values of every supervised token with a forward pass of its question alone."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    base, plain = _bases(subject)
    records, expected = _questions(subject, base.config.max_position_embeddings)
    if not records:
        return Skip("no question of the first records fits into the twin with its document")
    distilled = subject.implementation.teacher(base, subject.chat, records, TOP_K)
    worst, tokens = 0.0, 0
    for record, result, questions in zip(records, distilled, expected, strict=True):
        for number, question in enumerate(questions):
            table = _table(result, number)
            apart = _difference(_log_probabilities(plain, question), *table) if table else math.inf
            tokens += question.stop - question.start
            if not apart <= worst:
                worst = apart
                place = f"question {number} of {record.source}"
    if worst > TOLERANCE:
        return Fail(
            message="the teacher's log-probabilities are not those of the base with the document in its prompt",
            expected=f"the {TOP_K} largest at every supervised token, within {TOLERANCE:g} nats",
            actual=f"{place}: "
            + (f"{worst:.2g} apart" if math.isfinite(worst) else "another number of tokens, or no numbers"),
            remedy="take the logits at the token before each supervised one, with the document before the question",
            evidence={"apart": worst, "tokens": tokens},
        )
    return Pass(f"{tokens:,} supervised tokens have the base's own values to {worst:.1g} nats", {"apart": worst})


def _bases(subject: "Subject") -> "tuple[PreTrainedModel, PreTrainedModel]":
    """Return the twin's base with room for all tokens, as the run holds it, and with eager attention."""
    assert subject.tokenizer is not None
    config = deepcopy(subject.twin_base_config)
    config.vocab_size = max(len(subject.tokenizer), subject.base_config.vocab_size)
    base = subject.implementation.build_base(config, subject.twin_plan, seed=0)
    plain = deepcopy(base)
    plain.set_attn_implementation("eager")
    return base, plain


def _questions(subject: "Subject", longest: int) -> "tuple[list[Record], list[list[Expected]]]":
    """Return short records of two questions each, and the tokens of each question with its document before it."""
    assert subject.records is not None
    form = conversation_format(subject)
    records: list[Record] = []
    expected: list[list[Expected]] = []
    for record in subject.records[: 4 * RECORDS]:
        if len(records) == RECORDS:
            break
        context = record.context[:TEXT]
        prompts = tuple(prompt[:TEXT] for prompt in (record.prompts * 2)[:2])
        prompts = (prompts[0], prompts[1] if len(record.prompts) > 1 else f"{prompts[1]} {prompts[1]}")
        responses = (record.responses * 2)[:2]
        asked = [(f"{context}\n\n{prompt}", answer) for prompt, answer in zip(prompts, responses, strict=True)]
        found = [it for it in form.expected(asked) if it is not None and len(it.ids) < longest]
        if len(found) == len(asked):
            cut = replace(record, context=context, prompts=prompts, responses=responses)
            records.append(replace(cut, logprobs_vals=None, logprobs_indices=None))
            expected.append(found)
    return records, expected


@torch.no_grad()
def _log_probabilities(base: "PreTrainedModel", question: "Expected") -> Tensor:
    """Return what the base thinks of every supervised token, from a forward pass of this question alone [tokens, V]."""
    last = len(question.ids) - question.start + 1  # of what comes before, no logits are needed
    logits = base(input_ids=torch.tensor([question.ids]), use_cache=False, logits_to_keep=last).logits[0]
    return torch.log_softmax(logits[: question.stop - question.start].double(), dim=-1)


def _table(record: "Record", number: int) -> tuple[Tensor, Tensor] | None:
    """Return values and ids of a question [tokens, k]; None where they are no table of numbers."""
    try:
        values, ids = (getattr(record, name)[number] for name in ("logprobs_vals", "logprobs_indices"))
        return torch.tensor(values, dtype=torch.float64), torch.tensor(ids, dtype=torch.int64)
    except (TypeError, ValueError, IndexError):
        return None


def _difference(expected: Tensor, values: Tensor, ids: Tensor) -> float:
    """Return how far values are from those of their tokens, and from the largest; infinite where the shapes differ."""
    if values.shape != ids.shape or values.shape != (len(expected), TOP_K):
        return math.inf
    if int(ids.min()) < 0 or int(ids.max()) >= expected.shape[1] or any(len(set(row)) < TOP_K for row in ids.tolist()):
        return math.inf  # ids of no token, or of one twice
    of_tokens = (values - expected.gather(1, ids)).abs().max()
    of_largest = (values.sort(descending=True).values - expected.topk(TOP_K).values).abs().max()
    return float(torch.maximum(of_tokens, of_largest).nan_to_num(math.inf))


# Faults


def _edited(edit: Any) -> Any:
    """Make a fault in the values and ids of a record: `edit` gets both, [question][token][k]."""

    def teacher(healthy: Implementation, base: Any, chat: Any, records: Any, top_k: int) -> Iterator[Any]:
        for record in healthy.teacher(base, chat, records, top_k):
            values, ids = edit(record.logprobs_vals, record.logprobs_indices)
            yield replace(record, logprobs_vals=values, logprobs_indices=ids)

    return override(teacher=teacher)


def _of_the_token_before(values: Any, ids: Any) -> Any:
    """Give every token the values of the one before it, and the first its own."""
    return tuple(tuple((table[0], *table[:-1]) for table in tables) for tables in (values, ids))


def _summing_to_one(values: Any, ids: Any) -> Any:
    return [[[it - _log_sum(row) for it in row] for row in table] for table in values], ids


def _log_sum(row: Sequence[float]) -> float:
    return math.log(sum(map(math.exp, row)))


def _without_document(healthy: Implementation, base: Any, chat: Any, records: Any, top_k: int) -> Any:
    return healthy.teacher(base, chat, [replace(record, context="-") for record in records], top_k)


RULE = Rule(
    code="TCH301",
    name="teacher-differs",
    stage="data",
    severity="error",
    sources=("failure mode 39", "failure mode C22", "https://arxiv.org/abs/2602.15902"),
    requires=("LBL101", "DAT301", "LBL301", "DAT302", "DAT303", "ATT201"),
    check=check,
    faults=(
        Fault("token-before", "every token has the values of the one before it", _edited(_of_the_token_before)),
        Fault(
            "questions-swapped",
            "each question has another one's values",
            _edited(lambda *both: (it[::-1] for it in both)),
        ),
        Fault("renormalised", "the values are scaled to sum to 1 over the top k", _edited(_summing_to_one)),
        Fault("without-document", "the base is asked without the document", override(teacher=_without_document)),
    ),
)
