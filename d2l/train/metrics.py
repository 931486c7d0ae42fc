"""Measurements of an optimizer step: one line of metrics.jsonl, whose keys are documented here."""

import gc
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from d2l.config.schema import LossName, RunConfig

if TYPE_CHECKING:  # whoever reads metrics only need not wait for torch
    import torch

    from d2l.data.packing import PackedBatch

EVALUATED = "eval/"  # before the keys of an evaluation where they stand beside those of a step
LOSS_SUFFIX, PEAK_SUFFIX = "_loss", "_peak_gib"
# Keys of a line whose values differ between two equal runs.
MEASURED = frozenset({"seconds", "tokens_per_second", f"cuda{PEAK_SUFFIX}", f"resident{PEAK_SUFFIX}"})
GIB = 2**30
_RESIDENT_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of getrusage's ru_maxrss


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that the main process has held so far.

    Attributes:
        kind: `cuda`, what torch's allocator held on the GPU, or `resident`, the process's memory on the host.
        gib: in GiB.
    """

    kind: Literal["cuda", "resident"]
    gib: float


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of one optimizer step, over all processes where nothing else is said.

    In metrics.jsonl `task_loss` stands under the loss's name (`ce_loss`), `memory` under its kind (`cuda_peak_gib` or
    `resident_peak_gib`), and `tokens_per_second` beside the fields. Lines of earlier versions lack some of the keys.

    Attributes:
        step: 1 for the first.
        loss: the name of the task's loss, as the config has it.
        task_loss: its value, in nats.
        grad_norm: of all hypernetwork gradients before clipping.
        gen_lora_l1_norm: mean |A| + mean |B| of the generated LoRA, per context.
        exact_match: share of the questions whose supervised tokens are all the likeliest ones.
        stage: of the curriculum, 1 for the first.
        lr: the learning rate that the step used, of what AdamW steps.
        tokens: question tokens and document tokens of the step.
        label_tokens: supervised tokens of the step.
        seconds: wall time of the step, without saving.
        inp_fill: share of `max_packed_inp_len` that question tokens fill, mean over the step's packed rows.
        ctx_fill: share of `max_packed_ctx_len` that document tokens fill, likewise.
        memory: the peak so far, of the main process.
    """

    step: int
    loss: LossName
    task_loss: float
    grad_norm: float
    gen_lora_l1_norm: float
    exact_match: float
    stage: int
    lr: float
    tokens: int
    label_tokens: int
    seconds: float
    inp_fill: float
    ctx_fill: float
    memory: PeakMemory

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the step by its seconds."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, float]:
        """Return a line of metrics.jsonl."""
        values = asdict(self)
        name, memory = f"{values.pop('loss')}{LOSS_SUFFIX}", values.pop("memory")
        named = {name if key == "task_loss" else key: value for key, value in values.items()}
        return named | {"tokens_per_second": self.tokens_per_second, f"{memory['kind']}{PEAK_SUFFIX}": memory["gib"]}


def packing_fill(batches: "Sequence[PackedBatch]", config: RunConfig) -> tuple[float, float]:
    """Return the shares of the two packed budgets, of questions and of documents, that packed rows fill on average."""
    inp = sum(batch.n_tokens for batch in batches)
    ctx = sum(batch.ctx_ids.shape[1] for batch in batches)
    return inp / (len(batches) * config.max_packed_inp_len), ctx / (len(batches) * config.max_packed_ctx_len)


def forget_peak_memory(device: "torch.device") -> None:
    """Let the peak begin anew on a GPU: what checks took before the run is not the run's. A host's peak stays."""
    if device.type == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: "torch.device") -> PeakMemory:
    """Return the peak so far, read from counters of the host: nothing waits for the device."""
    if device.type == "cuda":
        import torch

        return PeakMemory("cuda", torch.cuda.max_memory_allocated(device) / GIB)
    return PeakMemory("resident", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RESIDENT_UNIT / GIB)
