"""Guards of every optimizer step: sound weights and moments, supervised tokens, a finite loss and gradient norm."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from d2l.errors import NonFiniteError

# Norm of a weight tensor. Neighbouring float32 values lie 2 and more apart from 2^24 on (24 bits of significand): a weight
# there rounds every update of size 1 and less away, so that it can neither learn nor come back. Where the norm is below, so
# is every weight. Weights are of order 1: a tensor of a billion of them has a norm of 3e4.
MAX_NORM = 2.0**24

STATE, LABELS, LOSS, GRADIENT_NORM = "state", "labels", "loss", "gradient norm"

_ADVICE = "nothing was written for this step; run `d2l preflight` on this config, and look at the records named above"


def is_spoilt(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensor:
    """Return whether an update has left weights or moments that no step may start from and no checkpoint may hold.

    Returns:
        bool scalar on the device, which nobody has waited for: the norm of a weight tensor is not finite or beyond
        `MAX_NORM`, or that of a moment is not finite. Clipped gradients bound the moments, which need no other limit.
    """
    spoilt = ~(_largest_norm(parameters) <= MAX_NORM)
    moments = [it for parameter in parameters for it in _moments(optimizer, parameter).values()]
    return spoilt | ~_largest_norm(moments).isfinite() if moments else spoilt


def _largest_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest of the tensors' norms, NaN where one is; by 2-norms, which are 30 times as fast as maxima on CPUs."""
    return torch.stack(torch._foreach_norm([it.detach() for it in tensors])).amax()


def is_sound(tensor: Tensor, *, moment: bool) -> bool:
    """Return whether a checkpoint may hold a tensor, a weight or a moment; the host waits for the device."""
    norm = float(_largest_norm([tensor]))
    return math.isfinite(norm) if moment else norm <= MAX_NORM


@dataclass(frozen=True)
class Spoilt:
    """A tensor of the hypernetwork or its optimizer that holds what it must not.

    Attributes:
        parameter: name of the parameter.
        moment: name of the optimizer's tensor; empty for the weight itself.
        size: largest absolute value; NaN where the tensor holds one.
    """

    parameter: str
    moment: str
    size: float

    def __str__(self) -> str:
        """Return the tensor and its size, as messages have them."""
        tensor = f"{self.moment} of {self.parameter}" if self.moment else self.parameter
        return f"{tensor} (largest value {self.size:.3g})"


def find_spoilt(named: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> list[Spoilt]:
    """Find every tensor that makes `is_spoilt` true: moments first, which spoil weights, then the largest weights."""
    found = []
    for name, parameter in named:
        for moment, values in {"": parameter, **_moments(optimizer, parameter)}.items():
            if not is_sound(values, moment=bool(moment)):
                found.append(Spoilt(name, moment, float(values.detach().abs().amax())))
    return sorted(found, key=lambda it: (not it.moment, math.isfinite(it.size), -it.size))


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer's tensors of a parameter, without its count of steps."""
    return {name: value for name, value in optimizer.state.get(parameter, {}).items() if name != "step"}


def require_sound_state(
    *,
    step: int,
    spoilt_ranks: Sequence[int],
    named: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Refuse to go on from, or to save, weights or moments that an update has spoilt.

    Args:
        step: the last step that was taken, 0 before the first.
        spoilt_ranks: processes in which `is_spoilt` is true.
        named: named parameters of this process; searched only where a process is named.
        optimizer: of this process.

    Raises:
        NonFiniteError: a process is named; the message names its tensors.
    """
    if not spoilt_ranks:
        return
    found = find_spoilt(named, optimizer)
    tensors = _list_some(found, 3) if found else f"those of rank {_list_some(spoilt_ranks, 8)}"
    cause = (
        f"weights or optimizer moments are not finite, or the norm of a weight is beyond {MAX_NORM:.3g}: {tensors}; "
        "no checkpoint of them was written"
    )
    where = f"after the update of step {step}" if step else "before the first step"
    raise NonFiniteError(f"{where}: {cause}\nlower the learning rate, or look at the tensors named above", STATE, cause)


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

    def refuse(guard: str, cause: str) -> NoReturn:
        raise NonFiniteError(f"step {step} (records {_list_some(records, 8)}): {cause}\n{_ADVICE}", guard, cause)

    if label_tokens == 0:
        refuse(
            LABELS,
            "expected at least one supervised token, found 0: the loss would be 0 or NaN and nothing would be learned; "
            "check the chat template and truncation (`d2l explain LBL301`)",
        )
    if not math.isfinite(loss):
        refuse(LOSS, f"the loss is {loss}, expected a finite value")
    if not math.isfinite(grad_norm):
        refuse(
            GRADIENT_NORM,
            f"the gradient norm is {grad_norm}, expected a finite value (the loss is {loss:.4g}); "
            f"{_describe_non_finite(parameters)}",
        )


def _describe_non_finite(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Name the parameters whose gradients hold a value that is not finite."""
    names = [name for name, parameter in parameters if parameter.grad is not None and _has_non_finite(parameter.grad)]
    if not names:
        return "every single gradient is finite, so their norm overflows: lower the learning rate or the L1 weight"
    return f"not finite in the gradients of {_list_some(names, 3)}"


def _has_non_finite(values: Tensor) -> bool:
    return not bool(values.isfinite().all())


def _list_some(items: Sequence[object], limit: int) -> str:
    """List the first items in one line, and how many more there are."""
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
