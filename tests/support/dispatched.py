"""What one call dispatches: its operations, counted, and those that would make a host wait for a GPU."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or whose size, the host needs before it goes on.
_WAITING = {
    *(
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::equal",
        "aten::nonzero",
        "aten::masked_select",
        "aten::bincount",
    ),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"),
}
_VIEWS = {
    "view",
    "t",
    "transpose",
    "permute",
    "slice",
    "select",
    "detach",
    "unsqueeze",
    "squeeze",
    "expand",
    "alias",
    "split",
}


class Dispatched(TorchDispatchMode):
    """Counts operations that compute, and those among them on which a host would wait for a GPU, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if not (function.is_view or name.removeprefix("aten::") in _VIEWS):
            self.operations[name] += 1
        if name in _WAITING or _indexes_by_truth(name, args) or _moves(result, args):
            self.waits[name] += 1
        return result


def _indexes_by_truth(name: str, args: Any) -> bool:
    indices = args[1] if name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list) else ()
    return any(isinstance(it, Tensor) and it.dtype == torch.bool for it in indices)


def _moves(result: Any, args: Any) -> bool:
    tensors = [it for it in (result, *args) if isinstance(it, Tensor)]
    return len({it.device for it in tensors}) > 1


def dispatched(call: Callable[[], Any]) -> Dispatched:
    """Run a call and return what it dispatched."""
    with Dispatched() as mode:
        call()
    return mode
