"""The runner and the selftest, on toy rules that look at one number."""

import json
import math
import os
import time
from dataclasses import dataclass, field, replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import runner
from checks.json_values import jsonable
from checks.processes import in_processes
from checks.result import Fail, Inapplicable, NotApplicable, NotOffered, Outcome, Pass, Skip, UsageError, Warn
from checks.rule import Fault, Rule, find_rule
from checks.runner import examine, run_checks
from checks.selftest import Trial, run_selftest
from checks.threads import one_thread
from d2l.base.twin import TWIN_CANNOT_SHOW
from d2l.config.schema import RunConfig
from d2l.errors import ModelError


@dataclass(frozen=True)
class Subject:
    """What the toy rules examine: names of the defects that it has."""

    defects: frozenset[str] = frozenset()
    name: str = "toy.yaml"
    fingerprint: str = "f" * 64
    judged: tuple[tuple[str, str], ...] = ()


def defect(name):
    return Fault(name, f"has {name}", lambda subject: replace(subject, defects=subject.defects | {name}))


def looks_for(code, *names, stage="twin", severity="error", requires=(), faults=None, finding=Fail):
    """A rule that is red on a subject with one of these defects."""

    def check(subject):
        found = sorted(subject.defects & set(names))
        if found:
            return finding(
                message=f"found {found[0]}",
                expected="nothing",
                actual=found[0],
                remedy=f"remove {found[0]}",
                evidence={"defects": found},
            )
        return Pass("nothing found", {"looked_for": list(names)})

    faults = tuple(defect(name) for name in names) if faults is None else faults
    return Rule(code, f"toy-{code.lower()}", stage, severity, ("fix 1",), check, requires, faults)


def says(code, result, **rest):
    """A rule that always gives this result, or raises it."""

    def check(subject):
        if isinstance(result, Exception):
            raise result
        return result

    return Rule(code, f"toy-{code.lower()}", "twin", "error", ("fix 1",), check, **rest)


CFG = looks_for("CFG101", "typo", stage="static")
HYP = looks_for("HYP201", "rank")
ATT = looks_for("ATT202", "leak", requires=("HYP201",))
LOG = looks_for("LOG203", "noise", severity="warning")
RULES = (CFG, HYP, ATT, LOG)
CLEAN = Subject()
FAIL = Fail(message="broken", expected="whole", actual="broken", remedy="fix it")


def kinds(report):
    return {outcome.code: outcome.outcome for outcome in report.outcomes}


def test_everything_runs_in_order_and_values_compare():
    report = run_checks(CLEAN, RULES)
    assert [outcome.code for outcome in report.outcomes] == ["CFG101", "HYP201", "ATT202", "LOG203"]
    assert report.outcomes[0] == Outcome(
        "CFG101", "toy-cfg101", "static", "error", "pass", "nothing found", evidence={"looked_for": ["typo"]}
    )
    assert report == run_checks(CLEAN, RULES)
    assert (report.config, report.fingerprint) == ("toy.yaml", "f" * 64)
    assert report.exit_code() == 0


@pytest.mark.parametrize(
    ("result", "severity", "kind"),
    [
        (Pass("fine"), "error", "pass"),
        (FAIL, "error", "fail"),
        (FAIL, "warning", "warn"),
        (Warn(message="odd", expected="even", actual="odd", remedy="round it"), "error", "warn"),
        (Skip("no data"), "error", "skip"),
        (Inapplicable("no experts"), "error", "inapplicable"),
        (ModelError("no such layer"), "error", "fail"),
        (NotOffered("export"), "error", "skip"),
        (ValueError("boom"), "error", "crash"),
        (None, "error", "crash"),
        (Pass("fine", {"module": math}), "error", "crash"),
    ],
)
def test_outcome_of_every_result(result, severity, kind):
    (outcome,) = run_checks(CLEAN, [replace(says("TOY101", result), severity=severity)]).outcomes
    assert outcome.outcome == kind


def test_a_finding_keeps_its_words():
    (outcome,) = run_checks(CLEAN, [says("TOY101", FAIL)]).outcomes
    assert (outcome.message, outcome.expected, outcome.actual, outcome.remedy) == (
        "broken",
        "whole",
        "broken",
        "fix it",
    )


def test_a_finding_takes_its_words_by_name_only():
    with pytest.raises(TypeError, match="positional"):
        Fail("broken", "whole", "broken", "fix it")


