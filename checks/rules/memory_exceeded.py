"""The run fits into the memory of the GPU that it would use.

What it does
------------
Reckons the run's bytes as `d2l plan` does, from the real model's shapes and the rows that it would train on (base by its
loading plan, hypernetwork with gradients and optimizer, what each phase of a step keeps), and compares them with the
memory of the GPU: of the one that is here, or the one that `device_memory` or `--gpu` names.

Why it matters
--------------
Running out of memory comes late: when the weights are dequantized, when a second copy of the base is loaded as encoder,
or at the first long row. By then the download and the load have been paid for.

How it is detected
------------------
The largest of the sums while loading and at the peak of a step must be below the memory. The sums come within 10% of
the tensors alive in steps on a CPU, and came within 10% of what was measured on one H100 before a step took less (grouped
experts, the Perceiver in pieces, flex_attention), which was not measured since. Without a GPU and without a named one the
figures are given and the check is skipped. A sharded base is counted for the processes that were started; without a
launcher that is one, and `d2l plan --processes N` counts for more.

How to fix
----------
`d2l plan` lists what saves most. Keep the experts packed (`expert_weights: packed`), lower `max_packed_inp_len` and
`max_packed_ctx_len`, set `gradient_checkpointing: true`, or take a larger GPU.
"""

from typing import TYPE_CHECKING, Any

from checks.faults import configure, override
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.trained_values import reckoned_sizes

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.plan.rows import Rows

GIB = 2**30
REMEDY = (
    "see what saves most in d2l plan; keep expert_weights: packed, lower the packed lengths, set "
    "gradient_checkpointing: true, or take a larger GPU"
)


def check(subject: "Subject") -> Result:
    """Compare the bytes needed with the bytes free."""
    from d2l.base.load_plan import plan_load
    from d2l.plan.cards import sized_card
    from d2l.plan.memory import memory_plan
    from d2l.plan.sizes import HOPPER

    load, free = subject.plan, subject.implementation.free_memory()
    named = subject.config.device_memory
    if named is not None or free is None:  # not how this machine would load it, but how that GPU would
        load = plan_load(subject.config, subject.base_config, "cuda", HOPPER)
        free = None if named is None else sized_card(named).usable
    sizes = reckoned_sizes(subject, load)
    rows = _rows(subject)
    memory = memory_plan(sizes, rows.shapes(subject.config))
    figures = {"loading": memory.loading, "peak": memory.peak, "steady": memory.steady}
    sums = ", ".join(f"{name} {_size(amount)}" for name, amount in figures.items())
    if subject.config.base_sharding == "full":
        sums += f" in each of {sizes.processes} processes"
    if free is None:
        return Skip(
            f"no GPU here and none named by --gpu or device_memory; reckoned for {load.dtype.value} on one: {sums}"
        )
    evidence: dict[str, Any] = figures | {"free": free, "phase": memory.phase, "rows": rows.source}
    evidence |= {part.name: part.peak for part in memory.components}
    if memory.needed > free:
        return Fail(
            message="the run does not fit into memory",
            expected=f"at most {_size(free)}",
            actual=sums,
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(f"{sums}; free {_size(free)}", evidence)


def _rows(subject: "Subject") -> "Rows":
    """Return the run's own rows where its data can be read and packed, else assumed ones."""
    from d2l.errors import DataError, ModelError
    from d2l.plan.rows import AssumedRows, DataRows

    if subject.records is not None and subject.tokenizer is not None:
        try:
            rows = DataRows.of(subject.rows.rows, "those of the run's data")
        except (DataError, ModelError):  # the checks of stage `data` report it
            return AssumedRows()
        if rows.shapes(subject.config):
            return rows
    return AssumedRows()


def _size(amount: int) -> str:
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / 2**20:.1f} MiB"


RULE = Rule(
    code="MEM401",
    name="memory-exceeded",
    stage="device",
    severity="error",
    sources=("hardware", "failure mode 17", "failure mode 18"),
    requires=("ATT101", "TGT101", "HYP201"),
    check=check,
    faults=(
        Fault(
            "small-gpu",
            "a GPU with a thousand bytes free",
            override(
                unless=lambda subject: "device_memory names another GPU" if subject.config.device_memory else "",
                free_memory=lambda healthy: 1000,
            ),
        ),
        Fault("small-card", "device_memory of a thousand bytes", configure(device_memory=1000)),
    ),
)
