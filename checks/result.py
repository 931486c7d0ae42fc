"""What a check says, what the runner makes of it, and the report of a whole run, as values that compare with `==`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any, Literal, get_args

from d2l.errors import D2LError

Stage = Literal["static", "twin", "data", "device"]
Severity = Literal["error", "warning"]
Kind = Literal["pass", "warn", "fail", "skip", "blocked", "crash"]
FailLevel = Literal["warn", "error"]

STAGES: tuple[str, ...] = get_args(Stage)
KINDS: tuple[str, ...] = get_args(Kind)
SCHEMA = 1
IGNORED = "ignored ("  # how the message of a demoted finding starts: `ignored (the user's reason): ...`


class UsageError(D2LError):
    """The checks were asked for something that does not exist or does not go together."""


class NotApplicable(Exception):
    """Raised by `Fault.plant`: this subject has nothing that the fault could spoil; `str(error)` says why."""


@dataclass(frozen=True)
class Pass:
    """The check looked and found nothing wrong; the message says what was compared, with numbers."""

    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fail:
    """A finding. A rule of severity `warning` cannot fail a run: the runner makes it a warning.

    `evidence["where"]`, if present, names the file, line, layer or row; otherwise the report names stage and config.
    """

    message: str
    expected: str
    actual: str
    remedy: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Warn(Fail):
    """A finding that is worth a line but does not stop a run, whatever the severity of the rule."""


@dataclass(frozen=True)
class Skip:
    """The check could not look (no data file, no GPU, nothing of that kind in the model); never printed as a pass."""

    reason: str


Result = Pass | Fail | Warn | Skip


@dataclass(frozen=True)
class Outcome:
    """One line of a report: what became of one rule. Seconds are wall time and play no part in `==`."""

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
    blocked_by: str | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def ignored(self) -> bool:
        """Whether the user ignored this finding: it stays visible as a warning and fails nothing."""
        return self.outcome == "warn" and self.message.startswith(IGNORED)

    @property
    def red(self) -> bool:
        """Whether the rule found its fault: a failure, or for a rule of severity `warning` its warning."""
        return self.outcome == "fail" or (self.severity == "warning" and self.outcome == "warn")

    def is_finding(self, fail_level: FailLevel = "error") -> bool:
        """Whether this outcome makes the exit code 1."""
        return self.outcome == "fail" or (fail_level == "warn" and self.outcome == "warn" and not self.ignored)


@dataclass(frozen=True)
class Report:
    """Every rule that was asked for with its outcome, in the order of the rules.

    Args:
        required: codes that the user selected by name or stage; they must have run (exit code 4). Not part of the JSON,
            whose recorded `exit_code` already holds the verdict.
    """

    version: str
    config: str
    fingerprint: str
    outcomes: tuple[Outcome, ...]
    unused_ignores: tuple[str, ...] = ()
    required: frozenset[str] = field(default=frozenset(), compare=False)

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
    def seconds(self) -> float:
        """Wall time of all checks together."""
        return sum(outcome.seconds for outcome in self.outcomes)

    def count(self, kind: Kind) -> int:
        """How many rules ended with this outcome."""
        return sum(outcome.outcome == kind for outcome in self.outcomes)

    def exit_code(self, fail_level: FailLevel = "error") -> int:
        """0 pass, 3 a check crashed, 1 a finding at or above `fail_level`, 4 a required check did not run."""
        if self.count("crash"):
            return 3
        if any(outcome.is_finding(fail_level) for outcome in self.outcomes):
            return 1
        not_run = {outcome.code for outcome in self.outcomes if outcome.outcome in ("skip", "blocked")}
        return 4 if not_run & self.required else 0

    def to_json(self, fail_level: FailLevel = "error") -> dict[str, Any]:
        """The report as JSON values; `Report.from_json` gives an equal report back."""
        summary = {kind: self.count(kind) for kind in get_args(Kind)}
        return {
            "schema": SCHEMA,
            "version": self.version,
            "config": self.config,
            "fingerprint": self.fingerprint,
            "outcomes": [_outcome_to_json(outcome) for outcome in self.outcomes],
            "summary": {
                **summary,
                "exit_code": self.exit_code(fail_level),
                "seconds": round(self.seconds, 3),
                "unused_ignores": list(self.unused_ignores),
            },
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Report":
        """Read back what `to_json` gave.

        Raises:
            ValueError: the document has another schema.
        """
        if document.get("schema") != SCHEMA:
            raise ValueError(f"a report must have schema {SCHEMA}. Got {document.get('schema')!r}")
        return cls(
            version=document["version"],
            config=document["config"],
            fingerprint=document["fingerprint"],
            outcomes=tuple(Outcome(**outcome) for outcome in document["outcomes"]),
            unused_ignores=tuple(document["summary"]["unused_ignores"]),
        )


def jsonable(value: Any) -> Any:
    """The same value in what JSON can hold: lists for tuples and sets, numbers for tensors, strings for paths, NaN and
    infinities.

    Raises:
        TypeError: there is no such value.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((jsonable(item) for item in value), key=str)
    if hasattr(value, "tolist"):  # numpy's and torch's scalars and arrays, without importing either
        return jsonable(value.tolist())
    raise TypeError(f"evidence must be what JSON can hold. Got {type(value).__name__}: {value!r:.200}")


def _outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    document = {item.name: getattr(outcome, item.name) for item in fields(outcome)}
    return document | {"evidence": jsonable(outcome.evidence), "seconds": round(outcome.seconds, 3)}
