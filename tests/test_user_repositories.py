"""What users' repositories take from here: the GitHub Action, its steps run as a runner would, and the pre-commit hook."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import cli

ROOT = Path(__file__).resolve().parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
DEFECT = "attn_implementation: flash_attention_2"
QUICK = "--select ATT101"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A user's repository with a good and a bad configuration, and `d2l` and a quiet `python -m pip` on its path."""
    workspace, bin_ = tmp_path / "workspace", tmp_path / "bin"
    workspace.mkdir()
    bin_.mkdir()
    (workspace / "good.yaml").write_text("model_name_or_path: configs/models/tiny_gpt_oss\n", encoding="utf-8")
    (workspace / "bad.yaml").write_text(
        f"# a run\nmodel_name_or_path: configs/models/tiny_gpt_oss\n{DEFECT}\n", encoding="utf-8"
    )
    python, home = shlex.quote(sys.executable), shlex.quote(str(ROOT))
    scripts = {
        "d2l": f'PYTHONPATH={home} exec {python} -m cli "$@"',
        "python": f'if [ "$2" = pip ]; then printf "%s\\n" "$@"; else exec {python} "$@"; fi',
    }
    for name, line in scripts.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (bin_ / name).chmod(0o755)
    return workspace


def environment(workspace: Path) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(("GITHUB_", "RUNNER_"))}
    return own | {"PATH": f"{workspace.parent / 'bin'}:{own['PATH']}"}


def act(workspace: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run the action's steps as a runner does, and return the last one with the action's outputs."""
    given = {name: it.get("default") for name, it in ACTION["inputs"].items()} | inputs
    assert all(value is not None for value in given.values())
    output = workspace.parent / "output"
    output.write_text("", encoding="utf-8")
    (workspace.parent / "temp").mkdir(exist_ok=True)
    done = None
    for number, step in enumerate(ACTION["runs"]["steps"]):
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]  # an input inside a script would be code
        values = {key: _expand(value, "inputs", given) for key, value in step.get("env", {}).items()}
        script = workspace.parent / f"step-{number}.sh"
        script.write_text(step["run"], encoding="utf-8")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=workspace,
            env=environment(workspace)
            | values
            | {
                "GITHUB_ACTION_PATH": str(ROOT),
                "GITHUB_OUTPUT": str(output),
                "RUNNER_TEMP": str(workspace.parent / "temp"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        if number == 0:
            assert done.stdout.split()[:3] == ["-m", "pip", "install"]
            assert done.stdout.split()[-2:] == [str(ROOT / "constraints.txt"), str(ROOT)]
    assert done is not None
    written = dict(line.split("=", 1) for line in output.read_text(encoding="utf-8").splitlines())
    names = {name: it["value"] for name, it in ACTION["outputs"].items()}
    return done, {name: _expand(value, "steps.preflight.outputs", written) for name, value in names.items()}


def _expand(expression: str, context: str, values: dict[str, str]) -> str:
    """Evaluate `${{ context.name }}`; a name that is not set is empty."""
    found = re.fullmatch(rf"\$\{{\{{ {re.escape(context)}\.([\w-]+) \}}\}}", expression)
    assert found is not None, expression
    return values.get(found[1], "")


def record(workspace: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Let d2l say in the action what it says to these arguments here, where its imports are there already."""
    with monkeypatch.context() as patch:
        patch.chdir(workspace)
        said = CliRunner().invoke(cli.app, [*arguments], prog_name="d2l")
    for name, text in (("out", said.stdout), ("err", said.stderr)):
        (workspace.parent / name).write_text(text, encoding="utf-8")
    (workspace.parent / "bin" / "d2l").write_text(
        f'#!/bin/bash\n[ "$*" = {shlex.quote(" ".join(arguments))} ] || exit 99\n'
        f'cat "{workspace.parent}/out"; cat "{workspace.parent}/err" >&2; exit {said.exit_code}\n',
        encoding="utf-8",
    )


@pytest.mark.parametrize("recorded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_action_annotates_the_line_of_the_key(
    recorded: bool, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recorded:
        record(workspace, monkeypatch, "preflight", "bad.yaml", *QUICK.split(), "--format", "github")
    done, outputs = act(workspace, config="bad.yaml", options=QUICK)
    assert done.returncode == 1
    assert outputs == {"exit-code": "1", "report": ""}
    start, *fenced, command, summary = done.stdout.splitlines()
    assert start.startswith("::stop-commands::")
    end = fenced.index(f"::{start.removeprefix('::stop-commands::')}::")
    assert end == len(fenced) - 1
    assert command.startswith(
        "::error file=bad.yaml,line=3,title=ATT101 attention-without-backward::flash_attention_2 "
    )
    assert summary.endswith("findings at or above fail level error (exit code 1)")


@pytest.mark.slow
def test_the_action_writes_sarif(workspace: Path) -> None:
    done, outputs = act(workspace, config="bad.yaml", options=QUICK, format="sarif", report="a b.sarif")
    assert (done.returncode, outputs) == (1, {"exit-code": "1", "report": "a b.sarif"})
    (result,) = json.loads((workspace / "a b.sarif").read_text(encoding="utf-8"))["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "bad.yaml"},
        "region": {"startLine": 3},
    }
    assert any(line.startswith("ATT101 attention-without-backward  FAIL") for line in done.stdout.splitlines())


@pytest.mark.parametrize("form", ["github", "sarif"])
def test_the_runner_takes_no_text_for_people_for_a_command(workspace: Path, form: str) -> None:
    """In place of d2l stands what prints its arguments as commands, on both streams, and fails with a code."""
    (workspace.parent / "bin" / "d2l").write_text(
        '#!/bin/bash\nprintf "::error::%s\\n" "$@" | tee /dev/stderr\ntouch made.sarif\nexit 4\n', encoding="utf-8"
    )
    done, outputs = act(
        workspace, config="$(touch pwned) a.yaml", options="--select *;touch pwned", format=form, report="made.sarif"
    )
    assert (done.returncode, outputs["exit-code"]) == (4, "4")
    asked = ["preflight", "$(touch pwned) a.yaml", "--select", "*;touch", "pwned", "--format", form]
    asked += ["--output", "made.sarif"] if form == "sarif" else []
    words = [f"::error::{word}" for word in asked]
    start, *lines = done.stdout.splitlines()
    end = f"::{start.removeprefix('::stop-commands::')}::"
    assert len(end) == 36
    assert lines == ([*words, *words, end] if form == "sarif" else [*words, end, *words])
    assert outputs["report"] == ("made.sarif" if form == "sarif" else "")
    assert not (workspace / "pwned").exists()


def test_another_format_is_refused(workspace: Path) -> None:
    done, outputs = act(workspace, config="bad.yaml", format="html")
    assert (done.returncode, outputs["exit-code"]) == (2, "")
    assert done.stdout.startswith("::error title=d2l preflight::format: expected github or sarif")


def test_the_hook_runs_as_pre_commit_runs_it(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry and the user's `args`, without names of files, in the user's repository."""
    assert HOOK["language"] == "python"  # installs this repository, and with it the console script of the entry
    assert HOOK["pass_filenames"] is False
    script, *entry = shlex.split(HOOK["entry"])
    assert script in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    monkeypatch.chdir(workspace)
    codes = {}
    for config in ("good.yaml", "bad.yaml"):
        assert re.search(HOOK["files"], config)
        done = CliRunner().invoke(cli.app, [*entry, config, *QUICK.split()], prog_name=script)
        codes[config] = done.exit_code
        assert "attention-without-backward" in done.stdout, done.output
    assert codes == {"good.yaml": 0, "bad.yaml": 1}
