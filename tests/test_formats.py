"""JUnit, SARIF, GitHub's commands and the JSON schema, each read by somebody else's parser, schema or rules."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft4Validator, Draft202012Validator, ValidationError
from junitparser import Error, Failure, JUnitXml, Skipped
from support.report_schema import PUBLISHED, validated
from support.reports import FULL, reports

from checks.catalogue import read_catalogue
from checks.formats import sarif, write_report
from checks.formats.place import read_lines
from checks.printable import printable
from checks.result import Kind, Outcome, Report
from checks.selftest import Selftest, Trial
from checks.sources import resolve

CATALOGUE = read_catalogue()
OASIS = Draft4Validator(
    json.loads((Path(__file__).parent / "fixtures" / "sarif" / "sarif-schema-2.1.0.json").read_text(encoding="utf-8"))
)
drawn = settings(
    derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _catalogue_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sarif, "read_catalogue", lambda: CATALOGUE)


def only(kind: Kind, **rest: Any) -> Report:
    """A report of one check."""
    outcome = Outcome("LBL301", "labels-lost", "data", "error", kind, "a message", **rest)
    return replace(FULL, outcomes=(outcome,), unused_ignores=(), expired_ignores=())


# What stands in a file, and in which line


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        ({"settings": {"seed": 1, "lora_r": 8}}, 4),  # the first of them that the file sets
        ({"message": "max_qas_len is 5, and lora_r is 8"}, 5),
        ({"remedy": "raise lora_r", "actual": "max_qas_len: 5"}, 5),  # actual comes first
        ({"message": "the loss differs from the formula"}, 1),  # a word, not the key
        ({"message": "with loss: kl there is no teacher"}, 2),  # under the old name that the file has
        ({"expected": "dtype=bfloat16"}, 6),
        ({"message": "nothing of it is in the file: lora_alpha"}, 1),
        ({}, 1),
    ],
)
def test_a_finding_stands_at_the_key_that_it_is_about(tmp_path: Path, outcome: dict[str, Any], line: int) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# a run\nuse_kl_loss: true\n\nlora_r: 8\nmax_qas_len: 5\ndtype: bfloat16\n", encoding="utf-8")
    found = replace(FULL.outcomes[2], **{"settings": {}, "message": "", "actual": "", "expected": "", "remedy": ""})
    report = replace(
        FULL, config=str(path), outcomes=(replace(found, **outcome),), unused_ignores=(), expired_ignores=()
    )
    assert read_lines(str(path)).line(report.outcomes[0]) == line
    (result,) = log(report)["results"]
    assert result["locations"][0]["physicalLocation"]["region"] == {"startLine": line}
    (command, *_) = commands(write_report(report, "github"))
    assert command[1]["line"] == str(line)


def test_paths_are_those_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "run.yaml").write_text("lora_r: 8\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("a b/run.yaml", str(tmp_path / "a b" / "run.yaml")):
        assert read_lines(name).file == "a b/run.yaml"
        (result, *_) = log(replace(FULL, config=name))["results"]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a%20b/run.yaml"
    monkeypatch.chdir(tmp_path / "a b")
    (result, *_) = log(replace(FULL, config="/else/where.yaml"))["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "file:///else/where.yaml"


@pytest.mark.parametrize("content", [b"lora_r: [\n", b"\xff\xfe", b"- a\n", b""])
def test_a_file_that_cannot_be_read_has_a_first_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    assert read_lines(str(tmp_path / "run.yaml")).line(FULL.outcomes[2]) == 1
    assert read_lines(str(tmp_path)).line(FULL.outcomes[2]) == 1


# JUnit


def junit(report: Report | Selftest, level: Any = "error") -> tuple[JUnitXml, list[Any]]:
    text = write_report(report, "junit", level)
    assert text.isascii()
    suites = JUnitXml.fromstring(text.encode())
    cases = [case for suite in suites for case in suite]
    for kind, count in ((Failure, suites.failures), (Error, suites.errors)):
        assert sum(isinstance(result, kind) for case in cases for result in case.result) == count
    assert suites.tests == len(cases)
    return suites, cases


def test_junit_of_every_outcome() -> None:
    suites, cases = junit(FULL)
    assert [suite.name for suite in suites] == ["static", "twin", "data", "device"]
    assert [(case.name.split()[0], [type(result) for result in case.result]) for case in cases] == [
        ("TGT101", []),
        ("QNT102", []),
        ("QNT202", [Failure]),
        ("HYP202", [Error]),
        ("GRD204", [Skipped]),
        ("EXP201", [Skipped]),
        ("LBL301", []),
        ("OPT101", []),
        ("MEM401", [Skipped]),
    ]
    assert (suites.failures, suites.errors, suites.time) == (1, 1, 4.25)
    assert [(suite.tests, suite.skipped, suite.time) for suite in suites][1] == (4, 2, 1.5)
    failure = cases[2].result[0]
    assert failure.message == "gradients are missing\nin 4 layers"
    assert "expected: a cosine above 0.999\nactual: layer 0: 0.341" in failure.text
    assert "d2l explain QNT202" in failure.text
    assert "blocked by QNT202" in cases[4].result[0].text
    assert "ignored (fits)" in cases[1].system_out
    warning, found = cases[7].system_out, FULL.outcomes[7]
    assert found.outcome == "warn"
    for text in (found.expected, found.actual, found.remedy):
        assert text
        assert text in warning
    assert [(it.name, it.value) for it in next(iter(suites)).properties()] == [*FULL.judged.items()]


def test_warnings_are_failures_where_they_fail_the_run() -> None:
    assert [bool(case.result) for case in junit(only("warn"), "warn")[1]] == [True]
    assert [bool(case.result) for case in junit(only("warn", ignored=True), "warn")[1]] == [False]
    asked = replace(only("skip"), required=frozenset({"LBL301"}))
    assert [(case.name, [type(it) for it in case.result]) for case in junit(asked)[1]] == [
        ("LBL301 labels-lost", [Skipped]),
        ("exit code", [Failure]),
    ]


@drawn
@given(reports)
def test_junit_is_red_where_the_exit_code_is(report: Report) -> None:
    for level in ("error", "warn"):
        suites, cases = junit(report, level)
        assert bool(suites.failures + suites.errors) == bool(report.exit_code(level))
        for case, outcome in zip(cases, report.outcomes, strict=False):
            texts = [result.text for result in case.result] or [case.system_out]
            assert texts[0].startswith(f"{outcome.outcome}: {printable(outcome.message)}")


def test_junit_of_a_selftest() -> None:
    trials = [Trial("LBL301", name, name, "detail \x1b ]]>", 1.0) for name in ("caught", "missed", "not_applied")]
    selftest = Selftest("0.2.0", "run.yaml", "f", (*trials, Trial("X", "y", "inapplicable", "no")), seconds=3.0)
    _, cases = junit(selftest)
    assert [[type(result) for result in case.result] for case in cases] == [[], [Failure], [Error], [Skipped]]
    assert cases[1].result[0].message == "detail \\x1b ]]>"
    nothing_caught = replace(selftest, trials=selftest.trials[3:])
    assert [case.name for case in junit(nothing_caught)[1]] == ["X y", "exit code"]
    assert junit(replace(selftest, trials=selftest.trials[:1]))[0].failures == 0


# SARIF


def log(report: Report, level: Any = "error") -> dict[str, Any]:
    text = write_report(report, "sarif", level)
    assert text.isascii()
    document = json.loads(text)
    OASIS.validate(document)
    (run,) = document["runs"]
    return run


def shown(message: dict[str, str]) -> str:
    """What a viewer shows of a message: section 3.11.5 of the standard; the message has no arguments and no links."""
    assert "arguments" not in message
    assert not re.search(r"(?<!\\)\[[^\[\]]*\]\(", message["text"])
    assert not re.search(r"(?<!\{)(\{\{)*\{(?!\{)", message["text"])
    return message["text"].replace("{{", "{").replace("}}", "}").replace("\\[", "[")


def test_sarif_of_every_outcome() -> None:
    run = log(FULL)
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [outcome.code for outcome in FULL]
    results = {rules[result["ruleIndex"]]["id"]: result for result in run["results"]}
    assert {code: result["level"] for code, result in results.items()} == {
        **{"QNT102": "warning", "QNT202": "error", "OPT101": "warning"}
    }
    assert all(rules[result["ruleIndex"]]["id"] == result["ruleId"] for result in run["results"])
    assert "fix: set expert_weights: packed or dequantize" in results["QNT202"]["message"]["text"]
    assert [code for code, result in results.items() if "suppressions" in result] == ["QNT102"]
    assert "ignored (fits)" in results["QNT102"]["suppressions"][0]["justification"]
    (invocation,) = run["invocations"]
    assert (invocation["exitCode"], invocation["executionSuccessful"]) == (3, False)
    told = [(it["associatedRule"]["id"], it["level"]) for it in invocation["toolExecutionNotifications"]]
    assert told == [("HYP202", "error"), ("GRD204", "note"), ("MEM401", "note")]
    assert "KeyError" in invocation["toolExecutionNotifications"][0]["exception"]["message"]
    assert [it["message"]["text"].split()[0] for it in invocation["toolConfigurationNotifications"]] == [
        *("TGT101", "OPT101@2026-01-31")
    ]
    passed = {outcome.code for outcome in FULL if outcome.outcome in ("pass", "inapplicable")}
    assert {outcome.code for outcome in FULL} == passed | set(results) | {code for code, _ in told}


def test_rules_bring_their_documentation() -> None:
    outcomes = tuple(Outcome(it.code, it.name, it.stage, it.severity, "pass", "fine") for it in CATALOGUE)  # type: ignore[arg-type]
    rules = log(replace(FULL, outcomes=outcomes))["tool"]["driver"]["rules"]
    for rule in rules:
        assert "How to fix\n" in rule["help"]["text"]
        assert rule["shortDescription"]["text"]
        assert rule["defaultConfiguration"]["level"] in ("error", "warning")
    linked = [it.code for it in CATALOGUE if any(resolve(key).link.startswith("https://") for key in it.sources)]
    assert [rule["id"] for rule in rules if "helpUri" in rule] == linked


def test_a_fingerprint_stays_where_lines_and_numbers_change(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    found = []
    for text, actual in (("expert_weights: a\n", "1"), ("\n\nexpert_weights: b\n", "2")):
        path.write_text(text, encoding="utf-8")
        outcomes = [replace(FULL.outcomes[2], actual=actual), FULL.outcomes[1]]
        found.append(log(replace(FULL, config=str(path), outcomes=tuple(outcomes)))["results"])
    first, second = ([result["partialFingerprints"] for result in results] for results in found)
    assert first == second
    assert first[0] != first[1]
    assert [results[0]["locations"][0]["physicalLocation"]["region"]["startLine"] for results in found] == [1, 3]


def test_findings_of_two_configurations_have_fingerprints_of_their_own(tmp_path: Path) -> None:
    """Code scanning shows one of those that share a fingerprint."""
    prints = set()
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text("expert_weights: packed\n", encoding="utf-8")
        report = replace(FULL, config=str(tmp_path / name), outcomes=FULL.outcomes[2:3])
        (result,) = log(report)["results"]
        prints.update(result["partialFingerprints"].values())
    assert len(prints) == 2


@drawn
@given(reports)
def test_sarif_of_anything_follows_the_standard(report: Report) -> None:
    run = log(report)
    findings = [outcome for outcome in report if outcome.outcome in ("warn", "fail")]
    for result, outcome in zip(run["results"], findings, strict=True):
        assert shown(result["message"]).startswith(printable(outcome.message))


# GitHub


def commands(text: str) -> list[tuple[str, dict[str, str], str]]:
    """Read lines as the runner of GitHub Actions does: a command has `::` after spaces, or `##[` anywhere."""
    found = []
    for line in text.split("\n"):
        line = line.lstrip()
        if line.startswith("::") and "::" in line[2:]:
            head, _, message = line[2:].partition("::")
            name, _, rest = head.partition(" ")
            pairs = [pair.split("=", 1) for pair in rest.split(",") if pair]
            found.append((name, {key: _unescape(value, ":,") for key, value in pairs}, _unescape(message)))
        else:
            assert "##[" not in line
            assert "::" not in line
    return found


def _unescape(text: str, more: str = "") -> str:
    for sign in ("\r", "\n", *more, "%"):
        text = text.replace(f"%{ord(sign):02X}", sign)
    return text


def test_annotations_of_every_outcome() -> None:
    text = write_report(FULL, "github")
    found = commands(text)
    assert [(name, place.get("title")) for name, place, _ in found] == [
        ("error", "QNT202 experts-gradient-missing"),
        ("error", "HYP202 hypernetwork-differs"),
        ("notice", "QNT102 quantized-twice"),
        ("warning", "OPT101 odd-schedule"),
        ("notice", "2 checks not judged"),
        ("warning", "d2l: ignored without effect"),
    ]
    assert all(place["file"] == "run.yaml" for _, place, _ in found[:5])
    assert found[0][2].startswith("gradients are missing\nin 4 layers\nwhere: run.yaml, stage twin\nexpected: a cosine")
    assert text.endswith("a check crashed (exit code 3)\n")


def test_annotations_of_a_clean_report_and_of_one_that_lacks_something() -> None:
    assert commands(write_report(only("pass"), "github")) == []
    asked = replace(only("skip"), required=frozenset({"LBL301"}))
    assert [name for name, _, _ in commands(write_report(asked, "github"))] == ["error"]
    assert [name for name, _, _ in commands(write_report(only("warn"), "github", "warn"))] == ["error"]


@drawn
@given(reports)
def test_data_begins_no_command(report: Report) -> None:
    text = write_report(report, "github")
    found = commands(text)
    shown = [outcome for outcome in report if outcome.outcome in ("fail", "crash", "warn")]
    assert len(text.splitlines()) == len(found) + 1
    assert len(found) - len(shown) <= 2
    messages = [message for _, _, message in found]
    for outcome in shown:
        assert any(message.startswith(printable(outcome.message)) for message in messages)
    for _, place, _ in found[: len(shown)]:
        assert set(place) == {"file", "line", "title"}


# The JSON schema


def test_the_published_schema_is_one_and_describes_every_key() -> None:
    Draft202012Validator.check_schema(PUBLISHED)
    documents = [FULL.to_json(), Selftest("1", "c", "f", (Trial("A", "b", "caught", ""),)).to_json()]
    for document in documents:
        validated(document)
        Draft202012Validator(PUBLISHED).validate(document | {"key of a later version": 1})
    for name, document in zip(("report", "selftest"), documents, strict=True):
        assert list(PUBLISHED["$defs"][name]["properties"]) == list(document)
    assert list(PUBLISHED["$defs"]["outcome"]["properties"]) == list(documents[0]["outcomes"][0])


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it.pop("judged"),
        lambda it: it["outcomes"][0].update(outcome="maybe"),
        lambda it: it["outcomes"][0].pop("code"),
        lambda it: it["outcomes"][4].update(blocked_by=None),
        lambda it: it["outcomes"][0].update(ignored=True),
        lambda it: it["summary"].update(exit_code=5),
        lambda it: it.update(schema=2),
        lambda it: it.update(extra=1),
    ],
)
def test_the_schema_refuses_what_is_no_report(change: Any) -> None:
    document = json.loads(json.dumps(FULL.to_json()))
    change(document)
    with pytest.raises(ValidationError):
        validated(document)


@drawn
@given(reports)
def test_json_of_anything_follows_the_schema(report: Report) -> None:
    validated(json.loads(write_report(report, "json")))
