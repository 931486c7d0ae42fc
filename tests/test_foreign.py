"""Another implementation under the same checks: healthy it passes, with a documented bug exactly the right checks fail."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support.naive import Naive
from typer.testing import CliRunner

from checks import preflight
from checks.foreign import load_implementation
from checks.report import plain_text
from checks.result import Report, UsageError
from cli import app
from d2l.config.load import load_config
from d2l.io.resources import resource

RUNNER = CliRunner()
PARTIAL = {"target_modules": "[v_proj, gate_up_projection]"}


def examine(*bugs: str, select: Sequence[str] = (), **settings: str) -> Report:
    return preflight(load_config(None, settings), select=select, implementation=Naive(*bugs))


def red(report: Report) -> Mapping[str, str]:
    return {outcome.code: outcome.outcome for outcome in report if outcome.outcome in ("fail", "crash")}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "[q_proj, o_proj]", "gen_lora_l1_reg_coef": "0.1", "use_per_ctx_average_loss": "true"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"gradient_checkpointing": "false", "gradient_accumulation_steps": "2", "lr_scheduler_type": "linear"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_healthy_one_passes_every_check_that_it_offers_something_for(settings: dict[str, str]) -> None:
    report = examine(**settings)
    text = plain_text(report)
    assert {outcome.outcome for outcome in report} <= {"pass", "skip", "warn", "inapplicable"}, text
    assert report.count("pass") >= 24, text
    for outcome in report:
        if outcome.outcome == "skip":
            assert outcome.message.startswith("the implementation does not offer"), text


@pytest.mark.parametrize(
    ("bug", "settings", "code"),
    [
        ("leak", {}, "ATT201"),
        pytest.param("plain forward", {}, "LOR201", marks=pytest.mark.slow),
        pytest.param("reentrant", {}, "GRD201", marks=pytest.mark.slow),
        ("four dimensions", {}, "HYP201"),
        pytest.param("object in state", {}, "SAV201", marks=pytest.mark.slow),
        pytest.param("partial targets", PARTIAL, "TGT101", marks=pytest.mark.slow),
    ],
)
def test_a_bug_turns_exactly_its_check_red(bug: str, settings: dict[str, str], code: str) -> None:
    report = examine(bug, **settings)
    assert red(report) == {code: "fail"}, plain_text(report)


@pytest.mark.parametrize(
    ("bug", "code"), [("plain forward", "LOR201"), ("object in state", "SAV201"), ("reentrant", "GRD201")]
)
def test_a_bug_that_blocks_few_checks_is_found_among_those_beside_its_own(bug: str, code: str) -> None:
    report = examine(bug, select=[code[:3]])
    assert red(report) == {code: "fail"}, plain_text(report)


@pytest.mark.parametrize(
    ("bugs", "message"),
    [
        ((), "a target module does not exist in every layer"),
        (("partial targets",), "a target module is left out without a word"),
    ],
)
def test_targets_that_are_left_out_are_told_from_refused_ones(bugs: tuple[str, ...], message: str) -> None:
    report = examine(*bugs, select=["TGT"], **PARTIAL)
    assert red(report) == {"TGT101": "fail"}, plain_text(report)
    assert [outcome.message for outcome in report if outcome.code == "TGT101"] == [message]


def test_the_wrapper_of_the_page_is_short_and_is_diagnosed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = resource("docs/another_implementation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) < 80
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, ["preflight", "--implementation", "mine:Mine"])
    assert result.exit_code == 0, result.output
    assert "implementation  mine.Mine" in result.output
    assert "the implementation does not offer trainer" in result.output


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("mine", "expected package.module:factory"),
        ("no.such.module:make", "ModuleNotFoundError"),
        ("support.naive:Missing", "AttributeError"),
        ("support.naive:SCALE", "TypeError"),
        ("builtins:dict", "a method build, found a dict"),
    ],
)
def test_a_wrong_place_is_named(place: str, words: str) -> None:
    with pytest.raises(UsageError, match="--implementation") as error:
        load_implementation(place)
    assert words in str(error.value)