def test_a_crash_names_the_error_and_keeps_the_traceback_and_the_others():
    report = run_checks(CLEAN, [says("TOY101", KeyError("x")), HYP])
    crash, after = report.outcomes
    assert crash.message == "crashed: KeyError: 'x'"
    assert "Traceback" in crash.evidence["traceback"]
    assert "KeyError: 'x'" in crash.evidence["traceback"]
    assert after.outcome == "pass"


def test_an_interrupt_is_not_a_crash():
    def check(subject):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks(CLEAN, [replace(HYP, check=check)])


@pytest.mark.parametrize("root", [FAIL, ValueError("boom")])
def test_dependents_are_blocked_by_the_root_cause(root):
    rules = [says("ONE101", root), looks_for("TWO102", requires=("ONE101",)), looks_for("TRE103", requires=("TWO102",))]
    report = run_checks(CLEAN, rules)
    assert [outcome.blocked_by for outcome in report.outcomes] == [None, "ONE101", "ONE101"]
    assert [outcome.outcome for outcome in report.outcomes[1:]] == ["blocked", "blocked"]
    assert report.outcomes[2].message == "blocked by ONE101"


@pytest.mark.parametrize(
    "harmless",
    [
        Pass("fine"),
        Skip("no data"),
        Inapplicable("no experts"),
        Warn(message="odd", expected="even", actual="odd", remedy="round it"),
    ],
)
def test_what_did_not_fail_blocks_nothing(harmless):
    report = run_checks(CLEAN, [says("ONE101", harmless), looks_for("TWO102", requires=("ONE101",))])
    assert report.outcomes[1].outcome == "pass"


def test_an_unselected_requirement_is_taken_to_be_fine():
    report = run_checks(Subject(frozenset({"rank"})), RULES, select=["ATT202"])
    assert kinds(report) == {"ATT202": "pass"}


