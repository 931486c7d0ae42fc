"""The runner: runs rules on a subject, all of them, in their order, and records what became of each."""

import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.choice import Ignore, choose, read_ignores
from checks.json_values import jsonable
from checks.plugins import package_files
from checks.processes import available_cores, in_processes
from checks.result import Fail, Inapplicable, Kind, NotOffered, Outcome, Pass, Report, Skip, Warn
from checks.rule import Rule
from checks.threads import threads_of_a_run
from checks.time_limit import SECONDS, TimedOut, time_limit
from d2l.errors import D2LError

if TYPE_CHECKING:
    from checks.subject import Subject

Observer = Callable[[Rule], None]  # called with every rule just before it runs
Known = Callable[["Subject", Rule], Outcome | None]

# Of more, forked processes would copy gigabytes: Python counts references where what is read lies, and so writes there.
SHARED_RECORDS = 100_000


def run_checks(
    subject: "Subject",
    rules: Sequence[Rule],
    *,
    stages: Collection[str] = (),
    select: Collection[str] = (),
    ignore: Mapping[str, str] | None = None,
    observe: Observer = lambda rule: None,
    today: date | None = None,
    seconds: float = SECONDS,
) -> Report:
    """Run the rules and report every one of them.

    Args:
        rules: in the order of running; a rule stands after those that it requires.
        stages: only these; empty means all.
        select: the rules to run, see `checks.choice.choose`; empty means all. It pulls nothing else in: a requirement
            that was not selected is taken to be fine.
        ignore: what the user accepts, see `checks.choice.read_ignores`. A finding or crash of such a rule becomes a
            warning that fails nothing; what requires it still runs, since the user wants to go on in spite of it and has to
            see the rest.
        seconds: wall time after which a check is ended and counts as crashed; 0: never.
        today: decides which ignores have expired; None: the day it is.

    Raises:
        UsageError: an unknown stage, code or name, an empty reason, or a selection that leaves nothing.
    """
    start = time.perf_counter()
    today = today or date.today()
    ignores = read_ignores(rules, ignore or {})
    chosen = choose(rules, stages, select)
    reasons = {code: it.reason for it in ignores if it.holds(today) for code in it.codes}
    outcomes = examine(subject, chosen.rules, reasons, observe, workers=available_cores(), seconds=seconds)
    return Report(
        version=installed_version(),
        config=subject.name,
        fingerprint=subject.fingerprint,
        outcomes=outcomes,
        unused_ignores=tuple(it.named for it in ignores if it.holds(today) and _is_unused(it, outcomes)),
        expired_ignores=tuple(f"{it.named}@{it.last_day}" for it in ignores if not it.holds(today)),
        judged=dict(subject.judged),
        required=chosen.required,
        twin_cannot_show=_twin_cannot_show(outcomes),
        seconds=time.perf_counter() - start,
    )


def _is_unused(ignore: Ignore, outcomes: Sequence[Outcome]) -> bool:
    """Tell whether there was nothing to ignore, as far as its checks ran."""
    own = [outcome for outcome in outcomes if outcome.code in ignore.codes]
    return any(outcome.outcome == "pass" for outcome in own) and not any(outcome.ignored for outcome in own)


