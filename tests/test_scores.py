"""Scores against hand-made answers and slow oracles: shared words, coverage of intervals, groups by size."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2l.evaluation.scores import (
    CONDITIONS,
    MAX_CHUNK_GROUPS,
    GradedAnswer,
    compute_scores,
    exact_match,
    group_by_chunks,
    group_by_length,
    normalize_answer,
    rouge_l,
    token_f1,
)

WORDS = st.lists(st.sampled_from(["red", "fox", "17", "the", "Éclair"]), max_size=6)


def make_answers(record: int = 0, query: int = 0, size: int = 1, **values: object) -> list[GradedAnswer]:
    """Make the answers to one question under every condition."""
    fields: Any = {
        "answer": "",
        "expected": "",
        "exact": 0.0,
        "f1": 0.0,
        "rouge_l": 0.0,
        "nll": 1.0,
        "tokens": 1,
    } | values
    return [GradedAnswer(record, query, size, size, condition, **fields) for condition in CONDITIONS]


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0),
        ("a red fox", "red", 2 / 3),
        ("red red", "red", 2 / 3),
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("", "the", 1.0),
        ("17", "71", 0.0),
    ],
)
def test_f1_counts_shared_words(answer: str, expected: str, f1: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(f1)
    assert token_f1(expected, answer) == pytest.approx(f1)


def test_answers_are_compared_without_case_punctuation_and_articles() -> None:
    assert normalize_answer(" The  Value, an 42! ") == "value 42"
    assert exact_match("the Value: 42.", "value 42") == 1.0
    assert exact_match("value 24", "value 42") == 0.0


def longest_common(found: Sequence[str], correct: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by its recursive definition."""
    if not found or not correct:
        return 0
    if found[0] == correct[0]:
        return 1 + longest_common(found[1:], correct[1:])
    return max(longest_common(found[1:], correct), longest_common(found, correct[1:]))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(found=WORDS, correct=WORDS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(found: list[str], correct: list[str]) -> None:
    expected = 2 * longest_common(found, correct) / (len(found) + len(correct)) if found or correct else 1.0
    assert rouge_l(", ".join(found).upper(), " ".join(correct)) == pytest.approx(expected)


def test_rouge_l_counts_words_of_every_script_and_their_order() -> None:
    assert rouge_l("Красная лиса", "красная лиса") == 1.0
    assert rouge_l("fox red", "red fox") == pytest.approx(0.5)
    assert token_f1("fox red", "red fox") == 1.0


def test_scores_are_means_over_questions_and_tokens() -> None:
    answers = [
        *make_answers(0, 0, exact=1.0, f1=1.0, rouge_l=1.0, nll=1.0, tokens=1),
        *make_answers(0, 1, exact=0.0, f1=0.5, rouge_l=0.2, nll=3.0, tokens=3),
        *make_answers(1, 0, exact=0.0, f1=0.0, rouge_l=0.0, nll=2.0, tokens=2),
    ]
    score = compute_scores(answers, seed=0)["document"]
    assert score.exact.value == pytest.approx(1 / 3)
    assert score.f1.value == pytest.approx(0.5)
    assert score.rouge_l.value == pytest.approx(0.4)
    assert score.perplexity.value == pytest.approx(math.exp(1))
    # document 0 alone has 1/2, document 1 alone 0: with both drawn from two, the interval reaches from one to the other
    assert (score.exact.low, score.exact.high) == pytest.approx((0.0, 0.5))


def test_relative_is_to_the_document_in_the_prompt() -> None:
    worth = {"document": 0.6, "other": 0.2, "none": 0.0, "in_prompt": 0.8}
    answers = [
        GradedAnswer(0, 0, 1, 1, condition, "", "", 0.0, worth[condition], worth[condition] / 2, 1.0, 1)
        for condition in CONDITIONS
    ]
    found = compute_scores(answers, seed=0)
    relative = {condition: (it.relative_f1, it.relative_rouge_l) for condition, it in found.items()}
    assert relative == {condition: pytest.approx((worth[condition] / 0.8,) * 2) for condition in CONDITIONS}
    silent = compute_scores(make_answers(), seed=0)["document"]
    assert (silent.relative_f1, silent.relative_rouge_l) == (None, None)


def test_documents_are_alike_whose_questions_with_several_answers_get_one() -> None:
    told = {  # document: answers beside the expected ones
        0: [("17", "17"), ("17", "23")],
        1: [("The fox.", "17"), ("fox", "23"), ("a fox", "4")],
        2: [("17", "17"), ("23", "23")],
        3: [("17", "17"), ("17", "The 17.")],  # one answer is right
        4: [("17", "17")],
        5: [("17", "17"), ("fox", "23"), ("17", "4")],
    }
    answers = [
        it
        for record, pairs in told.items()
        for query, (answer, expected) in enumerate(pairs)
        for it in make_answers(record, query, answer=answer, expected=expected)
    ]
    assert compute_scores(answers, seed=0)["document"].alike == 2 / 4
    assert [group.scores["none"].alike for group in group_by_length(answers, seed=0)] == [2 / 4]
    others = [replace(it, answer=f"{it.query}") if it.condition == "in_prompt" else it for it in answers]
    assert {condition: score.alike for condition, score in compute_scores(others, seed=0).items()} == {
        "document": 2 / 4,
        "other": 2 / 4,
        "none": 2 / 4,
        "in_prompt": 0.0,
    }


def test_no_document_with_several_answers_is_alike_to_none() -> None:
    answers = [it for query in range(3) for it in make_answers(0, query, answer="17", expected="17")]
    assert compute_scores(answers, seed=0)["document"].alike is None


def test_intervals_have_their_nominal_coverage() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for seed in range(100):
        draws = generator.random(100) < 0.3
        answers = [it for record, hit in enumerate(draws) for it in make_answers(record, exact=float(hit))]
        exact = compute_scores(answers, seed)["none"].exact
        covered += exact.low <= 0.3 <= exact.high
    assert covered >= 88


def test_a_very_low_likelihood_has_an_infinite_perplexity() -> None:
    assert compute_scores(make_answers(nll=1e5), seed=0)["none"].perplexity.value == math.inf


def test_lengths_share_a_group_up_to_the_next_power_of_two() -> None:
    sizes = [1, 2, 3, 4, 5, 8, 9, 1000]
    answers = [
        it
        for record, size in enumerate(sizes)
        for query in range(2)
        for it in make_answers(record, query, size, exact=float(size > 4))
    ]
    groups = group_by_length(answers, seed=0)
    assert [(group.low, group.high, group.documents, group.questions, group.mean) for group in groups] == [
        (1, 1, 1, 2, 1),
        (2, 2, 1, 2, 2),
        (3, 4, 2, 4, 3.5),
        (5, 8, 2, 4, 6.5),
        (9, 16, 1, 2, 9),
        (513, 1024, 1, 2, 1000),
    ]
    assert [group.scores["document"].exact.value for group in groups] == [0, 0, 0, 1, 1, 1]
    alone = [answer for answer in answers if answer.document_tokens in (5, 8)]
    assert groups[3].scores == compute_scores(alone, seed=0)


def test_each_number_of_chunks_has_a_group_unless_there_are_many() -> None:
    few = [it for record in range(MAX_CHUNK_GROUPS) for it in make_answers(record, size=record + 1)]
    assert [(group.low, group.high) for group in group_by_chunks(few, seed=0)] == [
        (n + 1, n + 1) for n in range(MAX_CHUNK_GROUPS)
    ]
    many = [*few, *make_answers(MAX_CHUNK_GROUPS, size=MAX_CHUNK_GROUPS + 1)]
    assert [(group.low, group.high) for group in group_by_chunks(many, seed=0)] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
    ]
