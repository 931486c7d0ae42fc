"""The benchmarks run, say what they measured, and leave nothing behind."""

import importlib
import tempfile
import time
from pathlib import Path

import pytest
from support.tiny_model import random_rows, run_config, tiny_model

from d2l.io.run_folder import step_folder
from d2l.train.loop import Trainer

if not (Path(__file__).parents[1] / "benchmarks").is_dir():
    pytest.skip("needs a checkout: benchmarks/ is not in the sdist", allow_module_level=True)

TINY = "configs/tiny_gpt_oss.yaml"


def run_real_shapes(*arguments: str) -> None:
    importlib.import_module("benchmarks.real_shapes").main(
        [TINY, "--inp", "48", "--ctx", "48", "--steps", "1", *arguments]
    )


def test_real_shapes_steps_on_a_checkpoint_that_it_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_real_shapes("--kernels", "3")
    out = capsys.readouterr().out
    assert "experts packed, float32 on cpu" in out
    assert "step 1: " in out
    assert "tokens/s" in out
    assert "GiB at the peak" in out
    assert "a profiled step" in out
    assert len(out.split("a profiled step")[1].splitlines()) == 4
    assert not list(tmp_path.glob("d2l-*"))


def test_deltas_in_float32_are_nearer_and_keep_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deltas = importlib.import_module("benchmarks.deltas")
    for name, value in {"D_IN": 64, "D_OUT": 96, "RANK": 4, "SHARES": (3.0,), "TOKENS": ((4, 2),)}.items():
        monkeypatch.setattr(deltas, name, value)
    deltas.main()
    lines = capsys.readouterr().out.splitlines()
    _, float32, bfloat16 = map(float, lines[1].split())
    assert float32 < 0.75 * bfloat16
    assert lines[3].split()[:2] == ["4", "2"]
    assert lines[4].startswith("kept for the backward at 1,024 tokens: float32 0.3 MiB, bfloat16 0.1 MiB")


def test_real_shapes_keeps_a_named_folder_and_uses_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    run_real_shapes("--kernels", "0", "--folder", str(folder))
    assert "GiB written" in capsys.readouterr().out
    files = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    run_real_shapes("--kernels", "0", "--folder", str(folder))
    assert "GiB written" not in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == files


def test_the_table_takes_the_place_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = importlib.import_module("benchmarks.bench")
    page = tmp_path / "RESULTS.md"
    page.write_text(f"# Results\n\n{bench.BEGIN}old\n{bench.END}\n## Kept\n", encoding="utf-8")
    monkeypatch.setattr(bench, "RESULTS", page)
    bench.write([bench.Line("loss", "a case", "a rule", 0.2, "0.1–0.3", 0.14)], "on a machine")
    text = page.read_text(encoding="utf-8")
    assert "| loss | a case | a rule | 0.20 | 0.1–0.3 | 0.14 missed |" in text
    assert "old" not in text
    assert text.startswith("# Results\n")
    assert text.endswith("## Kept\n")


def test_a_ratio_is_that_of_turns() -> None:
    timing = importlib.import_module("benchmarks.timing")
    found = timing.ratio(lambda: time.sleep(0.004), lambda: time.sleep(0.001), repeats=3)
    assert 1.5 < found.median < 8
    assert len(found.values) == 3


def test_saving_gives_shares_of_a_step(tmp_path: Path) -> None:
    saving = importlib.import_module("benchmarks.saving")
    config = run_config()
    trainer = Trainer(tiny_model(config), random_rows(), config)
    found = saving.measure(trainer, tmp_path, rounds=1)
    assert trainer.step_number == 6
    assert all(value > 0 for value in (found.step, found.copy, found.whole, found.beside))
    assert found.size == sum(path.stat().st_size for path in step_folder(tmp_path, 5).glob("*.safetensors"))


@pytest.mark.slow
def test_watching_gives_four_ratios_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watching = importlib.import_module("benchmarks.watching")
    monkeypatch.setattr(tempfile, "mkdtemp", lambda suffix, prefix, dir: str(tmp_path / "made"))
    (tmp_path / "made").mkdir()
    monkeypatch.setenv("COLUMNS", "120")
    watching.main([TINY, "--repeats", "1"])
    rows = [line.split("│")[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [
        ("guards", "1"),
        ("metrics", "1"),
        ("evaluation", "100"),
        ("save", "20"),
    ]
    evaluation = rows[2]
    assert min(float(evaluation[3]), float(evaluation[5])) > 1.5  # it reads documents three times over
    assert list(tmp_path.iterdir()) == []
