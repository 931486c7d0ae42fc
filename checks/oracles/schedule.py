"""The learning rate of every optimizer step.

Source: the documentation of transformers' optimizer schedules
(https://huggingface.co/docs/transformers/main_classes/optimizer_schedules): a linear warmup from 0, then a constant, a
line to 0, half a cosine to a minimum, or a constant that ends in a line to 0.
"""

import math

KINDS = ("constant_with_warmup", "linear", "cosine_with_min_lr", "warmup_stable_decay")


def learning_rate(
    step: int,
    kind: str,
    learning_rate: float,
    warmup_steps: int,
    max_steps: int,
    min_lr: float = 0.0,
    decay_steps: int = 0,
) -> float:
    """Return the learning rate that an optimizer step uses.

    Args:
        step: number of the optimizer step, from 0.
        kind: `lr_scheduler_type`, one of `KINDS`.
        learning_rate: the peak.
        warmup_steps: steps from 0 to the peak; the first of them has rate 0.
        max_steps: steps of the run.
        min_lr: where the cosine ends.
        decay_steps: last steps of `warmup_stable_decay`, from the peak to 0.
    """
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    match kind:
        case "constant_with_warmup":
            return learning_rate
        case "linear":
            return learning_rate * max(0, max_steps - step) / max(1, max_steps - warmup_steps)
        case "cosine_with_min_lr":
            progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
            return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2
        case "warmup_stable_decay":
            return learning_rate * min(1.0, max(0, max_steps - step) / max(1, decay_steps))
    raise ValueError(f"there is no lr_scheduler_type {kind!r}: expected one of {', '.join(KINDS)}")
