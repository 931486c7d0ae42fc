"""Evidence as small pictures, where a picture says more than numbers: shares, bars and curves, to be drawn by a template.

What is drawn is decided by the shape of the evidence and not by the check, so that a new check has its pictures too.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

MOST = 24  # bars of one picture
WIDTH, HEIGHT = 320.0, 80.0  # of a curve, in units of its drawing
LEAST = 0.1  # the largest of values between 0 and 1, such as shares and cosines, from which bars are parts of 1
DECADES = 3.0  # from which positive values that far apart are drawn by their logarithms
SHARES = {  # key of a part, key of its whole -> what the share is
    ("label_tokens", "tokens"): "supervised tokens",
    ("kept", "questions"): "questions kept",
    ("in_batches", "questions"): "questions in batches",
    ("peak", "free"): "peak of the memory that is free, in bytes",
}


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its value as text, and its length from 0 to 1."""

    label: str
    value: str
    length: float


@dataclass(frozen=True)
class Picture:
    """A drawing with its title, which says what lengths mean.

    Args:
        kind: `share` is one bar as a part of its whole, `curve` a line through `points` from left to right.
        points: x and y of the line in units of WIDTH and HEIGHT, as SVG writes them.
    """

    title: str
    kind: Literal["share", "bars", "curve"]
    bars: tuple[Bar, ...]
    points: str = ""


def pictures(evidence: Mapping[str, Any]) -> list[Picture]:
    """Return the pictures of a check's evidence, in its order; numbers that stand alone have none."""
    layers = {key: value for key, value in evidence.items() if key.startswith("layer ")}
    return [*_shares(evidence), *_series("by layer", layers), *_series("", evidence)]


def _shares(evidence: Mapping[str, Any]) -> Iterator[Picture]:
    for (part, whole), title in SHARES.items():
        some, all_ = evidence.get(part), evidence.get(whole)
        if _is_number(some) and _is_number(all_) and some >= 0 and all_ > 0:
            value = f"{some:,} of {all_:,}, {some / all_:.1%}"
            yield Picture(title, "share", (Bar(title, value, min(some / all_, 1.0)),))


def _series(title: str, evidence: Any) -> Iterator[Picture]:
    """Yield a picture for every list or table of two numbers or more, at any depth."""
    if isinstance(evidence, list) and evidence and all(map(_is_number, evidence)):
        unit = "layer" if title.endswith("layer") else "chunk" if title.endswith("chunk") else ""
        evidence = {f"{unit} {number}".strip(): value for number, value in enumerate(evidence)}
    if not isinstance(evidence, Mapping):
        return
    numbers = {str(key): value for key, value in evidence.items() if _is_number(value)}
    if title and len(numbers) > 1 and len(numbers) == len(evidence):
        yield _drawn(title, numbers)
        return
    for key, value in evidence.items():
        yield from _series(f"{title}, {key}" if title else str(key), value)


def _drawn(title: str, numbers: Mapping[str, float]) -> Picture:
    """Return a curve over steps where the keys are such, else bars."""
    title = title.replace("_", " ")
    if "step" in title and len(numbers) > 2 and all(key.isdecimal() for key in numbers):
        return _curve(title, {int(key): value for key, value in numbers.items()})
    shown = dict(list(numbers.items())[:MOST])
    lengths, scale = _lengths(list(shown.values()))
    more = f", the first {MOST} of {len(numbers)}" if len(numbers) > MOST else ""
    bars = (Bar(key, f"{value:.3g}", length) for (key, value), length in zip(shown.items(), lengths, strict=True))
    return Picture(f"{title}{more}{scale}", "bars", tuple(bars))


def _lengths(values: list[float]) -> tuple[list[float], str]:
    """Return lengths from 0 to 1, and a remark on their scale: zero has no logarithm and is drawn without length."""
    sizes = [abs(value) for value in values]
    positive = [size for size in sizes if size]
    if not positive:
        return [0.0] * len(values), ""
    low, high = math.log10(min(positive)), math.log10(max(positive))
    if high - low >= DECADES and len(positive) > 1:
        return [(math.log10(size) - low + 1) / (high - low + 1) if size else 0.0 for size in sizes], " (log scale)"
    full = 1.0 if min(values) >= 0 and LEAST <= max(values) <= 1 else max(positive)
    return [size / full for size in sizes], ""


def _curve(title: str, numbers: Mapping[int, float]) -> Picture:
    """Return a line over steps, its least and its largest value as texts."""
    steps, values = sorted(numbers), [numbers[step] for step in sorted(numbers)]
    low, high = min(0.0, *values), max(values)
    height = (high - low) or 1.0
    points = (
        f"{WIDTH * (step - steps[0]) / (steps[-1] - steps[0]):.1f},{HEIGHT * (1 - (value - low) / height):.1f}"
        for step, value in zip(steps, values, strict=True)
    )
    ends = (Bar("largest", f"{high:.3g}", 1.0), Bar("steps", f"{steps[0]} to {steps[-1]}", 1.0))
    return Picture(title, "curve", ends, " ".join(points))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
