"""How well documents were internalized: the same questions answered under four conditions, with confidence intervals.

A number without controls proves little: `none` shows what the base knows anyway, `other` what any document's LoRA gives
away, and `in_prompt` what this base could answer at best.
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
    Answered,
    Condition,
    Group,
    Score,
    by_chunks,
    by_length,
    exact_match,
    rouge_l,
    scores,
    token_f1,
)
from d2l.hypernet.lora import Lora
from d2l.inference.generate import answer_text, document_in_chunks, generate, internalize, prompt_ids, stop_ids
from d2l.inference.load import TrainedModel


@dataclass(frozen=True)
class Evaluation:
    """Every answer, the scores over them, and those of documents of about equal length, and of as many chunks."""

    documents: int
    questions: int
    scores: Mapping[Condition, Score]
    by_length: tuple[Group, ...]
    by_chunks: tuple[Group, ...]
    answers: tuple[Answered, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def evaluate(
    trained: TrainedModel,
    records: Sequence[Record],
    *,
    seed: int = 0,
    max_new_tokens: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Ask every question of every record under all conditions, decoding greedily.

    Args:
        records: at least two documents with different texts; `other` answers under the LoRA of another one of them.
        seed: draws which document is the other one, and the resamples of the intervals.
        on_progress: called after every document.

    Raises:
        DataError: there is no second document, or a record does not fit the limits that the model was trained with.
    """
    others = _other_documents(records, random.Random(f"{seed} other"))
    documents = [_measured(trained, index, record) for index, record in enumerate(records)]  # one may be too long
    answers: list[Answered] = []
    for index, record in enumerate(records):
        own, other = (internalize(trained, records[it].context) for it in (index, others[index]))
        asked: dict[Condition, tuple[Lora | None, Record]] = {
            "document": (own, record),
            "other": (other, record),
            "none": (None, record),
            "in_prompt": (None, document_in_prompts(record)),
        }
        for condition, (lora, questions) in asked.items():
            answers += _ask_all(trained, lora, questions, documents[index], condition, max_new_tokens)
        on_progress(index + 1, len(records))
    return Evaluation(
        documents=len(records),
        questions=sum(len(record.prompts) for record in records),
        scores=scores(answers, seed),
        by_length=by_length(answers, seed),
        by_chunks=by_chunks(answers, seed),
        answers=tuple(answers),
    )


@dataclass(frozen=True)
class _Document:
    """Which one it is, its tokens without what is put around every chunk, and the chunks in which it is read."""

    index: int
    tokens: int
    chunks: int


def _measured(trained: TrainedModel, index: int, record: Record) -> _Document:
    chunks = document_in_chunks(trained, record.context)
    around = sum(map(len, trained.chat.context_affixes()))
    return _Document(index, sum(map(len, chunks)) - around * len(chunks), len(chunks))


def _other_documents(records: Sequence[Record], generator: random.Random) -> list[int]:
    """For each record the index of another one with another text."""
    others = []
    for record in records:
        candidates = [index for index, other in enumerate(records) if other.context != record.context]
        if not candidates:
            raise DataError(
                "evaluation needs at least two different documents, so that one can be answered under the LoRA of "
                f"another; found {len({it.context for it in records})} in {len(records)} records"
            )
        others.append(generator.choice(candidates))
    return others


def _ask_all(
    trained: TrainedModel,
    lora: Lora | None,
    record: Record,
    document: _Document,
    condition: Condition,
    max_new_tokens: int,
) -> list[Answered]:
    """Answers to all questions of one record, with the likelihood of the expected ones."""
    said = _generated(trained, lora, record.prompts, max_new_tokens)
    likelihoods = _likelihoods(trained, lora, record)
    return [
        Answered(
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
        for query, (answer, expected, (nll, tokens)) in enumerate(zip(said, record.responses, likelihoods, strict=True))
    ]


def _generated(trained: TrainedModel, lora: Lora | None, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers; questions of equal length are answered together."""
    prompts = [prompt_ids(trained.chat, question) for question in questions]
    stop = stop_ids(trained)
    answers = [""] * len(prompts)
    for length in sorted({len(ids) for ids in prompts}):
        places = [place for place, ids in enumerate(prompts) if len(ids) == length]
        rows = torch.tensor([prompts[place] for place in places])
        bound = None if lora is None else _repeated(lora, len(places))
        new = generate(trained.model, bound, rows, stop=stop, max_new_tokens=max_new_tokens)
        for place, tokens in zip(places, new.tolist(), strict=True):
            end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
            answers[place] = answer_text(trained.chat, tokens[:end])
    return answers


def _repeated(lora: Lora, count: int) -> Lora:
    """One context's LoRA for several rows."""
    A, B = ({name: x.expand(count, -1, -1, -1) for name, x in side.items()} for side in (lora.A, lora.B))
    return Lora(A, B, lora.scale)


@torch.no_grad()
def _likelihoods(trained: TrainedModel, lora: Lora | None, record: Record) -> list[tuple[float, int]]:
    """Of each expected answer: its negative log-likelihood in nats, and its supervised tokens."""
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
