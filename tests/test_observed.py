"""The observer of a trainer's step: what optimizers get and leave, and which token ids the base reads."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from checks.training.observed import observed_step


class Nested(torch.optim.SGD):
    """An optimizer that calls another step within its own, as Muon with AdamW does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.optim.SGD(self.param_groups[0]["params"], lr=0.5).step()
        super().step()


class Base(nn.Module):
    """An embedding and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def trainer(optimizer: torch.optim.Optimizer, hypernet: nn.Module, base: Base) -> Any:
    def step() -> str:
        base.embedding(torch.tensor([[3, 1]]))
        for parameter in hypernet.parameters():
            parameter.grad = torch.full_like(parameter, 2.0)
        optimizer.step()
        return "metrics"

    return SimpleNamespace(model=SimpleNamespace(base=base, hypernet=hypernet), step=step)


def test_a_step_is_seen_once_with_gradient_values_and_options_although_it_nests_another() -> None:
    hypernet, base = nn.Linear(2, 1, bias=False), Base()
    start = hypernet.weight.detach().clone()
    seen = observed_step(trainer(Nested(hypernet.parameters(), lr=0.25), hypernet, base))
    update = seen.updates["weight"]
    assert (seen.metrics, update.times, update.options["lr"]) == ("metrics", 1, 0.25)
    assert torch.equal(update.before, start)
    assert torch.equal(update.gradient, torch.full((1, 2), 2.0))
    torch.testing.assert_close(update.after, start - 0.5 * 2 - 0.25 * 2)
    assert [ids.tolist() for ids in seen.ids] == [[3, 1]]


def test_a_parameter_that_is_not_the_hypernetworks_is_a_stranger_and_two_steps_are_counted() -> None:
    hypernet, base = nn.Linear(2, 1, bias=False), Base()
    inner = torch.optim.SGD([*hypernet.parameters(), *base.parameters()], lr=0.1)
    twice = SimpleNamespace(step=lambda: (inner.step(), inner.step()))
    seen = observed_step(trainer(twice, hypernet, base))  # type: ignore[arg-type]
    assert seen.updates["weight"].times == 2
    assert set(seen.strangers) == {"base.embedding.weight"}


def test_nothing_is_left_behind() -> None:
    hypernet, base = nn.Linear(2, 1), Base()
    observed_step(trainer(torch.optim.SGD(hypernet.parameters(), lr=0.1), hypernet, base))
    assert not base.embedding._forward_pre_hooks
    assert not _global_optimizer_pre_hooks
