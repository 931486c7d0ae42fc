"""Which checks run and whose findings are accepted: codes, names and beginnings of codes, days, and the configuration's own."""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date

import pytest

from checks.choice import choose, chosen_by, read_ignores, reads_data
from checks.report import plain_text
from checks.result import Fail, Pass, Skip, UsageError
from checks.rule import Rule
from checks.runner import run_checks
from checks.time_limit import time_limit
from d2l.config.schema import RunConfig


@dataclass(frozen=True)
class Subject:
    name: str = "toy.yaml"
    fingerprint: str = "f" * 64
    judged: tuple[tuple[str, str], ...] = ()


def rule(code: str, result: object = Pass("fine"), stage: str = "static") -> Rule:
    return Rule(code, f"toy-{code.lower()}", stage, "error", (), lambda subject: result)  # type: ignore[arg-type]


RED = Fail(message="broken", expected="whole", actual="broken", remedy="mend it")
RULES = (
    rule("ATT101"),
    rule("ATT102", RED),
    rule("ATT201", stage="twin"),
    rule("LBL301", Skip("no data"), stage="data"),
)
TODAY = date(2026, 11, 27)


@pytest.mark.parametrize(
    ("select", "codes", "required"),
    [
        ([], "ATT101 ATT102 ATT201 LBL301", ""),
        (["ATT"], "ATT101 ATT102 ATT201", ""),  # what cannot run here is no loss where it was not named by itself
        (["att1"], "ATT101 ATT102", ""),
        (["LBL301,ATT2"], "ATT201 LBL301", "LBL301"),
        (["toy-att102", " ATT2 ,"], "ATT102 ATT201", "ATT102"),
        (["ATT102", "ATT"], "ATT101 ATT102 ATT201", "ATT102"),
    ],
)
def test_checks_are_chosen_by_code_name_and_beginning(select: list[str], codes: str, required: str) -> None:
    choice = choose(RULES, (), select)
    assert [it.code for it in choice.rules] == codes.split()
    assert choice.required == set(required.split())


@pytest.mark.parametrize(
    ("stages", "expected"),
    [((), True), (("data",), True), (("static", "device"), True), (("static", "twin"), False)],
)
def test_data_is_read_where_a_stage_judges_it(stages: tuple[str, ...], expected: bool) -> None:
    """The plan of a card's memory counts the run's own rows."""
    assert reads_data(stages) is expected


def test_a_stage_asks_for_all_of_its_checks() -> None:
    choice = choose(RULES, ("static",), ("ATT",))
    assert ([it.code for it in choice.rules], choice.required) == (["ATT101", "ATT102"], {"ATT101", "ATT102"})