@pytest.mark.parametrize(
    ("stages", "select", "codes"),
    [
        ((), (), ["CFG101", "HYP201", "ATT202", "LOG203"]),
        (("static",), (), ["CFG101"]),
        (("twin", "static"), (), ["CFG101", "HYP201", "ATT202", "LOG203"]),
        ((), ("att202", "CFG101"), ["CFG101", "ATT202"]),
        ((), ("Toy-ATT202",), ["ATT202"]),
        (("twin",), ("LOG203",), ["LOG203"]),
    ],
)
def test_selection(stages, select, codes):
    report = run_checks(CLEAN, RULES, stages=stages, select=select)
    assert [outcome.code for outcome in report.outcomes] == codes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"select": ["ATT20"]}, ["'ATT20'", "did you mean", "ATT202 toy-att202"]),
        ({"select": ["zzzzzzzz"]}, ["d2l checks"]),
        ({"ignore": {"LOG20": "known"}}, ["did you mean LOG203"]),
        ({"ignore": {"LOG203": " "}}, ["LOG203", "--ignore LOG203=REASON"]),
        ({"ignore": {"LOG203": "a", "toy-log203": "b"}}, ["LOG203", "twice"]),
        ({"stages": ["twins"]}, ["'twins'", "static, twin, data, device"]),
        ({"stages": ["static"], "select": ["ATT202"]}, ["ATT202", "stage twin", "--stage twin"]),
        ({"stages": ["device"]}, ["nothing would be checked", "device"]),
    ],
)
def test_usage_errors_say_what_to_write(arguments, words):
    with pytest.raises(UsageError) as error:
        run_checks(CLEAN, RULES, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_finding_is_not_ignored_because_of_how_its_message_begins():
    finding = Warn(message="ignored (by the library): a key", expected="", actual="", remedy="")
    report = run_checks(CLEAN, [says("TOY101", finding)])
    assert not report.outcomes[0].ignored
    assert report.exit_code("warn") == 1


def test_the_seconds_of_a_report_hold_those_of_its_checks():
    def wait(subject):
        time.sleep(0.01)
        return Pass("fine")

    report = run_checks(CLEAN, [replace(HYP, code=f"HYP20{i}", check=wait) for i in range(3)])
    assert report.seconds >= sum(outcome.seconds for outcome in report.outcomes) >= 0.03


@pytest.mark.parametrize(
    ("rules", "limited"),
    [
        ([CFG, HYP], True),
        ([CFG], False),
        ([CFG, says("SKP202", Skip("no twin"))], False),
        ([says("CRS202", ValueError("boom"))], True),
    ],
)
def test_what_a_twin_cannot_show_is_reported_where_checks_ran_on_one(rules, limited):
    report = run_checks(CLEAN, rules)
    assert report.twin_cannot_show == (TWIN_CANNOT_SHOW if limited else ())
    assert report.to_json()["twin_cannot_show"] == list(report.twin_cannot_show)


def test_no_rules_is_no_all_clear():
    with pytest.raises(UsageError, match="nothing would be checked"):
        run_checks(CLEAN, [])


def test_an_ignored_finding_stays_visible_and_lets_dependents_run():
    report = run_checks(Subject(frozenset({"rank", "leak"})), RULES, ignore={"hyp201": "wanted"})
    _, ignored, dependent, _ = report.outcomes
    assert (ignored.outcome, ignored.ignored, ignored.message) == ("warn", True, "ignored (wanted): found rank")
    assert not dependent.ignored
    assert ignored.remedy == "remove rank"
    assert dependent.outcome == "fail"
    assert report.exit_code() == 1


@pytest.mark.parametrize("fail_level", ["warn", "error"])
def test_ignoring_every_finding_passes_at_every_fail_level(fail_level):
    reasons = {"HYP201": "wanted", "LOG203": "quiet"}
    report = run_checks(Subject(frozenset({"rank", "noise"})), RULES, ignore=reasons)
    assert kinds(report) == {"CFG101": "pass", "HYP201": "warn", "ATT202": "pass", "LOG203": "warn"}
    assert report.exit_code(fail_level) == 0
    assert report.unused_ignores == ()


def test_an_ignored_crash_is_a_warning():
    report = run_checks(CLEAN, [says("TOY101", ValueError("boom"))], ignore={"TOY101": "reported"})
    assert report.outcomes[0].message == "ignored (reported): crashed: ValueError: boom"
    assert report.exit_code() == 0


def test_ignoring_what_passes_is_reported():
    rules = [CFG, says("SKP102", Skip("no data")), LOG]
    report = run_checks(CLEAN, rules, ignore={"LOG203": "a", "SKP102": "b"}, select=["CFG101", "SKP102", "LOG203"])
    assert report.unused_ignores == ("LOG203",)
    assert run_checks(CLEAN, rules, ignore={"LOG203": "a"}, select=["CFG101"]).unused_ignores == ()


@pytest.mark.parametrize(
    ("results", "select", "fail_level", "code"),
    [
        ([Pass("fine")], False, "warn", 0),
        ([Warn(message="odd", expected="", actual="", remedy="")], False, "error", 0),
        ([Warn(message="odd", expected="", actual="", remedy="")], False, "warn", 1),
        ([FAIL], False, "error", 1),
        ([FAIL, ValueError()], False, "error", 3),
        ([Skip("no data")], False, "warn", 0),
        ([Skip("no data")], True, "error", 4),
        ([Skip("no data"), FAIL], True, "error", 1),
        ([Skip("no data"), ValueError()], True, "error", 3),
    ],
)
def test_exit_codes(results, select, fail_level, code):
    rules = [says(f"TOY10{index}", result) for index, result in enumerate(results)]
    chosen = {"select": [rule.code for rule in rules]} if select else {}
    assert run_checks(CLEAN, rules, **chosen).exit_code(fail_level) == code
    stages = {"stages": ["twin"]} if select else {}
    assert run_checks(CLEAN, rules, **stages).exit_code(fail_level) == code


def test_the_observer_hears_of_every_rule_that_runs():
    heard = []
    run_checks(Subject(frozenset({"rank"})), RULES, observe=lambda rule: heard.append(rule.code))
    assert heard == ["CFG101", "HYP201", "LOG203"]


REST = ("twin_cannot_show", "summary", "digest")


def test_json_has_exactly_the_agreed_keys():
    report = run_checks(Subject(frozenset({"rank"})), RULES, ignore={"CFG101": "why"})
    document = report.to_json()
    assert list(document) == ["schema", "version", "code", "config", "fingerprint", "judged", "outcomes", *REST]
    assert list(document["outcomes"][1]) == [
        *("code", "name", "stage", "severity", "outcome", "message", "expected", "actual", "evidence", "remedy"),
        *("settings", "judged_with", "blocked_by", "ignored", "plugin", "seconds"),
    ]
    assert {key: value for key, value in document["summary"].items() if key != "seconds"} == {
        **{"pass": 2, "warn": 0, "fail": 1, "skip": 0, "inapplicable": 0, "blocked": 1, "crash": 0},
        "exit_code": 1,
        "unused_ignores": ["CFG101"],
        "expired_ignores": [],
    }
    assert document["schema"] == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), values))
