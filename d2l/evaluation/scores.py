"""Scores of answers: exact match, token F1, ROUGE-L and perplexity, with confidence intervals, in groups of documents."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

Condition = Literal["document", "other", "none", "in_prompt"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
CEILING: Condition = "in_prompt"
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles: a 95% confidence interval
COUNTS_ALONE = 12  # as many different numbers of chunks have a group each; more of them share groups

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Answered:
    """One question under one condition.

    Attributes:
        record, query: index of the document and of its question.
        document_tokens, chunks: how long the document is, and in how many chunks it is read.
        exact: 1.0 where the answer is the expected one, else 0.0; both normalised as SQuAD does.
        f1: overlap of their words, 0 to 1.
        rouge_l: F-measure of their longest common subsequence of words, 0 to 1.
        nll: negative log-likelihood of the expected answer's tokens, in nats; tokens: how many they are.
    """

    record: int
    query: int
    document_tokens: int
    chunks: int
    condition: Condition
    answer: str
    exact: float
    f1: float
    rouge_l: float
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
    """What a condition reached; relative: over that of the document in the prompt, None where that is 0."""

    exact: Estimate
    f1: Estimate
    rouge_l: Estimate
    perplexity: Estimate
    relative_f1: float | None
    relative_rouge_l: float | None


@dataclass(frozen=True)
class Group:
    """The scores of those documents whose size lies between `low` and `high`, both included; `mean` is theirs."""

    low: int
    high: int
    mean: float
    documents: int
    questions: int
    scores: Mapping[Condition, Score]


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and superfluous space: the comparison of SQuAD (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, expected: str) -> float:
    """1.0 where both are equal after normalising, else 0.0."""
    return float(normalized(answer) == normalized(expected))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, after normalising; 1 where both are empty."""
    said, wanted = normalized(answer).split(), normalized(expected).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L (Lin 2004), F-measure, without stemming; 1 where neither holds a word."""
    if not _words(answer) and not _words(expected):
        return 1.0
    return float(_rouge().score(expected, answer)["rougeL"].fmeasure)


class _Words:
    """Lower-case runs of letters and digits: the library's own on ASCII, which drops every other script's letters."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=_Words())


def scores(answers: Sequence[Answered], seed: int) -> dict[Condition, Score]:
    """Scores of every condition, over the same resamples of documents.

    Args:
        answers: of at least one document, to the same questions under every condition.
        seed: of the resamples.
    """
    places = {record: place for place, record in enumerate(sorted({answer.record for answer in answers}))}
    count = len(places)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    tables = {condition: np.zeros((count, 6)) for condition in CONDITIONS}
    for it in answers:  # sums of each document
        tables[it.condition][places[it.record]] += (1, it.exact, it.f1, it.rouge_l, it.nll, it.tokens)
    f1_ceiling, rouge_ceiling = (_ratio(tables[CEILING], draws, column, 0).value for column in (2, 3))
    result: dict[Condition, Score] = {}
    for condition, table in tables.items():
        exact, f1, rouge = (_ratio(table, draws, column, 0) for column in (1, 2, 3))
        nll = _ratio(table, draws, 4, 5)
        result[condition] = Score(
            exact=exact,
            f1=f1,
            rouge_l=rouge,
            perplexity=Estimate(_exp(nll.value), _exp(nll.low), _exp(nll.high)),
            relative_f1=f1.value / f1_ceiling if f1_ceiling else None,
            relative_rouge_l=rouge.value / rouge_ceiling if rouge_ceiling else None,
        )
    return result


def by_length(answers: Sequence[Answered], seed: int) -> tuple[Group, ...]:
    """Groups of documents by their tokens, from one power of two to the next, shortest first."""
    return _grouped(answers, lambda answer: answer.document_tokens, _doubling, seed)


def by_chunks(answers: Sequence[Answered], seed: int) -> tuple[Group, ...]:
    """Groups of documents by their chunks, fewest first: one for each number, or by powers of two where there are many."""
    few = len({answer.chunks for answer in answers}) <= COUNTS_ALONE
    return _grouped(answers, lambda answer: answer.chunks, (lambda size: (size, size)) if few else _doubling, seed)


def _doubling(size: int) -> tuple[int, int]:
    """The bounds around a size: 1, 2, 3 to 4, 5 to 8 and so on."""
    high = 1 << (size - 1).bit_length()
    return high // 2 + 1, high


def _grouped(
    answers: Sequence[Answered], size: Callable[[Answered], int], bounds: Callable[[int], tuple[int, int]], seed: int
) -> tuple[Group, ...]:
    parts: dict[tuple[int, int], list[Answered]] = {}
    for answer in answers:
        parts.setdefault(bounds(size(answer)), []).append(answer)
    groups = []
    for (low, high), part in sorted(parts.items()):
        sizes = {answer.record: size(answer) for answer in part}
        questions = len({(answer.record, answer.query) for answer in part})
        mean = sum(sizes.values()) / len(sizes)
        groups.append(Group(low, high, mean, len(sizes), questions, scores(part, seed)))
    return tuple(groups)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _ratio(table: np.ndarray, draws: np.ndarray, above: int, below: int) -> Estimate:
    """The sum of one column over that of another, and its percentiles over resampled documents."""
    resampled = draws @ table  # [resamples, columns]; a draw says how often each document is in it
    low, high = np.percentile(resampled[:, above] / resampled[:, below], INTERVAL)
    return Estimate(float(table[:, above].sum() / table[:, below].sum()), float(low), float(high))
