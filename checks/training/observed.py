"""What a trainer's step does, seen from outside: through torch's hooks on every optimizer and on the base's embedding.

Nothing here reaches into a trainer, so it serves every implementation whose optimizers are `torch.optim.Optimizer`s.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from checks.implementation import Model, Stepper


@dataclass
class Update:
    """What one parameter went through in a step.

    Attributes:
        before: the value that the optimizer found.
        gradient: as the optimizer got it, after clipping; zeros where there was none.
        options: of the parameter's group, such as `lr` and `weight_decay`, without its parameters.
        after: the value that the optimizer left.
        times: how many optimizer steps changed it; 1 in a sound step.
    """

    before: Tensor
    gradient: Tensor
    options: Mapping[str, Any]
    after: Tensor
    times: int = 1


@dataclass
class Observed:
    """One step of a trainer.

    Attributes:
        metrics: what the trainer returned.
        updates: by name of the hypernetwork's parameter; those that no optimizer holds are missing.
        strangers: parameters that an optimizer holds and that are none of the hypernetwork's; with names where the base
            has one.
        ids: token ids of every call of the base's embedding, int64 [tokens], in order: documents and questions.
    """

    metrics: Any = None
    updates: dict[str, Update] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that the optimizer got, by parameter."""
        return {name: update.gradient for name, update in self.updates.items()}


def observed_step(trainer: "Stepper") -> Observed:
    """Take one step and return what it did.

    Raises:
        Exception: whatever the trainer raises; `observing` keeps what was seen until then.
    """
    with observing(trainer.model) as seen:
        seen.metrics = trainer.step()
    return seen


@contextmanager
def observing(model: "Model") -> Iterator[Observed]:
    """Record every optimizer step and every reading of token ids while the context is open."""
    seen = Observed()
    names = {id(parameter): name for name, parameter in model.hypernet.named_parameters()}
    strangers = {id(parameter): f"base.{name}" for name, parameter in model.base.named_parameters()}
    depth = 0

    def before(optimizer: Optimizer, *_: Any) -> None:
        nonlocal depth
        depth += 1
        if depth > 1:  # an optimizer that calls another one's step, or its own class's, within its step
            return
        for parameter, group in _parameters(optimizer):
            name = names.get(id(parameter))
            if name is None:
                seen.strangers.append(strangers.get(id(parameter), f"a tensor {list(parameter.shape)}"))
                continue
            value = parameter.detach().clone()
            gradient = torch.zeros_like(value) if parameter.grad is None else parameter.grad.detach().clone()
            times = seen.updates[name].times + 1 if name in seen.updates else 1
            seen.updates[name] = Update(value, gradient, group, value, times)

    def after(optimizer: Optimizer, *_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            for parameter, _options in _parameters(optimizer):
                if name := names.get(id(parameter)):
                    seen.updates[name].after = parameter.detach().clone()

    def read(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        ids = arguments[0] if arguments else named["input"]
        seen.ids.append(ids.detach().flatten().clone())

    with ExitStack() as hooks:
        hooks.callback(register_optimizer_step_pre_hook(before).remove)
        hooks.callback(register_optimizer_step_post_hook(after).remove)
        embedding: Any = model.base.get_input_embeddings()
        hooks.callback(embedding.register_forward_pre_hook(read, with_kwargs=True).remove)
        yield seen


def _parameters(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield every parameter of an optimizer with the options of its group."""
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        for parameter in group["params"]:
            yield parameter, options