def test_any_evidence_survives_strict_json(evidence):
    report = run_checks(CLEAN, [says("TOY101", Pass("fine", evidence)), says("TOY102", FAIL)], ignore={"TOY101": "x"})
    document = report.to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_evidence_holds_numbers_that_json_cannot():
    evidence = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "tensor": torch.tensor([1.0, math.nan]),
        "scalar": np.float32(0.5),
        1: {"b", "a"},
    }
    assert jsonable(evidence) == {
        "nan": "nan",
        "inf": ["inf", "-inf"],
        "tensor": [1.0, "nan"],
        "scalar": 0.5,
        "1": ["a", "b"],
    }


def test_find_rule_takes_code_and_name_in_any_case():
    assert find_rule(RULES, " att202") is ATT
    assert find_rule(RULES, "TOY-ATT202") is ATT


# Selftest


def trials(rules, subject=CLEAN, **arguments):
    return {(trial.code, trial.fault): trial for trial in run_selftest(subject, rules, **arguments).trials}


def test_every_fault_is_caught_by_exactly_its_rule():
    selftest = run_selftest(CLEAN, RULES)
    assert selftest.trials == (
        Trial("CFG101", "typo", "caught", "found typo"),
        Trial("HYP201", "rank", "caught", "found rank"),
        Trial("ATT202", "leak", "caught", "found leak"),
        Trial("LOG203", "noise", "caught", "found noise"),
    )
    assert selftest.exit_code() == 0


def crashes_on(name):
    def check(subject):
        assert name not in subject.defects
        return Pass("fine")

    return replace(looks_for("TOY204"), check=check, faults=(defect(name),))


@pytest.mark.parametrize(
    ("rule", "result", "words"),
    [
        (looks_for("TOY204", faults=(defect("unseen"),)), "missed", "TOY204 reports pass: nothing found"),
        (looks_for("TOY204", "rank"), "missed", "so is HYP201 fail"),
        (looks_for("TOY204", "own", finding=Warn), "missed", "TOY204 reports warn"),
        (looks_for("TOY204", "own", requires=("HYP201",), faults=(defect("rank"),)), "missed", "blocked by HYP201"),
        (crashes_on("own"), "missed", "TOY204 reports crash"),
        (looks_for("TOY204", "brittle"), "missed", "so is CRS205 crash"),
        (says("TOY204", FAIL, faults=(defect("own"),)), "missed", "does not pass on the clean subject"),
        (says("TOY204", Skip("no data"), faults=(defect("own"),)), "not_applied", "no data"),
        (looks_for("TOY204", "own", severity="warning"), "caught", "found own"),
    ],
)
def test_selftest_verdicts(rule, result, words):
    selftest = run_selftest(CLEAN, [*RULES, replace(crashes_on("brittle"), code="CRS205", faults=()), rule])
    trial = selftest.trials[-1]
    assert trial.result == result
    assert words in trial.detail
    assert selftest.exit_code() == (0 if result == "caught" else 5)


def fault_that_raises(error):
    def plant(subject):
        raise error

    return Fault("own", "", plant)


def test_a_fault_that_crashes_when_it_is_planted_is_an_error():
    rule = looks_for("TOY204", "typo", faults=(defect("typo"), fault_that_raises(KeyError("x"))))
    trial = trials([rule])["TOY204", "own"]
    assert trial.result == "not_applied"
    assert "planting crashed" in trial.detail
    assert run_selftest(CLEAN, [rule]).exit_code() == 5


@pytest.mark.parametrize(
    ("error", "words"),
    [(NotApplicable("one layer only"), "one layer only"), (NotOffered("its masks"), "offer its masks")],
)
def test_a_fault_that_the_run_cannot_have_is_no_loss_beside_another(error, words):
    rule = looks_for("TOY204", "typo", faults=(defect("typo"), fault_that_raises(error)))
    trial = trials([rule])["TOY204", "own"]
    assert trial.result == "inapplicable"
    assert words in trial.detail
    assert run_selftest(CLEAN, [rule]).exit_code() == 0


