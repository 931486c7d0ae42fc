"""A bare `pytest` needs no environment of its own, and `pytest -m golden` counts what it compares and fails without it."""

import json
import os
import re
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


# What the fixtures of every session change, without the seconds that importing it takes: the probe runs no check.
CHECKS = {
    "__init__": "",
    "result": "class Report:\n    def to_json(self): ...\n",
    "selftest": "class Selftest:\n    def to_json(self): ...\navailable_cores = None\n",
    "runner": "available_cores = None\n",
}


# One after the other in one process, which imports torch once: without the oracle data, and with it. A line begins each.
RUNS = """
import pathlib, pytest
for arguments in (["-rs"], ["-m", "golden"], ["-m", "golden", "-n", "1"]):
    if "-n" in arguments:
        pathlib.Path("../kept").rename("../shared")
    code = pytest.main(["-p", "no:cacheprovider", *arguments])
    print(f"ended with {int(code)}", flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What pytest says on the probe in a checkout of its own, as from a shell that sets none of our variables."""
    folder = tmp_path_factory.mktemp("bare")
    golden = folder / "kept" / "golden" / "reference"
    golden.mkdir(parents=True)
    for name in ("compared", "only_loaded", "unread"):
        (golden / f"{name}.json").write_text(json.dumps({"seed": 0}))
        save_file({"out.x": torch.ones(2, 3)}, golden / f"{name}.safetensors")
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "tests" / "support", checkout / "tests" / "support")
    shutil.copy(ROOT / "tests" / "conftest.py", checkout / "tests")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (checkout / "tests" / "test_probe.py").write_text(PROBE)
    (checkout / "checks").mkdir()
    for module, text in CHECKS.items():
        (checkout / "checks" / f"{module}.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", RUNS], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return re.split(r"(?<=ended with \d)\n", done.stdout)


def test_without_any_variable_set_there_is_one_thread_and_no_network(runs: list[str]) -> None:
    assert "1 passed, 2 skipped" in runs[0]
    assert "needs the oracle data in" in runs[0]
    assert runs[0].endswith("ended with 0")


def test_golden_cases_fail_where_their_folder_is_absent(runs: list[str]) -> None:
    assert "1 passed, 2 errors" in runs[1]
    assert f"needs the oracle data in {Path('..', 'shared')}" in runs[1]
    assert runs[1].endswith("ended with 1")


def test_a_golden_file_that_nothing_is_compared_with_fails(runs: list[str]) -> None:
    assert "loaded and not compared: only_loaded" in runs[2]
    assert "1 failed, 2 passed" in runs[2]
    assert "golden: 6 values compared: 6 in 1 files of components, 0 in 0 files of whole models" in runs[2]
    assert "golden: FAILED, compared by no test: only_loaded, unread" in runs[2]
    assert runs[2].endswith("ended with 1")


def test_an_account_counts_values_and_names_what_was_only_loaded() -> None:
    account = Account()
    for name in ("e2e_1", "lora_1"):
        account.load(name)
    account.compare("e2e_1", {"ids": [[1, 2], (3,)], "logits": torch.ones(2, 3), "error": "TypeError"})
    assert account.compared == {"e2e_1": 10, "lora_1": 0}
    with pytest.raises(AssertionError, match="loaded and not compared: lora_1"):
        account.close()
    account.close()
