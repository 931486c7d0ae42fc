"""Counts the bytes of tensors alive at each moment of a computation: exact, on a CPU and for fake tensors alike."""

import weakref
from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2l.train.loop import Trainer


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations make while it is entered, from their first to their last use.

    Attributes:
        live: bytes alive now, those of `known` included.
        peak: the most that were alive after any operation since `reset_peak`.

    Args:
        known: tensors that exist already, such as parameters.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._count(tensor)

    def reset_peak(self) -> int:
        """Start a new phase; return the peak of the last one."""
        last, self.peak = self.peak, self.live
        return last

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        size = storage.nbytes()
        if self._sizes.get(address) == size:
            return
        if address not in self._sizes:
            weakref.finalize(storage, self._forget, address)
        self.live += size - self._sizes.get(address, 0)
        self._sizes[address] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int) -> None:
        self.live -= self._sizes.pop(address)


def step_peak(trainer: Trainer) -> int:
    """Take an optimizer step; return the most bytes of tensors that were alive in it, the model and its states included."""
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    gradients = (parameter.grad for parameter in trainer.model.hypernet.parameters())
    known = [*trainer.model.parameters(), *trainer.model.buffers(), *states, *gradients]
    with LiveBytes(tensor for tensor in known if isinstance(tensor, Tensor)) as bytes_:
        del known
        trainer.step()
    return bytes_.peak
