"""One update of AdamW and of Muon, clipping, and which parameters decay.

Sources: AdamW, arXiv:1711.05101, algorithm 2; Muon, https://kellerjordan.github.io/posts/muon/, with updates of the size
of AdamW's, arXiv:2502.16982, section 2.2; what decays, the defaults of SakanaAI/doc-to-lora@baa85db.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MUON_MOMENTUM = 0.95
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_UPDATE_SIZE = 0.2  # root mean square of a typical update of AdamW


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    state: tuple[Tensor, Tensor] | None,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return a parameter after one update of AdamW, float64, and the state after it.

    Args:
        state: the means of the gradient and of its square so far; `None` before the first update.
        step: number of this update, from 1.
    """
    parameter, gradient = parameter.double(), gradient.double()
    zero = torch.zeros_like(parameter)
    mean, square = (zero, zero) if state is None else state
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    unbiased_mean, unbiased_square = mean / (1 - betas[0] ** step), square / (1 - betas[1] ** step)
    update = unbiased_mean / (unbiased_square.sqrt() + eps) + weight_decay * parameter
    return parameter - lr * update, (mean, square)


def muon(
    parameter: Tensor, gradient: Tensor, momentum: Tensor | None, *, lr: float, weight_decay: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Return a stack of matrices [..., m, n] after one update of Muon, float64, and the momentum after it.

    Args:
        momentum: the mean of the gradient so far, of the same shape; `None` before the first update.
    """
    parameter, gradient = parameter.double(), gradient.double()
    before = torch.zeros_like(parameter) if momentum is None else momentum.double()
    momentum = MUON_MOMENTUM * before + (1 - MUON_MOMENTUM) * gradient
    direction = MUON_MOMENTUM * momentum + (1 - MUON_MOMENTUM) * gradient  # Nesterov's
    m, n = parameter.shape[-2:]
    matrices = torch.stack([orthogonalized(matrix) for matrix in direction.reshape(-1, m, n)])
    update = _UPDATE_SIZE * max(m, n) ** 0.5 * matrices.reshape(parameter.shape) + weight_decay * parameter
    return parameter - lr * update, momentum


def orthogonalized(matrix: Tensor) -> Tensor:
    """Bring the singular values of one matrix [m, n] near 1 by five quintic Newton-Schulz iterations."""
    a, b, c = _QUINTIC
    x = matrix / matrix.norm()
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def clipped(gradients: Mapping[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """Return the gradients, scaled down together where the norm of all of them exceeds `max_norm` (arXiv:1211.5063)."""
    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    factor = min(1.0, max_norm / float(total)) if total > 0 else 1.0
    return {name: gradient.double() * factor for name, gradient in gradients.items()}


def decays(name: str, shape: Sequence[int]) -> bool:
    """Return whether weight decay acts on a parameter: on weight matrices and stacks of them.

    Scalers, biases, the weights of norms (vectors) and latent queries do not decay.

    Args:
        name: under the reference's names, such as `head.weight`.
    """
    return name.split(".")[-1] == "weight" and len(shape) > 1
