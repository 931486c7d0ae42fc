"""What is wrong with a configuration, one line a problem: where, what, and what to write instead."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from d2l.config.keys import STAGES
from d2l.config.renamed import why_not_read
from d2l.config.suggest import hint


def by_line(problem: str) -> tuple[bool, int]:
    """Return the key that sorts the file's problems by line, before those of the command line."""
    where, _, _ = problem.partition(":")
    number = where.removeprefix("line ")
    return (not number.isdigit(), int(number) if number.isdigit() else 0)


def describe(error: Any, lines: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """Write one problem of pydantic as one line.

    Args:
        error: an entry of `ValidationError.errors()`.
        lines: where each key was set: `line 3`, `--set`, ...
        values: all keys that were set.
    """
    key = str(error["loc"][0])
    where = lines.get(key, "default")
    if error["type"] == "extra_forbidden":
        return f"{where}: {unknown(error['loc'], values)}"
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    found = "" if error["type"] == "missing" else f", found {error['input']!r}"
    return f"{where}: {_name(error['loc'])}: {message}{found}{_nearest_choice(error)}"


def unknown(loc: Sequence[Any], values: Mapping[str, Any]) -> str:
    """Write that a key does not exist, and which one may be meant."""
    key, within = str(loc[-1]), len(loc) > 1
    beside = values[STAGES][loc[1]] if within else values
    name = _name(loc)
    if reason := why_not_read(key, beside, stage=within):
        return f"{name}: {reason}" if within else reason
    return f"unknown key {name}; {hint(key, stage=within)}"


def _name(loc: Sequence[Any]) -> str:
    """Write a place in the configuration as `curriculum[0].pairs`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if part != "[key]"]
    return "".join(parts).removeprefix(".")


def _nearest_choice(error: Any) -> str:
    """Return the choice that a misspelt word is near to, as the end of a message."""
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    choices = str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
    near = difflib.get_close_matches(error["input"], choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""
