"""Scores of answers: exact match, token F1, ROUGE-L and perplexity, with confidence intervals, by groups of documents."""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

Condition = Literal["document", "other", "none", "in_prompt"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
LABELS: dict[Condition, str] = {
    "document": "the document's LoRA",
    "other": "another document's LoRA",
    "none": "no document",
    "in_prompt": "document in the prompt",
}
SHORT_LABELS: dict[Condition, str] = {
    "document": "LoRA",
    "other": "other LoRA",
    "none": "none",
    "in_prompt": "in prompt",
}
CEILING: Condition = "in_prompt"
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles: a 95% confidence interval
MAX_CHUNK_GROUPS = 12  # up to so many different numbers of chunks have a group each; more of them share groups

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class GradedAnswer:
    """Answer to one question under one condition, with its scores.

    Attributes:
        record, query: index of the document, and of its question.
        document_tokens, chunks: length of the document, and number of its chunks.
        expected: the record's answer.
        exact: 1.0 where the answer equals the expected one, else 0.0; both normalised as in SQuAD.
        f1: F1 of the words of both, 0 to 1.
        rouge_l: F-measure of their longest common subsequence of words, 0 to 1.
        nll: negative log-likelihood of the expected answer, in nats.
        tokens: number of tokens of the expected answer.
    """

    record: int
    query: int
    document_tokens: int
    chunks: int
    condition: Condition
    answer: str
    expected: str
    exact: float
    f1: float
    rouge_l: float
    nll: float
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """Mean with its 95% confidence interval, from resampled documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """Scores of one condition.

    Attributes:
        relative_f1, relative_rouge_l: divided by those of the document in the prompt, None where those are 0.
        alike: share of the documents with several expected answers whose questions all got one, as from a LoRA that does
            not look at the question; None where no document has several.
    """

    exact: Estimate
    f1: Estimate
    rouge_l: Estimate
    perplexity: Estimate
    relative_f1: float | None
    relative_rouge_l: float | None
    alike: float | None


@dataclass(frozen=True)
class Group:
    """Scores of the documents whose size lies between `low` and `high`, both included; `mean` is their mean size."""

    low: int
    high: int
    mean: float
    documents: int
    questions: int
    scores: Mapping[Condition, Score]


def normalize_answer(text: str) -> str:
    """Lower a text and remove punctuation, articles and extra white space, as SQuAD does (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, expected: str) -> float:
    """Return 1.0 where both are equal after normalising, else 0.0."""
    return float(normalize_answer(answer) == normalize_answer(expected))


def token_f1(answer: str, expected: str) -> float:
    """Compute the F1 of the answer's words after normalising, 0 to 1; 1 where both texts are empty."""
    found, correct = normalize_answer(answer).split(), normalize_answer(expected).split()
    if not found or not correct:
        return float(found == correct)
    shared = (Counter(found) & Counter(correct)).total()
    return 2 * shared / (len(found) + len(correct))


def rouge_l(answer: str, expected: str) -> float:
    """Compute the F-measure of ROUGE-L (Lin 2004) without stemming, 0 to 1; 1 where neither text has a word."""
    if not _split_words(answer) and not _split_words(expected):
        return 1.0
    return float(_rouge_scorer().score(expected, answer)["rougeL"].fmeasure)


class _WordTokenizer:
    """Tokenizer into lower-case words of letters and digits: as rouge-score's own on ASCII, but for every script."""

    def tokenize(self, text: str) -> list[str]:
        return _split_words(text)


def _split_words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=_WordTokenizer())


