"""A run that is asked to stop has saved before it is killed.

What it does
------------
Saves small checkpoints where the run's folder would be, empty ones and some of a few megabytes, removes them, and reckons
from the quickest of each how long the run's own checkpoint takes (the hypernetwork and what the optimizer keeps of it, in
float32). It compares what a stop may have to wait for with the time between the signal and the kill, `grace_seconds`.

Why it matters
--------------
Preempted, a run gets a signal and some time: torchelastic, Slurm and spot machines kill it 30 s later and more. A save that
takes longer never ends, and the run falls back to its last regular checkpoint, often hours before.

How it is detected
------------------
A stop may come while a checkpoint is being written, and waits for that one and for its own: twice the time of a save must
be within `grace_seconds`. A stop also waits for the step that runs, and for an evaluation that does. How long these take on
the real device is not measured here: metrics.jsonl and evaluation.jsonl have their `seconds`.

How to fix
----------
Have the signal sent earlier (`--signal` of Slurm, `terminationGracePeriodSeconds` of Kubernetes) and set `grace_seconds` to
that, or name a faster disk (`output_dir`). Where neither can be had, a lower `save_steps` loses fewer steps.
"""

from typing import TYPE_CHECKING

from checks.faults import configure, override
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.trained_values import checkpoint_bytes

if TYPE_CHECKING:
    from checks.subject import Subject

SAMPLE, TIMES = 4 * 2**20, 3  # bytes, and how often: 0.12 s in all on a disk of 100 MB/s
MOST_TIMES = 12  # before a save is called slow: other work on the machine delays single ones
SAVES = 2  # the one that is being written, and the one of the stop


def check(subject: "Subject") -> Result:
    """Compare the seconds of two saves with those that are left after a signal."""
    config, size = subject.config, checkpoint_bytes(subject)
    try:
        save = _save_seconds(subject, size)
    except OSError as error:
        return Skip(f"nothing can be written below {config.output_dir}: {error.strerror or error}")
    evidence = {"checkpoint": size, "save_seconds": save, "grace_seconds": config.grace_seconds}
    text = f"{SAVES} saves of {size / 1e6:,.1f} MB, {save:.2f} s each, and the step that runs, which is not measured"
    if SAVES * save > config.grace_seconds:
        return Fail(
            message="a run that is asked to stop is killed before it has saved",
            expected=f"{SAVES} saves within {config.grace_seconds:g} s (grace_seconds)",
            actual=text,
            remedy="have the signal sent earlier and set grace_seconds to that, or set output_dir to a faster disk",
            evidence=evidence,
        )
    return Pass(f"{text}; killed after {config.grace_seconds:g} s", evidence)


def _save_seconds(subject: "Subject", size: int) -> float:
    """Reckon how long a checkpoint of so many bytes takes, from the quickest of several small ones."""
    config, measure = subject.config, subject.implementation.save_seconds
    seconds: dict[int, list[float]] = {0: [], SAMPLE: []}
    save = float("inf")
    while len(seconds[0]) < TIMES or (SAVES * save > config.grace_seconds and len(seconds[0]) < MOST_TIMES):
        for amount, measured in seconds.items():
            measured.append(measure(config, amount))
        least, sample = map(min, seconds.values())
        save = least + max(sample - least, 0.0) * size / SAMPLE
    return save


RULE = Rule(
    code="DSK402",
    name="save-outlasts-grace",
    stage="device",
    severity="warning",
    sources=("failure mode C26", "pytorch/pytorch#68258", "goodfire-ai/spd#677"),
    requires=("TGT101", "HYP201"),
    check=check,
    faults=(
        Fault(
            "slow-disk",
            "writing a byte takes as long as the run is given",
            override(save_seconds=lambda healthy, config, size: size * config.grace_seconds),
        ),
        Fault("killed-at-once", "a nanosecond between signal and kill", configure(grace_seconds=1e-9)),
    ),
)
