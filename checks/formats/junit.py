"""A report or a selftest as JUnit XML: a test suite for each stage, a test case for each check or planted fault."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from checks.printable import printable
from checks.report import details, plain_text
from checks.result import FailLevel, Outcome, Report
from checks.selftest import Selftest, Trial

_NOT_RUN = ("skip", "blocked", "inapplicable")


def junit_text(report: Report | Selftest, fail_level: FailLevel = "error") -> str:
    """Return the XML document, in ASCII: every file and pipe can hold it.

    It holds a failure or an error if, and only if, the exit code is not 0: where no single check stands for the code,
    such as one that was asked for and did not run, a test case of its own does.
    """
    root = Element("testsuites", name="d2l selftest" if isinstance(report, Selftest) else "d2l preflight")
    if isinstance(report, Selftest):
        _suite(root, "planted faults", [_trial(trial) for trial in report.trials])
    else:
        for stage, outcomes in groupby(report.outcomes, key=lambda outcome: outcome.stage):
            _suite(root, stage, [_outcome(outcome, report, fail_level) for outcome in outcomes], report.judged)
    code = report.exit_code(fail_level)
    if code and root.find(".//failure") is None and root.find(".//error") is None:
        *_, summary = plain_text(report, fail_level).rstrip().splitlines()
        _suite(root, "exit code", [_case("exit code", "d2l", 0.0, "failure", f"exit code {code}", summary)])
    _count(root, root.iter("testcase"), report.seconds)
    indent(root)
    text: str = tostring(root, encoding="us-ascii", xml_declaration=True).decode()
    return text + "\n"


def _suite(root: Element, name: str, cases: list[Element], judged: Mapping[str, str] | None = None) -> None:
    """Add a suite of test cases, with what was judged as its properties."""
    suite = SubElement(root, "testsuite", name=name)
    if judged:
        properties = SubElement(suite, "properties")
        for label, value in judged.items():
            SubElement(properties, "property", name=printable(label), value=printable(value))
    suite.extend(cases)
    _count(suite, cases, sum(float(case.get("time", 0)) for case in cases))


def _count(element: Element, cases: Iterable[Element], seconds: float) -> None:
    """Write the number of test cases, and of those that end in each way, as attributes."""
    found = list(cases)
    element.set("tests", str(len(found)))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        if attribute != "skipped" or element.tag == "testsuite":  # the schema knows no skipped ones of all suites
            element.set(attribute, str(sum(case.find(tag) is not None for case in found)))
    element.set("time", f"{seconds:.3f}")


def _outcome(outcome: Outcome, report: Report, fail_level: FailLevel) -> Element:
    """Return the test case of a check: a warning that fails nothing passes, and says what it warns of."""
    if outcome.outcome == "crash":
        kind = "error"
    elif outcome.is_finding(fail_level):
        kind = "failure"
    else:
        kind = "skipped" if outcome.outcome in _NOT_RUN else "system-out"
    found = outcome.outcome in ("fail", "warn", "crash")
    rows = [f"{label}: {text}" for label, text in details(outcome, report)] if found else []
    name = f"{outcome.code} {outcome.name}"
    text = "\n".join([f"{outcome.outcome}: {printable(outcome.message)}", *rows])
    return _case(name, f"d2l.{outcome.stage}", outcome.seconds, kind, printable(outcome.message), text)


def _trial(trial: Trial) -> Element:
    """Return the test case of a planted fault."""
    kinds = {"caught": "system-out", "missed": "failure", "not_applied": "error", "inapplicable": "skipped"}
    text = printable(trial.detail)
    return _case(f"{trial.code} {trial.fault}", "d2l.selftest", trial.seconds, kinds[trial.result], text, text)


def _case(name: str, classname: str, seconds: float, kind: str, message: str, text: str) -> Element:
    case = Element("testcase", name=printable(name), classname=classname, time=f"{seconds:.3f}")
    result = SubElement(case, kind)
    if kind in ("failure", "error"):
        result.set("message", message)
        result.set("type", kind)
    result.text = text
    return case
