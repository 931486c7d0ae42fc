"""Help for an implementation other than d2l: where it comes from, defaults for it, and batches as plain tensors.

`d2l preflight CONFIG --implementation package.module:factory` puts what `factory()` returns in the place of d2l.
docs/another_implementation.md shows a whole one.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from checks.machine import free_disk, free_memory, gpu, peak_memory
from checks.result import UsageError
from d2l.base.segments import Segments
from d2l.config.schema import RunConfig
from d2l.data.packing import PackedBatch
from d2l.errors import ModelError
from d2l.hypernet.lora import Lora

if TYPE_CHECKING:
    from checks.implementation import Model

__all__ = ["Context", "Foreign", "Lora", "PackedBatch", "contexts", "load_implementation", "stack"]


def load_implementation(place: str) -> Any:
    """Call the factory that `package.module:factory` names; modules of the present folder are found too.

    Raises:
        UsageError: there is no such module or factory, it fails, or what it returns has no method `build`.
    """
    module_name, colon, factory_name = place.partition(":")
    if not (module_name and colon and factory_name):
        raise UsageError(f"--implementation: expected package.module:factory, found {place!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        implementation = getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:
        raise UsageError(f"--implementation {place}: {type(error).__name__}: {error}") from error
    if not callable(getattr(implementation, "build", None)):
        kind = type(implementation).__name__
        raise UsageError(
            f"--implementation {place}: expected an object with a method build, found a {kind} without one"
        )
    return implementation


class Foreign:
    """What the checks need and another implementation may leave to them; subclass it, and define at least `build`."""

    def build(self, base: PreTrainedModel, config: RunConfig) -> "Model":
        """Make the model around a base; see `checks.implementation.Model` for its parts."""
        raise TypeError(f"{type(self).__name__} defines no method build")

    def build_base(self, base_config: PreTrainedConfig, plan: Any, seed: int) -> PreTrainedModel:
        """Make a random base as transformers does: frozen, float32, eager attention, experts as plain tensors."""
        own = deepcopy(base_config)
        if hasattr(own, "quantization_config"):
            del own.quantization_config
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_config(own, dtype=torch.float32, attn_implementation="eager")
        base.set_experts_implementation("eager")  # the batched kernels take no float64
        return base.eval().requires_grad_(False)

    def gpu(self) -> str | None:
        """Return the GPU that a run would use, as torch names it; None without one."""
        return gpu()

    def free_memory(self) -> int | None:
        """Return the free bytes of the GPU; None without one."""
        return free_memory()

    def peak_memory(self, work: Callable[[], object]) -> int | None:
        """Do something, and return the most bytes of the GPU that tensors took meanwhile."""
        return peak_memory(work)

    def free_disk(self, config: RunConfig) -> int:
        """Return the free bytes where the run's folder would be."""
        return free_disk(config)

    def targets(self, base: PreTrainedModel, names: Sequence[str]) -> Mapping[str, Sequence[nn.Module]]:
        """Return for each name the Linear of that name in every decoder layer.

        Raises:
            ModelError: a layer has none, or several.
        """
        found: dict[str, list[nn.Module]] = {name: [] for name in names}
        for index, layer in enumerate(base.get_decoder().layers):
            for name in names:
                matches = [
                    module
                    for path, module in layer.named_modules()
                    if path.rpartition(".")[2] == name and isinstance(module, nn.Linear)
                ]
                if len(matches) != 1:
                    raise ModelError(f"target_modules: layer {index} has {len(matches)} Linears named {name}")
                found[name] += matches
        return found


@dataclass(frozen=True)
class Context:
    """A document of a packed batch with its questions, as ids.

    Attributes:
        chunks: int64 [S] each.
        questions: int64 [T] each, answers included.
        labels: int64 [T] each: the question's id where supervised, else -100; not shifted.
        places: where each question lies in the packed row.
    """

    chunks: tuple[Tensor, ...]
    questions: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    places: tuple[slice, ...]


def contexts(batch: PackedBatch) -> Iterator[Context]:
    """Yield the documents of a packed batch with their questions."""
    chunks = iter(_pieces(batch.ctx_ids[0], batch.chunks))
    questions = iter(_pieces(batch.input_ids[0], batch.queries))
    labels = iter(_pieces(batch.labels[0], batch.queries))
    start = 0
    for n_chunks, n_questions in zip(batch.n_ctx_chunks, batch.n_queries, strict=True):
        own = tuple(next(questions) for _ in range(n_questions))
        places = []
        for question in own:
            places.append(slice(start, start + len(question)))
            start += len(question)
        yield Context(
            chunks=tuple(next(chunks) for _ in range(n_chunks)),
            questions=own,
            labels=tuple(next(labels) for _ in range(n_questions)),
            places=tuple(places),
        )


def _pieces(row: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    return row.split(list(segments.lengths))


def stack(loras: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], scale: float) -> Lora:
    """Put the LoRAs of several contexts together, padded with zero rows to a common rank.

    Args:
        loras: for each context A (module name → [layers, R, d_in]) and B (module name → [layers, R, d_out]).
        scale: factor of every delta `scale · (x Aᵀ) B`.
    """
    rank = max(a.shape[1] for side in loras for a in side[0].values())

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], rank - x.shape[1], x.shape[2])], dim=1)

    A, B = ({name: torch.stack([padded(lora[i][name]) for lora in loras]) for name in loras[0][i]} for i in (0, 1))
    return Lora(A, B, scale)
