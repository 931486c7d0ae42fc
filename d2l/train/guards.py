"""Guards before every optimizer step: supervised tokens, a finite loss, a finite gradient norm; else a diagnosis."""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from d2l.errors import NonFiniteError

_ADVICE = (
    "nothing was written for this step; run `d2l preflight` on this config, and look at the records named above "
    "(the newest checkpoint is intact: continue with --resume)"
)


def require_finite_step(
    *,
    step: int,
    loss: float,
    grad_norm: float,
    label_tokens: int,
    records: Sequence[int],
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> None:
    """Refuse an optimizer step that would make the weights non-finite or has nothing to learn from.

    Args:
        step: number of the step.
        loss: total loss of the step, over all micro-batches and ranks.
        grad_norm: norm of all gradients before clipping.
        label_tokens: number of supervised tokens of the step, over all ranks.
        records: indices of the records in the step, for the message.
        parameters: named parameters; their gradients are searched for the cause only where the norm is not finite.

    Raises:
        NonFiniteError: a value is not finite, or no token is supervised; the message names records and parameters.
    """
    where = f"step {step} (records {_list_some(records)})"
    if label_tokens == 0:
        raise NonFiniteError(
            f"{where}: expected at least one supervised token, found 0: the loss would be 0 or NaN and nothing would "
            f"be learned; check the chat template and truncation (`d2l explain LBL301`)\n{_ADVICE}"
        )
    if not math.isfinite(loss):
        raise NonFiniteError(f"{where}: the loss is {loss}, expected a finite value\n{_ADVICE}")
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"{where}: the gradient norm is {grad_norm}, expected a finite value (the loss is {loss:.4g}); "
            f"{_describe_non_finite(parameters)}\n{_ADVICE}"
        )


def _describe_non_finite(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Name the parameters whose gradients hold a value that is not finite."""
    names = [name for name, parameter in parameters if parameter.grad is not None and _has_non_finite(parameter.grad)]
    if not names:
        return "every single gradient is finite, so their norm overflows: lower the learning rate or the L1 weight"
    return f"not finite in the gradients of {_list_some(names)}"


def _has_non_finite(values: Tensor) -> bool:
    return not bool(values.isfinite().all())


def _list_some(items: Sequence[object], limit: int = 8) -> str:
    """List the first items in one line, and how many more there are."""
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
