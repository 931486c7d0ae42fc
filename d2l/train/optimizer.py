"""AdamW over the hypernetwork, and the schedule of its learning rate."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from d2l.config import RunConfig


def make_optimizer(hypernet: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW as the configuration asks for it; weights decay, see `parameter_groups`."""
    device = next(hypernet.parameters()).device
    return torch.optim.AdamW(
        parameter_groups(hypernet, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type == "cpu",  # one pass over each tensor instead of ten; on CUDA several tensors go together
    )


def make_schedule(optimizer: torch.optim.AdamW, config: RunConfig) -> LambdaLR:
    """The learning rate over `max_steps`, by transformers' schedule of that name."""
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


def parameter_groups(hypernet: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: weights decay; scalers, biases, norms and latents (one dimension, or named so) do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in hypernet.named_parameters():
        spared = parameter.ndim < 2 or any(word in name for word in ("scaler_", "bias", "latents_q", "norm"))
        (kept if spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
