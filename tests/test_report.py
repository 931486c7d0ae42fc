"""What people read: every word of a report, on a terminal and without one."""

import io
import re

import pytest
from rich.console import Console

from checks.report import json_text, plain_text, print_report
from checks.result import Outcome, Report
from checks.selftest import Selftest, Trial

PASS = Outcome("CFG101", "targets-match-nothing", "static", "error", "pass", "q_proj [4 Linears] in every layer")
WARN = Outcome(
    *("QNT102", "experts-in-bf16", "static", "warning", "warn", "ignored (fits): kernels [missing]"),
    ignored=True,
    expected="packed",
    actual="bf16",
    remedy="pip install kernels",
)
FAIL = Outcome(
    *("ATT201", "packed-documents-leak", "twin", "error", "fail", "document 2 sees document 1\nin layer 3"),
    expected="packed = alone within 1e-05",
    actual="largest difference 0.34",
    evidence={"largest_difference": 0.341234567, "layers": [3, 5], "text": "evil \x1b[31m\ttext", "many": "x\n" * 20},
    remedy="pass one mask for each layer type",
    seconds=1.26,
)
CRASH = Outcome(
    *("HYP202", "document-ignored", "twin", "error", "crash", "crashed: KeyError: 'x'"),
    evidence={"traceback": "Traceback\n  File a\n    a()\n  File b, line 2\n    b()\n    ^^^\nKeyError: 'x'\n"},
    remedy="report it",
)
BLOCKED = Outcome(*("ATT203", "future-visible", "twin", "error", "blocked", "blocked by ATT201"), blocked_by="ATT201")
EXPORT = Outcome("EXP201", "export-differs", "twin", "error", "inapplicable", "no adapter format")
SKIPS = [
    Outcome(code, name, "data", "error", "skip", "no data file: give --data FILE")
    for code, name in (("DAT301", "labels-lost"), ("DAT302", "rows-dropped"))
]


def report(*outcomes, **rest):
    return Report("0.1.0", "configs/tiny.yaml", "abcdef0123456789", outcomes, **rest)


FULL = report(
    *(PASS, WARN, FAIL, CRASH, BLOCKED, EXPORT, *SKIPS),
    judged={"base model": "tiny", "data": "none named"},
    unused_ignores=("CFG101",),
    twin_cannot_show=("running out of memory: a twin is small", "CUDA kernels"),
    seconds=4.26,
)


def terminal(value, width, **options):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, **options)
    print_report(value, console)
    return console.file.getvalue()


