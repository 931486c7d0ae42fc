"""A report in words, for a terminal, a file or a log; or as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from rich.console import Console

from checks.data.datasets import dataset_rows
from checks.printable import printable as _clean
from checks.report_layout import STYLES, Block, Line, Page, coloured, plain
from checks.result import FailLevel, Kind, Outcome, Report
from checks.selftest import Selftest

Detail = Literal["quiet", "normal", "verbose"]  # findings alone; every check in a line; and what each one measured

MOST_LINES = 6  # of one piece of evidence; JSON has all of it
LONGEST = 400  # characters of one line of evidence
_LISTING = "bold"  # the style of a block that is no finding
TRACEBACK_LINES = 4  # the innermost frame and the error


def print_report(
    report: Report | Selftest,
    console: Console,
    fail_level: FailLevel = "error",
    detail: Detail = "normal",
    *,
    ends: bool = True,
) -> None:
    """Print the report on the console: coloured on a terminal, else as `plain_text`.

    Args:
        ends: whether the command ends with the exit code of a `Report`, which is named then.
    """
    page = _page(report, fail_level, detail)
    if not ends and isinstance(report, Report):
        page = replace(page, summary=_outcome_line(report, fail_level))
    if console.is_terminal and not console.is_dumb_terminal:
        console.print(coloured(page, console.width))
    else:
        console.out(plain(page), end="", highlight=False)


def plain_text(report: Report | Selftest, fail_level: FailLevel = "error", detail: Detail = "normal") -> str:
    """Return the report without colour, boxes or line breaks inside a check's line, for files and logs."""
    return plain(_page(report, fail_level, detail))


def json_text(report: Report | Selftest, fail_level: FailLevel = "error") -> str:
    """Return the report as a JSON document."""
    return json.dumps(report.to_json(fail_level), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _page(report: Report | Selftest, fail_level: FailLevel, detail: Detail) -> Page:
    page = _page_of_selftest(report) if isinstance(report, Selftest) else _page_of_report(report, fail_level)
    if detail == "quiet":
        loud = [block for block in page.blocks if block.style != _LISTING]
        return replace(page, judged=(), lines=(), blocks=loud)
    if detail == "verbose" and isinstance(report, Report):
        return replace(page, blocks=[*_measured(report), *page.blocks])
    return page


def _measured(report: Report) -> list[Block]:
    """Return what was measured by every check that found nothing."""
    return [
        Block(
            f"{it.code} {it.name}: {it.seconds:.2f} s",
            _LISTING,
            [("", _clean(_listed(_beside_tables(it.evidence))) or "no evidence")],
        )
        for it in report.outcomes
        if it.outcome == "pass"
    ]


def _page_of_report(report: Report, fail_level: FailLevel) -> Page:
    findings = [outcome for outcome in report.outcomes if outcome.outcome in ("warn", "fail", "crash")]
    blocks = [
        Block(
            f"{outcome.code} {outcome.name}: {_clean(outcome.message)}",
            STYLES[outcome.outcome],
            details(outcome, report),
        )
        for outcome in findings
    ]
    blocks += _by_reason(report, "Not judged", ("skip", "blocked")) + _by_reason(
        report, "Not applicable", ("inapplicable",)
    )
    if rows := [("", text) for text in idle_ignores(report)]:
        blocks.append(Block("Ignored without effect", "yellow", rows))
    if report.datasets:
        blocks.append(
            Block("Data sets", _LISTING, [(_clean(name), _clean(text)) for name, text in dataset_rows(report.datasets)])
        )
    if report.twin_cannot_show:
        short = "; ".join(limit.partition(":")[0] for limit in report.twin_cannot_show)
        blocks.append(Block("A twin cannot show", _LISTING, [("", short)]))
    code = report.exit_code(fail_level)
    return Page(
        title=f"d2l {report.version} preflight of {report.config}, fingerprint {report.fingerprint[:12]}",
        judged=[(what, _clean(value)) for what, value in report.judged.items()],
        lines=[
            Line(each.stage, each.outcome, each.code, each.name, _clean(each.message), each.seconds)
            for each in report.outcomes
        ],
        blocks=blocks,
        summary=summary_line(report, fail_level),
        good=code == 0,
    )


def _by_reason(report: Report, heading: str, kinds: Sequence[Kind]) -> list[Block]:
    """Return a block that lists the reasons of these outcomes, each once with the checks that it concerns."""
    codes: dict[str, list[str]] = {}
    for outcome in report.outcomes:
        if outcome.outcome in kinds:
            codes.setdefault(_clean(outcome.message), []).append(outcome.code)
    rows = [("", f"{reason}: {', '.join(who)}") for reason, who in codes.items()]
    return [Block(heading, _LISTING, rows)] if rows else []


def _page_of_selftest(selftest: Selftest) -> Page:
    lost = [trial for trial in selftest.trials if trial.result != "caught"]
    blocks = [
        Block(
            f"{trial.code} {trial.fault}: {trial.result.replace('_', ' ')}",
            STYLES[trial.result],
            [("", _clean(trial.detail))],
        )
        for trial in lost
    ]
    if selftest.left_out:
        rows = [("", f"{', '.join(selftest.left_out)}: of a stage that was not requested (--stage)")]
        blocks.append(Block("Not tested", _LISTING, rows))
    count = f"{selftest.count('caught')} of {len(selftest.trials)} planted faults caught"
    return Page(
        title=f"d2l {selftest.version} selftest on {selftest.config}, fingerprint {selftest.fingerprint[:12]}",
        judged=(),
        lines=[
            Line("planted faults", each.result, each.code, each.fault, _clean(each.detail), each.seconds)
            for each in selftest.trials
        ],
        blocks=blocks,
        summary=f"{count} in {selftest.seconds:.1f} s (exit code {selftest.exit_code()})",
        good=selftest.exit_code() == 0,
    )


def details(outcome: Outcome, report: Report) -> list[tuple[str, str]]:
    """Return the labelled rows below a finding's heading; a row's text may have several lines."""
    evidence = _beside_tables(outcome.evidence)
    rows = [("where", str(evidence.pop("where", f"{report.config}, stage {outcome.stage}")))]
    if outcome.judged_with:
        rows.append(("judged with", ", ".join(f"{key}: {value}" for key, value in outcome.judged_with.items())))
    frames = str(evidence.pop("traceback", "")).rstrip().splitlines()
    if frames:
        rows.append(("traceback", "\n".join(line.strip() for line in frames[-TRACEBACK_LINES:])))
    if outcome.plugin:
        rows.append(("plugin", outcome.plugin))
    rows += [("expected", outcome.expected), ("actual", outcome.actual), ("evidence", _listed(evidence))]
    advice = f"d2l explain {outcome.code}"
    rows.append(("fix", f"{outcome.remedy}\n({advice})" if outcome.remedy else advice))
    return [(label, _clean(text)) for label, text in rows if text]


def _beside_tables(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evidence without what the report shows as a table of its own."""
    return {key: value for key, value in evidence.items() if key != "datasets"}


def _listed(evidence: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}: {_shown(value)}" for key, value in evidence.items())


def _shown(value: Any) -> str:
    """Shorten one piece of evidence for a screen."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    lines = [
        line if len(line) <= LONGEST else f"{line[:LONGEST]}… (whole in the JSON report)" for line in text.splitlines()
    ]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"… ({len(lines) - MOST_LINES} more lines in the JSON report)"]
    return "\n  ".join(lines)


