"""The commands, with toy rules and a toy training run in place of the real ones."""

import errno
import json
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console
from support.report_schema import PUBLISHED
from typer.testing import CliRunner

import cli
from checks.result import Fail, Pass, Skip, Warn
from checks.rule import Fault, Rule
from commands.console import LOADING, libraries_to_stderr, load_libraries
from d2l.errors import ConfigError, DataError, NonFiniteError
from d2l.train.first_step import Prediction

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Subject:
    defects: frozenset[str] = frozenset()
    name: str = "toy.yaml"
    fingerprint: str = "f" * 64
    identity: str = "hashes"
    judged: tuple[tuple[str, str], ...] = ()


@dataclass
class World:
    """What the commands find when they import, and what they did with it."""

    rules: list = field(default_factory=list)
    loaded: list = field(default_factory=list)
    trained: list = field(default_factory=list)
    predictions: list = field(default_factory=list)
    records: list = field(default_factory=list)
    load_error: Exception | None = None
    train_error: Exception | None = None
    asked: list = field(default_factory=list)
    step: int = 1
    remarks: tuple = ()
    train_ds_names: tuple = ("needle",)
    logging_steps: int = 1
    report_to: tuple = ()

    def load_config(self, path, overrides, **options):
        if self.load_error:
            raise self.load_error
        self.loaded.append((path, overrides, options))
        settings = {"max_steps": 2, "logging_steps": self.logging_steps, "report_to": self.report_to}
        settings |= {"select_checks": (), "ignore_checks": {}}
        return SimpleNamespace(remarks=self.remarks, train_ds_names=self.train_ds_names, **settings)

    def start_new(self, config, *, numbered):
        self.asked.append(numbered)
        return nullcontext(
            SimpleNamespace(folder=Path("runs/toy-2" if numbered else "runs/toy"), checkpoint=None, notes=())
        )

    def start_resumed(self, config, place, changes):
        self.asked.append(changes)
        passed_over = ("passed over a newer checkpoint: it is torn",)
        start = SimpleNamespace(
            folder=Path("runs/resumed"), checkpoint=f"checkpoint of {place}", step=self.step, notes=passed_over
        )
        return nullcontext(start)

    def with_inputs(self, start, identity):
        assert identity == "hashes"
        return SimpleNamespace(**vars(start) | {"notes": (*start.notes, "torch is another")})

    def train(self, config, start, *, preflight, prediction, on_step, on_tokenize, stop):
        self.predictions.append(prediction)
        self.trained.append((preflight, start.folder, start.checkpoint))
        for done in (1, 1200):
            on_tokenize(done, 1200)
        for record in self.records:
            on_step(record)
        if self.train_error:
            raise self.train_error


def rule(code, result=None, **rest):
    """A rule that gives this result (default: a pass) unless the defect `own` was planted."""

    def run(subject):
        if isinstance(result, BaseException):
            raise result
        sys.stdout.write("a library talks\n")
        return FAIL if "own" in subject.defects else result or Pass("fine [ok]")

    own = Fault("own", "the rule's own", lambda subject: replace(subject, defects=subject.defects | {"own"}))
    name = f"toy-{code.lower()}"
    return Rule(
        code,
        name,
        **{"stage": "twin", "severity": "error", "sources": ("fix 1",), "faults": (own,), "check": run} | rest,
    )


FAIL = Fail(message="broken", expected="whole", actual="broken", remedy="fix it")


@pytest.fixture
def world(monkeypatch):
    world = World(rules=[rule("TOY201")])

    def stand_in(name, **attributes):
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    stand_in("checks.rules", RULES=world.rules)
    stand_in("checks.production", make_subject=lambda config, name, *rest, **options: Subject(name=name))
    for command in ("preflight", "train"):
        monkeypatch.setattr(f"commands.{command}.waited", lambda: 0.0)  # two runs print the same
    stand_in("d2l.build")
    stand_in("d2l.config.load", load_config=world.load_config)
    stand_in(
        "d2l.train.run",
        train=world.train,
    )
    stand_in(
        "d2l.train.start",
        start_new=world.start_new,
        start_resumed=world.start_resumed,
        with_inputs=world.with_inputs,
    )
    return world


