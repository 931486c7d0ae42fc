"""Evaluation of a trained model: the same questions answered under four conditions, with confidence intervals.

Three conditions are controls for `document`: `none` shows what the base knows without a document, `other` what any
document's LoRA reveals, and `in_prompt` what the base can answer at best.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from d2l.data.limits import Limits
from d2l.data.packing import collate
from d2l.data.records import Record, document_in_prompts
from d2l.data.tokenize import Row, tokenize_record
from d2l.errors import DataError
from d2l.evaluation.scores import (
    Condition,
    GradedAnswer,
    Group,
    Score,
    compute_scores,
    exact_match,
    group_by_chunks,
    group_by_length,
    rouge_l,
    token_f1,
)
from d2l.hypernet.lora import Lora
from d2l.inference.generate import (
    decode_answer,
    encode_prompt,
    find_stop_ids,
    generate,
    internalize,
    tokenize_document,
    truncate_at_stop,
)
from d2l.inference.load import TrainedModel


@dataclass(frozen=True)
class Evaluation:
    """Answers to every question, their scores, and scores by the documents' length and number of chunks."""

    documents: int
    questions: int
    scores: Mapping[Condition, Score]
    by_length: tuple[Group, ...]
    by_chunks: tuple[Group, ...]
    answers: tuple[GradedAnswer, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as JSON values."""
        return asdict(self)


def evaluate(
    trained: TrainedModel,
    records: Sequence[Record],
    *,
    seed: int = 0,
    max_new_tokens: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Answer every question of every record under all conditions, by greedy decoding, and grade the answers.

    Args:
        records: at least two documents with different texts; condition `other` takes the LoRA of another one of them.
        seed: seed for drawing the other documents, and the resamples of the intervals.
        max_new_tokens: upper bound on the tokens of an answer.
        on_progress: called after every document, with the number of documents done, and of all.

    Raises:
        DataError: there is no second document, or a record exceeds the limits of the training.
    """
    others = _draw_other_documents(records, random.Random(f"{seed} other"))
    # measured first: a document that is too long is an error before anything is generated
    documents = [_measure_document(trained, index, record) for index, record in enumerate(records)]
    answers: list[GradedAnswer] = []
    for index, record in enumerate(records):
        own, other = (internalize(trained, records[it].context) for it in (index, others[index]))
        conditions: dict[Condition, tuple[Lora | None, Record]] = {
            "document": (own, record),
            "other": (other, record),
            "none": (None, record),
            "in_prompt": (None, document_in_prompts(record)),
        }
        for condition, (lora, questions) in conditions.items():
            answers += _answer_questions(trained, lora, questions, documents[index], condition, max_new_tokens)
        on_progress(index + 1, len(records))
    return Evaluation(
        documents=len(records),
        questions=sum(len(record.prompts) for record in records),
        scores=compute_scores(answers, seed),
        by_length=group_by_length(answers, seed),
        by_chunks=group_by_chunks(answers, seed),
        answers=tuple(answers),
    )


@dataclass(frozen=True)
class _Document:
    """Size of a document: its index, its tokens without affixes and overlaps of the chunks, and its number of chunks."""

    index: int
    tokens: int
    chunks: int


def _measure_document(trained: TrainedModel, index: int, record: Record) -> _Document:
    """Count the tokens and chunks of a document.

    Raises:
        DataError: the document exceeds the limits of the training.
    """
    chunks = tokenize_document(trained, record.context)
    return _Document(index, len(trained.chat.encode_contents(record.context)), len(chunks))


def _draw_other_documents(records: Sequence[Record], generator: random.Random) -> list[int]:
    """Draw for each record the index of another one with another text.

    Raises:
        DataError: all records have the same text.
    """
    others = []
    if not records:
        raise DataError("evaluation needs at least two different documents, found no record")
    for record in records:
        candidates = [index for index, other in enumerate(records) if other.context != record.context]
        if not candidates:
            raise DataError(
                "evaluation needs at least two different documents, so that one can be answered under the LoRA of "
                f"another; found {len({it.context for it in records})} in {len(records)} records"
            )
        others.append(generator.choice(candidates))
    return others


def _answer_questions(
    trained: TrainedModel,
    lora: Lora | None,
    record: Record,
    document: _Document,
    condition: Condition,
    max_new_tokens: int,
) -> list[GradedAnswer]:
    """Answer all questions of one record under one condition, and grade the answers."""
    answers = generate_answers(trained, lora, record.prompts, max_new_tokens)
    likelihoods = _compute_likelihoods(trained, lora, record)
    return [
        GradedAnswer(
            record=document.index,
            query=query,
            document_tokens=document.tokens,
            chunks=document.chunks,
            condition=condition,
            answer=answer,
            exact=exact_match(answer, expected),
            f1=token_f1(answer, expected),
            rouge_l=rouge_l(answer, expected),
            nll=nll,
            tokens=tokens,
        )
        for query, (answer, expected, (nll, tokens)) in enumerate(
            zip(answers, record.responses, likelihoods, strict=True)
        )
    ]


def generate_answers(
    trained: TrainedModel, lora: Lora | None, questions: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Generate greedy answers; questions of equal length share a batch."""
    prompts = [encode_prompt(trained.chat, question) for question in questions]
    stop = find_stop_ids(trained.chat, trained.model.base.generation_config.eos_token_id)
    answers = [""] * len(prompts)
    for length in sorted({len(ids) for ids in prompts}):
        places = [place for place, ids in enumerate(prompts) if len(ids) == length]
        rows = torch.tensor([prompts[place] for place in places])
        bound = None if lora is None else _repeat_lora(lora, len(places))
        new = generate(trained.model, bound, rows, stop=stop, max_new_tokens=max_new_tokens)
        for place, tokens in zip(places, new.tolist(), strict=True):
            answers[place] = decode_answer(trained.chat, truncate_at_stop(tokens, stop))
    return answers


def _repeat_lora(lora: Lora, count: int) -> Lora:
    """Repeat the LoRA of one context for several rows."""
    A, B = ({name: x.expand(count, -1, -1, -1) for name, x in side.items()} for side in (lora.A, lora.B))
    return Lora(A, B, lora.scale)


@torch.no_grad()
def _compute_likelihoods(trained: TrainedModel, lora: Lora | None, record: Record) -> list[tuple[float, int]]:
    """Compute the negative log-likelihood of each expected answer in nats, and count its supervised tokens.

    Raises:
        DataError: a question cannot be tokenized.
    """
    plain = replace(record, logprobs_vals=None, logprobs_indices=None)
    part = tokenize_record(0, plain, trained.chat, Limits(), None)
    if part.dropped or part.problems:
        raise DataError("; ".join([*map(str, part.dropped), *part.problems]))
    results = []
    for query in (query for row in part.rows for query in row.queries):
        batch = collate([Row(record=0, chunks=((0,),), queries=(query,))]).to(trained.model.base.device)
        logits = trained.model.logits(batch, lora, positions=batch.prediction_positions).float()
        labels = batch.labels[0, batch.label_positions]
        results.append((float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")), len(labels)))
    return results
