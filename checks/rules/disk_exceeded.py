"""The checkpoints that the run keeps fit on the disk.

What it does
------------
Computes the size of a checkpoint (the hypernetwork and what the optimizer keeps of it, in float32) and compares what the
run keeps at once with the free space where its folder would be.

Why it matters
--------------
A disk that fills up ends the run at a save, hours in, and may leave a truncated file behind as the newest checkpoint.

How it is detected
------------------
`save_total_limit` checkpoints and the one being written must fit into the free space.

How to fix
----------
Free space, name another disk (`output_dir`), or keep fewer checkpoints (`save_total_limit`).
"""

from typing import TYPE_CHECKING

from checks.faults import override
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.trained_values import checkpoint_bytes

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Compare the bytes kept with the bytes free."""
    kept = subject.config.save_total_limit + 1
    size = checkpoint_bytes(subject)
    free = subject.implementation.free_disk(subject.config)
    evidence = {"checkpoint": size, "kept": kept, "free": free}
    total = f"{kept} checkpoints of {size / 1e9:.2f} GB"
    if kept * size > free:
        return Fail(
            message="the checkpoints do not fit on the disk",
            expected=f"at most {free / 1e9:.2f} GB below {subject.config.output_dir}",
            actual=f"{total}, {kept * size / 1e9:.2f} GB",
            remedy="free space, set output_dir to another disk, or lower save_total_limit",
            evidence=evidence,
        )
    return Pass(f"{total}; free {free / 1e9:.1f} GB", evidence)


RULE = Rule(
    code="DSK401",
    name="disk-exceeded",
    stage="device",
    severity="error",
    sources=("failure mode 29", "mlfoundations/open_lm#154"),
    requires=("TGT101", "HYP201"),
    check=check,
    faults=(Fault("full-disk", "a thousand bytes are free", override(free_disk=lambda healthy, config: 1000)),),
)