def d2l(*arguments, **environment):
    return CliRunner().invoke(cli.app, arguments, prog_name="d2l", env=environment or None)


# What every command has in common


@pytest.mark.parametrize("code", ["import cli", "import sys, cli; sys.argv = ['d2l', '--help']; cli.main()"])
def test_nothing_heavy_is_imported_early(code):
    probe = f"""
import atexit, sys
heavy = ("torch", "transformers", "datasets", "pydantic", "rich")
atexit.register(lambda: print("HEAVY", [name for name in heavy if name in sys.modules]))
{code}
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_checks_framework_does_not_import_torch():
    probe = "import sys, checks.runner, checks.selftest, checks.report, checks.docs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_version():
    assert d2l("--version").stdout.startswith("d2l ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["preflght"], "preflight"),
        (["preflight", "--fail-level", "never"], "'warn', 'error'"),
        (["preflight", "--set", "lora_r"], "--set expects KEY=VALUE. Got 'lora_r'"),
        (["preflight", "--set", "lora_r=1", "--set", "lora_r=2"], "--set lora_r is given twice"),
        (["preflight", "--ignore", "TOY201"], "--ignore expects CODE=REASON"),
        (["preflight", "--ignore", "TOY201="], "without a reason"),
        (["preflight", "--select", "TOY202"], "did you mean TOY201"),
        (["preflight", "--stage", "twins"], "no stage 'twins'"),
        (["preflight", "--selftest", "--ignore", "TOY201=x"], "leave --ignore out"),
        (["preflight", "--selftest", "--format", "html"], "choose one of text, json, junit"),
        (["preflight", "--selftest", "--format", "sarif"], "--format sarif describes findings"),
        (["preflight", "-o", "no/such/folder/report.json"], "does not exist: make it"),
        (["explain", "ATT20"], "did you mean ATT206 block-tables-wrong or ATT205"),
        (["train"], "CONFIG is missing: name a configuration, or continue a run with --resume"),
        (["train", "--resume", "absent"], "--resume absent does not exist: `d2l status FOLDER` lists"),
        (
            ["train", "x", "--resume", "a", "--output", "b"],
            "to continue that run leave --output out; to start anew in b",
        ),
        (["train", "x", "--allow-change", "seed=1"], "--allow-change is about a run that is resumed: add --resume"),
        (["train", "x", "--resume", "a", "--allow-change", "seed="], "seed is changed without a reason"),
        (["train", "x", "--resume", "a", "--allow-change", "seed"], "--allow-change expects FIELD=REASON. Got 'seed'"),
    ],
)
def test_usage_errors_exit_2_without_a_traceback(world, arguments, words):
    result = d2l(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["preflight", "train"])
def test_every_config_problem_on_stderr(world, command):
    world.load_error = ConfigError(["line 1: bad", "line 2: worse"], "x.yaml")
    result = d2l(command, "x.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "line 1: bad" in result.stderr
    assert "line 2: worse" in result.stderr


@pytest.mark.parametrize("command", ["preflight", "train"])
def test_interrupt_is_one_line_and_130(world, command):
    world.rules[:] = [rule("TOY201", KeyboardInterrupt())]
    result = d2l(command, "x.yaml")
    assert (result.exit_code, result.stderr) == (130, f"{LOADING}\nInterrupted.\n")


def test_what_is_loaded_is_shown_before_it_is_loaded(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("commands.console.import_module", lambda name: shown.append((name, *capsys.readouterr())))
    load_libraries()
    assert shown == [("d2l.build", "", f"{LOADING}\n")]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_status_while_libraries_load(monkeypatch):
    screen = Console(file=StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("commands.console.console", lambda **options: screen)
    monkeypatch.setattr("commands.console.import_module", lambda name: time.sleep(0.2))
    load_libraries()
    text = screen.file.getvalue()
    assert LOADING in text
    assert text.endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize("quiet", [True, False])
def test_one_process_of_several_shows_what_it_loads(monkeypatch, capsys, quiet):
    monkeypatch.setattr("commands.console.import_module", lambda name: None)
    load_libraries(quiet=quiet)
    assert capsys.readouterr().err == ("" if quiet else f"{LOADING}\n")


@pytest.mark.parametrize("arguments", [["preflight"], ["train", "x.yaml"]])
def test_the_loading_is_shown_once_and_not_on_stdout(world, arguments):
    result = d2l(*arguments)
    assert result.stderr.count(LOADING) == 1
    assert LOADING not in result.stdout


def test_every_command_that_loads_libraries_shows_it(monkeypatch, capsys):
    monkeypatch.setattr("commands.console.import_module", lambda name: None)
    with libraries_to_stderr():
        sys.stdout.write("a library talks\n")
    assert capsys.readouterr() == ("", f"{LOADING}\na library talks\n")
    for name in ("internalize", "ask", "import_reference", "probe", "evaluate", "data"):
        assert "with libraries_to_stderr():" in (ROOT / "commands" / f"{name}.py").read_text()


def test_the_seconds_of_a_report_are_what_the_user_waited(world, monkeypatch):
    for command in ("preflight", "train"):
        monkeypatch.setattr(f"commands.{command}.waited", lambda: 42.25)
    assert "in 42.2 s: nothing found" in d2l("preflight").stdout
    assert "in 42.2 s (exit code 0)" in d2l("preflight", "--selftest").stdout
    for options in ([], ["--selftest"]):
        assert json.loads(d2l("preflight", "--format", "json", *options).stdout)["summary"]["seconds"] == 42.25
    assert "in 42.2 s: nothing found" in d2l("train", "x.yaml").stdout
    assert world.trained[0][0]["summary"]["seconds"] == 42.25


def test_the_clock_starts_before_the_commands_are_imported():
    probe = "import time; time.perf_counter = lambda: 100.0; time.process_time = lambda: 7.0"
    probe += "; from commands import console; time.perf_counter = lambda: 103.0; print(console.waited())"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "10.0\n"


def test_our_own_faults_are_not_hidden(world):
    world.load_error = RuntimeError("ours")
    assert isinstance(d2l("preflight").exception, RuntimeError)


def test_a_full_disk_behind_standard_output_is_one_message(world):
    world.load_error = OSError(errno.ENOSPC, "No space left on device")
    result = d2l("preflight")
    assert result.exit_code == 2
    assert "the disk behind standard output is full" in result.stderr
    world.load_error = OSError(errno.ENOSPC, "No space left on device", "weights")  # of a file: ours to have caught
    assert isinstance(d2l("preflight").exception, OSError)


# preflight


def test_preflight_passes_what_was_given(world):
    arguments = ["x.yaml", "--model", "m", "--tokenizer", "t", "--data", "d", "--set", "a=1", "--set", "b=c=d"]
    assert d2l("preflight", *arguments).exit_code == 0
    (loaded,) = world.loaded
    assert loaded == (Path("x.yaml"), {"a": "1", "b": "c=d"}, {"model": "m", "tokenizer": "t", "data": "d"})


def test_preflight_without_a_config_leaves_the_default_to_the_config(world):
    assert d2l("preflight").exit_code == 0
    assert world.loaded[0][0] is None


def test_preflight_text_on_stdout_is_plain(world):
    world.remarks = ("a key has no effect",)
    result = d2l("preflight")
    assert "TOY201 toy-toy201  pass  fine [ok]\n" in result.stdout
    assert "\x1b" not in result.stdout
    assert "a library talks" not in result.stdout
    assert "Note: a key has no effect\n" in result.stderr


@pytest.mark.parametrize(
    ("found", "arguments", "code"),
    [
        (None, [], 0),
        (FAIL, [], 1),
        (FAIL, ["--ignore", "toy201=wanted"], 0),
        (Warn(message="odd", expected="even", actual="odd", remedy="round"), [], 0),
        (Warn(message="odd", expected="even", actual="odd", remedy="round"), ["--fail-level", "warn"], 1),
        (ValueError("boom"), [], 3),
        (Skip("no data"), [], 0),
        (Skip("no data"), ["--select", "TOY201"], 4),
        (Skip("no data"), ["--stage", "twin"], 4),
        (None, ["--selftest"], 0),
        (Skip("no data"), ["--selftest"], 5),
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_preflight_exit_codes(world, found, arguments, code, form):
    world.rules[:] = [rule("TOY201", found)]
    result = d2l("preflight", "--format", form, *arguments)
    assert result.exit_code == code
    if form == "json":
        assert json.loads(result.stdout)["summary"]["exit_code"] == code


def test_preflight_json_is_all_of_stdout(world):
    world.rules[:] = [rule("TOY201", FAIL), rule("TOY202", requires=("TOY201",))]
    result = d2l("preflight", "--format", "json")
    document = json.loads(result.stdout)
    assert [outcome["outcome"] for outcome in document["outcomes"]] == ["fail", "blocked"]


FORMS = {
    "junit": "<?xml version=",
    "sarif": '{\n  "$schema": ',
    "github": "::error file=x.yaml,",
    "html": "<!doctype html>",
}


@pytest.mark.parametrize(("form", "start"), FORMS.items())
def test_a_format_for_programs_is_all_of_stdout_or_in_the_file(world, tmp_path, form, start):
    world.rules[:] = [rule("TOY201", FAIL), rule("TOY202", requires=("TOY201",))]
    result = d2l("preflight", "x.yaml", "--format", form)
    assert result.exit_code == 1
    assert result.stdout.startswith(start)
    told = d2l("preflight", "x.yaml", "--format", form, "-o", str(tmp_path / "report"))
    assert told.exit_code == 1
    assert (tmp_path / "report").read_text() == result.stdout
    assert told.stdout == d2l("preflight", "x.yaml").stdout


def test_a_report_that_cannot_be_written_was_printed(world, tmp_path, monkeypatch):
    def full(path):
        raise DataError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("commands.preflight.write_new_file", full)
    result = d2l("preflight", "x.yaml", "-o", str(tmp_path / "report"))
    assert result.exit_code == 2
    assert "TOY201" in result.stdout


def test_the_schema_of_reports_is_printed_and_nothing_runs(world):
    result = d2l("preflight", "--schema")
    assert json.loads(result.stdout) == PUBLISHED
    assert world.loaded == []


def test_output_file_is_written_and_the_terminal_still_told(world, tmp_path):
    result = d2l("preflight", "--format", "json", "-o", str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text())["summary"]["pass"] == 1
    assert "1 passed" in result.stdout
    d2l("preflight", "-o", str(tmp_path / "report.txt"))
    assert (tmp_path / "report.txt").read_text() == d2l("preflight").stdout


def test_an_existing_file_is_refused_before_anything_runs(world, tmp_path):
    (tmp_path / "mine").write_text("precious")
    result = d2l("preflight", "-o", str(tmp_path / "mine"))
    assert result.exit_code == 2
    assert "never written over" in result.stderr
    assert (tmp_path / "mine").read_text() == "precious"
    assert world.loaded == []


def test_a_file_that_appears_meanwhile_is_not_overwritten(world, tmp_path):
    target = tmp_path / "report.txt"

    def meanwhile(subject):
        target.write_text("precious")
        return Pass("fine")

    world.rules[:] = [rule("TOY201", check=meanwhile)]
    assert d2l("preflight", "-o", str(target)).exit_code == 2
    assert target.read_text() == "precious"


def test_selftest_junit(world):
    assert (
        '<testcase name="TOY201 own" classname="d2l.selftest"'
        in d2l(*("preflight", "--selftest", "--format", "junit")).stdout
    )


def test_selftest_json(world):
    (fault,) = json.loads(d2l("preflight", "--selftest", "--format", "json").stdout)["faults"]
    assert (fault["code"], fault["fault"], fault["result"]) == ("TOY201", "own", "caught")


# explain and checks


def test_explain_and_checks():
    text = d2l("explain", "att201").stdout
    assert text.startswith("ATT201 packed-documents-leak\n")
    place = next(line.strip() for line in text.splitlines() if "nine_fixes.md" in line)
    assert Path(place.partition("#")[0]).is_file()
    listed = d2l("checks").stdout.splitlines()
    documents = json.loads(d2l("checks", "--format", "json").stdout)
    assert [line.split()[0] for line in listed] == [document["code"] for document in documents]
    keys = ["code", "name", "stage", "severity", "sources", "requires", "faults", "plugin"]
    assert all(list(document) == keys for document in documents)


@pytest.mark.parametrize("arguments", [["checks"], ["checks", "--format", "json"], ["explain", "ATT201"]])
def test_explain_and_checks_import_no_rule(arguments):
    probe = f"""