@pytest.mark.parametrize(
    ("stages", "select", "message"),
    [
        ((), ("ATX",), "there is no check 'ATX'"),
        ((), ("ATT109",), "there is no check 'ATT109': did you mean ATT10"),
        ((), (",",), "the selection names no check"),
        (("data",), ("ATT",), "no check that ATT names in stage data"),
        (("data",), ("ATT101",), "ATT101 toy-att101 belongs to stage static"),
        (("dat",), (), "there is no stage 'dat'"),
    ],
)
def test_a_choice_that_leaves_nothing_is_refused(
    stages: tuple[str, ...], select: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose(RULES, stages, select)


@pytest.mark.parametrize(("until", "accepted"), [("", True), ("@2026-11-27", True), ("@2026-11-26", False)])
def test_a_finding_is_accepted_until_the_end_of_a_day(until: str, accepted: bool) -> None:
    report = run_checks(Subject(), RULES, ignore={"att102": f"mail of a@b{until}"}, today=TODAY)  # type: ignore[arg-type]
    outcome = report.outcomes[1]
    assert (outcome.outcome, outcome.ignored) == (("warn", True) if accepted else ("fail", False))
    assert outcome.message == ("ignored (mail of a@b): broken" if accepted else "broken")
    assert report.expired_ignores == (() if accepted else ("ATT102@2026-11-26",))
    assert report.to_json()["summary"]["expired_ignores"] == list(report.expired_ignores)
    alone = replace(report, outcomes=report.outcomes[:1])  # where nothing else stands against the run
    assert (alone.exit_code("error"), alone.exit_code("warn")) == (0, int(not accepted))
    assert ("ATT102@2026-11-26 is over: its findings count again" in plain_text(report)) is not accepted


def test_a_beginning_of_codes_is_ignored_and_unused_where_all_pass() -> None:
    report = run_checks(Subject(), RULES, ignore={"ATT1": "old", "att2": "never"}, today=TODAY)  # type: ignore[arg-type]
    assert [outcome.ignored for outcome in report.outcomes] == [False, True, False, False]
    assert report.unused_ignores == ("ATT2",)
    assert (report.exit_code("error"), report.exit_code("warn")) == (0, 1)
    assert "ATT2 need not be ignored" in plain_text(report)


@pytest.mark.parametrize(
    ("reasons", "message"),
    [
        ({"ATT102": "a", "ATT": "b"}, "ATT102 is ignored twice"),
        ({"ATT102": " @2026-01-01"}, "ATT102 is ignored without a reason"),
        ({"ATT": ""}, "ATT is ignored without a reason: write --ignore ATT=REASON"),
        ({"ATT102": "why@2026-02-30"}, "ATT102 is ignored until 2026-02-30, a day that does not exist"),
        ({"ATZ": "why"}, "there is no check 'ATZ'"),
    ],
)
def test_what_cannot_be_ignored_is_refused(reasons: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_ignores(RULES, reasons)


def test_the_configuration_chooses_where_the_command_does_not() -> None:
    config = RunConfig(select_checks="ATT", ignore_checks={"ATT102": "old", "LBL301": "short"})  # type: ignore[arg-type]
    assert chosen_by(config, (), {}) == (("ATT",), {"ATT102": "old", "LBL301": "short"})
    assert chosen_by(config, ("LBL301",), {"ATT102": "new"}) == (("LBL301",), {"ATT102": "new", "LBL301": "short"})


def test_a_check_that_hangs_ends_alone() -> None:
    def hang(subject: object) -> Pass:
        with suppress(Exception):  # a check may catch whatever the run raises
            time.sleep(30)
        return Pass("late")

    slow = replace(rule("ATT103"), check=hang)
    report = run_checks(Subject(), (*RULES[:1], slow, *RULES[2:3]), seconds=0.05)  # type: ignore[arg-type]
    assert [outcome.outcome for outcome in report] == ["pass", "crash", "pass"]
    assert report.outcomes[1].message == "did not finish within 0.05 s"
    assert "--timeout" in report.outcomes[1].remedy
    assert report.exit_code() == 3
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # no alarm is left


def test_no_alarm_is_left_behind_a_check_that_ends_in_time() -> None:
    """It would end `d2l train` in the midst of its steps."""
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(100):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_no_limit_is_no_limit() -> None:
    with time_limit(0):
        time.sleep(0.01)


def test_a_quiet_report_is_its_findings_and_a_verbose_one_has_all_evidence() -> None:
    measured = rule("ATT101", Pass("fine", {"bytes": 17}))
    report = run_checks(Subject(), (measured, *RULES[1:]))  # type: ignore[arg-type]
    quiet, normal, verbose = (plain_text(report, detail=detail) for detail in ("quiet", "normal", "verbose"))
    assert "ATT102 toy-att102: broken" in quiet
    assert "ATT101" not in quiet
    assert "no data" not in quiet
    assert quiet.splitlines()[-1] == normal.splitlines()[-1]
    assert "bytes: 17" in verbose
    assert "bytes: 17" not in normal
    assert set(normal.splitlines()) < set(verbose.splitlines())
