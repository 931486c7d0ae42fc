"""`d2l report`: one page that holds everything, loads nothing, and shows what comes from data as text."""

import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.html_page import Page
from support.run_folders import make_folder, step_line
from support.tiny_run import tiny_config
from typer.testing import CliRunner, Result

import cli
from commands import run_page
from commands.run_page import INK
from d2l.data.chat.format import chat_format
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.data.packing import collate
from d2l.data.tokenize import IGNORE_INDEX, Query, Row
from d2l.evaluation import sample
from d2l.evaluation.sample import read_batch, sample_row
from d2l.io.run_folder import EVALUATIONS

OLD = Path(__file__).parent / "fixtures" / "version_0_1_0" / "run"
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> & é'
FIRST_STEP = {
    "predicted": {"ce_loss": 6.9375, "context_tokens": 123.0, "cuda_peak_gib": 27.25},
    "measured": {"ce_loss": 7.5, "grad_norm": 0.25, "context_tokens": 118, "seconds": 0.5, "resident_peak_gib": 0.625},
}
HEADINGS = [
    *("Preflight", "Curves", "Evaluation", "Sample", "Memory", "Checkpoints", "Events", "Versions", "Configuration")
]


def d2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments)], prog_name="d2l")


def report(run: Path, output: Path) -> tuple[str, Page]:
    result = d2l("report", run, "-o", output)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"report  {output}\n"
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    assert page.text["h2"] == HEADINGS
    return text, page


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the curves of a page out, where they are not the point."""
    monkeypatch.setattr(run_page, "_curve", lambda *_: "")


def outcome(code: str, kind: str, **values: str) -> dict[str, Any]:
    return {"code": code, "name": "a-check", "outcome": kind, "message": "fine", "evidence": {}} | values


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with everything that a page shows, hostile where data and messages are."""
    data = tmp_path / "data.jsonl"
    records = [
        {"context": f"{EVIL} The value of owl is 4{n}.", "prompts": [f"{EVIL} owl?"], "responses": [f"4{n}{EVIL}"]}
        for n in range(3)
    ]
    data.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    folder = make_folder(tmp_path / "a<b>", train_ds_names=[str(data)])
    outcomes = [
        outcome("TOY101", "pass"),
        outcome("TOY102", "warn", message=EVIL, expected="<b>whole</b>", remedy="mend it"),
        outcome("MEM401", "pass", message="reckoned peak 61 GB"),
    ]
    judged = {"data": EVIL, "versions": "torch 2.13.0"}
    preflight = {"version": "0.2.0", "outcomes": outcomes, "judged": judged}
    (folder / "preflight.json").write_text(json.dumps(preflight), encoding="utf-8")
    (folder / "checkpoints" / "step-000004" / "state.json").write_text(json.dumps({"first_step": FIRST_STEP}))
    scores = {
        condition: {
            score: {"value": 0.25, "low": 0.2, "high": 0.3} for score in ("exact", "f1", "rouge_l", "perplexity")
        }
        for condition in ("document", "other", "none", "in_prompt")
    }
    (folder / "evaluation.json").write_text(json.dumps({"scores": scores, "answers": [EVIL]}))
    (folder / "events.jsonl").write_text(json.dumps({"time": 5, "text": f"resumed {EVIL}"}) + "\n")
    return folder


def test_a_page_holds_everything_and_loads_nothing(run: Path, tmp_path: Path) -> None:
    text, page = report(run, tmp_path / "page.html")
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "img", "link", "iframe", "object", "a", "image", "foreignObject"}
    for tag, attributes in page.seen:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert (value or "").startswith("#"), (tag, name, value)
            elif not name.startswith("xmlns"):
                assert "//" not in (value or "").replace(str(run), ""), (tag, name, value)
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert INK not in text
    assert not re.search(r"url\((?!#)", text)
    curves = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert [ElementTree.fromstring(curve).get("aria-label") for curve in curves] == [
        *(
            "loss (nats) over steps",
            "gradient norm over steps",
            "learning rate over steps",
            "tokens a second over steps",
        )
    ]
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    for words in (
        "6 of 10",
        "1 warn",
        "0.56 GiB",
        "reckoned peak 61 GB",
        "torch 2.13.0",
        "0.25 [0.2, 0.3]",
        "loss 7.5 (predicted 6.938); gradient norm 0.25; document tokens 118 (predicted 123); seconds 0.5; "
        "peak on the GPU in GiB - (predicted 27.25); peak on the host in GiB 0.625",
    ):
        assert any(words in cell for cell in (*page.text["td"], *page.text["p"])), words
    assert '<th scope="row">step-000004</th>' in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_the_peak_is_that_of_all_processes_of_a_resumed_run(tmp_path: Path, undrawn: None) -> None:
    """A process counts its own peak from its start."""
    lines = [step_line(step, resident_peak_gib=peak) for step, peak in enumerate((50.0, 70.0, 10.0), start=1)]
    text, _ = report(make_folder(tmp_path / "run", lines=lines), tmp_path / "page.html")
    assert "70.00 GiB" in text


