"""`d2l preflight --format html`: one page that holds everything, loads nothing, and shows what comes from data as text."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from support.html_page import Page
from support.reports import FULL, reports

from checks.catalogue import read_catalogue
from checks.formats import page, write_report
from checks.formats.pictures import MOST, Picture, pictures
from checks.printable import printable
from checks.result import Report

CATALOGUE = read_catalogue()


@pytest.fixture(autouse=True)
def _catalogue_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "read_catalogue", lambda: CATALOGUE)


def read(report: Report) -> tuple[str, Page]:
    text = write_report(report, "html")
    assert text.isascii()
    read = Page(text)
    assert not {tag for tag, _ in read.seen} & {"script", "img", "link", "iframe", "object", "image", "form"}
    for tag, attributes in read.seen:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert (value or "").startswith("#"), (tag, name, value)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(", text)
    return text, read


def test_a_page_holds_every_check_causes_first() -> None:
    text, found = read(FULL)
    assert found.text["h2"] == [
        *("Failed: 1", "Crashed: 1", "Warnings: 2", "Blocked: 1", "Not judged: 1", "Not applicable: 1", "Passed: 2"),
        *("Ignored without effect: 2", "A twin cannot show"),
    ]
    assert [heading.split()[0] for heading in found.text["h3"]] == [
        *("QNT202", "HYP202", "QNT102", "OPT101", "GRD204", "MEM401", "EXP201", "TGT101", "LBL301")
    ]
    opened = {attributes.get("id") for tag, attributes in found.seen if tag == "details" and "open" in attributes} - {
        None
    }
    assert opened == {"fail", "crash", "warn", "QNT202", "HYP202", "QNT102", "OPT101"}
    rows = dict(zip(found.text["th"], found.text["td"], strict=False))
    assert rows["base model"] == "tiny"
    for words in (
        "a cosine above 0.999",
        "layer 0: 0.341",
        "set expert_weights: packed or dequantize",
        "KeyError: 'x'",
    ):
        assert any(words in cell for cell in found.text["td"]), words
    assert "twin, 1.50 s" in found.text["span"]
    counts = "2 passed, 2 warned, 1 failed, 1 crashed, 1 blocked, 1 skipped, 1 not applicable in 4.2 s"
    assert found.text["p"][0] == f"{counts}: a check crashed (exit code 3)"
    assert any("grad_norm" in text for text in found.text["p"])  # why QNT202 matters, of its documentation
    assert "prefers-color-scheme: dark" in text
    ids = [attributes["id"] for _, attributes in found.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [str(attributes["href"])[1:] for tag, attributes in found.seen if tag == "a"]
    assert targets == ["fail", "crash", "warn", "blocked", "skip", "inapplicable", "pass"]
    assert set(targets) <= set(ids)


def test_a_clean_page_and_one_without_checks() -> None:
    _, found = read(
        replace(FULL, outcomes=FULL.outcomes[:1], unused_ignores=(), expired_ignores=(), twin_cannot_show=())
    )
    assert found.text["h2"] == ["Passed: 1"]
    assert (
        read(replace(FULL, outcomes=(), unused_ignores=(), expired_ignores=(), twin_cannot_show=()))[1].text["h2"] == []
    )


def test_a_page_is_red_where_the_exit_code_is() -> None:
    """A warning stands against a run of `--fail-level warn` alone."""
    warned = replace(FULL, outcomes=(replace(FULL.outcomes[0], outcome="warn"),), unused_ignores=(), expired_ignores=())
    for level in ("error", "warn"):
        assert ('class="verdict fail"' in write_report(warned, "html", level)) == bool(warned.exit_code(level))


@settings(derandomize=True, deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reports)
def test_what_comes_from_data_stays_text(report: Report) -> None:
    _, found = read(report)
    assert found.text["h3"] == [f"{it.code} {it.name}" for kind in page.GROUPS for it in report if it.outcome == kind]
    messages = {printable(outcome.message) for outcome in report}
    assert messages <= set(found.text["span"])
    for outcome in report:
        assert {printable(text) for text in (outcome.expected, outcome.actual) if text} <= set(found.text["td"])


# Pictures


def lengths(picture: Picture) -> list[float]:
    return [round(bar.length, 3) for bar in picture.bars]


@pytest.mark.parametrize(
    ("evidence", "titles", "drawn"),
    [
        ({"label_tokens": 25, "tokens": 200}, ["supervised tokens"], [[0.125]]),
        ({"peak": 90, "free": 60}, ["peak of the memory that is free, in bytes"], [[1.0]]),
        ({"cosine_by_layer": [0.5, 1.0, 0.25]}, ["cosine by layer"], [[0.5, 1.0, 0.25]]),
        ({"cosine_by_layer": [0.5, 0.25]}, ["cosine by layer"], [[0.5, 0.25]]),  # parts of 1
        ({"norms": [4.0, -2.0]}, ["norms"], [[1.0, 0.5]]),
        ({"errors": {"a": 1e-9, "b": 1e-8}}, ["errors"], [[0.1, 1.0]]),
        ({"errors": {"a": 1e-9, "b": 1e-5, "c": 0.0}}, ["errors (log scale)"], [[0.2, 1.0, 0.0]]),
        ({"layer 0": 2.0, "layer 3": 1.0, "n": 7}, ["by layer"], [[1.0, 0.5]]),
        ({"early_exit": {"by_layer": [1.0, 2.0], "by_chunk": []}}, ["early exit, by layer"], [[0.5, 1.0]]),
        ({"shares": {"1": 0, "2": 0}}, ["shares"], [[0.0, 0.0]]),
        ({"many": list(range(1, 99))}, [f"many, the first {MOST} of 98"], [[n / 24 for n in range(1, 25)]]),
        ({"alone": 1.0, "text": "x", "flags": [True, False], "mixed": [1, "a"], "nan": ["nan", 1.0]}, [], []),
        ({"label_tokens": 25, "tokens": 0}, [], []),
    ],
)
def test_pictures_of_evidence(evidence: dict[str, Any], titles: list[str], drawn: list[list[float]]) -> None:
    found = pictures(evidence)
    assert [picture.title for picture in found] == titles
    assert [lengths(picture) for picture in found] == [[round(length, 3) for length in row] for row in drawn]


def test_steps_are_a_curve_from_left_to_right() -> None:
    (picture,) = pictures({"rates by step": {"10": 0.5, "0": 0.0, "40": 0.25}})
    assert picture.kind == "curve"
    assert picture.points == "0.0,80.0 80.0,0.0 320.0,40.0"
    assert [(bar.label, bar.value) for bar in picture.bars] == [("largest", "0.5"), ("steps", "0 to 40")]
    assert pictures({"rates by step": {"0": 1.0, "1": 1.0, "2": 1.0}})[0].points == "0.0,0.0 160.0,0.0 320.0,0.0"


def test_a_browser_shows_it_on_a_phone_and_in_the_dark(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    probe = write_report(FULL, "html").replace("default-src 'none'", "script-src 'unsafe-inline'")
    check = """<script>
