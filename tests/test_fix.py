"""`d2l preflight --fix`: a patch that another tool applies, what becomes of each finding, and a file that is never lost."""

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli

FILE = """\
# my run
model_name_or_path: configs/models/tiny_gpt_oss
attn_implementation: sdpa  # faster?
target_modules: [v_proj]
"""
SETTLED = FILE.replace("sdpa  #", "auto  #")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("run.yaml")
    path.write_text(FILE)
    return path


def fix(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["preflight", "--select", "ATT101,LOR204", "--fix", *arguments])


def test_the_patch_settles_what_was_found_and_nothing_is_written(config: Path) -> None:
    result = fix("run.yaml", "-q")
    assert result.exit_code == 1
    assert "ATT101 attention-without-backward: fail → pass\n" in result.stderr
    assert config.read_text() == FILE
    applied = subprocess.run(["git", "apply", "-p0"], input=result.stdout, text=True, capture_output=True, check=False)
    assert applied.returncode == 0, applied.stderr
    assert config.read_text() == SETTLED
    clean = fix("run.yaml")
    assert (clean.exit_code, clean.stdout) == (0, "")
    assert clean.stderr.endswith("No setting is known that settles a finding.\n")


def test_a_finding_that_is_accepted_is_left_alone(config: Path) -> None:
    result = fix("run.yaml", "--write", "--ignore", "ATT101=it is what we have")
    assert result.stderr.endswith("No setting is known that settles a finding.\n")
    assert config.read_text() == FILE


def test_the_line_endings_of_windows_stay(config: Path) -> None:
    windows = FILE.replace("\n", "\r\n").encode()
    config.write_bytes(windows)
    patch = fix("run.yaml", "--write").stdout_bytes
    assert config.read_bytes() == SETTLED.replace("\n", "\r\n").encode()
    config.write_bytes(windows)
    applied = subprocess.run(["git", "apply", "-p0"], input=patch, capture_output=True, check=False)
    assert applied.returncode == 0, applied.stderr
    assert config.read_bytes() == SETTLED.replace("\n", "\r\n").encode()


def test_a_written_patch_keeps_the_old_file(config: Path) -> None:
    Path("run.before-fix.yaml").write_text("another one\n")
    result = fix("run.yaml", "--write")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.endswith("Written to run.yaml; the old one is run.before-fix-2.yaml\n")
    assert config.read_text() == SETTLED
    assert Path("run.before-fix-2.yaml").read_text() == FILE
    assert Path("run.before-fix.yaml").read_text() == "another one\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.yaml", "--set", "attn_implementation=sdpa"], "attn_implementation is set to 'sdpa' by an option"),
        ([], "--fix changes a configuration: name the file"),
        (["absent.yaml"], "name the file"),
        (["run.yaml", "--format", "json"], "--fix prints a patch"),
        (["run.yaml", "-o", "report.txt"], "--fix prints a patch"),
        (["run.yaml", "-q", "-v"], "-q prints less"),
    ],
)
def test_what_does_not_go_together_is_refused(config: Path, arguments: list[str], message: str) -> None:
    result = fix(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert [path.name for path in Path().iterdir()] == ["run.yaml"]


def test_write_without_fix_is_refused(config: Path) -> None:
    result = CliRunner().invoke(cli.app, ["preflight", "run.yaml", "--write"])
    assert (result.exit_code, "give both" in result.stderr) == (2, True)