def test_the_newest_evaluation_of_the_run_itself_is_a_table(run: Path, tmp_path: Path) -> None:
    line = {f"{control}_{key}": 0.25 for control in ("document", "other", "none") for key in ("ce_loss", "exact_match")}
    lines = [{"step": 2, **line}, {"step": 4, **line, "document_ce_loss": 0.125, "lora_distance": 0.5}]
    (run / EVALUATIONS).write_text("".join(f"{json.dumps(it)}\n" for it in lines))
    text, page = report(run, tmp_path / "page.html")
    assert "<h3>evaluation.jsonl</h3>" in text
    assert "step 4; distance of two LoRAs: 0.5" in text
    assert page.text["td"].count("0.125") == 1
    assert page.text["td"].count("0.25") == 5
    assert "0.125 (first 0.25)" in page.text["td"]
    assert 'aria-label="held-out loss (nats) over steps"' in text


@pytest.mark.usefixtures("undrawn")
def test_what_comes_from_data_stays_text(run: Path, tmp_path: Path) -> None:
    text, page = report(run, tmp_path / "page.html")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert any(EVIL in cell for cell in page.text["td"])  # versions, events
    assert EVIL in page.text["p"][1]  # the finding
    assert "".join(page.text["span"]).count(EVIL) == 6  # documents and questions
    assert ("h1", {}) in page.seen


@pytest.mark.usefixtures("undrawn")
def test_a_run_in_html_signs_is_named(run: Path, tmp_path: Path) -> None:
    assert "<h1>Run a&lt;b&gt;</h1>" in report(run, tmp_path / "page.html")[0]


