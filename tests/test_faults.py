"""What a planted fault can change: fields that a check reads, records alone, and what a subject has computed before."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from checks import selftest
from checks.faults import (
    Used,
    changed_fields,
    compute_ahead,
    configure,
    inherit,
    only_records_differ,
    override,
    override_step,
    use_of,
)
from checks.production import make_subject
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.rules import RULES
from checks.rules.stale_token_cache import _exchange
from checks.selftest import concerns
from checks.subject import Subject, changed
from checks.training.steps import LIGHT_BASE
from d2l.config.load import load_config
from d2l.config.schema import RunConfig


@pytest.fixture(scope="module")
def subject() -> Subject:
    return make_subject(load_config())


class TestUse:
    def test_methods_and_fields_are_noted(self, subject: Subject) -> None:
        def run(seen: Subject) -> None:
            assert seen.config.lora_r
            assert seen.chat

        used = use_of(subject, run)
        assert used.methods == {"chat"}
        assert "lora_r" in used.fields
        assert "learning_rate" not in used.fields

    def test_a_copy_with_the_runs_value_counts_and_another_value_does_not(self, subject: Subject) -> None:
        other = changed(subject.config, learning_rate=subject.config.learning_rate / 2)

        def run(seen: Subject) -> None:
            copy = RunConfig(**other.model_dump())
            assert copy.learning_rate
            assert copy.weight_decay == seen.config.model_dump()["weight_decay"]

        fields = use_of(subject, run).fields
        assert "weight_decay" in fields
        assert "learning_rate" not in fields

    def test_reading_is_as_before_afterwards_and_after_an_error(self, subject: Subject) -> None:
        plain = RunConfig.__getattribute__

        def fail(seen: Subject) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            use_of(subject, fail)
        assert RunConfig.__getattribute__ is plain


class TestDifferences:
    def test_fields_that_a_fault_sets(self, subject: Subject) -> None:
        planted = configure(learning_rate=1e6, lora_r=3)(subject)
        assert changed_fields(planted, subject) == {"learning_rate", "lora_r"}
        assert not changed_fields(replace(planted, records=()), subject)
        assert not only_records_differ(planted, subject)

    def test_records_alone(self, subject: Subject) -> None:
        assert only_records_differ(replace(subject, records=()), subject)
        assert not only_records_differ(subject, subject)


class TestFaultsThatShowInAnotherRun:
    def test_the_implementation_and_the_named_fields_differ(self, subject: Subject) -> None:
        lost = override(batches=lambda healthy, config, rows: [])
        fault = Fault("lost", "no batch in a run with a rank of 3", lost.under(lora_r=3))
        planted = fault.plant(subject)
        assert (planted.config.lora_r, planted.implementation.batches(planted.config, subject.rows.rows)) == (3, [])
        assert replace(planted, config=subject.config, implementation=subject.implementation) == subject
        assert (fault.replaces, fault.configures) == ({"batches"}, {"lora_r"})
        assert lost(subject).config == subject.config
        assert Fault("lost", "no batch", lost).configures == set()

    def test_what_uses_a_replaced_method_or_reads_a_named_field_is_concerned(self, subject: Subject) -> None:
        rule = next(rule for rule in RULES if rule.code == "DAT309")
        fault = Fault("lost", "no batch", override(batches=lambda healthy, config, rows: []).under(lora_r=3))
        planted = fault.plant(subject)
        for methods, fields, expected in (("batches", "seed", True), ("rows", "lora_r", True), ("rows", "seed", False)):
            used = {rule.code: Used(frozenset({methods}), frozenset({fields}))}
            assert concerns(rule, fault, planted, subject, used) == expected


class Slotted:
    """A trainer whose class cannot be exchanged."""

    __slots__ = ("model", "steps")

    def step(self) -> int:
        return 7


class TestTrainers:
    def test_the_members_that_a_check_uses_are_noted_those_that_others_call_too(self, subject: Subject) -> None:
        class Plain:
            def step(self) -> int:
                return 7

            def train(self) -> int:
                return self.step()

        def members(make: Any, use: Any) -> set[str]:
            made = replace(subject, implementation=SimpleNamespace(trainer=make))
            used = use_of(made, lambda watched: use(watched.implementation.trainer()))
            return {name for name in used.methods if "." in name and "__" not in name}

        assert members(Plain, lambda made: None) == set()
        assert members(Plain, lambda made: made.step()) == {"trainer.step"}
        assert members(Plain, lambda made: Plain.train(made)) == {"trainer.step"}
        assert members(Plain, lambda made: made.train()) == {"trainer.train", "trainer.step"}
        assert members(Slotted, lambda made: None) == {"trainer.model", "trainer.step", "trainer.steps"}

    def test_a_fault_of_a_member_concerns_who_uses_it(self, subject: Subject) -> None:
        fault = Fault("still", "no step", override_step(lambda step, made: None))
        assert fault.replaces == {"trainer.step"}
        planted, rule = fault.plant(subject), next(iter(RULES))
        for used, expected in (("trainer.step", True), ("trainer.save", False), ("trainer", False)):
            own = {rule.code: Used(frozenset({"trainer", used}), frozenset())}
            assert concerns(rule, fault, planted, subject, own) == expected


class TestInheritance:
    def test_what_the_fault_does_not_touch_is_kept(self, subject: Subject) -> None:
        rows, chat = subject.rows, subject.chat
        planted = override(batches=lambda healthy, config, rows: [])(subject)
        inherit(planted, subject, frozenset({"batches"}))
        assert planted.rows is rows
        planted = override(rows=lambda healthy, *arguments: healthy.rows(*arguments))(subject)
        inherit(planted, subject, frozenset({"rows"}))
        assert planted.chat is chat
        assert planted.rows is not rows

    def test_another_configuration_or_an_undeclared_fault_inherits_nothing(self, subject: Subject) -> None:
        assert subject.rows
        for planted in (
            configure(lora_r=3)(subject),
            override(rows=lambda healthy, *arguments: healthy.rows(*arguments))(subject),
        ):
            inherit(planted, subject, frozenset())
            assert "rows" not in vars(planted)

    def test_what_is_handed_on_is_computed_ahead_where_it_can_be(self, subject: Subject) -> None:
        without = replace(subject, tokenizer=None, records=None)
        compute_ahead(without)
        assert {"plan", "_twin_base"} <= vars(without).keys()
        assert {f"{LIGHT_BASE} {layers} None" for layers in (1, 2)} <= vars(without)["_shared"].keys()
        assert not {"chat", "rows"} & vars(without).keys()


def test_a_selftest_runs_a_check_once_on_the_clean_subject(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[int] = []

    def check(judged: Subject) -> Result:
        ranks.append(judged.config.lora_r)
        return Fail(message="three", expected="8", actual="3", remedy="none") if judged.config.lora_r == 3 else Pass("")

    monkeypatch.setattr(selftest, "available_cores", lambda: 1)
    rule = Rule("TOY101", "toy", "static", "error", (), check, faults=(Fault("three", "", configure(lora_r=3)),))
    assert selftest.run_selftest(subject, [rule]).exit_code() == 0
    assert ranks == [subject.config.lora_r, 3]


def test_what_other_checks_say_of_other_settings_is_measured_once(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But on the planted subject where they use, under these settings alone, what the fault replaces."""
    runs = Counter[str]()

    def uses(code: str, *, under: bool) -> Any:
        def check(judged: Subject) -> Result:
            runs[code] += 1
            if judged.config.lora_r == 3 and under and not judged.implementation.batches(judged.config, ()):
                return Fail(message="none", expected="some", actual="none", remedy="none")
            return Pass("")

        return check

    def rules(*others: Rule) -> list[Rule]:
        lost = override(batches=lambda healthy, config, rows: []).under(lora_r=3)
        faults = tuple(Fault(name, "", lost) for name in ("first", "second"))
        return [Rule("TOY101", "toy", "static", "error", (), uses("TOY101", under=True), faults=faults), *others]

    monkeypatch.setattr(selftest, "available_cores", lambda: 1)
    healthy = SimpleNamespace(batches=lambda config, rows: ["one"])
    clean = replace(subject, implementation=healthy)
    plain = Rule("TOY102", "plain", "static", "error", (), uses("TOY102", under=False))
    assert [it.result for it in selftest.run_selftest(clean, rules(plain)).trials] == ["caught", "caught"]
    assert runs == {"TOY101": 3, "TOY102": 2}
    other = Rule("TOY103", "other", "static", "error", (), uses("TOY103", under=True))
    for trial in selftest.run_selftest(clean, rules(other)).trials:
        assert (trial.result, trial.detail) == ("missed", "TOY101 is red, but so is TOY103 fail")


def test_files_of_a_cache_are_exchanged_or_cut(tmp_path: Path) -> None:
    assert _exchange(tmp_path) == "nothing: the cache keeps no files"
    (tmp_path / "a.bin").write_bytes(b"0123")
    assert _exchange(tmp_path) == "a.bin was cut in half"
    assert (tmp_path / "a.bin").read_bytes() == b"01"
    (tmp_path / "b.json").write_bytes(b"{}x")
    assert _exchange(tmp_path) == "b.json was cut in half"
    (tmp_path / "c.bin").write_bytes(b"89")
    assert _exchange(tmp_path) == "a.bin and c.bin were exchanged"
    assert (tmp_path / "a.bin").read_bytes() == b"89"
