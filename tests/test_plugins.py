"""Checks of other distributions: a real package, installed and run; and what is refused of broken ones."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from checks.catalogue import read_catalogue
from checks.docs import problems
from checks.gate import reuse
from checks.plugins import full_catalogue, load_plugins, with_plugins
from checks.result import Pass
from checks.rule import Fault, Rule
from checks.rules import plugin_not_loaded
from checks.runner import run_checks
from cli import app
from d2l.io.resources import resource

EXAMPLE = Path(__file__).parent / "plugin_example"
RULE = (EXAMPLE / "team_checks/rank_above_ours.py").read_text(encoding="utf-8")

OURS = cache(read_catalogue)  # not anew for every case

Write = Callable[..., None]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder of installed distributions, whose modules are forgotten behind the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    load_plugins.cache_clear()
    yield folder
    load_plugins.cache_clear()
    for module in set(sys.modules) - before:
        if Path(getattr(sys.modules[module], "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[module]


@pytest.fixture
def write(site: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return what installs a distribution of one module: its text, and the entry point's attribute."""
    monkeypatch.setattr("checks.plugins.read_catalogue", OURS)

    def install(name: str, text: str, attribute: str = ":RULE", version: str = "1.0") -> None:
        module = name.replace("-", "_")
        (site / f"{module}.py").write_text(text, encoding="utf-8")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[d2l.checks]\nown = {module}{attribute}\n")
        load_plugins.cache_clear()

    return install


def renamed(text: str, code: str, name: str) -> str:
    return text.replace("TEM101", code).replace("rank-above-ours", name)


def test_an_installed_package_is_listed_judged_and_named(site: Path) -> None:
    """The example, by pip: red where its check is, with its origin."""
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(site), str(EXAMPLE)],
        check=True,
        capture_output=True,
    )
    importlib.invalidate_caches()
    command = ["preflight", "--select", "TEM,PLG101", "--set", "lora_r=64", "--format", "json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.stderr
    report = json.loads(done.stdout)
    assert re.fullmatch(r"team-checks 1\.0 \(code [0-9a-f]{12}\)", report["judged"]["plugins"])
    assert [(it["code"], it["outcome"], it["plugin"]) for it in report["outcomes"]] == [
        ("PLG101", "pass", ""),
        ("TEM101", "fail", "team-checks 1.0"),
    ]


def test_the_page_shows_the_example_word_for_word() -> None:
    blocks = re.findall(r"```\w+\n(.*?)```", resource("docs/plugins.md").read_text(encoding="utf-8"), re.DOTALL)
    files = ("pyproject.toml", "team_checks/__init__.py", "team_checks/rank_above_ours.py")
    assert blocks == [(EXAMPLE / file).read_text(encoding="utf-8") for file in files]


def test_checks_of_a_plugin_are_listed_and_explained_as_ours(write: Write) -> None:
    write("team-checks", RULE)
    listed = json.loads(CliRunner().invoke(app, ["checks", "--format", "json"]).stdout)
    assert {it["code"]: it["plugin"] for it in listed if it["plugin"]} == {"TEM101": "team-checks 1.0"}
    explained = CliRunner().invoke(app, ["explain", "rank-above-ours"])
    assert "plugin    team-checks 1.0\n" in explained.stdout
    assert problems(full_catalogue()) == []
    stages = [
        rule.stage for rule in with_plugins([Rule("TWI201", "a-twin", "twin", "error", (), lambda subject: Pass(""))])
    ]
    assert stages == ["static", "twin"]


def without(section: str) -> str:
    return re.sub(rf"{section}\n-+\n.*?\n\n", "", RULE, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch_of_yesterday\n", "ModuleNotFoundError: No module named 'torch_of_yesterday'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("OTHER = 1\n", "AttributeError"),
        ("RULE = 1\n", "TypeError"),
        ("RULE = ()\n", "it registers no check"),
        ("RULE = ('TEM101',)\n", "expected a Rule of checks.rule. Got str"),
        (RULE.replace('"TEM101"', '"ATT101"'), "ATT101: ATT101 is taken by d2l"),
        (RULE.replace('"rank-above-ours"', '"packed-documents-leak"'), "packed-documents-leak is taken by d2l"),
        (RULE.replace("TEM101", "team1"), "a code is three capitals and three digits"),
        (RULE.replace('"static"', '"early"'), "there is no stage 'early'"),
        (RULE.replace('"error"', '"fatal"'), "there is no severity 'fatal'"),
        (RULE.replace("    faults=(Fault", "    # (Fault"), "needs at least one planted fault"),
        (RULE.replace("faults=(Fault(", "faults=(tuple("), "TypeError"),
        (RULE.replace('("https://docs.vllm.ai/en/stable/features/lora/",)', "()"), "needs at least one source"),
        (
            RULE.replace('("https://docs.vllm.ai/en/stable/features/lora/",)', '("https://a.b")'),
            "sources must be a tuple",
        ),
        (RULE.replace("https://docs.vllm.ai/en/stable/features/lora/", "our wiki"), "there is no source 'our wiki'"),
        (RULE.replace("    check=check,\n", "    check=check,\n    requires=('DAT301',),\n"), "requires DAT301"),
        (RULE.replace("    check=check,\n", "    check=print,\n"), "check must be a function"),
        (without("Why it matters"), "sections must be"),
    ],
)
def test_what_is_incomplete_is_refused_by_name_and_fails_the_gate(text: str, words: str, write: Write) -> None:
    write("broken-checks", text)
    write("good-checks", renamed(RULE, "GOO101", "rank-too-high"))
    broken, good = load_plugins()
    assert broken.name == "broken-checks 1.0"
    assert any(words in problem for problem in broken.problems), broken.problems
    assert [rule.code for rule in with_plugins(())] == ["GOO101"]
    assert good.problems == ()
    found = plugin_not_loaded.check(SimpleNamespace(implementation=SimpleNamespace(plugins=load_plugins)))  # type: ignore[arg-type]
    assert found.message == "installed checks are not judged: broken-checks 1.0 cannot be loaded"  # type: ignore[union-attr]