def examine(
    subject: "Subject",
    rules: Sequence[Rule],
    reasons: Mapping[str, str],
    observe: Observer,
    workers: int = 1,
    known: Known = lambda subject, rule: None,
    seconds: float = SECONDS,
) -> tuple[Outcome, ...]:
    """Run the rules and return one outcome for each, in order.

    Only a failure or a crash blocks what requires it, and what is blocked names the first cause, not the last link. A
    failure that proposes settings blocks nothing: what requires it runs with these settings, and says so. A skipped
    requirement blocks nothing: nothing is known against it, and the dependent names best itself what it lacks.

    Args:
        workers: processes that share the rules of the stages twin and data, each of which measures something of its own.
        known: gives an outcome that was measured before on an equal subject, or None.
        seconds: for each rule, see `run_checks`.
    """
    outcomes: list[Outcome] = []
    cause: dict[str, str | None] = {}  # code of every rule so far -> what stands in the way of those that require it
    settings: dict[str, dict[str, Any]] = {}  # code -> settings with which those that require it have to run
    ahead: dict[str, Outcome] = {}  # code -> its outcome on the subject as it is, where that was measured ahead
    for index, rule in enumerate(rules):
        needed = {key: value for code in rule.requires for key, value in settings.get(code, {}).items()}
        root = next((cause[code] for code in rule.requires if cause.get(code)), None)
        own: dict[str, Any] = {}
        if root:
            outcome = _outcome(rule, "blocked", message=f"blocked by {root}", blocked_by=root)
        else:
            if workers > 1 and not needed and rule.code not in ahead and _is_ready(subject, index, rules):
                ahead |= _measure_ahead(subject, rules[index:], observe, workers, seconds)
            if needed or rule.code not in ahead:
                observe(rule)
                judged = _with_settings(subject, needed)
                outcome = known(judged, rule) or _measure(rule, judged, seconds)
            else:
                outcome = ahead[rule.code]
            outcome = _ignored(replace(outcome, judged_with=needed), reasons.get(rule.code))
            if outcome.outcome in ("fail", "crash"):
                own = _remedy(rule, subject, needed, outcome, seconds)
                root = None if own else rule.code
        outcomes.append(outcome)
        cause[rule.code], settings[rule.code] = root, needed | own
    return tuple(outcomes)


def _with_settings(subject: "Subject", settings: Mapping[str, Any]) -> "Subject":
    """Return the subject with other values in its configuration; itself where there are none."""
    if not settings:
        return subject
    from checks.subject import changed  # here: it imports torch

    return replace(subject, config=changed(subject.config, **settings))


def _remedy(
    rule: Rule, subject: "Subject", needed: Mapping[str, Any], outcome: Outcome, seconds: float
) -> dict[str, Any]:
    """Return the settings that a finding proposes, if its rule passes with them; else nothing."""
    settings = dict(outcome.settings)
    if settings and _measure(rule, _with_settings(subject, {**needed, **settings}), seconds).outcome == "pass":
        return settings
    return {}


def _is_ready(subject: "Subject", index: int, rules: Sequence[Rule]) -> bool:
    """Tell whether this is the place to farm out the rest of a stage: behind the first rule that builds a twin, or rows.

    That rule fills what is computed once, and a forked process inherits it.
    """
    if index == 0 or rules[index - 1].stage != rules[index].stage:
        return False
    if rules[index].stage == "data":
        return "rows" in vars(subject) and len(subject.records or ()) <= SHARED_RECORDS
    return rules[index].stage == "twin" and hasattr(subject, "twin")


def _measure_ahead(
    subject: "Subject", rules: Sequence[Rule], observe: Observer, workers: int, seconds: float
) -> dict[str, Outcome]:
    """Measure every rule of the first one's stage among `rules` in forked processes, each rule by itself."""
    chosen = [rule for rule in rules if rule.stage == rules[0].stage]
    outcomes = in_processes(lambda index: _measure(chosen[index], subject, seconds), len(chosen), workers)
    ahead = {}
    for rule, outcome in zip(chosen, outcomes, strict=True):
        observe(rule)
        ahead[rule.code] = outcome
    return ahead


def installed_version() -> str:
    """Return the version of the installed distribution, or `unreleased` in a checkout that is not installed."""
    try:
        return metadata.version("d2l-preflight")
    except metadata.PackageNotFoundError:
        return "unreleased"


