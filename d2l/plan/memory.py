"""Bytes by component of a run: while the base loads, at the peak of a training step, and between steps.

Weights, gradients and the optimizer's states are exact. What a step keeps is counted phase by phase from what its
operations save; the peak is that of the highest phase.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from d2l.hypernet.memory import ActivationBytes, perceiver_parameters
from d2l.plan.base_memory import (
    gathered_bytes,
    layer_backward_bytes,
    layer_forward_bytes,
    layer_kept_bytes,
    logits_bytes,
    mask_bytes,
    weight_bytes,
)
from d2l.plan.hypernet_memory import hypernet_memory, lora_bytes
from d2l.plan.rows import RowShape
from d2l.plan.sizes import Sizes

_FLOAT32 = 4
# cuBLAS holds workspaces that the allocator counts; 32 MiB on SM 90 for each handle (torch's CUBLAS_WORKSPACE_CONFIG)
_WORKSPACES = 64 * 2**20

Parts = dict[str, int]  # component → bytes


@dataclass(frozen=True)
class Component:
    """Bytes of one part of the run, while the base loads, at the peak of a step, and between steps."""

    name: str
    loading: int
    peak: int
    steady: int


@dataclass(frozen=True)
class MemoryPlan:
    """The components of a run; their sums are the run's.

    Attributes:
        phase: the part of a step that is the peak.
        row: the packed row that it is reached with.
    """

    components: tuple[Component, ...]
    phase: str
    row: RowShape

    @property
    def loading(self) -> int:
        """Bytes while the base loads."""
        return sum(component.loading for component in self.components)

    @property
    def peak(self) -> int:
        """Bytes at the peak of a training step."""
        return sum(component.peak for component in self.components)

    @property
    def steady(self) -> int:
        """Bytes between steps."""
        return sum(component.steady for component in self.components)

    @property
    def needed(self) -> int:
        """Bytes that the run needs: while it loads, or at a step's peak."""
        return max(self.loading, self.peak)


def memory_plan(sizes: Sizes, rows: Sequence[RowShape]) -> MemoryPlan:
    """Compute the bytes of a run on one device, at the row that takes most.

    Args:
        rows: at least one.
    """
    candidates = [
        (sum(parts.values()), phase, parts, row) for row in rows for phase, parts in step_phases(sizes, row).items()
    ]
    _, phase, peak, row = max(candidates, key=lambda it: it[0])
    loading, steady = _loading(sizes), _between_steps(sizes)
    names = dict.fromkeys([*loading, *steady, *peak])
    parts = (Component(name, loading.get(name, 0), peak.get(name, 0), steady.get(name, 0)) for name in names)
    return MemoryPlan(tuple(parts), phase, row)


def step_phases(sizes: Sizes, row: RowShape) -> dict[str, Parts]:
    """Compute the components of every phase of a training step over one packed row."""
    hypernet, loras = hypernet_memory(sizes, row), lora_bytes(sizes, row)
    held = _held(sizes)
    running = {"gathered layers": gathered_bytes(sizes)}
    read = held | {"context features": hypernet.features}
    made = read | {"hypernetwork activations": hypernet.kept, "generated LoRAs": loras}
    return {
        "context encoder": read | running | {"base activations": _encoder_bytes(sizes, row)},
        "forward of the Perceiver": read | {"hypernetwork activations": hypernet.passing + hypernet.forward},
        "forward of the hypernetwork": made
        | {
            "hypernetwork activations": hypernet.kept + hypernet.passing,
            "generated LoRAs": 2 * loras,  # before and after the chunks of each document are merged
        },
        **_answering(sizes, row, made | running),
        "backward of merging": made | {"generated LoRAs": 3 * loras},  # values, gradients, those of the chunks
        **_hypernet_backward(sizes, read, hypernet),
        "optimizer step": _between_steps(sizes) | {"optimizer at work": sizes.optimizer_work},
    }


def _encoder_bytes(sizes: Sizes, row: RowShape) -> int:
    """Return what the base works with in a layer that reads documents; room for the features is made before."""
    tokens, longest = row.context_tokens, row.longest_document
    return layer_forward_bytes(sizes, tokens, longest) + mask_bytes(sizes, tokens, longest)


def _hypernet_backward(sizes: Sizes, read: Parts, hypernet: ActivationBytes) -> dict[str, Parts]:
    """Compute the phases of the hypernetwork's backward behind the heads, which have left their gradients."""
    every = sizes.trained * _FLOAT32
    of_heads = every - perceiver_parameters(sizes.shape) * _FLOAT32
    at_end = hypernet.backward + (hypernet.perceiver if hypernet.recomputed else 0)
    earlier = max(of_heads, read["gradients"])
    return {
        "backward of the Perceiver": read | {"gradients": earlier, "hypernetwork activations": hypernet.perceiver},
        "end of the hypernetwork's backward": read | {"gradients": every, "hypernetwork activations": at_end},
    }


def _answering(sizes: Sizes, row: RowShape, made: Parts) -> dict[str, Parts]:
    """Compute the phases from the questions' tokens to the gradients of the LoRAs."""
    tokens, longest = row.question_tokens, row.longest_question
    inputs = tokens * sizes.base.hidden * sizes.element
    layer = layer_kept_bytes(sizes, tokens, longest)
    kept = sizes.base.layers * (inputs if sizes.config.gradient_checkpointing else layer)
    kept += mask_bytes(sizes, tokens, longest)
    earlier = kept if sizes.config.gradient_checkpointing else kept - layer  # without what the last layer keeps
    forward, backward = (bytes_of(sizes, tokens, longest) for bytes_of in (layer_forward_bytes, layer_backward_bytes))
    final = 3 * tokens * sizes.base.hidden * _FLOAT32  # the last norm, in float32
    loras = made["generated LoRAs"] + lora_bytes(sizes, row)  # and their gradients
    return {
        "forward under the LoRAs": made | {"base activations": max(earlier + forward, kept)},
        "logits": made | {"base activations": kept + final, "logits": logits_bytes(sizes, row.label_tokens)},
        "backward under the LoRAs": made | {"base activations": earlier + backward, "generated LoRAs": loras},
    }


def _loading(sizes: Sizes) -> Parts:
    """Return what is alive at the highest moment before the first step: the hypernetwork is made when the base is loaded."""
    held, transient = weight_bytes(sizes)
    trained = sizes.trained * _FLOAT32
    first = {"loading the base": transient} if transient > trained else {"hypernetwork": trained}
    return {"base weights": held, **first}


def _held(sizes: Sizes) -> Parts:
    """Return what is alive throughout a step; the gradients only where earlier micro-batches have left theirs."""
    parts = _between_steps(sizes)
    if sizes.config.gradient_accumulation_steps == 1:
        parts["gradients"] = 0
    return parts


def _between_steps(sizes: Sizes) -> Parts:
    """Return what is alive between steps: gradients stay until the next step begins."""
    return {
        "base weights": weight_bytes(sizes)[0],
        "hypernetwork": sizes.trained * _FLOAT32,
        "gradients": sizes.trained * _FLOAT32,
        "optimizer states": sizes.optimizer * _FLOAT32,
        "library workspaces": _WORKSPACES if sizes.on_gpu else 0,
    }
