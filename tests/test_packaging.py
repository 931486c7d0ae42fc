"""The wheel holds everything that a command needs, and works from any directory."""

import json
import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
D2L = ("-m", "cli")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that holds the wheel; dependencies come from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("d2l_preflight-*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    site = next(environment.glob("lib/python*/site-packages"))
    own = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    # A plain path entry: the packages of `own` are found behind those of the wheel, its .pth files are not read.
    (site / "dependencies.pth").write_text(f"{own}\n")
    return environment / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def files_of(path: Path) -> Iterator[Path]:
    """Every file of a folder that belongs into a distribution, or the file itself."""
    if path.is_file():
        yield path
    for file in path.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            yield file


def test_the_wheel_holds_every_file_of_what_it_includes(installed: Path) -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {"d2l", "checks", "commands", "cli.py"} <= set(wheel["only-include"])
    site = next(installed.parents[1].glob("lib/python*/site-packages"))
    for included in wheel["only-include"]:
        files = [str(file.relative_to(ROOT)) for file in files_of(ROOT / included)]
        assert files, included
        for file in files:
            moved = next((folder for folder in wheel["sources"] if f"{file}/".startswith(f"{folder}/")), None)
            place = wheel["sources"][moved] + file.removeprefix(moved) if moved else file
            assert (site / place).is_file(), f"{file} is not in the wheel, at {place}"
    if (ROOT / "d2l" / "py.typed").is_file():
        assert (site / "d2l" / "py.typed").is_file()  # type checkers read our annotations


def test_an_installed_wheel_runs_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    modules = "d2l, checks, commands, cli"
    places = run(installed, tmp_path, "-c", f"import {modules}; print(*(module.__file__ for module in ({modules})))")
    assert [("environment" in place) for place in places.stdout.split()] == [True] * 4, places.stderr
    listed = run(installed, tmp_path, *D2L, "checks", "--format", "json")
    assert listed.returncode == 0, listed.stderr
    links = [source["link"] for check in json.loads(listed.stdout) for source in check["sources"]]
    pages = {link.partition("#")[0] for link in links if not link.startswith("https://")}
    names = {"nine_fixes.md", "failure_modes.md", "plugins.md", "targets.md", "smollm2.md"}
    assert {Path(page).name for page in pages} == names
    assert all("environment" in page and Path(page).is_file() for page in pages)
    shipped = ("configs/gpt_oss_20b.yaml", "--tokenizer", "configs/models/tiny_gpt_oss")
    chosen = ("--select", "TGT101", "--select", "LBL101", "--format", "json")
    report = run(installed, tmp_path, *D2L, "preflight", *shipped, *chosen)
    assert report.returncode == 0, report.stderr
    assert [outcome["outcome"] for outcome in json.loads(report.stdout)["outcomes"]] == ["pass", "pass"]
    assert not list(tmp_path.iterdir())


def test_the_oldest_versions_are_the_lower_bounds_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    ranges = [line.partition(";")[0] for line in ranges if not line.startswith("torch>=")]  # torch comes from a file
    bounds = dict(line.split(">=") for line in ranges)
    oldest = (ROOT / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0] for line in oldest if line and line[0] != "#" and not line.startswith("torch==")]
    pinned = dict(line.split("==") for line in pins)
    assert {name: Version(bounds[name]) for name in pinned} == {name: Version(pin) for name, pin in pinned.items()}
    assert set(bounds) - set(pinned) == {"mypy", "ruff", "types-PyYAML"}  # tools whose version no test depends on
