"""The selftest: plants every rule's faults and demands that exactly that rule turns red.

A check that nobody saw fail is no check.
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from checks.choice import choose
from checks.processes import available_cores, in_processes
from checks.result import SCHEMA, FailLevel, NotApplicable, NotOffered, Outcome
from checks.rule import Fault, Rule
from checks.runner import Observer, examine, installed_version

if TYPE_CHECKING:
    from checks.faults import Used
    from checks.subject import Subject

Verdict = Literal["caught", "missed", "not_applied", "inapplicable"]
STAGES_WITHOUT_DEVICE = ("static", "twin", "data")


@dataclass(frozen=True)
class Trial:
    """One planted fault and what became of it. Seconds are wall time and play no part in `==`."""

    code: str
    fault: str
    result: Verdict
    detail: str
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Selftest:
    """Every planted fault, in the order of the rules; `left_out` are the rules of stages that were not requested."""

    version: str
    config: str
    fingerprint: str
    trials: tuple[Trial, ...]
    left_out: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)  # wall time of all, several of which may have run at once

    def count(self, verdict: Verdict) -> int:
        """Count the faults that ended with this verdict."""
        return sum(trial.result == verdict for trial in self.trials)

    def exit_code(self, fail_level: FailLevel = "error") -> int:
        """Return 0 if every fault that this run can have was caught, else 5 at any fail level.

        A fault that could not be planted for want of data proves nothing; one of a kind that the run cannot have is no
        loss, as long as there are others.
        """
        caught, inapplicable = self.count("caught"), self.count("inapplicable")
        return 0 if caught and caught + inapplicable == len(self.trials) else 5

    def to_json(self, fail_level: FailLevel = "error") -> dict[str, Any]:
        """Return the selftest as JSON values."""
        return {
            "schema": SCHEMA,
            "version": self.version,
            "config": self.config,
            "fingerprint": self.fingerprint,
            "faults": [
                {
                    "code": trial.code,
                    "fault": trial.fault,
                    "result": trial.result,
                    "seconds": round(trial.seconds, 3),
                    "detail": trial.detail,
                }
                for trial in self.trials
            ],
            "summary": {
                "caught": self.count("caught"),
                "missed": self.count("missed"),
                "not_applied": self.count("not_applied"),
                "inapplicable": self.count("inapplicable"),
                "left_out": list(self.left_out),
                "exit_code": self.exit_code(fail_level),
                "seconds": round(self.seconds, 3),
            },
        }


def run_selftest(
    subject: "Subject",
    rules: Sequence[Rule],
    *,
    stages: Collection[str] = (),
    select: Collection[str] = (),
    observe: Observer = lambda rule: None,
) -> Selftest:
    """Plant the faults of the selected rules into the subject, one at a time, and run the rules of all stages on each.

    Args:
        stages: where empty, all but `device`, whose rules need the real weights.
        select: codes or names of the rules whose faults are planted; empty means all of the stages.

    Raises:
        UsageError: an unknown stage, code or name, or a selection that leaves nothing.
    """
    start = time.perf_counter()
    stages = stages or STAGES_WITHOUT_DEVICE
    chosen = choose(rules, stages, select).rules
    present = choose(rules, stages, ()).rules
    alone, used = measure_alone(subject, present) if hasattr(subject, "twin") else ({}, {})
    known = {outcome.code: outcome for outcome in alone}
    outcomes = examine(
        subject, present, {}, observe, known=lambda judged, rule: known.get(rule.code) if judged is subject else None
    )
    clean = {outcome.code: outcome for outcome in outcomes}
    trials = tuple(_trials(subject, chosen, present, clean, used, observe))
    return Selftest(
        version=installed_version(),
        config=subject.name,
        fingerprint=subject.fingerprint,
        trials=trials,
        left_out=tuple(rule.code for rule in rules if rule not in present),
        seconds=time.perf_counter() - start,
    )


def measure_alone(subject: "Subject", rules: Sequence[Rule]) -> "tuple[list[Outcome], dict[str, Used]]":
    """Run each rule by itself on the clean subject; return its outcome, and by its code what it uses.

    A fault in anything else cannot change its outcome.
    """
    from checks.faults import compute_ahead  # here: it imports torch

    compute_ahead(subject)
    found = list(in_processes(lambda index: _alone(subject, rules[index]), len(rules), available_cores()))
    return [outcome for outcome, _ in found], {outcome.code: used for outcome, used in found}


def _alone(subject: "Subject", rule: Rule) -> "tuple[Outcome, Used]":
    """Run a rule by itself, with nothing computed before; return its outcome and what it uses."""
    from checks.faults import use_of  # here: it imports torch

    outcomes: list[Outcome] = []
    used = use_of(subject, lambda fresh: outcomes.extend(examine(fresh, [rule], {}, lambda _: None)))
    return outcomes[0], used


class _Configured:
    """The outcomes of checks on the clean subject with other settings, each measured once by a process."""

    def __init__(self, subject: "Subject") -> None:
        self._subject = subject
        self._measured: dict[tuple[str, str], tuple[Outcome, Used]] = {}

    def outcome(self, rule: Rule, planted: "Subject", replaced: Collection[str]) -> Outcome | None:
        """Return the outcome with the settings of a planted subject; None where the check uses what is replaced there."""
        key = rule.code, planted.config.model_dump_json()
        if key not in self._measured:
            self._measured[key] = _alone(replace(self._subject, config=planted.config), rule)
        outcome, used = self._measured[key]
        return None if used.methods.intersection(replaced) else outcome


def _trials(
    subject: "Subject",
    chosen: Sequence[Rule],
    present: Sequence[Rule],
    clean: dict[str, Outcome],
    used: "dict[str, Used]",
    observe: Observer,
) -> Iterator[Trial]:
    """Yield one trial for each fault, in order; several processes share them where the system can fork."""
    planted = [(rule, fault) for rule in chosen for fault in rule.faults]
    configured = _Configured(subject)

    def trial(index: int) -> Trial:
        rule, fault = planted[index]
        start = time.perf_counter()
        verdict, detail = _try(subject, rule, fault, present, used, clean, configured)
        return Trial(rule.code, fault.name, verdict, detail, time.perf_counter() - start)

    # A fork has everything that was read and computed so far; only the number of a trial and its result are sent.
    for (rule, _), result in zip(planted, in_processes(trial, len(planted), available_cores()), strict=True):
        observe(rule)
        yield result


def concerns(rule: Rule, fault: Fault, planted: "Subject", subject: "Subject", used: "Mapping[str, Used]") -> bool:
    """Tell whether a fault could change a rule's outcome: it uses what differs."""
    from checks.faults import changed_fields, only_records_differ, plans_differ  # here: they import torch

    if rule.code not in used:
        return True
    own = used[rule.code]
    if fault.replaces:
        if own.methods & fault.replaces or own.fields & fault.configures:
            return True
        return "plan" in fault.replaces and plans_differ(planted, subject, own)
    if only_records_differ(planted, subject):
        return rule.stage == "data"
    fields = changed_fields(planted, subject)
    return not fields or bool(own.fields & fields)


