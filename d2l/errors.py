"""Exceptions for users; each message names the place, the expected and the actual value, and what to change.

D2LError
├── ConfigError      the run's configuration (all problems at once)
├── DataError        a data file or a record in it
├── ModelError       the base model, its tokenizer or its chat template
├── CheckpointError  a checkpoint or an output folder
├── ProcessError     one of several processes of a run is gone, or differs from the others
├── ServerError      a server of adapters is down, slow, or answers what it should not
└── NonFiniteError   training stopped before a step, or before a save, on a value that is not finite
"""

from collections.abc import Sequence


class D2LError(Exception):
    """Base of every error that a user can fix; `str(error)` is the whole message."""


class ConfigError(D2LError):
    """Every problem of a configuration, reported together.

    Args:
        problems: one line for each problem.
        source: name of the file that was read, if any.
    """

    def __init__(self, problems: Sequence[str], source: str | None = None) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        where = f" in {source}" if source else ""
        super().__init__("\n".join([f"{count}{where}:", *(f"  {problem}" for problem in self.problems)]))


class DataError(D2LError):
    """A data file cannot be read, or a record in it cannot be used."""


class ModelError(D2LError):
    """The base model, its tokenizer or its chat template cannot be used."""


class CheckpointError(D2LError):
    """A checkpoint or output folder cannot be written, verified or read."""


class ProcessError(D2LError):
    """One of several processes of a run is gone, or differs from the others."""


class ServerError(D2LError):
    """A server is down, slow, refuses a request, or answers nonsense.

    Args:
        kind: `down`, `slow`, `status`, `nonsense`, or `adapter` where it has none of that name.
        message: the whole message.
        status: the HTTP status of kind `status`.
    """

    def __init__(self, kind: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.status = kind, status


class NonFiniteError(D2LError):
    """Training met a value that is not finite, or a step without a supervised token.

    Args:
        message: the whole message.
        guard: which guard fired, such as `loss`; see `d2l.train.guards`.
        cause: the guard's finding alone, without step, records and advice.
    """

    def __init__(self, message: str, guard: str = "", cause: str = "") -> None:
        super().__init__(message)
        self.guard, self.cause = guard, cause
