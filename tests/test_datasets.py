"""The table of data sets, against counts on paper."""

import json
from pathlib import Path

from checks.production import make_subject
from checks.rules.records_dropped import RULE
from checks.runner import run_checks
from d2l.config.load import load_config


def record(context: str, *prompts: str) -> dict[str, object]:
    return {"context": context, "prompts": prompts, "responses": ["Red."] * len(prompts)}


def test_counts_of_two_files_are_those_on_paper(tmp_path: Path) -> None:
    one = [record("The bridge is red.", "Which colour?", "What is red?"), record("It is a tower.", "What?")]
    other = [one[0], record("The bridge is red.", "Why?"), record("A river. " * 200, "Where?")]
    for name, records in (("one", one), ("other", other)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    names = [str(tmp_path / "one.jsonl"), str(tmp_path / "other.jsonl")]
    settings = {"train_ds_names": json.dumps(names), "max_ctx_len": "200", "max_qas_per_sample": "1"}
    subject = make_subject(load_config(Path("configs/tiny_gpt_oss.yaml"), settings))
    assert subject.tokenizer is not None
    answer = len(subject.tokenizer("Red.")["input_ids"]) + 1  # and its end token
    report = run_checks(subject, [RULE])
    first, second = report.datasets
    assert (first["name"], second["name"]) == tuple(names)
    keys = ("records", "packed_records", "split_records", "rows", "questions", "questions_in_rows")
    assert [first[key] for key in keys] == [2, 2, 1, 3, 3, 3]
    assert [second[key] for key in keys] == [3, 2, 1, 3, 4, 3]
    assert (first["dropped"], second["dropped"]) == ({}, {"document too long": 1})
    assert [it["documents_without_questions"] for it in (first, second)] == [0, 0]
    assert [(it["duplicates"], it["repeated_documents"]) for it in (first, second)] == [(0, 0), (1, 2)]
    assert [it["ending_in_stop_token"] for it in (first, second)] == [3, 3]
    assert first["supervised_tokens"] == second["supervised_tokens"] == 3 * answer


def test_a_document_that_is_too_long_is_not_one_without_questions(tmp_path: Path) -> None:
    """Only those are counted that fit, and whose questions do not."""
    long = "Which river? " * 200
    records = [
        record("The bridge is red.", "Which colour?", long),
        record("It is a tower.", long),
        record("It is a ferry.", long, long),
        record("A river. " * 200, "Where?", "Which?"),
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    settings = {"train_ds_names": json.dumps([str(path)]), "max_ctx_len": "200", "max_qas_len": "200"}
    report = run_checks(make_subject(load_config(Path("configs/tiny_gpt_oss.yaml"), settings)), [RULE])
    (counts,) = report.datasets
    assert counts["dropped"] == {"question too long": 4, "document too long": 1}
    assert (counts["records"], counts["packed_records"], counts["documents_without_questions"]) == (4, 1, 2)
