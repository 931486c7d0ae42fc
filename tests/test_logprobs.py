"""Validation of teacher logprobs: unusable ones are refused early, with the record's name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import tiny_config
from typer.testing import CliRunner

import cli
from checks.rule import Rule
from checks.rules import RULES
from d2l import build
from d2l.build import Components
from d2l.data.logprobs import check_logprobs, require_teacher_logprobs
from d2l.data.records import Record, write_records
from d2l.errors import DataError


@pytest.mark.parametrize(
    ("vals", "indices", "expected"),
    [
        ([[-0.1, -3.0]], [[1, 2]], "1 entries for 2 supervised tokens"),
        ([[-0.1, -3.0]] * 2, [[1, 2]], "of one shape"),
        ([[-0.1, -3.0], [-0.1]], [[1, 2], [1]], "as many for every token"),
        ([["x"], ["y"]], [[1], [2]], "expected numbers"),
        ([], [], "of one shape"),
        ([[], []], [[], []], "of one shape"),
        ([[-0.1]] * 2, [[1.0]] * 2, "float64"),
        ([[-0.1]] * 2, [[-1]] * 2, "of one shape"),
        ([[-0.1], [float("-inf")]], [[1]] * 2, "not finite"),
        ([[-0.1], [float("nan")]], [[1]] * 2, "not finite"),
        ([[-0.1, -0.1]] * 2, [[1, 2]] * 2, "sum to 1.81 > 1"),
    ],
)
def test_teacher_logprobs_that_do_not_fit(vals: list, indices: list, expected: str) -> None:
    with pytest.raises(DataError, match="teacher logprobs") as caught:
        check_logprobs(vals, indices, n_labels=2)
    assert expected in str(caught.value)


def test_teacher_logprobs_may_sum_to_one_within_bfloat16() -> None:
    check_logprobs([[-0.6904, -0.6904], [-9.0, -1.0]], [[1, 2], [3, 4]], n_labels=2)


def make_record(*ids: Any, source: str = "a.jsonl:1") -> Record:
    """Make a record with one prompt for each of `ids`, a teacher's token ids [token][k]."""
    texts = tuple("x" for _ in ids)
    return Record("a", texts, texts, source, tuple(((-1.0,),) for _ in ids), ids)


def test_records_without_a_teacher_are_named() -> None:
    records = [make_record(((1,),)), Record("a", ("p",), ("r",), "a.jsonl:2")] + [
        Record("b", ("p",), ("r",), "b:1")
    ] * 9
    with pytest.raises(DataError) as caught:
        require_teacher_logprobs(records, 10)
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["loss: kl needs teacher logprobs; 10 of 11 records have none:", "  record 1 (a.jsonl:2)"]
    assert "and 5 more" in lines[-2]
    assert lines[-1].endswith("--set loss=ce")


def test_ids_beyond_the_vocabulary_are_named_with_record_and_prompt() -> None:
    records = [make_record(((9,), (0,))), make_record(((1,),), ((3,), (10,)), source="a.jsonl:2")]
    require_teacher_logprobs(records, 11)
    with pytest.raises(DataError, match=r"beyond the 10 of .*:\n  record 1 \(a\.jsonl:2\), prompt 1: token id 10\n"):
        require_teacher_logprobs(records, 10)


@pytest.mark.parametrize("ids", [3, "x", ((1,), (2, 3)), (("x",),), (), ((),), ((None,),)])
def test_malformed_tables_are_left_to_check_logprobs(ids: Any) -> None:
    require_teacher_logprobs([make_record(ids)], 10)


N_LABELS = 6  # supervised tokens of the answer below: five digits and the end token


@pytest.mark.parametrize(
    ("largest", "problem"),
    [
        (1023, None),
        (1024, r"record 1 \(.*:2\), prompt 0: token id 1,024"),
        (None, r"1 of 2 records have none:\n.*:2\)"),
    ],
)
@pytest.mark.parametrize("cached", [True, False])
def test_rows_of_a_kl_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int | None, problem: str | None, cached: bool
) -> None:
    if cached:
        monkeypatch.setattr(build, "CACHED_FROM", 1)
    path = tmp_path / "teacher.jsonl"
    write_records_with_logprobs(path, largest)
    config = tiny_config(loss="kl", train_ds_names=str(path), cache=cached, cache_dir=str(tmp_path / "cache"))
    if problem is None:
        assert len(Components(config).rows) == 2
        return
    with pytest.raises(DataError, match=problem):
        _ = Components(config).rows


def write_records_with_logprobs(path: Path, largest: int | None) -> None:
    """Write two records; the second has that id among its teacher's, or no teacher logprobs."""

    def record(ids: list[int] | None) -> Record:
        vals = None if ids is None else (tuple((-1.0,) for _ in range(N_LABELS)),)
        indices = None if ids is None else (tuple((ids[place % len(ids)],) for place in range(N_LABELS)),)
        return Record("A number: 12345.", ("Which?",), ("12345",), "", vals, indices)

    write_records(path, [record([1]), record(None if largest is None else [1, largest])])


# What is refused is refused by the data; the checks of a twin would find nothing
OF_DATA = tuple(rule for rule in RULES if rule.stage in ("static", "data"))


@pytest.mark.parametrize(
    "rules", [pytest.param(OF_DATA, id="of data"), pytest.param(RULES, id="all", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("largest", "words"), [(5000, "token id 5,000"), (None, "teacher logprobs")])
def test_training_does_not_start(
    tmp_path: Path, largest: int | None, words: str, rules: Sequence[Rule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checks.rules.RULES", rules)
    path = tmp_path / "teacher.jsonl"
    write_records_with_logprobs(path, largest)
    arguments = ["train", "configs/tiny_gpt_oss.yaml", "--data", str(path), "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(cli.app, [*arguments, "--set", "loss=kl"], prog_name="d2l")
    assert result.exit_code in (2, 10), result.output
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()
