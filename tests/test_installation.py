"""A start is refused where another project's d2l, or another version of ours, lies in the package's folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands.installation import OLD_COMMANDS, OLD_MODULES, OTHER_PROJECT, installation_problem

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder into which d2l-preflight was installed."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("d2l", "checks", "commands"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "cli.py", tmp_path)
    (tmp_path / "d2l_preflight-0.2.0.dist-info").mkdir()
    return tmp_path


def start(site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", "checks"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, check=False)


def test_nothing_is_wrong_with_this_tree_and_an_installed_one(site: Path) -> None:
    assert installation_problem(ROOT / "d2l") == ""
    assert installation_problem(site / "d2l") == ""
    assert not [name for name in (*OLD_MODULES, *OTHER_PROJECT) if (ROOT / "d2l" / name).exists()]


@pytest.mark.parametrize("installed_last", ["ours", "theirs"])
def test_the_other_project_beside_ours_is_refused_before_it_is_imported(site: Path, installed_last: str) -> None:
    (site / "d2l-1.0.3.dist-info").mkdir()
    (site / "d2l-1.0.3.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: d2l\nVersion: 1.0.3\n")
    (site / "d2l" / "torch.py").write_text("raise SystemExit('the other project was imported')\n")
    if installed_last == "theirs":
        (site / "d2l" / "__init__.py").write_text("raise SystemExit('the other project was imported')\n")
    done = start(site)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: two projects called d2l are installed in {site}\n")
    assert "found: d2l-1.0.3.dist-info, d2l/torch.py, of PyPI's d2l" in done.stderr
    assert "pip uninstall d2l" in done.stderr
    assert len(done.stderr.splitlines()) == 4


def test_the_other_project_in_place_of_ours_is_refused(site: Path) -> None:
    shutil.rmtree(site / "d2l")
    (site / "d2l").mkdir()
    (site / "d2l" / "__init__.py").write_text('__version__ = "1.0.3"\n')
    (site / "d2l" / "mxnet.py").write_text("")
    done = start(site)
    assert (done.returncode, done.stdout) == (2, "")
    assert "found: d2l/mxnet.py" in done.stderr


def test_the_metadata_of_the_other_project_is_enough(site: Path) -> None:
    (site / "d2l-0.17.6.dist-info").mkdir()
    assert "d2l-0.17.6.dist-info" in installation_problem(site / "d2l")


@pytest.mark.parametrize("name", ["d2l/config.py", "d2l/prepare.py", "cli_data.py"])
def test_modules_of_an_older_version_are_refused_in_a_checkout(site: Path, name: str) -> None:
    (site / "pyproject.toml").write_text("")
    (site / name).write_text("")
    done = start(site)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"found: {name}, of version 0.1.0" in done.stderr
    assert "delete these files" in done.stderr


def test_a_file_beside_the_package_is_no_fault_outside_of_a_checkout(site: Path) -> None:
    (site / OLD_COMMANDS[0]).write_text("")  # perhaps of another project
    assert installation_problem(site / "d2l") == ""


def test_a_sound_installation_starts(site: Path) -> None:
    shutil.copytree(ROOT / "docs", site / "docs")
    done = start(site)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
