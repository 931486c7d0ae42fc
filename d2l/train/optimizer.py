"""Optimizer of the hypernetwork, AdamW or Muon with AdamW, and the schedule of its learning rate."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from d2l.config.schema import RunConfig

MUON_MOMENTUM = 0.95
# Keller Jordan's quintic: five iterations bring the singular values of a matrix of norm 1 into [0.7, 1.2].
_QUINTIC, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
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
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrices(parameter, parameter.grad, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, parameter: nn.Parameter, gradient: Tensor, lr: float, weight_decay: float) -> None:
        """Take Muon's step of one parameter [..., m, n]."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MUON_MOMENTUM)
        update = orthogonalize(gradient.lerp(momentum, MUON_MOMENTUM))  # Nesterov's
        size = _ADAMW_RMS * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - lr * weight_decay).sub_(update.to(parameter.dtype), alpha=lr * size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices [..., m, n] near 1, by Newton-Schulz iteration.

    In bfloat16 on a GPU, as published (https://kellerjordan.github.io/posts/muon/); on a CPU float32 is faster.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide.bfloat16() if wide.is_cuda else wide
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide is matrices else x.mT


def make_optimizer(hypernet: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Make the optimizer of a configuration; see `parameter_groups`."""
    device = next(hypernet.parameters()).device
    kind = torch.optim.AdamW if config.muon_learning_rate is None else MuonAdamW
    return kind(
        parameter_groups(hypernet, config),
        lr=config.learning_rate,  # the schedule divides min_lr by it
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type == "cpu",  # one pass over each tensor instead of ten; on CUDA several tensors go together
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
