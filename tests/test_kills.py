"""Runs that are killed and damaged end equal, a few of those that `make kills` tries."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.kills import KINDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_killed_and_damaged_runs_end_equal() -> None:
    command = [sys.executable, "experiments/kills.py", "--trials", "8", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n|") == 1 + len(KINDS)  # a line below the heading, and one for each kind
