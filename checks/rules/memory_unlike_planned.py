"""A step takes no more memory on the GPU than `d2l plan` and MEM401 reckon.

What it does
------------
Takes the steps of STP401 on the GPU, and compares the most bytes that tensors took with what is reckoned for the same packed
row.

Why it matters
--------------
How much fits, and which GPU is rented, is decided by the reckoned figure. Kernels differ in what they keep between forward
and backward, so a figure that was measured on one card and one release may be wrong on another.

How it is detected
------------------
A peak of more than 1.1 times the reckoned one is a warning; the plan came within a tenth of what was measured. On a CPU
memory is not measured.

How to fix
----------
Choose the packed lengths by what was measured here: run `d2l plan` and leave as much room as the figures are apart.
"""

from typing import TYPE_CHECKING

from checks.faults import override
from checks.result import Pass, Result, Skip, Warn
from checks.rule import Fault, Rule
from checks.training.on_device import DeviceSteps, device_steps, nothing_to_load, nothing_to_train

if TYPE_CHECKING:
    from checks.subject import Subject

MOST, GIB = 1.1, 2**30
LEAST = 2**28  # bytes more than reckoned that count: workspaces of libraries are as large, and nothing to a GPU


def check(subject: "Subject") -> Result:
    """Compare the measured peak with the reckoned one."""
    if (reason := nothing_to_load(subject)) is not None:
        return reason
    if subject.implementation.gpu() is None:
        return Skip("no GPU here: a CPU's memory is not measured")
    steps = device_steps(subject)
    if not isinstance(steps, DeviceSteps):
        return steps
    if steps.peak is None:
        return Skip("the peak was not measured")
    evidence = {"peak": steps.peak, "reckoned": steps.reckoned, "tokens": steps.tokens}
    actual = f"{steps.peak / GIB:.2f} GiB on a row of {steps.tokens:,} tokens"
    most = max(MOST * steps.reckoned, steps.reckoned + LEAST)
    if steps.peak > most:
        return Warn(
            message="a step takes more memory than planned",
            expected=f"at most {most / GIB:.2f} GiB, where d2l plan reckons {steps.reckoned / GIB:.2f} GiB",
            actual=actual,
            remedy="choose the packed lengths by what was measured: leave as much room as the figures are apart",
            evidence=evidence,
        )
    return Pass(f"{actual}; reckoned {steps.reckoned / GIB:.2f} GiB", evidence)


RULE = Rule(
    code="MEM402",
    name="memory-unlike-planned",
    stage="device",
    severity="warning",
    sources=("hardware", "failure mode 17"),
    requires=("STP401",),
    check=check,
    lasting=True,
    faults=(
        Fault(
            "more-memory",
            "a step of a tebibyte",
            override(
                nothing_to_train,
                peak_memory=lambda healthy, work: (work(), 2**40)[1],
            ),
        ),
    ),
)
