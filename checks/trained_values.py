"""How many values a run would train and keep, counted on the real model's skeleton."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from checks.machine import started_processes
from d2l.base.config import skeleton
from d2l.errors import ModelError
from d2l.train.optimizer import optimizer_values

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.base.load_plan import LoadPlan
    from d2l.plan.sizes import Sizes


BYTES_PER_VALUE = 4  # everything is in float32


def checkpoint_bytes(subject: "Subject") -> int:
    """Return the bytes of a checkpoint's tensors.

    Raises:
        ModelError: the sizes are beyond what torch can count.
    """
    return sum(trained_values(subject)) * BYTES_PER_VALUE


def trained_values(subject: "Subject") -> tuple[int, int]:
    """Count the parameters that the run would train, on the real model's skeleton, and the values that the optimizer keeps.

    Raises:
        ModelError: the sizes are beyond what torch can count.
    """
    try:
        with torch.device("meta"):
            model = subject.implementation.build(skeleton(subject.base_config), subject.config)
    except RuntimeError as error:  # torch cannot count so many
        raise ModelError(
            f"no hypernetwork can have these sizes: {str(error).splitlines()[0]}; lower latent_size, lora_r, "
            "n_latent_queries, perceiver_heads or perceiver_head_dim"
        ) from error
    return sum(p.numel() for p in model.hypernet.parameters()), optimizer_values(model.hypernet, subject.config)


def reckoned_sizes(subject: "Subject", load: "LoadPlan") -> "Sizes":
    """Return what the memory of the run is reckoned from under a loading plan, with the values of its own hypernetwork.

    Raises:
        ModelError: the sizes are beyond what torch can count.
    """
    from d2l.plan.sizes import Model

    trained, kept = trained_values(subject)
    model = Model(subject.base_config, processes=started_processes())
    return replace(model.sizes_of(subject.config, load), trained=trained, optimizer=kept)
