"""A report as workflow commands of GitHub Actions, which shows them as annotations at the configuration's lines.

https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions
"""

from checks.formats.place import ConfigLines, read_lines
from checks.printable import printable
from checks.report import details, idle_ignores, summary_line
from checks.result import FailLevel, Outcome, Report

_FINDINGS = ("fail", "crash", "warn")


def github_text(report: Report, fail_level: FailLevel = "error") -> str:
    """Return a command for each finding, causes first, one for all that was not judged, and the summary as plain text."""
    config = read_lines(report.config)
    found = sorted(
        (outcome for outcome in report.outcomes if outcome.outcome in _FINDINGS),
        key=lambda outcome: _FINDINGS.index(outcome.outcome),
    )
    commands = [_annotation(outcome, report, config, fail_level) for outcome in found]
    left_out = [outcome for outcome in report.outcomes if outcome.outcome in ("skip", "blocked")]
    if left_out:
        level = "error" if report.exit_code(fail_level) == 4 else "notice"
        reasons = "\n".join(f"{it.code} {it.name}: {printable(it.message)}" for it in left_out)
        commands.append(_command(level, reasons, file=config.file, line=1, title=f"{len(left_out)} checks not judged"))
    if idle := idle_ignores(report):
        commands.append(_command("warning", printable("\n".join(idle)), title="d2l: ignored without effect"))
    return "\n".join([*commands, f"d2l preflight: {summary_line(report, fail_level)}", ""])


def _annotation(outcome: Outcome, report: Report, config: ConfigLines, fail_level: FailLevel) -> str:
    """Return the command for one finding; one that the user ignores is a notice."""
    level = "warning"
    if outcome.outcome == "crash" or outcome.is_finding(fail_level):
        level = "error"
    elif outcome.ignored:
        level = "notice"
    rows = [f"{label}: {text}" for label, text in details(outcome, report)]
    message = "\n".join([printable(outcome.message), *rows])
    title = f"{outcome.code} {outcome.name}"
    return _command(level, message, file=config.file, line=config.line(outcome), title=title)


def _command(level: str, message: str, **properties: str | int) -> str:
    """Write a command as the runner's own toolkit escapes it: nothing in the texts can begin another one."""
    escaped = (f"{key}={_escape(printable(str(value)), ':,')}" for key, value in properties.items())
    return f"::{level} {','.join(escaped)}::{_escape(message)}"


def _escape(text: str, more: str = "") -> str:
    """Replace the signs that end a line, and those in `more`, by their numbers; the per cent sign first."""
    for sign in ("%", "\r", "\n", *more):
        text = text.replace(sign, f"%{ord(sign):02X}")
    return text
