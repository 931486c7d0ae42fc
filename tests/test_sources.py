"""The sources of every check: the page exists and has the anchor, an address is well formed; nothing is looked up."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from checks import sources
from checks.catalogue import read_catalogue
from checks.sources import Source, resolve

ROOT = Path(__file__).resolve().parents[1]
CHECKS = read_catalogue()
PUBLIC_HOST = re.compile(r"([a-z0-9-]+\.)+[a-z]{2,}")


@pytest.mark.parametrize(("code", "key"), [(check.code, key) for check in CHECKS for key in check.sources])
def test_every_source_of_every_rule_opens(code: str, key: str) -> None:
    source = resolve(key)
    assert len(source.title) > 5
    if "://" in source.link:
        address = urlsplit(source.link)
        assert address.scheme == "https"
        assert PUBLIC_HOST.fullmatch(address.netloc)
        assert address.path.count("/") >= 1
        return
    name, _, anchor = source.link.partition("#")
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not anchor or text.count(f'id="{anchor}"') == 1
    assert source.place == f"{ROOT / name}{'#' if anchor else ''}{anchor}"


def test_titles_and_links() -> None:
    assert resolve("fix 2") == Source("Fix 2: attention in training", "docs/nine_fixes.md#fix-2")
    assert resolve("sanity run") == Source("The sanity run", "docs/nine_fixes.md#sanity-run")
    mode = Source("Failure mode 9: stop token or prefix changes between turns", "docs/failure_modes.md#failure-mode-9")
    assert resolve("failure mode 9") == mode
    assert resolve("failure mode C4").link == "docs/failure_modes.md#failure-mode-c4"
    assert resolve("experiments/targets.md").title == "Which targets, features and stages can carry a document"
    thread = resolve("Dao-AILab/flash-attention#1797")
    assert thread.place == thread.link == "https://github.com/Dao-AILab/flash-attention/issues/1797"
    assert resolve("https://arxiv.org/abs/2602.15902").title == "https://arxiv.org/abs/2602.15902"


@pytest.mark.parametrize(
    "key",
    [
        "fix 10",
        "Fix 2",
        "failure modes F2, 10",
        "nine_fixes Fix 2",
        "transformers#39997",
        "huggingface/transformers#0",
        "http://arxiv.org/abs/2602.15902",
        "https://localhost/notes",
        "https://arxiv.org/abs with a space",
        "/home/me/notes.md",
        "",
    ],
)
def test_another_form_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="there is no source"):
        resolve(key)


@pytest.mark.parametrize(("anchors", "count"), [("", 0), ('<a id="fix-2"></a>\n# A\n<a id="fix-2"></a>\n# B\n', 2)])
def test_an_anchor_must_be_there_once(
    anchors: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text(anchors, encoding="utf-8")
    monkeypatch.setattr(sources, "resource", lambda name: tmp_path / "page.md")
    with pytest.raises(ValueError, match=f"must have the anchor fix-2 once. Got {count}"):
        resolve("fix 2")


def test_a_row_may_hold_escaped_bars() -> None:
    assert sources._title("F8 | ends with `<\\|end\\|>` | a cause |") == "Failure mode F8: ends with `<|end|>`"