def compute_scores(answers: Sequence[GradedAnswer], seed: int) -> dict[Condition, Score]:
    """Compute the scores of every condition, over the same resamples of documents.

    Args:
        answers: answers on at least one document, to the same questions under every condition.
        seed: seed of the resamples.
    """
    places = {record: place for place, record in enumerate(sorted({answer.record for answer in answers}))}
    count = len(places)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    tables = {condition: np.zeros((count, 6)) for condition in CONDITIONS}
    for it in answers:  # sums over each document
        tables[it.condition][places[it.record]] += (1, it.exact, it.f1, it.rouge_l, it.nll, it.tokens)
    f1_ceiling, rouge_ceiling = (_estimate_ratio(tables[CEILING], draws, column, 0).value for column in (2, 3))
    result: dict[Condition, Score] = {}
    for condition, table in tables.items():
        exact, f1, rouge = (_estimate_ratio(table, draws, column, 0) for column in (1, 2, 3))
        nll = _estimate_ratio(table, draws, 4, 5)
        result[condition] = Score(
            exact=exact,
            f1=f1,
            rouge_l=rouge,
            perplexity=Estimate(_exp(nll.value), _exp(nll.low), _exp(nll.high)),
            relative_f1=f1.value / f1_ceiling if f1_ceiling else None,
            relative_rouge_l=rouge.value / rouge_ceiling if rouge_ceiling else None,
            alike=_share_answered_alike([it for it in answers if it.condition == condition]),
        )
    return result


def _share_answered_alike(answers: Iterable[GradedAnswer]) -> float | None:
    """Return the share of documents that got one answer to all questions, of those whose questions have several."""
    given: dict[int, set[str]] = defaultdict(set)
    expected: dict[int, set[str]] = defaultdict(set)
    for it in answers:
        given[it.record].add(normalize_answer(it.answer))
        expected[it.record].add(normalize_answer(it.expected))
    several = [record for record, texts in expected.items() if len(texts) > 1]
    return sum(len(given[record]) == 1 for record in several) / len(several) if several else None


def group_by_length(answers: Sequence[GradedAnswer], seed: int) -> tuple[Group, ...]:
    """Group documents by their tokens, by powers of two, shortest first, and compute the scores of each group."""
    return _group_documents(answers, lambda answer: answer.document_tokens, _doubling_range, seed)


def group_by_chunks(answers: Sequence[GradedAnswer], seed: int) -> tuple[Group, ...]:
    """Group documents by their number of chunks, or by powers of two where there are many numbers, fewest first."""
    few = len({answer.chunks for answer in answers}) <= MAX_CHUNK_GROUPS
    size_range = (lambda size: (size, size)) if few else _doubling_range
    return _group_documents(answers, lambda answer: answer.chunks, size_range, seed)


def _doubling_range(size: int) -> tuple[int, int]:
    """Return the bounds of the range that holds a size: 1, 2, 3 to 4, 5 to 8 and so on."""
    high = 1 << (size - 1).bit_length()
    return high // 2 + 1, high


def _group_documents(
    answers: Sequence[GradedAnswer],
    size: Callable[[GradedAnswer], int],
    size_range: Callable[[int], tuple[int, int]],
    seed: int,
) -> tuple[Group, ...]:
    """Group documents by the range of their size, smallest first, and compute the scores of each group."""
    parts: dict[tuple[int, int], list[GradedAnswer]] = {}
    for answer in answers:
        parts.setdefault(size_range(size(answer)), []).append(answer)
    groups = []
    for (low, high), part in sorted(parts.items()):
        sizes = {answer.record: size(answer) for answer in part}
        questions = len({(answer.record, answer.query) for answer in part})
        mean = sum(sizes.values()) / len(sizes)
        groups.append(Group(low, high, mean, len(sizes), questions, compute_scores(part, seed)))
    return tuple(groups)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _estimate_ratio(table: np.ndarray, draws: np.ndarray, above: int, below: int) -> Estimate:
    """Divide the sum of one column by that of another, with an interval from resampled documents.

    Args:
        table: sums over each document, [documents, columns].
        draws: number of times that a resample holds each document, [resamples, documents].
        above, below: index of the numerator's column, and of the denominator's.
    """
    resampled = draws @ table  # [resamples, columns]
    low, high = np.percentile(resampled[:, above] / resampled[:, below], INTERVAL)
    return Estimate(float(table[:, above].sum() / table[:, below].sum()), float(low), float(high))