import atexit, sys
heavy = ("torch", "transformers", "checks.rules")
atexit.register(lambda: print("HEAVY", [name for name in heavy if name in sys.modules]))
import cli
sys.argv = ["d2l", *{arguments}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert len(done.stdout.splitlines()) > 20


# train

RECORDS = [
    {"step": 1, "ce_loss": 5.5, "grad_norm": 0.5, "gen_lora_l1_norm": 0.25, "tokens": 700, "seconds": 0.5},
    {"step": 2, "ce_loss": 5.25, "grad_norm": 0.4, "gen_lora_l1_norm": 0.125, "tokens": 800, "seconds": 0.5},
]


def test_train_without_data_is_refused_before_anything_is_checked(world):
    world.train_ds_names = ()
    result = d2l("train", "x.yaml")
    assert result.exit_code == 2
    assert "no training data" in result.stderr
    assert "TOY201" not in result.stdout


def test_a_tracker_that_is_not_installed_is_found_before_anything_is_checked(world, monkeypatch):
    monkeypatch.setattr("d2l.train.trackers.get_available_trackers", lambda: ["tensorboard"])
    world.report_to = ("tensorboard", "mlflow", "wandb")
    result = d2l("train", "x.yaml")
    assert result.exit_code == 2
    assert "expected installed trackers, mlflow, wandb is not" in result.stderr
    assert "TOY201" not in result.stdout
    assert world.trained == []


def test_train_checks_first_then_shows_steps_and_what_came_out(world):
    world.records = RECORDS
    result = d2l("train", "x.yaml", "--max-steps", "2", "--output", "runs/toy")
    assert result.exit_code == 0
    assert world.loaded[0][2] == {"model": None, "tokenizer": None, "data": None, "max_steps": 2, "output": "runs/toy"}
    ((preflight, *place),) = world.trained
    assert preflight["summary"]["exit_code"] == 0
    assert preflight["config"] == "x.yaml"
    assert place == [Path("runs/toy"), None]
    report, _, steps = result.stdout.partition("step 1/2")
    assert "1 passed" in report
    assert report.count("tokenized") == report.count("\ntokenized 1,200 records\n") == 1
    assert "step 2/2  ce_loss 5.25  grad_norm 0.4  gen_lora_l1_norm 0.125  tokens 800\n" in steps
    assert result.stdout.endswith(
        """
steps of this run  2
ce_loss            5.25
grad_norm          0.4
gen_lora_l1_norm   0.125
tokens             1,500
run folder         runs/toy
"""
    )


def test_train_is_told_what_the_preflight_predicts(world):
    world.rules[:] = [rule("DAT305", Pass("fine", {"context_tokens_per_row": 61.5}))]
    assert d2l("train", "x.yaml").exit_code == 0
    assert world.predictions == [Prediction(context_tokens_per_row=61.5)]


def test_train_takes_a_new_folder(world):
    assert d2l("train", "x.yaml").exit_code == 0
    assert list(world.trained[0][1:]) == [Path("runs/toy-2"), None]
    assert world.asked == [True]


def test_train_resumes_and_says_from_where_and_what_is_to_be_known(world):
    result = d2l(
        "train", "x.yaml", "--resume", "runs/old", "--allow-change", "data=mended", "--allow-change", "seed=x=y"
    )
    assert result.exit_code == 0
    assert list(world.trained[0][1:]) == [Path("runs/resumed"), "checkpoint of runs/old"]
    assert world.asked == [{"data": "mended", "seed": "x=y"}]
    assert "\nresumed from step 1 of runs/resumed\n" in result.stdout
    notes = [line for line in result.stderr.splitlines() if line.startswith("Note: ")]
    assert notes == ["Note: passed over a newer checkpoint: it is torn", "Note: torch is another"]


def test_train_says_that_there_is_nothing_to_do(world):
    world.step = 2
    result = d2l("train", "x.yaml", "--resume", "runs/old")
    assert (result.exit_code, world.trained) == (0, [])
    assert result.stdout == (
        "nothing to do: runs/resumed is at step 2, and max_steps is 2\n"
        "to go on: --resume runs/resumed --max-steps N, with N above 2; a schedule that ends at max_steps is another one then, "
        "which --allow-change max_steps=REASON has to allow\n"
    )


@pytest.mark.parametrize("place", ["", "checkpoints/step-000005"])
def test_train_resumes_with_the_configuration_of_the_run(world, tmp_path, place):
    (tmp_path / "config.yaml").touch()
    assert d2l("train", "--resume", str(tmp_path / place), "--output", str(tmp_path)).exit_code == 0
    assert world.loaded[0][0] == tmp_path / "config.yaml"
    assert d2l("train", "x.yaml", "--resume", str(tmp_path / place)).exit_code == 0
    assert world.loaded[1][0] == Path("x.yaml")


def test_train_resumes_from_within_the_folder_of_checkpoints(world, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert d2l("train", "--resume", "step-000005").exit_code == 0
    assert world.loaded[0][0].resolve() == tmp_path / "config.yaml"


@pytest.mark.parametrize("found", [FAIL, ValueError("boom")])
def test_train_is_refused_by_a_red_report(world, found):
    world.rules[:] = [rule("TOY201", found)]
    result = d2l("train", "x.yaml")
    assert result.exit_code == 10
    assert world.trained == []
    assert "d2l explain TOY201" in result.stdout
    assert "refused" in result.stderr


def test_train_goes_on_past_an_ignored_finding(world):
    world.rules[:] = [rule("TOY201", FAIL)]
    assert d2l("train", "x.yaml", "--ignore", "TOY201=wanted").exit_code == 0
    assert "ignored (wanted)" in world.trained[0][0]["outcomes"][0]["message"]


def test_train_stopped_on_a_non_finite_value_is_11(world):
    world.train_error = NonFiniteError("step 3: loss nan")
    result = d2l("train", "x.yaml")
    assert result.exit_code == 11
    assert result.stderr.endswith("Error: step 3: loss nan\n")


def test_one_process_of_several_speaks(world):
    world.records, world.remarks = RECORDS, ("a key has no effect",)
    other = d2l("train", "x.yaml", RANK="1", WORLD_SIZE="2")
    assert (other.stdout, other.stderr) == ("", "a library talks\n")
    first = d2l("train", "x.yaml", RANK="0")
    assert "step 1/2" in first.stdout
    assert "Note: a key has no effect\n" in first.stderr


def test_a_process_that_its_own_preflight_refuses_names_itself_and_the_findings(world):
    world.rules[:] = [rule("TOY201", FAIL), rule("TOY202")]
    result = d2l("train", "x.yaml", RANK="1", WORLD_SIZE="2", TORCHELASTIC_USE_AGENT_STORE="False")
    assert (result.exit_code, result.stdout) == (10, "")
    refusal, finding, place = result.stderr.splitlines()[-3:]
    assert refusal.startswith("Error: training refused by preflight, nothing was written: TOY201; `d2l explain CODE`")
    assert (finding.split()[0], FAIL.message in finding) == ("TOY201", True)
    assert place.startswith("in rank 1 of 2 on ")
    assert "(exit code" not in d2l("train", "x.yaml").stdout  # of the report: the command's own is another


def test_a_warning_is_said_without_a_line_of_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # given back
    monkeypatch.setattr(sys, "argv", ["d2l", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    said = [warnings.formatwarning("too long", kind, "file.py", 7) for kind in (UserWarning, FutureWarning)]
    assert said == ["Warning: too long\n", "Warning: FutureWarning: too long\n"]