@pytest.mark.usefixtures("undrawn")
def test_supervised_tokens_are_those_of_the_answers(run: Path, tmp_path: Path) -> None:
    page = report(run, tmp_path / "page.html")[1]
    answers = "".join(page.text["mark"]).removeprefix("supervised tokens")
    assert sorted(answers.removesuffix("<|return|>").split("<|return|>")) == [f"4{n}{EVIL}" for n in range(3)]
    assert [title.partition(":")[0] for title in page.text["h3"] if title.startswith(("Chunk", "Question"))] == [
        *(f"{what} {number}" for what in ("Chunk", "Question") for number in (1, 2, 3))
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_page_of_a_run_gets_the_next_free_name_and_nothing_is_written_over(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    for name in ("report.html", "report-2.html"):
        assert d2l("report", folder).stdout == f"report  {folder / name}\n"
    before = (folder / "report.html").read_bytes()
    assert "never written over" in d2l("report", folder, "-o", folder / "report.html").stderr
    assert (folder / "report.html").read_bytes() == before
    assert "expected a name that ends in .html" in d2l("report", folder, "-o", tmp_path / "a.pdf").stderr
    several = d2l("report", tmp_path)
    assert (several.exit_code, "is a folder of runs: name one" in several.stderr) == (2, True)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml does not exist"),
        (lambda folder: (folder / "config.yaml").write_text("a: [\n"), "data cannot be shown"),
        (lambda folder: (folder / "preflight.json").write_text("{"), "No preflight report"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), "No step has been taken yet"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "None is complete"),
        (lambda folder: (folder / "x.json").write_text('{"scores": {"document": {"exact": 1}}}'), "x.json"),
        (lambda folder: (folder / "x.json").write_text('{"scores": 1}'), "evaluation.json"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, change: Any, words: str) -> None:
    folder = make_folder(tmp_path / "run")
    change(folder)
    assert words in report(folder, tmp_path / "page.html")[0]


@pytest.mark.usefixtures("undrawn")
def test_data_that_is_gone_is_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", train_ds_names=[str(tmp_path / "gone.jsonl")])
    page = report(folder, tmp_path / "page.html")[1]
    assert any("The run's data cannot be shown" in words and "gone.jsonl" in words for words in page.text["p"])


def test_a_run_of_an_earlier_version_and_one_that_wrote_nothing(tmp_path: Path) -> None:
    text, _ = report(OLD, tmp_path / "old.html")
    assert "2 of 2" in text
    assert "<svg" in text
    (tmp_path / "new").mkdir()
    assert "No step has been taken yet" in report(tmp_path / "new", tmp_path / "new.html")[0]


# The sample


def test_tokens_of_one_character_stand_together_and_every_text_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_format(load_tokenizer("configs/models/tiny_gpt_oss"))
    text = "naïve 🦉🦉 中文 plain"
    ids = chat.encode_text(text)
    singles = [chat.decode([token]) for token in ids]
    assert any("�" in single for single in singles), "the text must have characters of several tokens"
    labels = (IGNORE_INDEX, *ids[1:])
    part = read_batch(chat, collate([Row(0, (tuple(ids),), (Query(tuple(ids), labels),))]))
    for side in (part.chunks, part.questions):
        assert "".join(token.text for token in side[0].tokens) == text
        assert side[0].length == len(ids) > len(side[0].tokens)
    assert not any(token.supervised for token in part.chunks[0].tokens)
    assert [token.supervised for token in part.questions[0].tokens] == [False] + [True] * (
        len(part.questions[0].tokens) - 1
    )
    half = [token for token, single in zip(ids, singles, strict=True) if "�" in single][:1]
    alone = read_batch(chat, collate([Row(0, ((*half, ids[0]),), (Query(tuple(ids), labels),))]))
    assert [token.text for token in alone.chunks[0].tokens] == ["�", singles[0]]
    monkeypatch.setattr(sample, "MOST_TOKENS", 2)
    short = read_batch(chat, collate([Row(0, (tuple(ids),), (Query(tuple(ids), labels),))])).chunks[0]
    assert (len(short.tokens), short.length) == (2, len(ids))


def test_a_character_in_part_supervised_is_shown_by_its_tokens() -> None:
    """A token that is supervised does not stand under the same mark as one that is not."""
    chat = chat_format(load_tokenizer("configs/models/tiny_gpt_oss"))
    ids = chat.encode_text("🦉")
    assert len(ids) > 2, "the character must have several tokens"
    for mask in product([False, True], repeat=len(ids) - 1):
        supervised = (False, *mask)  # nothing predicts the first
        labels = tuple(token if on else IGNORE_INDEX for token, on in zip(ids, supervised, strict=True))
        row = read_batch(chat, collate([Row(0, (tuple(ids),), (Query(tuple(ids), labels),))]))
        (question,) = row.questions
        assert tuple(token.supervised for token in question.tokens for _ in token.ids) == supervised
        assert question.n_labels == sum(mask)
        assert [token.text for token in row.chunks[0].tokens] == ["🦉"]


def test_the_first_records_are_enough(tmp_path: Path) -> None:
    found = sample_row(tiny_config(needle_documents=5000, max_packed_ctx_len=100_000, max_packed_inp_len=100_000))
    assert len(found.records) == sample.RECORDS
    assert (len(found.chunks), found.n_chunks) == (sample.MOST_PARTS, sample.RECORDS)
    assert found.n_questions == 2 * sample.RECORDS
    few = sample_row(tiny_config(needle_documents=50, max_train_samples_per_ds=2))
    assert len(few.records) == 2


def test_a_browser_shows_it_on_a_phone_and_in_the_dark(run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    page = tmp_path / "page.html"
    report(run, page)
    probe = page.read_text(encoding="utf-8").replace("default-src 'none'", "script-src 'unsafe-inline'")
    check = """<script>
const style = getComputedStyle(document.body), wide = document.documentElement;
document.title = JSON.stringify({
  overflow: wide.scrollWidth > wide.clientWidth, paper: style.backgroundColor, ink: style.color,
  curve: getComputedStyle(document.querySelector("svg text")).fill, curves: document.querySelectorAll("svg").length,
  heading: document.querySelectorAll("h2").length, inner: window.innerWidth,
});
</script></body>"""
    page.write_text(probe.replace("</body>", check), encoding="utf-8")
    for dark, paper, ink in (
        (False, "rgb(255, 255, 255)", "rgb(27, 27, 27)"),
        (True, "rgb(22, 22, 22)", "rgb(230, 230, 230)"),
    ):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [browser, profile, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        (title,) = re.findall(r"<title>(\{.*?\})</title>", done.stdout)
        assert json.loads(title) == {
            "overflow": False, "paper": paper, "ink": ink, "curve": ink, "curves": 4, "heading": 9, "inner": 500
        }  # fmt: skip
