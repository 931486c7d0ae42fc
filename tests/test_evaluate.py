"""Evaluation: what each condition is given, scores against hand-made answers, and intervals that a seed repeats."""

import math
import random

import numpy as np
import pytest
import torch
from tiny_run import make_run

from d2l.answer import ask, internalize
from d2l.data.needle import needle_records
from d2l.data.packing import collate
from d2l.data.tokenize import Limits, Row, tokenize_record
from d2l.errors import DataError
from d2l.evaluate import (
    CONDITIONS,
    Answered,
    Condition,
    Evaluation,
    _other_documents,
    _scores,
    evaluate,
    normalized,
    token_f1,
)
from d2l.train.losses import label_positions
from d2l.trained import Trained, load_trained

RECORDS = needle_records(documents=3, pairs=2, digits=2, filler_tokens=8, seed=5, split="heldout")
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    trained = load_trained(make_run(tmp_path_factory.mktemp("run")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.model.hypernet.named_parameters():
            if name.startswith("scaler_B"):  # the LoRA of an untrained hypernetwork is zero
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return trained


@pytest.fixture(scope="module")
def evaluation(trained: Trained) -> Evaluation:
    return evaluate(trained, RECORDS, seed=1, max_new_tokens=NEW_TOKENS)


def under(condition: Condition, evaluation: Evaluation) -> list[Answered]:
    return [answer for answer in evaluation.answers if answer.condition == condition]


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
    assert normalized(" The  Value, an 42! ") == "value 42"


def test_every_question_is_answered_under_every_condition(evaluation: Evaluation) -> None:
    assert (evaluation.documents, evaluation.questions) == (3, 6)
    asked = [(answer.condition, answer.record, answer.query) for answer in evaluation.answers]
    assert sorted(asked) == sorted((c, r, q) for c in CONDITIONS for r in range(3) for q in range(2))


def test_each_condition_is_given_its_lora_and_prompt(trained: Trained, evaluation: Evaluation) -> None:
    others = _other_documents(RECORDS, random.Random("1 other"))
    for index, record in enumerate(RECORDS):
        for query, question in enumerate(record.prompts):
            own, other = internalize(trained, record.context), internalize(trained, RECORDS[others[index]].context)
            in_prompt = f"{record.context}\n\n{question}"
            expected = {
                "document": ask(trained, own, question, NEW_TOKENS),
                "other": ask(trained, other, question, NEW_TOKENS),
                "none": ask(trained, None, question, NEW_TOKENS),
                "in_prompt": ask(trained, None, in_prompt, NEW_TOKENS),
            }
            found = {it.condition: it.answer for it in evaluation.answers if (it.record, it.query) == (index, query)}
            assert found == expected


def test_likelihood_is_that_of_the_training_loss(trained: Trained, evaluation: Evaluation) -> None:
    part = tokenize_record(0, RECORDS[1], trained.chat, Limits(), None)
    lora = internalize(trained, RECORDS[1].context)
    for answer in [it for it in under("document", evaluation) if it.record == 1]:
        batch = collate([Row(0, part.rows[0].chunks, (part.rows[0].queries[answer.query],))])
        positions = label_positions(batch)
        with torch.no_grad():
            logits = trained.model.logits(batch, lora, positions - 1)
        log_probs = logits.log_softmax(-1)[torch.arange(len(positions)), batch.labels[0, positions]]
        assert answer.nll == pytest.approx(-float(log_probs.sum()), rel=1e-4)
        assert answer.tokens == len(positions)


def test_conditions_differ_in_what_they_see(evaluation: Evaluation) -> None:
    losses = {c: [answer.nll for answer in under(c, evaluation)] for c in CONDITIONS}
    assert len({tuple(values) for values in losses.values()}) == len(CONDITIONS)


def test_scores_are_means_over_questions_and_tokens() -> None:
    answers = [
        Answered(record, query, condition, "", exact, f1, nll, tokens)
        for condition in CONDITIONS
        for record, query, exact, f1, nll, tokens in [(0, 0, 1, 1, 1, 1), (0, 1, 0, 0.5, 3, 3), (1, 0, 0, 0, 2, 2)]
    ]
    score = _scores(answers, np.random.default_rng(0))["document"]
    assert score.exact.value == pytest.approx(1 / 3)
    assert score.f1.value == pytest.approx(0.5)
    assert score.perplexity.value == pytest.approx(math.exp(1))
    assert score.relative_f1 == 1.0
    # document 0 alone has 1/2, document 1 alone 0: with both drawn from two, the interval reaches from one to the other
    assert (score.exact.low, score.exact.high) == pytest.approx((0.0, 0.5))


def test_an_interval_holds_what_was_drawn_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        draws = generator.random(100) < 0.3
        answers = [Answered(i, 0, c, "", float(x), float(x), 1.0, 1) for i, x in enumerate(draws) for c in CONDITIONS]
        exact = _scores(answers, generator)["none"].exact
        covered += exact.low <= 0.3 <= exact.high
    assert covered >= 88


def test_the_seed_alone_decides(evaluation: Evaluation) -> None:
    scores = [_scores(evaluation.answers, np.random.default_rng(1)) for _ in range(2)]
    assert scores[0] == scores[1] == evaluation.scores
    others = [_other_documents(RECORDS * 9, random.Random(f"{seed} other")) for seed in (1, 1, 2)]
    assert others[0] == others[1] != others[2]


def test_another_document_is_another_text() -> None:
    doubled = [*RECORDS, RECORDS[0]]
    for index, other in enumerate(_other_documents(doubled, random.Random(0))):
        assert doubled[other].context != doubled[index].context
    with pytest.raises(DataError, match="found 1 in 2 records"):
        _other_documents([RECORDS[0], RECORDS[0]], random.Random(0))


def test_a_document_over_the_limits_is_refused(trained: Trained) -> None:
    long = needle_records(documents=2, pairs=2, digits=2, filler_tokens=9000, seed=5)
    with pytest.raises(DataError, match="does not fit the checkpoint"):
        evaluate(trained, long)