const style = getComputedStyle(document.body), wide = document.documentElement;
document.querySelectorAll("details").forEach(it => it.open = true);
document.title = JSON.stringify({
  overflow: wide.scrollWidth > wide.clientWidth, paper: style.backgroundColor, ink: style.color,
  bars: [...document.querySelectorAll(".part")].map(it => Math.round(
    100 * it.getBoundingClientRect().width / it.previousElementSibling.getBoundingClientRect().width)),
  curves: document.querySelectorAll("polyline").length, checks: document.querySelectorAll(".check").length,
});
</script></body>"""
    (tmp_path / "page.html").write_text(probe.replace("</body>", check), encoding="utf-8")
    for dark, paper, ink in (
        (False, "rgb(255, 255, 255)", "rgb(27, 27, 27)"),
        (True, "rgb(22, 22, 22)", "rgb(230, 230, 230)"),
    ):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        place = (tmp_path / "page.html").as_uri()
        done = subprocess.run(
            [browser, profile, *options, place], capture_output=True, text=True, timeout=120, check=True
        )
        (title,) = re.findall(r"<title>(\{.*?\})</title>", done.stdout)
        assert json.loads(title) == {
            "overflow": False, "paper": paper, "ink": ink, "bars": [25, 50, 75, 100, 11, 100, 13], "curves": 1, "checks": 9
        }  # fmt: skip
