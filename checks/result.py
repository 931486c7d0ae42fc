"""Results of checks, their outcomes, and the report of a whole run, as values that compare with `==`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from checks.json_values import jsonable
from checks.seal import code_fingerprint, digest
from d2l.errors import D2LError

Stage = Literal["static", "twin", "data", "device"]
Severity = Literal["error", "warning"]
Kind = Literal["pass", "warn", "fail", "skip", "inapplicable", "blocked", "crash"]
FailLevel = Literal["warn", "error"]

STAGES: tuple[str, ...] = get_args(Stage)
SEVERITIES: tuple[str, ...] = get_args(Severity)
SCHEMA = 1  # of the JSON documents
DATASETS_FROM = "DAT301"  # the check whose evidence has the counts of each data set


class UsageError(D2LError):
    """A command or option names something that does not exist, or things that do not go together."""


class NotApplicable(Exception):
    """Raised by `Fault.plant`: this subject has nothing that the fault could spoil; `str(error)` gives the reason."""


class NotOffered(AttributeError):
    """The implementation lacks a part of the protocol: what needs the part is skipped, with this as the reason."""

    def __init__(self, part: str) -> None:
        super().__init__(f"the implementation does not offer {part}")


@dataclass(frozen=True)
class Pass:
    """The check looked and found nothing wrong; the message names what was compared, with numbers."""

    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Fail:
    """A finding. A rule of severity `warning` cannot fail a run: the runner makes it a warning.

    `evidence["where"]`, if present, names the file, line, layer or row; otherwise the report names stage and config.
    `settings` are values of the configuration that remedy it: with them, the checks that this one would block still run.
    """

    message: str
    expected: str
    actual: str
    remedy: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Warn(Fail):
    """A finding that is worth a line but does not stop a run, whatever the severity of the rule."""


@dataclass(frozen=True)
class Skip:
    """The check could not look: the reason names what it takes (data, a tokenizer, a GPU); never printed as a pass."""

    reason: str


@dataclass(frozen=True)
class Inapplicable:
    """There is nothing to look at: the run has nothing of the kind that the check judges."""

    reason: str


Result = Pass | Fail | Warn | Skip | Inapplicable


@dataclass(frozen=True)
class Outcome:
    """What became of one rule: one line of a report.

    Args:
        settings: values of the configuration that remedy the finding.
        judged_with: settings that earlier findings proposed and with which this check ran, since it could not without.
        ignored: whether the user ignored this finding, so that it is a warning that fails nothing.
        plugin: distribution and version that the rule comes from; empty for d2l's own.
        seconds: wall time of this check; plays no part in `==`.
    """

    code: str
    name: str
    stage: Stage
    severity: Severity
    outcome: Kind
    message: str
    expected: str = ""
    actual: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    judged_with: Mapping[str, Any] = field(default_factory=dict)
    blocked_by: str | None = None
    ignored: bool = False
    plugin: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def found_fault(self) -> bool:
        """Tell whether the rule found its fault: a failure, or for a rule of severity `warning` its warning."""
        return self.outcome == "fail" or (self.severity == "warning" and self.outcome == "warn")

    def is_finding(self, fail_level: FailLevel = "error") -> bool:
        """Tell whether this outcome makes the exit code 1."""
        return self.outcome == "fail" or (fail_level == "warn" and self.outcome == "warn" and not self.ignored)


@dataclass(frozen=True)
class Report:
    """Every requested rule with its outcome, in the order of the rules.

    Args:
        judged: what the verdict is about, for people: base model, tokenizer, data, versions, device.
        unused_ignores: accepted findings that were not found, as the user named them; warnings.
        expired_ignores: those that are accepted no more, with their last day; warnings.
        required: codes that the user selected one by one or by stage; they must have run (exit code 4). Not part of the JSON,
            whose recorded `exit_code` already holds the verdict.
        twin_cannot_show: faults that no twin can show; empty where no check ran on one.
        seconds: wall time of all checks; the commands put in what the user waited, loading included. No part of `==`.
    """

    version: str
    config: str
    fingerprint: str
    outcomes: tuple[Outcome, ...]
    unused_ignores: tuple[str, ...] = ()
    expired_ignores: tuple[str, ...] = ()
    judged: Mapping[str, str] = field(default_factory=dict)
    required: frozenset[str] = field(default=frozenset(), compare=False)
    twin_cannot_show: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    def __iter__(self) -> Iterator[Outcome]:
        """Yield every outcome, in the order of the rules."""
        return iter(self.outcomes)

    def __len__(self) -> int:
        """Return how many checks were asked for."""
        return len(self.outcomes)

    @property
    def ok(self) -> bool:
        """Whether the run may start: no check failed or crashed, and none that was asked for was left out."""
        return self.exit_code() == 0

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The outcomes that stand against the run: failures and crashes."""
        return tuple(outcome for outcome in self.outcomes if outcome.outcome in ("fail", "crash"))

    @property
    def not_run(self) -> frozenset[str]:
        """The codes of checks that could not run."""
        return frozenset(outcome.code for outcome in self.outcomes if outcome.outcome in ("skip", "blocked"))

    @property
    def datasets(self) -> tuple[dict[str, Any], ...]:
        """The counts of each data set, from the evidence of `DATASETS_FROM`; empty where it has none."""
        tables = (it.evidence.get("datasets", ()) for it in self.outcomes if it.code == DATASETS_FROM)
        return tuple(next(tables, ()))

    def count(self, kind: Kind) -> int:
        """Count the rules that ended with this outcome."""
        return sum(outcome.outcome == kind for outcome in self.outcomes)

    def exit_code(self, fail_level: FailLevel = "error") -> int:
        """Return 0 if nothing is found, 3 if a check crashed, 1 with a finding, 4 if a required check could not run.

        A required check that has nothing to look at in this run is no loss.
        """
        if self.count("crash"):
            return 3
        if any(outcome.is_finding(fail_level) for outcome in self.outcomes):
            return 1
        if fail_level == "warn" and (self.unused_ignores or self.expired_ignores):
            return 1
        return 4 if self.not_run & self.required else 0

    def to_json(self, fail_level: FailLevel = "error") -> dict[str, Any]:
        """Return the report as JSON values."""
        summary = {kind: self.count(kind) for kind in get_args(Kind)}
        document = {
            "schema": SCHEMA,
            "version": self.version,
            "code": code_fingerprint(),
            "config": self.config,
            "fingerprint": self.fingerprint,
            "judged": dict(self.judged),
            "outcomes": [_outcome_to_json(outcome) for outcome in self.outcomes],
            "twin_cannot_show": list(self.twin_cannot_show),
            "summary": {
                **summary,
                "exit_code": self.exit_code(fail_level),
                "seconds": round(self.seconds, 3),
                "unused_ignores": list(self.unused_ignores),
                "expired_ignores": list(self.expired_ignores),
            },
        }
        return document | {"digest": digest(document)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Report":
        """Return the report of JSON values that `to_json` made; what it required is lost."""
        names = {item.name for item in fields(Outcome)}
        return cls(
            version=document["version"],
            config=document["config"],
            fingerprint=document["fingerprint"],
            outcomes=tuple(
                Outcome(**{key: value for key, value in it.items() if key in names}) for it in document["outcomes"]
            ),
            unused_ignores=tuple(document["summary"]["unused_ignores"]),
            expired_ignores=tuple(document["summary"]["expired_ignores"]),
            judged=document["judged"],
            twin_cannot_show=tuple(document["twin_cannot_show"]),
            seconds=document["summary"]["seconds"],
        )


def _outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    document = {item.name: getattr(outcome, item.name) for item in fields(outcome)}
    return document | {"evidence": jsonable(outcome.evidence), "seconds": round(outcome.seconds, 3)}
