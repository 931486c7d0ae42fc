"""An earlier report speaks for a run that is the same in everything, and for no other one."""

import json
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from checks import seal
from checks.gate import reuse
from checks.result import Fail, Outcome, Pass, Report, Skip
from checks.rule import Rule
from checks.runner import run_checks
from checks.seal import digest


@dataclass(frozen=True)
class Subject:
    name: str = "run.yaml"
    fingerprint: str = "f" * 64
    judged: dict[str, str] = field(default_factory=lambda: {"versions": "torch 2", "device": "CPU only"})
    free: int = 5
    broken: bool = False


RED = Fail(message="broken", expected="whole", actual="broken", remedy="mend it")
RAN: list[str] = []


def rule(code: str, stage: str) -> Rule:
    def check(subject: Any) -> object:
        RAN.append(code)
        if code == "MEM401":
            return Pass(f"{subject.free} free") if subject.free else RED
        return (
            RED
            if subject.broken and code == "ATT201"
            else Skip("no data")
            if stage == "data"
            else Pass("fine", {"x": 0.1})
        )

    lasting = code == "BAS402"
    return Rule(code, f"toy-{code.lower()}", stage, "error", (), check, lasting=lasting)  # type: ignore[arg-type]


RULES = (
    rule("CFG101", "static"),
    rule("ATT201", "twin"),
    rule("DAT301", "data"),
    rule("BAS402", "device"),
    rule("MEM401", "device"),
)
TODAY = date(2026, 11, 27)


def written(folder: Path, subject: Subject = Subject(), **arguments: Any) -> Path:
    """Write the report of a preflight into a run's folder."""
    report = run_checks(subject, RULES, today=TODAY, **arguments)  # type: ignore[arg-type]
    (folder / "preflight.json").write_text(json.dumps(report.to_json()))
    RAN.clear()
    return folder


def tried(place: Path, subject: Subject = Subject(), ignore: dict[str, str] | None = None) -> tuple[Report | None, str]:
    return reuse(place, subject, RULES, ignore or {}, today=TODAY)  # type: ignore[arg-type]


def test_what_is_the_same_or_lasts_is_taken_and_the_device_judged_anew(tmp_path: Path) -> None:
    report, said = tried(written(tmp_path), Subject(name="again.yaml", free=3))
    assert report is not None, said
    assert RAN == ["MEM401"]
    assert said.endswith("speaks for this run: stage device is judged anew, the rest is taken from it")
    whole = run_checks(Subject(name="again.yaml", free=3), RULES)  # type: ignore[arg-type]
    assert report == whole
    assert report.to_json()["outcomes"][0].keys() == whole.to_json()["outcomes"][0].keys()
    assert isinstance(report.outcomes[0], Outcome)


def test_a_device_without_room_now_is_red_whatever_was(tmp_path: Path) -> None:
    report, _ = tried(written(tmp_path), Subject(free=0))
    assert report is not None
    assert report.exit_code() == 1


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (Subject(fingerprint="e" * 64), "it judged another configuration, data, base, tokenizer, template or library"),
        (
            Subject(judged={"versions": "torch 3", "device": "CPU only"}),
            "it judged on other versions: torch 2, and here are torch 3",
        ),
        (Subject(judged={"versions": "torch 2", "device": "H100"}), "on other device: CPU only, and here are H100"),
    ],
)
def test_another_run_is_judged_anew(tmp_path: Path, now: Subject, reason: str) -> None:
    report, said = tried(written(tmp_path), now)
    assert (report, RAN) == (None, [])
    assert "does not speak for this run" in said
    assert reason in said


def test_a_report_that_was_edited_is_none(tmp_path: Path) -> None:
    path = written(tmp_path, Subject(broken=True)) / "preflight.json"
    assert "it does not pass" in tried(tmp_path)[1]
    document = json.loads(path.read_text())
    document["outcomes"][1]["outcome"] = "pass"
    document["summary"]["exit_code"] = 0
    path.write_text(json.dumps(document))
    assert tried(tmp_path) == (None, f"the report {tmp_path} does not speak for this run: it is not as it was written")
    path.write_text(json.dumps(document | {"digest": digest(document)}))  # so it would pass: a seal, no signature
    assert tried(tmp_path)[0] is not None


def test_other_code_or_a_choice_of_checks_is_no_report_of_this_run(tmp_path: Path, monkeypatch: Any) -> None:
    assert (
        "it did not judge BAS402, MEM401"
        in tried(written(tmp_path, stages=("static", "twin", "data"), select=("CFG", "ATT201", "DAT")))[1]
    )
    written(tmp_path)
    monkeypatch.setattr("checks.gate.code_fingerprint", lambda: "other")
    assert "it was written by other code of d2l" in tried(tmp_path)[1]


@pytest.mark.parametrize(
    ("now", "speaks"),
    [
        ({}, False),
        ({"ATT201": "old@2026-11-26"}, False),
        ({"ATT": "old"}, True),
        ({"ATT201": "for another reason"}, True),
    ],
)
def test_what_was_accepted_then_has_to_be_accepted_now(tmp_path: Path, now: dict[str, str], speaks: bool) -> None:
    written(tmp_path, Subject(broken=True), ignore={"ATT201": "old"})
    report, said = tried(tmp_path, Subject(broken=True), now)
    assert (report is not None) is speaks
    assert ("it ignores ATT201, which this run does not" in said) is not speaks


def test_no_report_at_all_is_said(tmp_path: Path) -> None:
    assert tried(tmp_path) == (None, f"cannot read {tmp_path / 'preflight.json'}: No such file or directory")


def test_the_code_is_that_of_the_packages(tmp_path: Path, monkeypatch: Any) -> None:
    first = seal.code_fingerprint.__wrapped__()
    assert first == seal.code_fingerprint()
    (tmp_path / "d2l").mkdir()
    (tmp_path / "checks").mkdir()
    monkeypatch.setattr(seal, "__file__", str(tmp_path / "checks" / "seal.py"))
    empty = seal.code_fingerprint.__wrapped__()
    (tmp_path / "d2l" / "a.py").write_text("x = 1")
    assert len({first, empty, seal.code_fingerprint.__wrapped__()}) == 3


def test_a_report_of_json_is_the_report() -> None:
    report = run_checks(Subject(broken=True), RULES, ignore={"CFG101": "unused"})  # type: ignore[arg-type]
    again = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert again == replace(report, seconds=again.seconds)
    assert again.to_json()["digest"] == report.to_json()["digest"]
