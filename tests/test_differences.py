"""What changed between two reports: versions, outcomes and numbers; and what is no report."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cli
from checks.differences import Difference, differences, read_report
from checks.result import UsageError

REPORT: dict[str, Any] = {
    "schema": 1,
    "version": "1.0",
    "config": "run.yaml",
    "fingerprint": "a",
    "judged": {"versions": "torch 2.12.0, peft 0.21", "device": "CPU only"},
    "outcomes": [
        {"code": "ATT201", "name": "leak", "outcome": "pass", "message": "at most 3e-06", "evidence": {"change": 3e-6}},
        {
            **{
                "code": "LOR201",
                "name": "no-effect",
                "outcome": "fail",
                "message": "it does 2 things",
                "ignored": True,
            },
            "evidence": {"layer": {"0": [1e-7, 2], "1": "fp 3"}, "found": 4, "bytes": 10**7, "gain": 0.5},
        },
        {"code": "MEM401", "name": "memory", "outcome": "skip", "message": "no GPU: 3 GiB"},
    ],
}


def changed(*path: Any, value: Any) -> dict[str, Any]:
    """Return the report with another value at a path; None removes it."""
    report = deepcopy(REPORT)
    place: Any = report
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return report


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (changed("version", value="1.0"), []),
        (changed("outcomes", 0, "evidence", "change", value=4e-7), []),  # rounding
        (changed("outcomes", 0, "message", value="at most 4e-07"), []),
        (changed("outcomes", 1, "evidence", "layer", "1", value="fp 17.5"), []),
        (changed("outcomes", 1, "evidence", "bytes", value=3 * 10**7), []),
        (
            changed("judged", "versions", value="torch 2.13.0, peft 0.21"),
            [("judged", "versions: torch", "2.12.0", "2.13.0")],
        ),
        (changed("judged", "device", value=None), [("judged", "device", "CPU only", "-")]),
        (changed("outcomes", 0, "outcome", value="fail"), [("outcome", "ATT201 leak", "pass", "fail")]),
        (changed("outcomes", 1, "ignored", value=False), [("outcome", "LOR201 no-effect", "fail (ignored)", "fail")]),
        (changed("outcomes", 2, value=None), [("outcome", "MEM401 memory", "skip", "-")]),
        (changed("outcomes", 0, "evidence", "change", value=1e-2), [("measured", "ATT201 change", "3e-06", "0.01")]),
        (
            changed("outcomes", 1, "evidence", "gain", value=-0.5),
            [("measured", "LOR201 gain", "0.5", "-0.5")],
        ),
        (changed("outcomes", 0, "evidence", "change", value=-3e-6), []),  # of either sign, rounding
        (
            changed("outcomes", 1, "evidence", "layer", "0", value=[1e-7, 3]),
            [("measured", "LOR201 layer: 0", "[1e-07, 2]", "[1e-07, 3]")],
        ),
        (changed("outcomes", 1, "evidence", "found", value=5), [("measured", "LOR201 found", "4", "5")]),
        (
            changed("outcomes", 2, "message", value="no card: 3 GiB"),
            [("measured", "MEM401 memory", "no GPU: 3 GiB", "no card: 3 GiB")],
        ),
    ],
)
def test_what_changed_is_named_and_rounding_is_not(after: dict[str, Any], expected: list[tuple[str, ...]]) -> None:
    found = differences(REPORT, after)
    assert [(it.kind, it.name, it.before, it.after) for it in found] == expected


def test_a_new_check_is_named_with_what_it_says() -> None:
    shorter = changed("outcomes", 0, value=None)
    assert differences(shorter, REPORT) == [Difference("outcome", "ATT201 leak", "-", "pass", "at most 3e-06")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "found no JSON"),
        ("[" * 100_000, "found no JSON"),
        ("[]", "found other JSON"),
        ('{"outcomes": [1]}', "found other JSON"),
        (json.dumps(REPORT | {"schema": 9}), "expected a report of schema 1, found 9"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_report(path)


def test_the_command_takes_a_run_and_ends_like_diff(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "preflight.json").write_text(json.dumps(REPORT))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed("outcomes", 0, "outcome", value="fail")))
    same = CliRunner().invoke(cli.app, ["diff", str(run), str(run)])
    assert (same.exit_code, same.stdout) == (0, "no difference\n")
    found = CliRunner().invoke(cli.app, ["diff", str(run), str(other)])
    assert (found.exit_code, found.stdout) == (1, "ATT201 leak: pass → fail: at most 3e-06\n")
    (entry,) = json.loads(CliRunner().invoke(cli.app, ["diff", str(run), str(other), "--format", "json"]).stdout)
    assert entry == {
        "kind": "outcome",
        "name": "ATT201 leak",
        "before": "pass",
        "after": "fail",
        "message": "at most 3e-06",
    }
