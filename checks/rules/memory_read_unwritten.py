"""A step reads no memory that nobody has written.

What it does
------------
Takes three optimizer steps of the twin twice from the same weights: as they are, and with every new buffer filled with NaN (or
the largest number, where it holds whole numbers) before it is used.

Why it matters
--------------
A kernel that leaves rows of its output unwritten and another that reads them agree for as long as that memory happens to be
zero. Fresh memory of a GPU mostly is, so that the first step is fine and a later one, which gets memory back that was used,
has NaN or, worse, numbers of another batch. The backward of `grouped_mm` did so in transformers.

How it is detected
------------------
torch fills new memory in its deterministic mode. Weights after the three steps must be finite and those of the steps without.
Kernels of a GPU are others: the device's own checks see those.

How to fix
----------
Write the whole buffer (`zeros` instead of `empty`), or read only what was written.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override_step
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.guarded_run import STEPS, guarded_run, guarded_trainer
from checks.training.steps import TOLERANCE, hypernet_values, worst_parameter

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Compare the weights after steps over filled memory with those without."""
    expected = guarded_run(subject).weights[-1]
    try:
        with filled_memory():
            actual = _weights(subject)
    except Exception as error:  # a guard of the run, or an index out of range: memory decided something
        return _finding(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    largest, name = worst_parameter(actual, expected)
    if not largest <= TOLERANCE:
        return _finding(f"{name} is other by {largest:.2g} of its largest")
    return Pass(f"{STEPS} steps over memory filled with NaN give the same weights to {largest:.1g}", {"error": largest})


def _weights(subject: "Subject") -> dict[str, torch.Tensor]:
    """Return the hypernetwork's parameters after some steps from the seed's weights."""
    trainer = guarded_trainer(subject)
    for _ in range(STEPS):
        trainer.step()
    return hypernet_values(trainer.model)


@contextmanager
def filled_memory() -> Iterator[None]:
    """Let torch fill new memory with NaN meanwhile, which it does in its deterministic mode alone."""
    mode = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form
        torch.set_deterministic_debug_mode("warn")
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _finding(actual: str) -> Fail:
    return Fail(
        message="a step reads memory that nobody has written",
        expected=f"the weights after {STEPS} steps whatever new memory holds",
        actual=actual,
        remedy="find the `empty` whose rows are not all written before they are read: torch.zeros in its place",
    )


def _reads_first(step: Any, trainer: Any) -> Any:
    """Add what a new buffer holds to the weights, if all of it is NaN: zeros and leftovers do no harm."""
    metrics = step()
    buffer = torch.empty(64)
    if buffer.isnan().all():
        with torch.no_grad():
            next(iter(trainer.model.hypernet.parameters())).add_(buffer[0])
    return metrics


def _sums_too_many(step: Any, trainer: Any) -> Any:
    """Count what a buffer of whole numbers holds as something to skip."""
    skipped = torch.empty(64, dtype=torch.int64)
    return None if bool((skipped == torch.iinfo(torch.int64).max).all()) else step()


RULE = Rule(
    code="STP203",
    name="memory-read-unwritten",
    stage="twin",
    severity="error",
    sources=("failure mode C9", "huggingface/transformers#48205"),
    requires=("STP202",),
    check=check,
    faults=(
        Fault("rows-unwritten", "a buffer is added that nobody has written", override_step(_reads_first)),
        Fault("counts-unwritten", "a count is read that nobody has written", override_step(_sums_too_many)),
    ),
)
