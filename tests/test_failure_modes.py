"""docs/failure_modes.md: the page is that of the modes and the rules, and every mode has what sees it, or a reason."""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from checks.catalogue import read_catalogue
from checks.failure_modes import ELSEWHERE, NONE, SEEN, Mode, Modes, main, problems, read_modes, render_page

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "failure_modes.md"


@cache
def read_document() -> dict[str, Any]:
    """Return the modes as values."""
    return read_modes().model_dump()


def changed(number: str, **values: object) -> Modes:
    """Return the modes with other values in one of them."""
    document = deepcopy(read_document())
    (mode,) = [mode for group in document["groups"] for mode in group["modes"] if mode["mode"] == number]
    mode.update(values)
    return Modes.model_validate(document)


def test_the_page_is_up_to_date_and_modes_and_rules_agree() -> None:
    modes, checks = read_modes(), read_catalogue()
    assert problems(modes, checks) == []
    assert PAGE.read_text(encoding="utf-8") == render_page(modes, checks), "run `make docs`"


def test_every_row_names_exactly_the_checks_that_name_its_mode_and_none_is_left_open() -> None:
    rows = {
        re.sub(r"<a.*</a>", "", cells[1]).strip(): cells[6]
        for cells in (re.split(r"(?<!\\)\|", line) for line in PAGE.read_text(encoding="utf-8").splitlines())
        if cells[1:] and cells[1].startswith(' <a id="failure-mode-')
    }
    assert len(rows) == len(read_modes().modes)
    checks = read_catalogue()
    for number, cell in rows.items():
        naming = {check.code for check in checks if f"failure mode {number}" in check.sources}
        cited = set(re.findall(r"\[([A-Z]{3}\d{3})\]", cell.partition("none: ")[0]))
        assert naming == cited, number
        assert len(cell.strip()) > len("none: "), number
        assert "yet" not in cell, number


def test_the_counts_add_up() -> None:
    lines = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.fullmatch(r"\| [^|]+( \| \d+){4} \|", line)
    ]
    *groups, total = ([int(number) for number in re.findall(r"\| (\d+)", line)] for line in lines)
    assert [sum(column) for column in zip(*groups, strict=True)] == total
    assert total[0] == sum(total[1:]) == PAGE.read_text(encoding="utf-8").count('<a id="failure-mode-')
    assert all(kind in PAGE.read_text(encoding="utf-8") for kind in (SEEN, ELSEWHERE, NONE))


@pytest.mark.parametrize(
    ("number", "values", "words"),
    [
        ("C14", {"no_check": ""}, "mode C14: no check names it"),
        ("F2", {"no_check": "a reason"}, "mode F2: ATT101, ATT201, ATT401 sees it"),
        ("C29", {"no_check": "a reason"}, "mode C29: another part of d2l sees it"),
        ("F2", {"limits": {"TGT101": "a note"}}, "mode F2: limits TGT101"),
        ("F2", {"mode": "F8"}, "mode F8 stands there twice"),
        ("F2", {"mode": "C99"}, "ATT101, ATT201, ATT401: there is no failure mode F2"),
        ("F2", {"mode": "C99"}, "'loss `nan` or 0.0': there is no failure mode F2"),
        ("C14", {"no_check": "see ABC299"}, "there is no check ABC299"),
    ],
)
def test_where_modes_and_rules_disagree_is_said(number: str, values: dict[str, object], words: str) -> None:
    assert any(problem.startswith(words) for problem in problems(changed(number, **values), read_catalogue()))


def test_main_prints_the_page_or_the_disagreement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main()
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr("checks.failure_modes.read_modes", lambda: changed("C14", no_check=""))
    with pytest.raises(SystemExit, match="mode C14"):
        main()


def test_a_mode_has_a_number_and_a_source() -> None:
    fields = {"mode": "C1", "symptom": "s", "cause": "c", "seen": "twin", "response": "r", "sources": ["a/b#1"]}
    assert Mode.model_validate(fields).anchor == "failure-mode-c1"
    for wrong in ({"mode": "D1"}, {"sources": []}, {"cheks": "ATT101"}):
        with pytest.raises(ValueError, match="validation error"):
            Mode.model_validate(fields | wrong)
