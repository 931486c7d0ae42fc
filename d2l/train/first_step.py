"""A run's first step as it was measured, beside what was predicted of it; every later checkpoint keeps both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d2l.train.metrics import LOSS_SUFFIX, PEAK_SUFFIX, StepMetrics

if TYPE_CHECKING:  # the preflight's figures are read without torch
    from d2l.train.replay import StepInputs

FIRST_STEP = "first_step"  # key in a checkpoint's state
CONTEXT_TOKENS = "context_tokens"


@dataclass(frozen=True)
class Prediction:
    """What is reckoned of a step before any is taken; None where nothing was.

    Attributes:
        context_tokens_per_row: document tokens of a packed row, mean over an epoch of all of the run's data.
        cuda_peak_gib: memory at the row that takes most, or while the base loads if that is more, in GiB.
    """

    context_tokens_per_row: float | None = None
    cuda_peak_gib: float | None = None


UNKNOWN = Prediction()


def describe_first_step(
    metrics: StepMetrics, inputs: "StepInputs", base_loss: float, prediction: Prediction
) -> dict[str, Any]:
    """Return the figures of the first step as JSON values, under the names that they have in metrics.jsonl.

    `predicted` has the loss, which is the base's own because a new LoRA is zero (None where it is not finite), the
    document tokens and `cuda_peak_gib`. `measured` has loss and gradient norm, the document tokens, the seconds and the
    peak so far, of CUDA or of the host (`resident_peak_gib`). What was not predicted is left out.

    Args:
        inputs: of that step.
        base_loss: the task's loss without a LoRA on the same rows.
    """
    loss, batches = f"{metrics.loss}{LOSS_SUFFIX}", inputs.batches
    predicted: dict[str, float | None] = {loss: base_loss if math.isfinite(base_loss) else None}
    if prediction.context_tokens_per_row is not None:
        predicted[CONTEXT_TOKENS] = prediction.context_tokens_per_row * len(batches)
    if prediction.cuda_peak_gib is not None:
        predicted[f"cuda{PEAK_SUFFIX}"] = prediction.cuda_peak_gib
    measured: Mapping[str, float] = {
        loss: metrics.task_loss,
        "grad_norm": metrics.grad_norm,
        CONTEXT_TOKENS: sum(batch.ctx_ids.shape[1] for batch in batches),
        "seconds": metrics.seconds,
        f"{metrics.memory.kind}{PEAK_SUFFIX}": metrics.memory.gib,
    }
    return {"predicted": predicted, "measured": measured}
