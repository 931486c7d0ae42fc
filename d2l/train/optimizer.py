"""Optimizer of the hypernetwork, AdamW or Muon with AdamW, and the schedule of its learning rate."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from d2l.config.schema import RunConfig

MUON_MOMENTUM = 0.95
# Keller Jordan's quintic: five iterations bring the singular values of a matrix of norm 1 into [0.7, 1.2].
_QUINTIC, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# Matrices orthogonalized in one go, in values. Several of one shape are one product instead of many; at work are two
# copies of them and two Gram matrices each, in bfloat16 on a GPU: 0.5 GB for the largest pair of the published shapes.
STACK_VALUES = 2**26
_FUSED = ("cpu", "cuda")
_ADAMW_RMS = 0.2  # typical root mean square of an AdamW update; arXiv:2502.16982, section 2.2


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups marked `matrices` take Muon's step: orthogonalized momentum.

    `torch.optim.Muon` takes single matrices only. The weights of a hypernetwork for the layers of its base are stacks of
    matrices, and each matrix is orthogonalized by itself. Updates have the root mean square of AdamW's, so that both
    share a scale of learning rates (`adjust_lr_fn="match_rms_adamw"` there).
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one optimizer step."""
        groups = self.param_groups
        for group in groups:
            if group["matrices"]:
                for alike in _of_one_shape([it for it in group["params"] if it.grad is not None]):
                    self._step_matrices(alike, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Take Muon's step of parameters [..., m, n] of the same m and n."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MUON_MOMENTUM)
        nesterov = torch._foreach_lerp(gradients, momenta, MUON_MOMENTUM)
        stacks = [it.reshape(-1, *it.shape[-2:]) for it in nesterov]
        updates = orthogonalize(torch.cat(stacks) if len(stacks) > 1 else stacks[0])
        size = _ADAMW_RMS * max(parameters[0].shape[-2:]) ** 0.5
        for parameter, update in zip(parameters, updates.split([len(it) for it in stacks]), strict=True):
            parameter.mul_(1 - lr * weight_decay).sub_(update.reshape(parameter.shape), alpha=lr * size)


def _of_one_shape(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters whose matrices have one shape, to at most `STACK_VALUES` a group where one has not more."""
    groups: list[list[nn.Parameter]] = []
    latest: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        shape = tuple(parameter.shape[-2:])
        group = latest.get(shape, [])
        if not group or sum(it.numel() for it in [*group, parameter]) > STACK_VALUES:
            group = latest[shape] = []
            groups.append(group)
        group.append(parameter)
    return groups


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices [k, m, n] near 1, by Newton-Schulz iteration.

    In bfloat16 on a GPU, as published (https://kellerjordan.github.io/posts/muon/). On a CPU float32 is faster, and
    precise enough to iterate on the m × m Gram matrices alone where they are small: for n = 4 m in 57% of the time.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide.bfloat16() if wide.is_cuda else wide
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if x.dtype != torch.bfloat16 and x.shape[-1] >= 2 * x.shape[-2]:
        x = _factor(x @ x.mT) @ x
    else:
        a, b, c = _QUINTIC
        for _ in range(_ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


def _factor(gram: Tensor) -> Tensor:
    """Return what the iteration multiplies x by, from x xᵀ: polynomials of it, so that all factors commute."""
    a, b, c = _QUINTIC
    product = None
    for step in range(_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < _ITERATIONS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product


def make_optimizer(hypernet: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Make the optimizer of a configuration; see `parameter_groups`."""
    device = next(hypernet.parameters()).device
    kind = torch.optim.AdamW if config.muon_learning_rate is None else MuonAdamW
    return kind(
        parameter_groups(hypernet, config),
        lr=config.learning_rate,  # the schedule divides min_lr by it
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type in _FUSED,  # one pass over each tensor instead of ten
    )


def state_names(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, tuple[str, ...]]:
    """Return the names of the state tensors that the optimizer keeps for each parameter after its first step."""
    muon = isinstance(optimizer, MuonAdamW)
    return {
        parameter: ("momentum",) if muon and group["matrices"] else ("step", "exp_avg", "exp_avg_sq")
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def optimizer_values(hypernet: nn.Module, config: RunConfig) -> int:
    """Count the float32 values in the optimizer's state: AdamW keeps two for each parameter, Muon one for a weight."""
    matrices, others = (
        sum(parameter.numel() for parameter in group["params"]) for group in parameter_groups(hypernet, config)
    )
    return (2 if config.muon_learning_rate is None else 1) * matrices + 2 * others


def step_bytes(hypernet: nn.Module, config: RunConfig, device: str) -> int:
    """Count the bytes that a step works with: AdamW's, fused, works in place; Muon holds one group of matrices at a time.

    That is Nesterov's momentum, of several parameters also side by side, and in `orthogonalize`, in bfloat16 on a GPU, two
    of their size and two Gram matrices.
    """
    if config.muon_learning_rate is None:
        return 0
    on_gpu = device.startswith("cuda")
    largest = 0
    for alike in _of_one_shape(parameter_groups(hypernet, config)[0]["params"]):
        shape = alike[0].shape[-2:]
        values = sum(it.numel() for it in alike)
        grams = values * min(shape) // max(shape)
        largest = max(largest, 4 * values * (1 + (len(alike) > 1)) + (2 if on_gpu else 4) * 2 * (values + grams))
    return largest


def make_schedule(optimizer: torch.optim.Optimizer, config: RunConfig) -> LambdaLR:
    """Make the schedule of the learning rate over `max_steps`, by its name in transformers."""
    options: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr": config.min_lr},
        "warmup_stable_decay": {"num_decay_steps": config.decay_steps, "decay_type": "linear"},
    }
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
        scheduler_specific_kwargs=options.get(config.lr_scheduler_type, {}),
    )


def set_schedule(scheduler: LambdaLR, step: int) -> None:
    """Set a new schedule to the learning rates of the step after `step`, by its own configuration.

    The rates follow from the step alone: where a configuration changed on purpose, the new one holds from here on.
    """
    rates = [base * share(step) for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": step, "_last_lr": rates})
    for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


def learning_rates(config: RunConfig, steps: Iterable[int]) -> list[float]:
    """Return the learning rates of steps by the schedule of a configuration; 0 is the first step."""
    schedule = make_schedule(make_optimizer(nn.Linear(1, 1), config), config)
    return [float(schedule.base_lrs[-1]) * schedule.lr_lambdas[-1](step) for step in steps]


def parameter_groups(hypernet: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Split the parameters into weight matrices, which decay, and scalers, biases, norms and latents, which do not."""
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in hypernet.named_parameters():
        no_decay = parameter.ndim < 2 or any(word in name for word in ("scaler_", "bias", "latents_q", "norm"))
        (others if no_decay else weights).append(parameter)
    lr = config.learning_rate
    return [
        {
            "params": weights,
            "matrices": True,
            "lr": config.muon_learning_rate or lr,
            "weight_decay": config.weight_decay,
        },
        {"params": others, "matrices": False, "lr": lr, "weight_decay": 0.0},
    ]
