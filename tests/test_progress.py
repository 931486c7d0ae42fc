"""What a training shows: a bar that fits 80 columns on a terminal, and a line every so many steps in a pipe."""

import os
import re
from io import StringIO

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from rich.console import Console
from transformers.utils import logging

from checks.processes import in_processes
from checks.rules import RULES
from commands.console import load_libraries
from commands.progress import checks_progress, clock, steps_progress, thousands
from d2l.config.schema import RunConfig

MEASURED = {"tokens_per_second": 98_765.4, "cuda_peak_gib": 138.6}


def record(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "ce_loss": 12.3456, "grad_norm": 0.5, "lr": 4e-5, "tokens": 700} | values


def shown(console: Console, config: RunConfig, records: list[dict[str, float]]) -> str:
    with steps_progress(console, config) as (show, on_tokenize):
        on_tokenize(1, 1200)
        on_tokenize(1200, 1200)
        for it in records:
            show(it)
    assert isinstance(console.file, StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


@pytest.mark.parametrize(
    ("total", "values", "parts"),
    [
        (2, {"resident_peak_gib": 0.61}, ["2/2", "loss 12.3", "lr 4.0e-05", "0.6 GiB", "0:0", "<0:00"]),
        (2, MEASURED, ["2/2", "98.8k tok/s", "138.6 GiB"]),
        (200_000, MEASURED | {"ce_loss": 1.23456e-7, "lr": 1.234e-5}, ["2/200000", "loss 1.23e-07", "lr 1.2e-05"]),
        (2, {}, ["2/2", "loss 12.3"]),  # an earlier version's keys
    ],
)
def test_the_bar_fits_80_columns(total: int, values: dict[str, float], parts: list[str]) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=80)
    text = shown(console, RunConfig(max_steps=total), [record(1, **values), record(2, **values)])
    last = text.splitlines()[-1] if text.splitlines()[-1].strip() else text.splitlines()[-2]
    for part in parts:
        assert part in last, (part, last)
    assert "…" not in last
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]", text))


@pytest.mark.parametrize("terminal", [False, True])
def test_an_evaluation_has_a_line_of_its_own(terminal: bool) -> None:
    console = Console(file=StringIO(), force_terminal=terminal, width=200)
    losses = {"eval/document_ce_loss": 0.3118, "eval/other_ce_loss": 1.9466, "eval/none_ce_loss": 3.6547}
    exact = {"eval/document_exact_match": 0.75, "eval/other_exact_match": 0.1, "eval/none_exact_match": 0.0}
    config = RunConfig(max_steps=9, logging_steps=9)
    text = shown(console, config, [record(3), record(4, **losses, **exact, **{"eval/lora_distance": 0.55241})])
    assert (
        "step 4 held-out  ce_loss 0.3118 (other LoRA 1.947, none 3.655)  exact_match 0.75 (other LoRA 0.1, none 0)  "
        "lora_distance 0.552\n" in text.replace("\r", "")
    )
    assert "step 3 held-out" not in text


def test_a_continued_run_estimates_from_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    console = Console(file=StringIO(), force_terminal=True, width=80, get_time=lambda: now[0])
    with steps_progress(console, RunConfig(max_steps=1100)) as (show, _):
        for step in range(1001, 1006):
            now[0] += 10
            show(record(step))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "1005/1100" in text
    assert "<15:50" in text.splitlines()[-1]  # 95 steps of 10 s


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (7, [5])])
def test_a_pipe_gets_a_line_every_so_many_steps_and_the_last(every: int, steps: list[int]) -> None:
    console = Console(file=StringIO(), width=40)
    config = RunConfig(max_steps=5, logging_steps=every)
    first, *lines = shown(console, config, [record(step, **MEASURED) for step in range(1, 6)]).splitlines()
    assert first == "tokenized 1,200 records"
    assert [line.split()[1] for line in lines] == [f"{step}/5" for step in steps]
    expected = "ce_loss 12.35  grad_norm 0.5  lr 4e-05  tokens 700  tokens_per_second 9.877e+04  cuda_peak_gib 138.6"
    assert lines[-1] == f"step 5/5  {expected}"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (360_000, "4d4h")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (950, "950"), (1234, "1.23k"), (45_600, "45.6k"), (2e6, "2M")])
def test_counts_are_short(value: float, text: str) -> None:
    assert thousands(value) == text


def test_bars_of_libraries_are_silent_and_those_of_downloads_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "_tqdm_active", True)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS")
    enable_progress_bars()
    load_libraries(quiet=True)
    assert list(logging.tqdm(range(3), desc="Loading weights")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    assert not are_progress_bars_disabled()
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"  # which datasets reads when it is imported


def test_checks_in_forked_processes_leave_the_screen_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have inherited its lock from a thread that held it, and would wait for it forever."""
    shown: list[str] = []
    monkeypatch.setattr("rich.status.Status.update", lambda status, text: shown.append(text))
    screen = Console(file=StringIO(), force_terminal=True)
    monkeypatch.setattr("commands.progress.console", lambda stderr: screen)

    with checks_progress() as (observe, on_tokenize):

        def elsewhere(index: int) -> list[str]:
            on_tokenize(1, 10)
            return shown

        assert [*in_processes(elsewhere, 2, workers=2)] == [[], []]
        observe(RULES[0])
        on_tokenize(1000, 2000)
    assert shown == [f"{RULES[0].code} {RULES[0].name}", "tokenizing: 1,000 of 2,000 records"]
