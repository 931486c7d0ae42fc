"""Scores of an answer beside the expected one: exact match and F1 as SQuAD has them, ROUGE-L as its author has it.

Sources: `normalize_answer`, `exact_match_score` and `f1_score` of SQuAD's evaluation script (Rajpurkar et al. 2016), over
ASCII punctuation; ROUGE-L (Lin 2004), equation 4 with β = 1, over lower-case words of letters and digits.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

ARTICLES = ("a", "an", "the")


def squad_words(text: str) -> list[str]:
    """Return the words that count: lower-case, without punctuation and articles."""
    letters = "".join(it for it in text.lower() if it not in string.punctuation)
    runs = ["".join(run) for _, run in groupby(letters, key=lambda it: it.isalnum() or it == "_")]
    return "".join(" " if run in ARTICLES else run for run in runs).split()


def exact(answer: str, expected: str) -> float:
    """Return 1 where both have the same words in the same order, else 0."""
    return float(squad_words(answer) == squad_words(expected))


def f1(answer: str, expected: str) -> float:
    """Return the harmonic mean of precision and recall of words, each counted as often as it occurs; 1 without any in both."""
    found, wanted = squad_words(answer), squad_words(expected)
    if not found or not wanted:
        return float(found == wanted)
    rest, shared = list(wanted), 0
    for word in found:
        if word in rest:
            rest.remove(word)
            shared += 1
    return _harmonic(shared / len(found), shared / len(wanted))


def rouge_l(answer: str, expected: str) -> float:
    """Return the F-measure of the longest common subsequence of words; 1 where neither has a word."""
    found, wanted = (_words(text) for text in (answer, expected))
    if not found or not wanted:
        return float(found == wanted)
    common = _longest_common(found, wanted)
    return _harmonic(common / len(found), common / len(wanted))


def _words(text: str) -> list[str]:
    return "".join(it if it.isalnum() else " " for it in text.lower()).split()


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by the table of all prefixes."""
    above = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, theirs in enumerate(other):
            row.append(above[place] + 1 if word == theirs else max(above[place + 1], row[place]))
        above = row
    return above[-1]


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


SCORES: Mapping[str, Callable[[str, str], float]] = {"exact": exact, "f1": f1, "rouge_l": rouge_l}
