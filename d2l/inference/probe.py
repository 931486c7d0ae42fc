"""Judgement of a server: does it serve an adapter as PEFT computes it, or its base, another base, or something else?

Four sets of log-probabilities are compared: the server's and PEFT's, of the base alone and with the adapter. Precision and
kernels move both of the server's alike, so the adapter is judged by what it changes: the slope of the served change over
PEFT's is 1 for a whole adapter, 0 for none, and about 1/2 where alpha is halved.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from d2l.errors import ServerError
from d2l.inference.expected import TEXT, Expected
from d2l.inference.json_http import JsonServer
from d2l.inference.served import Key, Prompt, Route, Routes, Values, Way, choose_way, find_routes, tokenize_there
from d2l.inference.verdicts import (
    BOUND,
    Compared,
    Finding,
    Measured,
    Verdict,
    failed,
    judge,
    judge_alone,
    judge_tokens,
    other_tokens,
    passed,
)


@dataclass(frozen=True)
class Probe:
    """Outcome of a probe: findings, the gravest first, the names that were asked for, and the figures behind it."""

    findings: tuple[Finding, ...]
    routes: Routes | None = None
    measured: Measured | None = None
    compared: Compared | None = None

    @property
    def verdict(self) -> Verdict:
        return self.findings[0].verdict


def probe(
    server: JsonServer,
    adapter: str,
    expected: Expected | None,
    *,
    base: str | None = None,
    text: str = TEXT,
    bound: float = BOUND,
) -> Probe:
    """Ask a server for a text's log-probabilities with and without an adapter, and compare.

    Args:
        adapter: name of the adapter on the server.
        expected: PEFT's values, and the text; without them only `served = base` can be seen.
        base: name of the base on the server.
        text: what to ask about where nothing is expected.
        bound: mean absolute difference in nats up to which log-probabilities count as equal.
    """
    routes = None
    try:
        routes = find_routes(server, adapter, base)
        prompt: Prompt = text if expected is None else expected.ids
        way, alone = choose_way(server, routes.base, prompt)
        again = way(server, routes.base, prompt) or {}
        served = _ask_adapter(way, server, routes.adapter, prompt)
        there = None if expected is None else tokenize_there(server, routes.base, expected.text)
    except ServerError as error:
        return Probe((failed(error, server.timeout),), routes)
    local, adapted = ({}, {}) if expected is None else (expected.of_base(), expected.of_adapter())
    keys = [key for key in sorted(alone.keys() & served.keys()) if expected is None or key in local]
    if not keys:
        return Probe((other_tokens(len(alone)),), routes)
    measured = Measured(len(keys), _distance(served, alone, keys), _distance(again, alone, keys))
    if expected is None:
        return Probe((judge_alone(measured),), routes, measured)
    compared = _compare(alone, served, local, adapted, keys)
    findings = [*judge(measured, compared, bound), *judge_tokens(expected.ids, there)]
    return Probe(tuple(findings) or (passed(measured, compared, bound),), routes, measured, compared)


def _ask_adapter(way: Way, server: JsonServer, route: Route, prompt: Prompt) -> Values:
    try:
        return way(server, route, prompt) or {}
    except ServerError as error:
        if error.status in (400, 404, 422):  # the same request about the base was answered
            raise ServerError("adapter", str(error)) from None
        raise


def _compare(alone: Values, served: Values, local: Values, adapted: Values, keys: Collection[Key]) -> Compared:
    """Compare a server with PEFT; the slope is that of a line through the origin, by least squares."""
    changes = [(adapted[key] - local[key], served[key] - alone[key]) for key in keys]
    weight = sum(change**2 for change, _ in changes)
    slope = sum(change * there for change, there in changes) / weight if weight else 0.0
    rest = sum((there - slope * change) ** 2 for change, there in changes)
    return Compared(
        effect=_distance(adapted, local, keys),
        base_error=_distance(alone, local, keys),
        adapter_error=_distance(served, adapted, keys),
        slope=slope,
        slope_error=math.sqrt(rest / weight / len(keys)) if weight else math.inf,
    )


def _distance(left: Values, right: Values, keys: Collection[Key]) -> float:
    """Return the mean absolute difference over the keys that both have; infinity where there are none."""
    differences = [abs(left[key] - right[key]) for key in keys if key in left and key in right]
    return sum(differences) / len(differences) if differences else math.inf
