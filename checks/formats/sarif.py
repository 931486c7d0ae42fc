"""A report as SARIF 2.1.0: findings at the lines of the configuration, for code scanning and editors.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from checks.catalogue import CheckFacts, read_catalogue
from checks.docs import sections, summary
from checks.formats.place import ConfigLines, read_lines
from checks.plugins import plugin_facts
from checks.printable import printable
from checks.report import details, idle_ignores, summary_line
from checks.result import FailLevel, Outcome, Report
from checks.sources import resolve

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"fail": "error", "warn": "warning"}  # of what becomes a result
_NOT_RUN = {"crash": "error", "skip": "note", "blocked": "note"}  # of what says nothing about the configuration
_LINK = re.compile(r"\[(?=[^\[\]]*\]\()")


def sarif_text(report: Report, fail_level: FailLevel = "error") -> str:
    """Return the log of one run, as JSON in ASCII.

    Failures and warnings are results; crashes and what was not judged are notifications of the invocation, so that they
    are not taken for findings. What passed or does not apply stands in the rules alone.
    """
    config, facts = read_lines(report.config), {check.code: check for check in [*read_catalogue(), *plugin_facts()]}
    code = report.exit_code(fail_level)
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "d2l",
                "fullName": f"d2l {report.version} preflight",
                "version": report.version,
                "rules": [_rule(outcome, facts.get(outcome.code)) for outcome in report.outcomes],
            }
        },
        "automationDetails": {"id": f"d2l-preflight/{printable(config.file)}/"},
        "invocations": [
            {
                "executionSuccessful": code != 3,
                "exitCode": code,
                "exitCodeDescription": summary_line(report, fail_level),
                "toolExecutionNotifications": [
                    _notification(index, outcome)
                    for index, outcome in enumerate(report.outcomes)
                    if outcome.outcome in _NOT_RUN
                ],
                "toolConfigurationNotifications": [
                    {"level": "warning", "message": _message(text)} for text in idle_ignores(report)
                ],
            }
        ],
        "results": [
            _result(index, outcome, report, config)
            for index, outcome in enumerate(report.outcomes)
            if outcome.outcome in _LEVELS
        ],
        "columnKind": "unicodeCodePoints",
        "properties": {
            "fingerprint": report.fingerprint,
            "judged": {label: printable(value) for label, value in report.judged.items()},
            "outcomes": {outcome.code: outcome.outcome for outcome in report.outcomes},
        },
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _rule(outcome: Outcome, facts: CheckFacts | None) -> dict[str, Any]:
    """Describe a check; one that is not of d2l's own has a name only."""
    rule: dict[str, Any] = {
        "id": outcome.code,
        "name": outcome.name,
        "defaultConfiguration": {"level": outcome.severity},
        "properties": {"tags": ["d2l", outcome.stage]},
    }
    if facts is None:
        return rule
    texts = sections(facts)
    links = [source.link for source in map(resolve, facts.sources) if source.link.startswith("https://")]
    parts = [f"{heading}\n{texts[heading]}" for heading in ("Why it matters", "How to fix") if heading in texts]
    parts.append("\n".join([f"Planted faults and sources: d2l explain {outcome.code}", *links]))
    rule |= {
        "shortDescription": _message(summary(facts)),
        "fullDescription": _message(texts.get("What it does", summary(facts))),
        "help": _message("\n\n".join(parts)),
    }
    return rule | ({"helpUri": links[0]} if links else {})


def _result(index: int, outcome: Outcome, report: Report, config: ConfigLines) -> dict[str, Any]:
    """Describe a finding at its line; the fingerprint is the same wherever in the file the key moves."""
    rows = [f"{label}: {text}" for label, text in details(outcome, report)]
    identity = hashlib.sha256(f"{outcome.code}\n{config.file}".encode(errors="backslashreplace")).hexdigest()
    result: dict[str, Any] = {
        "ruleId": outcome.code,
        "ruleIndex": index,
        "level": _LEVELS[outcome.outcome],
        "message": _message("\n".join([outcome.message, *rows])),
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": _address(config.file)},
                    "region": {"startLine": config.line(outcome)},
                }
            }
        ],
        "partialFingerprints": {"d2lFinding/v1": identity},
    }
    if outcome.ignored:
        reason = printable(outcome.message)  # begins with it: `ignored (REASON): ...`
        result["suppressions"] = [{"kind": "external", "status": "accepted", "justification": reason}]
    return result


def _notification(index: int, outcome: Outcome) -> dict[str, Any]:
    """Describe a check that crashed or could not look."""
    notification: dict[str, Any] = {
        "associatedRule": {"id": outcome.code, "index": index},
        "level": _NOT_RUN[outcome.outcome],
        "message": _message(f"{outcome.outcome}: {outcome.message}"),
    }
    if traceback := outcome.evidence.get("traceback"):
        notification["exception"] = {"kind": "crash", "message": printable(str(traceback))}
    return notification


def _message(text: str) -> dict[str, str]:
    """Return a message in which data stands for itself: braces would be placeholders, and `[text](address)` a link."""
    escaped = printable(text).replace("{", "{{").replace("}", "}}")
    return {"text": _LINK.sub(r"\\[", escaped)}


def _address(file: str) -> str:
    """Return a path as a URI: a relative one stays relative, to the top of what is scanned."""
    return Path(file).as_uri() if Path(file).is_absolute() else quote(file, errors="surrogateescape")