def idle_ignores(report: Report) -> list[str]:
    """Return what is ignored without effect, or no longer, each in a sentence."""
    unused = [f"{code} need not be ignored: the check passes" for code in report.unused_ignores]
    return unused + [f"{code} is over: its findings count again" for code in report.expired_ignores]


def summary_line(report: Report, fail_level: FailLevel = "error") -> str:
    """Return how many checks ended in each way, the time, and the exit code, in words too."""
    return f"{_outcome_line(report, fail_level)} (exit code {report.exit_code(fail_level)})"


def _outcome_line(report: Report, fail_level: FailLevel) -> str:
    verdict = _verdict(report, report.exit_code(fail_level), fail_level)
    return f"{_counts(report)} in {report.seconds:.1f} s: {verdict}"


def _counts(report: Report) -> str:
    words: dict[Kind, str] = {
        "pass": "passed",
        "warn": "warned",
        "fail": "failed",
        "crash": "crashed",
        "blocked": "blocked",
        "skip": "skipped",
        "inapplicable": "not applicable",
    }
    return ", ".join(f"{report.count(kind)} {word}" for kind, word in words.items() if report.count(kind))


def _verdict(report: Report, code: int, fail_level: FailLevel) -> str:
    """Put the exit code into words; what was not judged and warnings that it lets pass are counted."""
    warnings, left_out = report.count("warn"), report.count("skip") + report.count("blocked")
    found = f"{warnings} warning{'s' if warnings > 1 else ''}" if warnings else "nothing found"
    return {
        0: f"{found} in what was judged, {left_out} not judged" if left_out else found,
        1: f"findings at or above fail level {fail_level}",
        3: "a check crashed",
        4: "a requested check did not run",
    }[code]
