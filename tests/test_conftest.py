"""A bare `pytest` needs no environment of its own, and `pytest -m golden` counts what it compares and fails without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT
from safetensors.torch import save_file
from support.golden import Account

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import os, subprocess, sys
import pytest, torch
from support import golden

EXPECTED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

@pytest.mark.golden  # in a worker too
def test_environment():
    code = f"import os; assert os.environ.items() >= {EXPECTED}.items()"
    assert os.environ.items() >= EXPECTED.items()
    assert torch.get_num_threads() == 1
    subprocess.run([sys.executable, "-c", code], check=True)

@pytest.mark.golden
def test_compares(shared):
    case = golden.load_case(shared, "compared")
    golden.assert_close(case["out.x"], case["out.x"], 0)

@pytest.mark.golden
def test_only_loads(shared):
    golden.load_case(shared, "only_loaded")
"""


def bare_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Pytest on the probe in a checkout of its own, as from a shell that sets none of our variables."""
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "tests" / "support", checkout / "tests" / "support", dirs_exist_ok=True)
    shutil.copy(ROOT / "tests" / "conftest.py", checkout / "tests")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (checkout / "tests" / "test_probe.py").write_text(PROBE)
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def test_without_any_variable_set_there_is_one_thread_and_no_network(tmp_path: Path) -> None:
    result = bare_pytest(tmp_path, "-rs")
    assert result.returncode == 0, result.stdout
    assert "1 passed, 2 skipped" in result.stdout
    assert "needs the oracle data in" in result.stdout


def test_golden_cases_fail_where_their_folder_is_absent(tmp_path: Path) -> None:
    result = bare_pytest(tmp_path, "-m", "golden")
    assert result.returncode == 1
    assert "1 passed, 2 errors" in result.stdout
    assert f"needs the oracle data in {Path('..', 'shared')}" in result.stdout


def test_a_golden_file_that_nothing_is_compared_with_fails(tmp_path: Path) -> None:
    folder = tmp_path / "shared" / "golden" / "reference"
    folder.mkdir(parents=True)
    for name in ("compared", "only_loaded", "unread"):
        (folder / f"{name}.json").write_text(json.dumps({"seed": 0}))
        save_file({"out.x": torch.ones(2, 3)}, folder / f"{name}.safetensors")
    result = bare_pytest(tmp_path, "-m", "golden", "-n", "1")
    assert result.returncode == 1
    assert "loaded and not compared: only_loaded" in result.stdout
    assert "1 failed, 2 passed" in result.stdout
    assert "golden: 6 values compared: 6 in 1 files of components, 0 in 0 files of whole models" in result.stdout
    assert "golden: FAILED, compared by no test: only_loaded, unread" in result.stdout


def test_an_account_counts_values_and_names_what_was_only_loaded() -> None:
    account = Account()
    for name in ("e2e_1", "lora_1"):
        account.load(name)
    account.compare("e2e_1", {"ids": [[1, 2], (3,)], "logits": torch.ones(2, 3), "error": "TypeError"})
    assert account.compared == {"e2e_1": 10, "lora_1": 0}
    with pytest.raises(AssertionError, match="loaded and not compared: lora_1"):
        account.close()
    account.close()
