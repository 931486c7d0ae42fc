"""Bytes by component of a run: while the base loads, at the peak of a training step, and between steps.

Weights, gradients and the optimizer's states are exact. What a step keeps is counted phase by phase from what its
operations save; the peak is that of the highest phase.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from d2l.plan.base_memory import (
    layer_backward_bytes,
    layer_forward_bytes,
    layer_kept_bytes,
    logits_bytes,
    mask_bytes,
    weight_bytes,
)
from d2l.plan.hypernet_memory import HypernetMemory, hypernet_memory, lora_bytes, projection_backward_bytes
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


def memory_plan(sizes: Sizes, rows: Sequence[RowShape], *, experts_at_once: int = 1) -> MemoryPlan:
    """Compute the bytes of a run on one device, at the row that takes most.

    Args:
        rows: at least one.
        experts_at_once: packed experts of a layer that are dequantized together.
    """
    candidates = [
        (sum(parts.values()), phase, parts, row)
        for row in rows
        for phase, parts in step_phases(sizes, row, experts_at_once).items()
    ]
    _, phase, peak, row = max(candidates, key=lambda it: it[0])
    loading, steady = _loading(sizes), _between_steps(sizes)
    names = dict.fromkeys([*loading, *steady, *peak])
    parts = (Component(name, loading.get(name, 0), peak.get(name, 0), steady.get(name, 0)) for name in names)
    return MemoryPlan(tuple(parts), phase, row)


def step_phases(sizes: Sizes, row: RowShape, experts_at_once: int) -> dict[str, Parts]:
    """Compute the components of every phase of a training step over one packed row."""
    hypernet = hypernet_memory(sizes, row)
    held = _held(sizes)
    made = held | {
        "hypernetwork activations": hypernet.kept,
        "generated LoRAs": hypernet.lora,
    }
    return {
        **_reading(sizes, row, held, hypernet, experts_at_once),
        **_answering(sizes, row, made, experts_at_once),
        "backward of merging": made | {"generated LoRAs": 3 * hypernet.lora},  # values, gradients, those of the chunks
        "end of the hypernetwork's backward": held
        | {
            "gradients": sizes.trained * _FLOAT32,
            "hypernetwork activations": hypernet.projection + hypernet.casts + projection_backward_bytes(sizes, row),
        },
        "optimizer step": _between_steps(sizes) | {"optimizer at work": _optimizer_work(sizes)},
    }


def _reading(
    sizes: Sizes, row: RowShape, held: Parts, hypernet: HypernetMemory, experts_at_once: int
) -> dict[str, Parts]:
    """Compute the phases from the documents' tokens to the end of the hypernetwork's forward."""
    every = sizes.config.ctx_encoder_type in ("per_layer_activations", "concat_layers")
    layers = sizes.base.layers if every else 1
    inputs = row.context_tokens * sizes.base.hidden * sizes.element * layers
    copies = {"concat_layers": 3, "per_layer_activations": 2}.get(sizes.config.ctx_encoder_type, 1)
    widened = hypernet.features if sizes.element < _FLOAT32 else 0
    tokens, longest = row.context_tokens, row.longest_document
    layer = layer_forward_bytes(sizes, tokens, longest, experts_at_once) + mask_bytes(sizes, tokens, longest)
    return {
        "context encoder": held | {"context features": inputs, "base activations": layer},
        "context features": held | {"context features": max(copies * inputs, inputs + widened)},
        "forward of the hypernetwork": held
        | {
            "context features": hypernet.features if sizes.mixed else 0,
            "hypernetwork activations": hypernet.kept + hypernet.passing_casts,
            "generated LoRAs": 2 * hypernet.lora,  # before and after the chunks of each document are merged
        },
    }


def _answering(sizes: Sizes, row: RowShape, made: Parts, experts_at_once: int) -> dict[str, Parts]:
    """Compute the phases from the questions' tokens to the gradients of the LoRAs."""
    tokens, longest = row.question_tokens, row.longest_question
    inputs = tokens * sizes.base.hidden * sizes.element
    layer = layer_kept_bytes(sizes, tokens, longest)
    kept = sizes.base.layers * (inputs if sizes.config.gradient_checkpointing else layer)
    kept += mask_bytes(sizes, tokens, longest)
    earlier = kept if sizes.config.gradient_checkpointing else kept - layer  # without what the last layer keeps
    forward = layer_forward_bytes(sizes, tokens, longest, experts_at_once)
    backward = layer_backward_bytes(sizes, tokens, longest, experts_at_once)
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


def _optimizer_work(sizes: Sizes) -> int:
    """Return the bytes of the step itself: on CUDA AdamW's square roots of all parameters, and Muon's products."""
    # a stack: Nesterov's momentum, then in bfloat16 (float32 on a CPU) the iterate, two of its products and the next one
    narrow = 2 if sizes.on_gpu else _FLOAT32
    muon = sizes.largest_stack * (_FLOAT32 + 4 * narrow)
    if sizes.config.muon_learning_rate is None:
        return sizes.trained * _FLOAT32 if sizes.on_gpu else 0
    return muon