def test_a_selftest_that_planted_nothing_is_no_all_clear():
    rule = looks_for("TOY204", faults=(fault_that_raises(NotApplicable("one layer only")),))
    assert run_selftest(CLEAN, [rule]).exit_code() == 5


class TestSettingsThatRemedy:
    """A finding that names a working setting blocks nothing: what requires it runs with that setting."""

    @dataclass(frozen=True)
    class Configured(Subject):
        config: RunConfig = field(default_factory=lambda: RunConfig(lora_r=5))

    @staticmethod
    def wants(code, rank, *, offers=None, requires=()):
        def check(subject):
            if subject.config.lora_r == rank:
                return Pass(f"rank {rank}")
            settings = {} if offers is None else {"lora_r": offers}
            return Fail(message="rank", expected=str(rank), actual="other", remedy="", settings=settings)

        return Rule(code, f"toy-{code.lower()}", "static", "error", ("fix 1",), check, requires)

    def test_what_requires_it_runs_with_them(self):
        report = run_checks(
            self.Configured(),
            [
                self.wants("ONE101", 3, offers=3),
                self.wants("TWO102", 3, requires=("ONE101",)),
                self.wants("TRE103", 3, requires=("TWO102",)),
                self.wants("FOR104", 5),
            ],
        )
        assert [outcome.outcome for outcome in report] == ["fail", "pass", "pass", "pass"]
        assert [outcome.judged_with for outcome in report] == [{}, {"lora_r": 3}, {"lora_r": 3}, {}]
        assert report.exit_code() == 1

    def test_a_remedy_on_top_of_another_one_is_tried_with_both(self):
        def check(subject):
            if (subject.config.lora_r, subject.config.latent_size) == (3, 16):
                return Pass("both")
            return Fail(message="size", expected="16", actual="other", remedy="", settings={"latent_size": 16})

        second = replace(self.wants("TWO102", 3, requires=("ONE101",)), check=check)
        rules = [self.wants("ONE101", 3, offers=3), second, self.wants("TRE103", 3, requires=("TWO102",))]
        report = run_checks(self.Configured(), rules)
        assert kinds(report) == {"ONE101": "fail", "TWO102": "fail", "TRE103": "pass"}
        assert report.outcomes[2].judged_with == {"lora_r": 3, "latent_size": 16}

    def test_settings_with_which_it_still_fails_block(self):
        rules = [self.wants("ONE101", 3, offers=4), self.wants("TWO102", 4, requires=("ONE101",))]
        assert kinds(run_checks(self.Configured(), rules)) == {"ONE101": "fail", "TWO102": "blocked"}


def test_what_d2l_refuses_is_a_finding_and_no_crash():
    refusal = ModelError("layer_idx: expected less than 24\nlower it")
    (outcome,) = run_checks(CLEAN, [says("TOY101", refusal)])
    assert (outcome.outcome, outcome.actual, outcome.remedy) == ("fail", "layer_idx: expected less than 24", "lower it")


def test_what_the_implementation_does_not_offer_is_skipped():
    (outcome,) = run_checks(CLEAN, [says("TOY101", NotOffered("export"))])
    assert (outcome.outcome, outcome.message) == ("skip", "the implementation does not offer export")


@pytest.mark.parametrize(("result", "code"), [(Skip("no data"), 4), (Inapplicable("no experts"), 0)])
def test_what_has_nothing_to_look_at_is_not_what_could_not_run(result, code):
    report = run_checks(CLEAN, [says("TOY101", result)], select=["TOY101"])
    assert report.exit_code() == code


