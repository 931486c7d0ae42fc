"""Evaluation of a trained model: the same questions answered under four conditions, with confidence intervals.

Three conditions are controls for `document`: `none` shows what the base knows without a document, `other` what any
document's LoRA reveals, and `in_prompt` what the base can answer at best.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from d2l.data.records import Record, document_in_prompts
from d2l.errors import DataError
from d2l.evaluation.answers import compute_likelihoods, generate_answers
from d2l.evaluation.scores import (
    CONDITIONS,
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
from d2l.inference.generate import internalize, tokenize_document
from d2l.inference.load import TrainedModel

TOGETHER = 8  # documents that are asked about at once


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
        on_progress: called after every few documents, with the number of documents done, and of all.

    Raises:
        DataError: there is no second document, or a record exceeds the limits of the training.
    """
    others = _draw_other_documents(records, random.Random(f"{seed} other"))
    # measured first: a document that is too long is an error before anything is generated
    documents = [_measure_document(trained, index, record) for index, record in enumerate(records)]
    answers: list[GradedAnswer] = []
    for start in range(0, len(records), TOGETHER):
        some = documents[start : start + TOGETHER]
        loras = {
            it: internalize(trained, records[it].context)
            for document in some
            for it in (document.index, others[document.index])
        }
        asked = [records[it.index] for it in some]
        in_prompt = [document_in_prompts(record) for record in asked]
        conditions: dict[Condition, tuple[list[Lora] | None, list[Record]]] = {
            "document": ([loras[it.index] for it in some], asked),
            "other": ([loras[others[it.index]] for it in some], asked),
            "none": (None, asked),
            "in_prompt": (None, in_prompt),
        }
        for condition, (bound, questions) in conditions.items():
            answers += _answer_questions(trained, bound, questions, some, condition, max_new_tokens)
        on_progress(start + len(some), len(records))
    answers.sort(key=lambda it: (it.record, CONDITIONS.index(it.condition), it.query))
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
    loras: Sequence[Lora] | None,
    records: Sequence[Record],
    documents: Sequence[_Document],
    condition: Condition,
    max_new_tokens: int,
) -> list[GradedAnswer]:
    """Answer all questions of some records under one condition, and grade the answers."""
    of_question = [place for place, record in enumerate(records) for _ in record.prompts]
    bound = None if loras is None else [loras[place] for place in of_question]
    prompts = [prompt for record in records for prompt in record.prompts]
    answers = iter(generate_answers(trained, bound, prompts, max_new_tokens))
    graded = []
    for place, (record, document) in enumerate(zip(records, documents, strict=True)):
        likelihoods = compute_likelihoods(trained, None if loras is None else loras[place], record)
        for query, (expected, (nll, tokens)) in enumerate(zip(record.responses, likelihoods, strict=True)):
            answer = next(answers)
            graded.append(
                GradedAnswer(
                    record=document.index,
                    query=query,
                    document_tokens=document.tokens,
                    chunks=document.chunks,
                    condition=condition,
                    answer=answer,
                    expected=expected,
                    exact=exact_match(answer, expected),
                    f1=token_f1(answer, expected),
                    rouge_l=rouge_l(answer, expected),
                    nll=nll,
                    tokens=tokens,
                )
            )
    return graded