def _twin_cannot_show(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Return the limits of a twin, where any check measured on one."""
    if not any(
        outcome.stage == "twin" and outcome.outcome not in ("skip", "inapplicable", "blocked") for outcome in outcomes
    ):
        return ()
    from d2l.base.twin import TWIN_CANNOT_SHOW  # here: it imports transformers, as whatever runs a twin does

    return TWIN_CANNOT_SHOW


def _measure(rule: Rule, subject: "Subject", seconds: float) -> Outcome:
    """Run one rule. What d2l refuses is a finding; anything else that is raised is a crash of the rule and no finding."""
    start = time.perf_counter()
    try:
        with time_limit(seconds), threads_of_a_run() if rule.stage == "device" else nullcontext():
            result = rule.check(subject)
        outcome = _judge(rule, result)
    except TimedOut as late:
        advice = f"give checks more time with --timeout, or go on without this one: --ignore {rule.code}=REASON"
        outcome = _outcome(rule, "crash", message=str(late), remedy=advice)
    except NotOffered as absent:
        outcome = _judge(rule, Skip(str(absent)))
    except D2LError as refusal:
        outcome = _judge(rule, _refused(refusal))
    except Exception as error:
        if is_of_the_run(error, rule):
            outcome = _judge(rule, _stopped(error))
            return replace(outcome, seconds=time.perf_counter() - start)
        outcome = _outcome(
            rule,
            "crash",
            message=f"crashed: {type(error).__name__}: {error}",
            remedy=f"the check broke, which is no finding about your run: report it with the traceback (--format json); "
            f"to go on in spite of it: --ignore {rule.code}=REASON",
            evidence={"traceback": traceback.format_exc()},
        )
    return replace(outcome, seconds=time.perf_counter() - start)


def is_of_the_run(error: Exception, rule: Rule) -> bool:
    """Tell whether an error comes out of what is examined, and not out of the check or of a library that it calls."""
    files = [*Path(__file__).parent.rglob("*.py"), *package_files(rule.check.__module__)]
    own = {*map(str, files), rule.check.__code__.co_filename}
    called: list[str] = []  # files of the frames below the check's innermost one
    for frame in traceback.extract_tb(error.__traceback__):
        called = [] if frame.filename in own else [*called, frame.filename]
    return any(not _LIBRARIES & set(Path(name).parts) and Path(name).exists() for name in called)


_LIBRARIES = {"site-packages", "dist-packages", f"python{sys.version_info.major}.{sys.version_info.minor}"}


def _stopped(error: Exception) -> Fail:
    """Return the finding that what is examined stops with an error where nothing is wrong with its input."""
    return Fail(
        message="the run would stop with an error",
        expected="no error",
        actual=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
        remedy="follow the traceback in the evidence",
        evidence={"traceback": "".join(traceback.format_exception(error))},
    )


def _refused(refusal: D2LError) -> Fail:
    """Return the finding that a run with this configuration would end with an error that its user can remedy."""
    first, *rest = str(refusal).splitlines() or [type(refusal).__name__]
    return Fail(
        message="the run would refuse this configuration",
        expected="a run that starts",
        actual=first,
        remedy="\n".join(rest) or "change what the message names",
        evidence={"error": type(refusal).__name__},
    )


def _judge(rule: Rule, result: object) -> Outcome:
    """Turn the result of a check into the outcome of its rule."""
    match result:
        case Pass():
            return _outcome(rule, "pass", message=result.message, evidence=jsonable(result.evidence))
        case Skip():
            return _outcome(rule, "skip", message=result.reason)
        case Inapplicable():
            return _outcome(rule, "inapplicable", message=result.reason)
        case Fail():
            milder = isinstance(result, Warn) or rule.severity == "warning"
            return _outcome(
                rule,
                "warn" if milder else "fail",
                message=result.message,
                expected=result.expected,
                actual=result.actual,
                remedy=result.remedy,
                evidence=jsonable(result.evidence),
                settings=jsonable(result.settings),
            )
    raise TypeError(f"a check must return Pass, Fail, Warn, Skip or Inapplicable. Got {type(result).__name__}")


def _outcome(rule: Rule, outcome: Kind, **rest: Any) -> Outcome:
    return Outcome(rule.code, rule.name, rule.stage, rule.severity, outcome, plugin=rule.plugin, **rest)


def _ignored(outcome: Outcome, reason: str | None) -> Outcome:
    if reason is None or outcome.outcome not in ("fail", "warn", "crash"):
        return outcome
    return replace(outcome, outcome="warn", ignored=True, message=f"ignored ({reason}): {outcome.message}")
