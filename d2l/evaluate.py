"""How well documents were internalized: the same questions answered under four conditions, with confidence intervals.

A number without controls proves little: `none` shows what the base knows anyway, `other` what any document's LoRA gives
away, and `in_prompt` what this base could answer at best.
"""

import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from d2l.answer import answer_text, generate, internalize, prompt_ids, stop_ids
from d2l.data.packing import collate
from d2l.data.records import Record
from d2l.data.tokenize import Limits, Row, tokenize_record
from d2l.errors import DataError
from d2l.hypernet.lora import Lora
from d2l.train.losses import label_positions
from d2l.trained import Trained

Condition = Literal["document", "other", "none", "in_prompt"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles: a 95% confidence interval

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answered:
    """One question under one condition.

    Attributes:
        record, query: index of the document and of its question.
        exact: 1.0 where the answer is the expected one, else 0.0; both normalised as SQuAD does.
        f1: overlap of their words, 0 to 1.
        nll: negative log-likelihood of the expected answer's tokens, in nats; tokens: how many they are.
    """

    record: int
    query: int
    condition: Condition
    answer: str
    exact: float
    f1: float
    nll: float
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """A mean with the bounds of its 95% confidence interval, from resampled documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """What a condition reached. `relative_f1` is its F1 over that of the document in the prompt; None where that is 0."""

    exact: Estimate
    f1: Estimate
    perplexity: Estimate
    relative_f1: float | None


@dataclass(frozen=True)
class Evaluation:
    """Every answer, and the scores over them."""

    answers: tuple[Answered, ...]
    scores: Mapping[Condition, Score]
    documents: int
    questions: int

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def evaluate(
    trained: Trained,
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
    loras = [internalize(trained, record.context) for record in records]
    answers: list[Answered] = []
    for index, record in enumerate(records):
        bound: dict[Condition, Lora | None] = {"document": loras[index], "other": loras[others[index]], "none": None}
        for condition, lora in bound.items():
            answers += _ask_all(trained, lora, record, index, condition, max_new_tokens)
        asked = _with_document_in_prompts(record)
        answers += _ask_all(trained, None, asked, index, "in_prompt", max_new_tokens)
        on_progress(index + 1, len(records))
    generator = np.random.default_rng(seed)
    return Evaluation(
        answers=tuple(answers),
        scores=_scores(answers, generator),
        documents=len(records),
        questions=sum(len(record.prompts) for record in records),
    )


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and superfluous space: the comparison of SQuAD (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, after normalising; 1 where both are empty."""
    said, wanted = normalized(answer).split(), normalized(expected).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


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


def _with_document_in_prompts(record: Record) -> Record:
    return replace(record, prompts=tuple(f"{record.context}\n\n{prompt}" for prompt in record.prompts))


def _ask_all(
    trained: Trained, lora: Lora | None, record: Record, index: int, condition: Condition, max_new_tokens: int
) -> list[Answered]:
    """Answers to all questions of one record, with the likelihood of the expected ones."""
    said = _generated(trained, lora, record.prompts, max_new_tokens)
    likelihoods = _likelihoods(trained, lora, record)
    return [
        Answered(
            record=index,
            query=query,
            condition=condition,
            answer=answer,
            exact=float(normalized(answer) == normalized(expected)),
            f1=token_f1(answer, expected),
            nll=nll,
            tokens=tokens,
        )
        for query, (answer, expected, (nll, tokens)) in enumerate(zip(said, record.responses, likelihoods, strict=True))
    ]


def _generated(trained: Trained, lora: Lora | None, questions: Sequence[str], max_new_tokens: int) -> list[str]:
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
def _likelihoods(trained: Trained, lora: Lora | None, record: Record) -> list[tuple[float, int]]:
    """Of each expected answer: its negative log-likelihood in nats, and its supervised tokens."""
    plain = replace(record, logprobs_vals=None, logprobs_indices=None)
    part = tokenize_record(0, plain, trained.chat, Limits(), None)
    if part.dropped or part.problems:
        raise DataError("; ".join([*map(str, part.dropped), *part.problems]))
    results = []
    for query in (query for row in part.rows for query in row.queries):
        batch = collate([Row(record=0, chunks=((0,),), queries=(query,))]).to(trained.model.base.device)
        positions = label_positions(batch)
        logits = trained.model.logits(batch, lora, positions=positions - 1).float()
        loss = torch.nn.functional.cross_entropy(logits, batch.labels[0, positions], reduction="sum")
        results.append((float(loss), len(positions)))
    return results


def _scores(answers: Sequence[Answered], generator: np.random.Generator) -> dict[Condition, Score]:
    """Scores of every condition, over the same resamples of documents."""
    documents = 1 + max(answer.record for answer in answers)
    draws = generator.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)
    tables = {}
    for condition in CONDITIONS:
        table = np.zeros((documents, 5))  # sums of each document: questions, exact, f1, nll, tokens
        for answer in answers:
            if answer.condition == condition:
                table[answer.record] += (1, answer.exact, answer.f1, answer.nll, answer.tokens)
        tables[condition] = table
    ceiling = _ratio(tables["in_prompt"], draws, 2, 0).value
    scores: dict[Condition, Score] = {}
    for condition, table in tables.items():
        f1, nll = _ratio(table, draws, 2, 0), _ratio(table, draws, 3, 4)
        scores[condition] = Score(
            exact=_ratio(table, draws, 1, 0),
            f1=f1,
            perplexity=Estimate(math.exp(nll.value), math.exp(nll.low), math.exp(nll.high)),
            relative_f1=f1.value / ceiling if ceiling else None,
        )
    return scores


def _ratio(table: np.ndarray, draws: np.ndarray, above: int, below: int) -> Estimate:
    """The sum of one column over that of another, and its percentiles over resampled documents."""
    resampled = draws @ table  # [resamples, columns]; a draw says how often each document is in it
    low, high = np.percentile(resampled[:, above] / resampled[:, below], INTERVAL)
    return Estimate(float(table[:, above].sum() / table[:, below].sum()), float(low), float(high))