def test_an_error_of_what_is_examined_is_a_finding(tmp_path, monkeypatch):
    """A rule that calls code elsewhere, which breaks; not one that breaks itself, or in a library that it calls."""
    (tmp_path / "examined.py").write_text("def step():\n    return {}['moments']\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def calls(function):
        return replace(says("TOY101", Pass("fine")), check=lambda subject: function())

    rules = [calls(import_module("examined").step), calls(lambda: torch.zeros(2) @ torch.zeros(3))]
    found, crash = run_checks(CLEAN, [replace(rule, code=f"TOY10{i}") for i, rule in enumerate(rules)])
    assert (found.outcome, found.actual) == ("fail", "KeyError: 'moments'")
    assert crash.outcome == "crash"


class TestSeveralProcesses:
    """Rules of the stages twin and data are shared by processes, with the outcomes of one process."""

    @dataclass(frozen=True)
    class WithTwin(Subject):
        twin: str = "made"
        rows: tuple[int, ...] = (1,)
        records: tuple[int, ...] = (1,)

    def test_outcomes_are_those_of_one_process(self):
        rules = [
            CFG,
            looks_for("ONE201"),
            HYP,
            ATT,
            LOG,
            says("CRS202", KeyError("x")),
            looks_for("DAT301", stage="data"),
            looks_for("DAT302", "lost", stage="data"),
            looks_for("DAT303", stage="data", requires=("DAT302",)),
        ]
        for defects in (set(), {"rank"}, {"leak", "noise"}, {"lost"}):
            subject = self.WithTwin(frozenset(defects))
            alone, shared = (examine(subject, rules, {}, lambda rule: None, workers) for workers in (1, 3))
            assert [self.without_frames(outcome) for outcome in shared] == [self.without_frames(o) for o in alone]

    def test_they_run_elsewhere(self):
        def check(subject):
            return Pass(str(os.getpid()))

        for stage, number in (("twin", 2), ("data", 3)):
            rules = [replace(HYP, code=f"HYP{number}0{i}", stage=stage, check=check) for i in range(4)]
            first, *rest = examine(self.WithTwin(), rules, {}, lambda rule: None, 2)
            assert first.message == str(os.getpid())
            assert str(os.getpid()) not in {outcome.message for outcome in rest}

    def test_one_that_hangs_there_is_ended_too(self):
        hang = replace(HYP, code="HYP203", check=lambda subject: time.sleep(30))
        rules = [replace(HYP, code="HYP201"), hang, replace(HYP, code="HYP204")]
        found = examine(self.WithTwin(), rules, {}, lambda rule: None, 2, seconds=0.2)
        assert [(it.outcome, it.message) for it in found][1] == ("crash", "did not finish within 0.2 s")
        assert [it.outcome for it in found] == ["pass", "crash", "pass"]

    def test_those_of_large_data_do_not(self, monkeypatch):
        def check(subject):
            return Pass(str(os.getpid()))

        monkeypatch.setattr(runner, "SHARED_RECORDS", 2)
        rules = [replace(HYP, code=f"DAT30{i}", stage="data", check=check) for i in range(3)]
        for records, here in (((1, 2), False), ((1, 2, 3), True)):
            *_, last = examine(self.WithTwin(records=records), rules, {}, lambda rule: None, 2)
            assert (last.message == str(os.getpid())) is here

    @staticmethod
    def without_frames(outcome):
        return replace(outcome, evidence={} if outcome.outcome == "crash" else outcome.evidence)


def test_blocked_others_do_not_spoil_a_trial():
    assert trials(RULES)["HYP201", "rank"].result == "caught"  # ATT202 is blocked by it


def test_selected_faults_are_still_tried_against_all_rules():
    both = looks_for("TOY204", "rank")
    assert list(trials([HYP, both], select=["TOY204"])) == [("TOY204", "rank")]
    assert trials([HYP, both], select=["TOY204"])["TOY204", "rank"].result == "missed"


def test_the_device_stage_is_left_out_unless_requested():
    device = looks_for("DEV401", "memory", stage="device")
    assert run_selftest(CLEAN, [HYP, device]).left_out == ("DEV401",)
    assert trials([HYP, device], stages=["device"])["DEV401", "memory"].result == "caught"


def test_selftest_json():
    document = run_selftest(CLEAN, [HYP]).to_json()
    assert [set(fault) for fault in document["faults"]] == [{"code", "fault", "result", "seconds", "detail"}]
    assert document["summary"]["caught"] == 1
    assert document["summary"]["exit_code"] == 0


def test_work_is_forked_unless_there_is_a_gpu_which_a_fork_cannot_use(monkeypatch):
    def processes():
        return {*in_processes(lambda index: os.getpid(), 3, workers=2)}

    assert os.getpid() not in processes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes() == {os.getpid()}


def test_checks_on_the_device_run_with_the_threads_of_a_run_and_all_others_with_one():
    """A kernel that they compile serves the run: torch compiles anew for another number of threads."""
    seen = {}

    def note(code, stage):
        return replace(
            looks_for(code, "x", stage=stage, faults=()),
            check=lambda subject: seen.update({stage: torch.get_num_threads()}) or Pass(""),
        )

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            run_checks(Subject(), [note("TOY201", "twin"), note("TOY401", "device"), note("TOY301", "data")])
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {"twin": 1, "device": 3, "data": 1}