def _try(
    subject: "Subject",
    rule: Rule,
    fault: Fault,
    present: Sequence[Rule],
    used: "dict[str, Used]",
    measured: dict[str, Outcome],
    configured: _Configured,
) -> tuple[Verdict, str]:
    """Plant one fault and run the rules that it could change."""
    from checks.faults import inherit  # here: it imports torch

    clean = measured[rule.code]
    if clean.outcome == "skip":
        return "not_applied", f"{rule.code} is skipped on the clean subject: {clean.message}"
    if clean.outcome == "inapplicable":
        return "inapplicable", clean.message
    if clean.outcome != "pass":
        return "missed", f"{rule.code} does not pass on the clean subject: {clean.outcome}: {clean.message}"
    try:
        planted = fault.plant(subject)
    except (NotApplicable, NotOffered) as reason:
        return "inapplicable", str(reason)
    except Exception as error:
        return "not_applied", f"planting crashed: {type(error).__name__}: {error}"

    concerned = [other for other in present if other == rule or concerns(other, fault, planted, subject, used)]
    if used:
        inherit(planted, subject, fault.replaces)

    def known(judged: "Subject", other: Rule) -> Outcome | None:
        """Return the clean outcome where a remedy made the subject clean again, or nothing that the check uses is replaced."""
        if judged == subject:
            return measured[other.code]
        if judged is planted and fault.configures and other != rule and used:
            return configured.outcome(other, planted, fault.replaces)
        return None

    outcomes = {outcome.code: outcome for outcome in examine(planted, concerned, {}, lambda _: None, known=known)}
    target = outcomes.pop(rule.code)
    if not target.found_fault:
        return "missed", f"{rule.code} reports {target.outcome}: {target.message}"
    others = [
        f"{outcome.code} {outcome.outcome}" for outcome in outcomes.values() if outcome.outcome in ("fail", "crash")
    ]
    if others:
        return "missed", f"{rule.code} is red, but so is {', '.join(others)}"
    return "caught", target.message
