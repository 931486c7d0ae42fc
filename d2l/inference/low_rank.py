"""The nearest LoRA of a smaller rank, exactly, and how far one LoRA's deltas are from another's.

Of all matrices of rank r the truncated singular value decomposition of a delta is the nearest (Eckart and Young 1936). A
delta Aᵀ B of rank R is never formed: QR decompositions of both factors leave a core of R x R.

Shape legend: L = layers, R = rank, r = wanted rank, k = min(d, R).
"""

from dataclasses import replace

import torch
from torch import Tensor

from d2l.hypernet.lora import Lora


def refactor(lora: Lora, rank: int) -> Lora:
    """Return the LoRA of that rank whose deltas are nearest in the Frobenius norm, module by module and layer by layer.

    Computed in float64. Exact up to rounding where the deltas have no more than that rank, as all have from the smaller
    side of a module on (512 for `v_proj` of gpt-oss-20b).

    Args:
        lora: of one or several contexts.
        rank: ranks beyond those of the deltas are zero.
    """
    A, B = {}, {}
    for name, a in lora.A.items():
        pairs = [_nearest(x, y, rank) for x, y in zip(a.flatten(0, 1), lora.B[name].flatten(0, 1), strict=True)]
        A[name], B[name] = (torch.stack(side).unflatten(0, a.shape[:2]).to(a) for side in zip(*pairs, strict=True))
    return replace(lora, A=A, B=B)


def relative_error(actual: Lora, expected: Lora) -> float:
    """Return the largest ‖actual − expected‖ / ‖expected‖ of all deltas, in the Frobenius norm, computed in float64.

    A delta that is zero where it should be counts as exact, and as infinitely wrong where it should not.
    """
    worst = 0.0
    for name in expected.A:
        sides = (expected.A[name], expected.B[name], actual.A[name], actual.B[name])
        for a, b, other_a, other_b in zip(*(side.flatten(0, 1).double() for side in sides), strict=True):
            left, right = torch.cat([a, other_a]), torch.cat([b * expected.scale, other_b * -actual.scale])
            wanted, off = float(_core(a, b * expected.scale).norm()), float(_core(left, right).norm())
            worst = max(worst, off / wanted if wanted else float("inf") if off else 0.0)
    return worst


def _nearest(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors [r, d_in] and [r, d_out] of the best approximation to aᵀ b, in float64."""
    (left, left_core), (right, right_core) = (torch.linalg.qr(side.detach().double().mT) for side in (a, b))
    u, values, vt = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()[:, None]
    new_a, new_b = root * (left @ u[:, :kept]).mT, root * (vt[:kept] @ right.mT)
    room = (0, 0, 0, rank - kept)
    return torch.nn.functional.pad(new_a, room), torch.nn.functional.pad(new_b, room)


def _core(a: Tensor, b: Tensor) -> Tensor:
    """Return a matrix of at most R x R with the singular values of aᵀ b."""
    left, right = (torch.linalg.qr(side.detach().mT, mode="r").R for side in (a, b))
    return left @ right.mT
