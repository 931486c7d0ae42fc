"""A shell completes commands, options, choices, codes and stages, by the protocols of bash and zsh."""

import os
import subprocess
import sys

import pytest

from checks.catalogue import read_catalogue


def bash(line: str) -> list[str]:
    """What the console script offers bash for the last word of a line."""
    variables = {"_D2L_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return complete(variables).splitlines()


def complete(variables: dict[str, str]) -> str:
    command = [sys.executable, "-m", "cli"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("d2l pref", ["preflight"]),
        ("d2l preflight --fo", ["--format"]),
        ("d2l preflight --format ", ["text", "json", "junit", "sarif", "github", "html"]),
        ("d2l preflight --stage t", ["twin"]),
        ("d2l preflight --select QNT101,QNT10", ["QNT101,QNT101", "QNT101,QNT102", "QNT101,QNT103"]),
        ("d2l train --ignore DSK", ["DSK401", "DSK402"]),
    ],
)
def test_bash_completes(line: str, offered: list[str]) -> None:
    assert bash(line) == offered


def test_bash_completes_the_code_of_every_check() -> None:
    assert bash("d2l explain ") == sorted(check.code for check in read_catalogue())


def test_zsh_shows_the_name_of_a_check() -> None:
    offered = complete({"_D2L_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "d2l explain ATT101"})
    assert '"ATT101":"attention-without-backward"' in offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_the_shell_is_made_for_d2l(shell: str) -> None:
    assert "_D2L_COMPLETE=complete_" in complete({"_D2L_COMPLETE": f"source_{shell}"})
