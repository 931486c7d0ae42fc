"""A step makes the host wait for the device once: shown on the meta device, whose tensors have no values to wait for."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.tiny_model import random_rows, run_config, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2l.base import segments, transfer
from d2l.data import packing
from d2l.hypernet import lora, recompute
from d2l.hypernet.model import DocToLora
from d2l.train.loop import Trainer
from d2l.train.processes import OneProcess

META = torch.device("meta")
# Operations whose result the host has to read: a number, or how many values there are.
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount"}
WAITS |= {"equal", "is_nonzero", "repeat_interleave", "_to_cpu"}


class Device(TorchDispatchMode):
    """Counts waits for the device, and copies to it other than those of `d2l.base.transfer.moved`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if x.device == META]
        if on_device and (name in WAITS or (name in ("index", "index_put_") and _has_mask(args[1]))):
            self.waits.append(name)
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.device == META and tensors and not on_device:
            self.copies += 1
        return made


def _has_mask(indices: Any) -> bool:
    return any(x is not None and x.dtype == torch.bool for x in indices)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True, "muon_learning_rate": 0.01, "use_per_ctx_average_loss": True},
        {"ctx_encoder_type": "concat_layers", "loss": "kl"},
    ],
)
def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    config = run_config(**changes, attn_implementation="eager")
    model = tiny_model(config, family="llama")
    trainer = Trainer(model.to(META), random_rows(top_k=3), config, OneProcess(META))
    fetched: list[int] = []
    moves = 0

    def fetch(x: Tensor) -> list[float]:
        if x.device != META:
            return read(x)
        fetched.append(x.numel())
        return [0.0] * x.numel()

    def moved(x: Tensor, device: torch.device) -> Tensor:
        nonlocal moves
        moves += x.device != device
        return move(x, device)

    read, move = Tensor.tolist, transfer.moved
    for module in (packing, lora, recompute, segments):
        monkeypatch.setattr(module, "moved", moved)
    monkeypatch.setattr(Tensor, "tolist", fetch)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # the meta device has no autocast
    monkeypatch.setattr(DocToLora, "_hypernet_precision", lambda model: nullcontext())
    # masks are the attention's own matter; those of transformers for eager attention ask for packed documents
    monkeypatch.setattr(
        DocToLora, "attention_mask", lambda model, ids: torch.zeros(1, 1, *[ids.shape[1]] * 2, device=META)
    )
    with Device() as device:
        trainer.step()
    assert fetched == [
        6
    ]  # task loss, L1 norm, exact match, whether to stop, whether the weights are spoilt, gradient norm
    assert device.waits == []
    assert device.copies == moves > 0