def without_colour(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_plain_text_word_for_word():
    assert (
        plain_text(FULL)
        == """\
d2l 0.1.0 preflight of configs/tiny.yaml, fingerprint abcdef012345
  base model  tiny
  data        none named

CFG101 targets-match-nothing  pass     q_proj [4 Linears] in every layer
QNT102 experts-in-bf16        WARN     ignored (fits): kernels [missing]
ATT201 packed-documents-leak  FAIL     document 2 sees document 1 in layer 3
HYP202 document-ignored       CRASH    crashed: KeyError: 'x'
ATT203 future-visible         blocked  blocked by ATT201
EXP201 export-differs         n/a      no adapter format
DAT301 labels-lost            skip     no data file: give --data FILE
DAT302 rows-dropped           skip     no data file: give --data FILE

QNT102 experts-in-bf16: ignored (fits): kernels [missing]
  where     configs/tiny.yaml, stage static
  expected  packed
  actual    bf16
  fix       pip install kernels
            (d2l explain QNT102)

ATT201 packed-documents-leak: document 2 sees document 1
in layer 3
  where     configs/tiny.yaml, stage twin
  expected  packed = alone within 1e-05
  actual    largest difference 0.34
  evidence  largest_difference: 0.341235
            layers: [3, 5]
            text: evil \\x1b[31m    text
            many: x
              x
              x
              x
              x
              x
              … (14 more lines in the JSON report)
  fix       pass one mask for each layer type
            (d2l explain ATT201)

HYP202 document-ignored: crashed: KeyError: 'x'
  where      configs/tiny.yaml, stage twin
  traceback  File b, line 2
             b()
             ^^^
             KeyError: 'x'
  fix        report it
             (d2l explain HYP202)

Not judged
  blocked by ATT201: ATT203
  no data file: give --data FILE: DAT301, DAT302

Not applicable
  no adapter format: EXP201

Ignored without effect
  CFG101 need not be ignored: the check passes

A twin cannot show
  running out of memory; CUDA kernels

1 passed, 1 warned, 1 failed, 1 crashed, 1 blocked, 2 skipped, 1 not applicable in 4.3 s: a check crashed (exit code 3)
"""
    )


def test_evidence_can_say_where():
    outcome = Outcome("DAT301", "doubled-bos", "data", "error", "fail", "found", evidence={"where": "a.jsonl, line 7"})
    text = plain_text(report(outcome))
    assert "  where  a.jsonl, line 7\n" in text
    assert "evidence" not in text


@pytest.mark.parametrize(
    ("value", "level", "verdict"),
    [
        (report(PASS), "warn", "1 passed in 0.0 s: nothing found (exit code 0)"),
        (report(PASS, WARN), "error", "1 passed, 1 warned in 0.0 s: 1 warning (exit code 0)"),
        (report(WARN, WARN), "warn", "2 warned in 0.0 s: 2 warnings (exit code 0)"),
        (report(PASS, FAIL), "error", "findings at or above fail level error (exit code 1)"),
        (report(SKIPS[0], required=frozenset({"DAT301"})), "error", "did not run (exit code 4)"),
    ],
)
def test_summary_is_the_last_line(value, level, verdict):
    assert plain_text(value, level).rstrip("\n").endswith(verdict)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_terminal_keeps_to_its_width(width):
    lines = without_colour(terminal(FULL, width)).splitlines()
    assert max(len(line) for line in lines) <= width


def test_terminal_folds_long_evidence_instead_of_cutting_it():
    outcome = Outcome("DAT301", "doubled-bos", "data", "error", "fail", "found", actual="0123456789" * 20)
    text = without_colour(terminal(report(outcome), 80))
    assert "0123456789" * 20 in re.sub(r"\s", "", text)


def test_terminal_shows_brackets_and_no_stolen_escapes():
    text = terminal(FULL, 120)
    assert "\x1b[1;31m" in text or "\x1b[31m" in text  # colour
    assert "[4 Linears]" in without_colour(text)
    assert "evil \\x1b[31m    text" in without_colour(text)


def test_terminal_lines_are_one_line_and_findings_are_whole():
    text = without_colour(terminal(FULL, 80))
    assert len(re.findall(r"^  (pass|WARN|FAIL|CRASH|blocked|skip) +\w{3}\d{3}  ", text, re.MULTILINE)) == 7
    for word in (
        "largest difference 0.34",
        "pass one mask for each layer type",
        "d2l explain ATT201",
        "DAT301, DAT302",
    ):
        assert word in text


def test_terminal_groups_by_stage_and_times_on_wide_ones():
    wide = without_colour(terminal(FULL, 120))
    assert [line for line in wide.splitlines() if line in ("static", "twin", "data")] == ["static", "twin", "data"]
    assert re.search(r"ATT201 .* 1\.3 s$", wide, re.MULTILINE)
    assert "1.3 s\n" not in without_colour(terminal(FULL, 80)).split("\n\n")[2]


@pytest.mark.parametrize("options", [{"force_terminal": False}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}])
def test_no_terminal_gets_plain_text_unwrapped(options):
    console = Console(file=io.StringIO(), width=40, highlight=False, **options)
    print_report(FULL, console)
    assert console.file.getvalue() == plain_text(FULL)


def test_a_quiet_console_stays_quiet():
    console = Console(file=io.StringIO(), quiet=True)
    print_report(FULL, console)
    assert console.file.getvalue() == ""


def test_selftest_word_for_word():
    trials = (
        Trial("CFG101", "typo", "caught", "found typo", 1.0),
        Trial("HYP201", "rank", "missed", "HYP201 reports pass: fine", 1.0),
        Trial("ATT202", "leak", "not_applied", "one layer only"),
    )
    selftest = Selftest("0.1.0", "configs/tiny.yaml", "abcdef0123456789", trials, left_out=("DEV401",), seconds=2.0)
    assert (
        plain_text(selftest)
        == """\
d2l 0.1.0 selftest on configs/tiny.yaml, fingerprint abcdef012345

CFG101 typo  caught       found typo
HYP201 rank  MISSED       HYP201 reports pass: fine
ATT202 leak  NOT APPLIED  one layer only

HYP201 rank: missed
  HYP201 reports pass: fine

ATT202 leak: not applied
  one layer only

Not tested
  DEV401: of a stage that was not requested (--stage)

1 of 3 planted faults caught in 2.0 s (exit code 5)
"""
    )
    assert "NOT APPLIED" in without_colour(terminal(selftest, 80))


def test_json_text_is_strict_json():
    assert '"exit_code": 3' in json_text(FULL)
    assert "NaN" not in json_text(report(Outcome("A", "b", "twin", "error", "pass", "m", evidence={"x": float("nan")})))
