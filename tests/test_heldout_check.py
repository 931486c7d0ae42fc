"""DAT310 on held-out documents that cannot be used, or that training reads, and on runs that do not evaluate themselves."""

import json
from pathlib import Path
from typing import Any

import pytest

from checks import production
from checks.production import make_subject
from checks.result import Outcome
from checks.rules import RULES
from checks.rules.heldout_trained_on import RULE
from checks.runner import run_checks
from checks.subject import Subject
from d2l import build
from d2l.config.load import load_config


def write(file: Path, names: list[str]) -> str:
    records = [
        {"context": f"The {it} is blue.", "prompts": [f"How is the {it}?"], "responses": ["blue"]} for it in names
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def subject_of(folder: Path, trained: list[str], heldout: list[str], **changes: Any) -> Subject:
    files = {"train_ds_names": [write(folder / "train.jsonl", trained)]}
    if heldout:
        files["val_ds_names"] = [write(folder / "heldout.jsonl", heldout)]
    return make_subject(load_config(overrides={**files, **changes}))


def judge(subject: Subject) -> Outcome:
    (outcome,) = run_checks(subject, RULES, select=("DAT310",)).outcomes
    return outcome


def test_other_documents_pass_and_are_counted(tmp_path: Path) -> None:
    outcome = judge(subject_of(tmp_path, ["sea", "sky"], ["bird", "fish", "door"], eval_steps=5))
    assert (outcome.outcome, outcome.evidence["held_out"], outcome.evidence["fewest"]) == ("pass", 3, 3)


def test_the_data_of_training_is_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized: list[int] = []
    tokenize = build.tokenize

    def counting(config: Any, base: Any, chat: Any, records: Any, *rest: Any) -> Any:
        tokenized.append(len(records))
        return tokenize(config, base, chat, records, *rest)

    for module in (build, production):
        monkeypatch.setattr(module, "tokenize", counting)
    subject = subject_of(tmp_path, ["sea", "sky", "tree", "leaf"], ["bird", "fish", "door"], eval_steps=5)
    assert judge(subject).outcome == "pass"
    assert tokenized == [4, 3]


@pytest.mark.parametrize(
    ("heldout", "changes", "said"),
    [
        (["sky", "fish"], {}, "found 1 of 2 in train_ds_names too"),
        (["fish"], {}, "needs two different held-out documents"),
        (["fish", "bird"], {"loss": "kl"}, "loss: kl needs teacher logprobs"),
    ],
)
def test_what_the_run_would_refuse_after_loading_is_refused_before(
    tmp_path: Path, heldout: list[str], changes: dict[str, Any], said: str
) -> None:
    outcome = judge(subject_of(tmp_path, ["sea", "sky"], heldout, eval_steps=5, **changes))
    assert outcome.outcome == "fail"
    assert said in f"{outcome.message} {outcome.actual} {outcome.remedy}"


def test_a_run_without_evaluation_may_have_too_few_documents(tmp_path: Path) -> None:
    outcome = judge(subject_of(tmp_path, ["sea", "sky"], []))
    assert outcome.outcome == "inapplicable"
    assert "does not evaluate itself" in outcome.message


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("fault", RULE.faults, ids=lambda fault: fault.name)
def test_planted_faults_are_red(tmp_path: Path, fault: Any, evaluated: bool) -> None:
    changes = {"eval_steps": 5} if evaluated else {}
    subject = subject_of(tmp_path, [f"thing {n}" for n in range(30)], [], **changes)
    assert judge(subject).outcome == "pass"
    assert judge(fault.plant(subject)).outcome == "fail"
