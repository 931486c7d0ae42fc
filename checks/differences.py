"""What changed between two JSON reports: what was judged, the verdicts, and what was measured; to bisect an upgrade."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from checks.result import SCHEMA, UsageError
from d2l.io.run_folder import PREFLIGHT

Kind = Literal["judged", "outcome", "measured"]
FACTOR = 10.0  # between two numbers of an equal verdict that are worth a look: rounding errors differ by less
MANY = 10**6  # whole numbers from here on are bytes
ABSENT = "-"
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?")


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in two reports.

    Args:
        kind: what it is of: what was judged, a check's outcome, or a check's message and evidence where its outcome is equal.
        name: what differs, such as `versions: torch`, `ATT201 packed-documents-leak`, `LOR201 error`.
        before: its value in the first report, in words; `-` where it is absent.
        after: in the second.
        message: what the second report says of an outcome.
    """

    kind: Kind
    name: str
    before: str
    after: str
    message: str = ""


def read_report(place: Path) -> dict[str, Any]:
    """Read a JSON report, or the one in a run's folder.

    Raises:
        UsageError: there is none, or it is of another form.
    """
    path = place / PREFLIGHT if place.is_dir() else place
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(
            f"{path}: expected a report as `d2l preflight --format json` writes it, found no JSON"
        ) from None
    outcomes = document.get("outcomes") if isinstance(document, dict) else None
    if not isinstance(outcomes, list) or not all(
        isinstance(it, dict) and isinstance(it.get("code"), str) for it in outcomes
    ):
        raise UsageError(f"{path}: expected a report as `d2l preflight --format json` writes it, found other JSON")
    if document.get("schema") != SCHEMA:
        raise UsageError(f"{path}: expected a report of schema {SCHEMA}, found {document.get('schema')!r}")
    return document


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return what differs between two reports that `read_report` read: what was judged, outcomes, what was measured."""
    return [*_judged(before, after), *_outcomes(before, after), *_measured(before, after)]


def _judged(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    facts = [
        {key: str(report.get(key)) for key in ("version", "config", "fingerprint")}
        | {
            what: value
            for what, text in dict(report.get("judged") or {}).items()
            for what, value in _split(what, str(text))
        }
        for report in (before, after)
    ]
    for name, was, now in _pairs(*facts):
        if was != now:
            yield Difference("judged", name, was or ABSENT, now or ABSENT)


def _split(what: str, text: str) -> list[tuple[str, str]]:
    """Return each version by itself: `torch 2.13.0, transformers 5.23.0`."""
    if what != "versions":
        return [(what, text)]
    return [(f"versions: {name}", version) for name, _, version in (part.partition(" ") for part in text.split(", "))]


def _outcomes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    for _, was, now in _pairs(_by_code(before), _by_code(after)):
        first, second = (_verdict(it) for it in (was, now))
        if first != second:
            yield Difference("outcome", _name(now or was), first, second, str((now or was).get("message", "")))


def _measured(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    for code, was, now in _pairs(_by_code(before), _by_code(after)):
        if was is None or now is None or _verdict(was) != _verdict(now):
            continue
        found = [
            Difference("measured", f"{code} {key}", _shown(first), _shown(second))
            for key, first, second in _pairs(_evidence(was), _evidence(now))
            if _is_other(first, second)
        ]
        yield from found
        if not _evidence(now) and _is_other(was.get("message"), now.get("message")):
            yield Difference("measured", _name(now), str(was.get("message")), str(now.get("message")))


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield every key of two mappings with both values, None where it is absent."""
    for key in dict.fromkeys([*before, *after]):
        yield key, before.get(key), after.get(key)


def _by_code(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {outcome["code"]: outcome for outcome in report["outcomes"]}


def _name(outcome: Mapping[str, Any]) -> str:
    return f"{outcome['code']} {outcome.get('name', '')}".strip()


def _verdict(outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return ABSENT
    return f"{outcome.get('outcome')}{' (ignored)' if outcome.get('ignored') else ''}"


def _evidence(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evidence by the path of each value."""
    return dict(_leaves("", outcome.get("evidence") or {}))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _leaves(f"{path}: {key}" if path else str(key), item)


def _is_other(before: Any, after: Any) -> bool:
    """Tell whether two pieces of evidence differ: measured numbers by a factor, texts beside the numbers in them."""
    if isinstance(before, list) and isinstance(after, list):
        return len(before) != len(after) or any(_is_other(*pair) for pair in zip_longest(before, after))
    if isinstance(before, str) and isinstance(after, str):
        return _NUMBER.sub("#", before) != _NUMBER.sub("#", after)
    if _is_measured(before) and _is_measured(after):
        return not _is_near(before, after)
    return bool(before != after)


def _is_measured(value: Any) -> bool:
    """Tell numbers that are measured from those that count: a float, or bytes."""
    return isinstance(value, float) or (isinstance(value, int) and (value == 0 or abs(value) >= MANY))


def _is_near(before: float, after: float) -> bool:
    small, large = sorted((abs(before), abs(after)))
    same_sign = math.copysign(1, before) == math.copysign(1, after) or large < 1e-3
    return before == after or (same_sign and large <= FACTOR * max(small, 1e-6))


def _shown(value: Any) -> str:
    if value is None:
        return ABSENT
    text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
