"""A report as one HTML page without scripts or outer resources; what comes from data is escaped by the template."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

from checks.catalogue import CheckFacts, read_catalogue
from checks.data.datasets import dataset_rows
from checks.docs import sections, summary
from checks.formats.pictures import HEIGHT, WIDTH, Picture, pictures
from checks.plugins import plugin_facts
from checks.printable import printable
from checks.report import details, idle_ignores, summary_line
from checks.result import FailLevel, Kind, Outcome, Report

TEMPLATE = Path(__file__).with_name("page.html")
GROUPS: dict[Kind, str] = {  # in the order of the page: causes first
    "fail": "Failed",
    "crash": "Crashed",
    "warn": "Warnings",
    "blocked": "Blocked",
    "skip": "Not judged",
    "inapplicable": "Not applicable",
    "pass": "Passed",
}
FINDINGS = ("fail", "crash", "warn")
MEASURED = ("judged with", "evidence")  # the rows of a check that found nothing


@dataclass(frozen=True)
class _Check:
    """What the page shows of one check; texts are printable, and escaped by the template."""

    code: str
    name: str
    stage: str
    message: str
    seconds: str
    must_hold: str
    why: list[str]
    rows: list[tuple[str, str]]
    pictures: list[Picture]


def page_text(report: Report, fail_level: FailLevel = "error") -> str:
    """Return the page, in ASCII: every file, pipe and mail shows the same signs."""
    facts = {check.code: check for check in [*read_catalogue(), *plugin_facts()]}
    groups = [
        (
            kind,
            title,
            [_check(it, report, facts.get(it.code)) for it in report.outcomes if it.outcome == kind],
        )
        for kind, title in GROUPS.items()
    ]
    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = page.render(
        config=printable(report.config),
        good=report.exit_code(fail_level) == 0,
        summary=summary_line(report, fail_level),
        judged=[("d2l", report.version), *((label, printable(value)) for label, value in report.judged.items())],
        fingerprint=report.fingerprint,
        datasets=[(printable(name), printable(text)) for name, text in dataset_rows(report.datasets)],
        groups=[group for group in groups if group[2]],
        findings=FINDINGS,
        idle_ignores=[printable(text) for text in idle_ignores(report)],
        twin_cannot_show=report.twin_cannot_show,
        width=WIDTH,
        height=HEIGHT,
    )
    return text.encode("ascii", "xmlcharrefreplace").decode() + "\n"


def _check(outcome: Outcome, report: Report, facts: CheckFacts | None) -> _Check:
    """Collect what the page shows; a check that is not of d2l's own has no documentation here."""
    found = outcome.outcome in FINDINGS
    return _Check(
        code=outcome.code,
        name=outcome.name,
        stage=outcome.stage,
        message=printable(outcome.message),
        seconds=f"{outcome.seconds:.2f} s",
        must_hold=summary(facts) if facts else "",
        why=sections(facts).get("Why it matters", "").split("\n\n") if facts and found else [],
        rows=[row for row in details(outcome, report) if found or row[0] in MEASURED],
        pictures=pictures(outcome.evidence),
    )