def test_the_command_says_what_it_leaves_out_and_lists_the_others(write: Write) -> None:
    write("broken-checks", "OTHER = 1\n")
    write("good-checks", renamed(RULE, "GOO101", "rank-too-high"))
    noted = CliRunner().invoke(app, ["checks", "--format", "json"])
    assert "checks of broken-checks 1.0 are left out" in noted.stderr
    assert "GOO101" in {it["code"] for it in json.loads(noted.stdout)}


def test_a_code_belongs_to_the_first_of_two_plugins(write: Write) -> None:
    write("a-checks", RULE)
    write("b-checks", RULE)
    first, second = load_plugins()
    assert first.problems == ()
    assert second.problems == (
        "TEM101: TEM101 is taken by a-checks 1.0",
        "TEM101: rank-above-ours is taken by a-checks 1.0",
    )


def test_what_a_plugin_prints_does_not_reach_stdout(write: Write) -> None:
    write("loud-checks", f"{RULE}\nprint('a plugin talks')\n")
    done = CliRunner().invoke(app, ["checks", "--format", "json"])
    assert "TEM101" in {it["code"] for it in json.loads(done.stdout)}


def test_other_code_is_another_plugin(write: Write) -> None:
    write("team-checks", RULE)
    before = str(*load_plugins())
    for module in ("team_checks",):
        path = Path(str(sys.modules[module].__file__))
        del sys.modules[module]
    path.write_text(RULE.replace("SERVED = 64", "SERVED = 65"), encoding="utf-8")
    load_plugins.cache_clear()
    assert str(*load_plugins()) != before


class Judged:
    """What the runner and the gate need of a subject."""

    name, fingerprint = "run.yaml", "f"

    def __init__(self, plugins: str) -> None:
        self.judged = {"versions": "torch 1", "device": "CPU", **({"plugins": plugins} if plugins else {})}


def test_a_report_made_with_other_plugins_does_not_speak_for_a_run(tmp_path: Path) -> None:
    own = Fault("own", "", lambda subject: subject)
    rules = [
        Rule("CFG101", "toy-rule", "device", "error", (), lambda subject: Pass(""), faults=(own,), plugin="team 1.0")
    ]
    made: Any = Judged("team 1.0 (code aa)")
    document = run_checks(made, rules).to_json()
    (tmp_path / "report.json").write_text(json.dumps(document))
    for plugins in ("team 1.0 (code aa)", "team 1.0 (code bb)", "team 1.1 (code aa)", ""):
        now: Any = Judged(plugins)
        report, said = reuse(tmp_path / "report.json", now, rules, {})
        assert (report is None) == (plugins != "team 1.0 (code aa)"), said
    assert "it judged on other plugins: team 1.0 (code aa), and here are none" in said


def test_nothing_is_loaded_where_nothing_is_registered() -> None:
    load_plugins.cache_clear()
    assert load_plugins() == ()
    assert full_catalogue() == read_catalogue()
