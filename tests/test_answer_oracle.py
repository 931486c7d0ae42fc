"""The formulas of answers' scores beside values on paper and d2l's own scores, and EVL302 where there is one document."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.oracles import answers
from checks.production import make_subject
from checks.rules import RULES
from checks.runner import run_checks
from d2l.config.load import load_config
from d2l.evaluation import scores

TEXTS = st.lists(
    st.sampled_from(
        ["the", "a", "an", "The", "cat", "Cat,", "a-b", "a–b", "d'un", "the_", "42", "été", "ß", "\u0301", "!"]
    ),
    max_size=8,
).map(" ".join) | st.text(max_size=12)


@pytest.mark.parametrize(
    ("answer", "expected", "exact", "f1", "rouge"),
    [
        ("The Cat, sat!", "cat sat", 1, 1, 0.8),
        ("red red blue", "red blue blue", 0, 2 / 3, 2 / 3),
        ("harbour of the north", "the north harbour", 0, 0.8, 4 / 7),
        ("nobody", "a keeper", 0, 0, 0),
        ("the", "an", 1, 1, 0),
        ("", "", 1, 1, 1),
    ],
)
def test_scores_on_paper(answer: str, expected: str, exact: float, f1: float, rouge: float) -> None:
    found = [formula(answer, expected) for formula in answers.SCORES.values()]
    assert found == pytest.approx([exact, f1, rouge])


@given(answer=TEXTS, expected=TEXTS)
def test_the_formulas_agree_with_the_scores_of_evaluations(answer: str, expected: str) -> None:
    own = [scores.exact_match(answer, expected), scores.token_f1(answer, expected), scores.rouge_l(answer, expected)]
    assert [formula(answer, expected) for formula in answers.SCORES.values()] == pytest.approx(own)


def test_one_document_has_no_other(tmp_path: Path) -> None:
    record = {"context": "The lamp is red.", "prompts": ["Which colour?", "Is it blue?"], "responses": ["red", "no"]}
    data = tmp_path / "one.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for _ in range(2)), encoding="utf-8")
    subject = make_subject(load_config(overrides={"train_ds_names": [str(data)]}))
    (outcome,) = run_checks(subject, RULES, select=("EVL302",)).outcomes
    assert (outcome.outcome, outcome.message) == ("inapplicable", "the run keeps fewer than two different documents")
