"""Trials of mutants, each in a forked process of its own: does its witness change, and what does a preflight say?

torch, transformers and the project are imported before the fork, so that a trial costs no more than what it runs.
"""

import contextlib
import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import checks
from d2l.errors import D2LError
from experiments.mutants.mutant import DoesNotApplyError, Mutant, planted
from experiments.mutants.values import DiffersError, Values
from experiments.mutants.witnesses import WITNESSES
from experiments.mutants.workbench import configurations

Kind = Literal["killed", "crashed", "survived", "invalid"]
WORKERS = 2
PATIENCE = 240  # seconds for one trial: a mutant that never ends is no silent one


@dataclass(frozen=True)
class Red:
    """A red check: its code and name, and what it says was found."""

    code: str
    name: str
    message: str


@dataclass(frozen=True)
class Validity:
    """Whether a mutant is one.

    Attributes:
        problem: why not: it does not apply, is not reached, changes nothing or stops its witness; empty if it is one.
        change: the first value of the witness that differs.
    """

    problem: str
    change: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a preflight says about a mutant.

    Attributes:
        kind: killed by a red check, crashed (a check, or the preflight itself), survived, or no valid mutant.
        config: the configuration whose preflight was not green.
        red: the red checks.
        note: the crash, or why the mutant is invalid.
        change: the first value of the witness that differs.
    """

    kind: Kind
    config: str = ""
    red: tuple[Red, ...] = ()
    note: str = ""
    change: str = ""
    seconds: float = field(default=0.0, compare=False)


class HealthyIsRedError(Exception):
    """The preflight of the code as it is finds something, so no kill would mean anything."""


def run_forked(function: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Return what a function returns in a forked process, which may fork others: no daemon.

    Raises:
        RuntimeError: it raised, died or took too long; the message holds its last line.
    """
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(function, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(patience):
            raise RuntimeError(f"took more than {patience:.0f} seconds")
        done, result = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise RuntimeError("the process died") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not done:
        raise RuntimeError(result)
    return result


def _answer(function: Callable[[], Any], sender: Any) -> None:
    """Run a function quietly and send what it returns, or its last line."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        answer = (True, function())
    except BaseException as error:
        answer = (False, "".join(traceback.format_exception_only(error)).strip()[:300])
    sender.send_bytes(pickle.dumps(answer))
    sender.close()
    os._exit(0)


def map_parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Apply a function that forks to items, two at a time, in order."""
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(function, items)


def healthy_values(names: Sequence[str]) -> dict[str, Values]:
    """Return the witnesses' values with the code as it is.

    Raises:
        RuntimeError: a witness fails, or gives other values the second time.
    """
    return dict(zip(names, map_parallel(_healthy, names), strict=True))


def _healthy(name: str) -> Values:
    values = Values()
    values |= run_forked(lambda: dict(_record(name, None)))
    if difference := run_forked(lambda: _difference(name, values)):
        raise RuntimeError(f"witness {name} differs from run to run: {difference}")
    return values


def _record(name: str, healthy: Values | None) -> Values:
    values = Values(healthy)
    WITNESSES[name](values)
    values.finish()
    return values


def _difference(name: str, healthy: Values) -> str:
    """Return the first difference of a witness's values from the healthy ones, or an empty text."""
    try:
        _record(name, healthy)
    except DiffersError as difference:
        return str(difference)
    return ""


def validate(mutant: Mutant, healthy: dict[str, Values]) -> Validity:
    """Prove that a mutant applies, is reached and changes a number."""
    try:
        return run_forked(lambda: _validate(mutant, healthy[mutant.witness]))
    except RuntimeError as error:
        return Validity(str(error))


def _validate(mutant: Mutant, healthy: Values) -> Validity:
    try:
        with planted(mutant) as plant:
            change = _difference(mutant.witness, healthy)
            reached = plant.was_reached
    except DoesNotApplyError as error:
        return Validity(str(error))
    except Exception as error:
        return Validity(f"its witness fails: {type(error).__name__}: {str(error)[:160]}")
    if not reached:
        return Validity(f"its witness {mutant.witness} does not reach it")
    return Validity("" if change else f"its witness {mutant.witness} does not change", change)


def preflight(mutant: Mutant | None, select: Sequence[str] = ()) -> Verdict:
    """Run the preflight of each configuration under a mutant, until one is not green."""
    started = time.perf_counter()
    for name in configurations():
        try:
            verdict = run_forked(lambda name=name: _preflight(mutant, name, select))
        except RuntimeError as error:
            verdict = Verdict("crashed", name, note=str(error))
        if verdict.kind != "survived":
            break
    return Verdict(verdict.kind, verdict.config, verdict.red, verdict.note, seconds=time.perf_counter() - started)


def _preflight(mutant: Mutant | None, name: str, select: Sequence[str]) -> Verdict:
    with contextlib.nullcontext() if mutant is None else planted(mutant):
        try:
            report = checks.preflight(configurations()[name], select=select)
        except D2LError as error:
            return Verdict("crashed", name, note=f"refused: {str(error).splitlines()[0]}")
    red = tuple(Red(it.code, it.name, it.message) for it in report if it.outcome == "fail")
    crashes = [f"{it.code} {it.message}" for it in report if it.outcome == "crash"]
    note = "; ".join(crashes)[:300]
    if red:
        return Verdict("killed", name, red, note)
    return Verdict("crashed", name, note=note) if crashes else Verdict("survived")


def try_mutant(mutant: Mutant, healthy: dict[str, Values]) -> Verdict:
    """Validate a mutant and run the preflight under it."""
    validity = validate(mutant, healthy)
    if validity.problem:
        return Verdict("invalid", note=validity.problem)
    verdict = preflight(mutant)
    note = verdict.note
    return Verdict(verdict.kind, verdict.config, verdict.red, note, validity.change, verdict.seconds)


def require_green() -> None:
    """Refuse to go on where the preflight of the code as it is is not green.

    Raises:
        HealthyIsRedError: with what was found.
    """
    verdict = preflight(None)
    if verdict.kind != "survived":
        raise HealthyIsRedError(f"{verdict.config}: {verdict.note} {verdict.red}")
