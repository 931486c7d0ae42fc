"""The subject of the checks: a run's configuration and inputs, and the implementation of Doc-to-LoRA that would run them.

Checks reach an implementation through the narrow protocol `Implementation` only. `checks/production.py` is d2l's own;
a reference, a fork or a user's own can stand in its place. A planted fault is a changed configuration (`configure`) or
an implementation with one method replaced (`override`).
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from checks.result import NotOffered
from d2l.config.schema import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from d2l.base.load_plan import LoadPlan
    from d2l.data.chat.format import ChatFormat
    from d2l.data.packing import PackedBatch
    from d2l.data.records import Record
    from d2l.data.tokenize import Row, Tokenized
    from d2l.fingerprint import Fingerprint
    from d2l.hypernet.lora import Lora


class Model(Protocol):
    """A base, its context encoder and its hypernetwork."""

    @property
    def base(self) -> "PreTrainedModel":
        """Return the frozen base."""

    @property
    def hypernet(self) -> nn.Module:
        """Return the module that trains."""

    def features(self, batch: "PackedBatch") -> Tensor:
        """Return what the context encoder makes of all chunks, `[1, layers, Tc, hidden]` or `[1, Tc, features]`."""

    def lora(self, batch: "PackedBatch") -> "Lora":
        """Return the merged LoRA of every context of a packed row."""

    def logits(self, batch: "PackedBatch", lora: "Lora | None", positions: Tensor | None = None) -> Tensor:
        """Return the logits of the questions, `[T or positions, V]`, under `lora`, or of the base alone."""

    def gradient_checkpointing_enable(self, kwargs: Mapping[str, Any]) -> None:
        """Recompute the base's layers in the backward pass."""


class Stepper(Protocol):
    """A run in progress on some rows."""

    @property
    def model(self) -> Model:
        """Return the model in training."""

    def step(self) -> Any:
        """Take one optimizer step and return its metrics: `task_loss`, `grad_norm`, and `exact_match` where it has one.

        Raises:
            Exception: of any kind, before anything is changed, where the step is not finite or has no label.
        """

    def save(self, folder: Path) -> None:
        """Write all that is needed to continue elsewhere into a new folder."""

    def resume(self, folder: Path) -> None:
        """Continue from such a folder."""


class Implementation(Protocol):
    """The functions through which an implementation is diagnosed. Twins are tiny, random, float32 and on the CPU.

    Only `build` is necessary. What an implementation, its model or its stepper lacks is `NotOffered`, and the checks
    that need it are skipped. `checks.foreign` has defaults for an implementation other than d2l.
    """

    def plan(self, config: RunConfig, base_config: "PreTrainedConfig") -> "LoadPlan":
        """Return how the base would be loaded."""

    def build_base(self, base_config: "PreTrainedConfig", plan: "LoadPlan", seed: int) -> "PreTrainedModel":
        """Make a random frozen base."""

    def save_base(self, base: "PreTrainedModel", folder: Path) -> None:
        """Write a base in the file format of its family's checkpoints."""

    def load_base(self, folder: Path, plan: "LoadPlan") -> "PreTrainedModel":
        """Read a base as the run would."""

    def build(self, base: "PreTrainedModel", config: RunConfig) -> Model:
        """Make the whole model around a base."""

    def targets(self, base: "PreTrainedModel", names: Sequence[str]) -> Mapping[str, Sequence[nn.Module]]:
        """Return the modules that would be adapted: for each name one in every layer."""

    def chat(self, config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> "ChatFormat":
        """Return the chat format of the run."""

    def records(self, config: RunConfig) -> Sequence["Record"]:
        """Read the documents that `train_ds_names` names, or generate them, in that order."""

    def rows(self, config: RunConfig, chat: "ChatFormat", records: Sequence["Record"]) -> "Tokenized":
        """Tokenize records into rows, and list what was dropped."""

    def cached_rows(
        self, config: RunConfig, chat: "ChatFormat", records: Sequence["Record"], folder: Path
    ) -> "Tokenized":
        """Return the same as `rows`, through the cache that lies in this folder, in as many files as records where it can."""

    def batches(self, config: RunConfig, rows: Sequence["Row"]) -> Sequence["PackedBatch"]:
        """Pack the rows of one epoch."""

    def loss(self, model: Any, batches: Sequence["PackedBatch"], config: RunConfig) -> tuple[Tensor, Tensor]:
        """Return the task loss and the weighted L1 term of one step made of these micro-batches, with gradients."""

    def trainer(self, model: Any, rows: Sequence["Row"], config: RunConfig) -> Stepper:
        """Make a run at its start."""

    def train(self, run: Any, folder: Path) -> Sequence[Path]:
        """Take the steps of a whole run, and write its checkpoints below an empty folder; return those left, oldest first."""

    def newest(self, folder: Path) -> Path:
        """Return the checkpoint that a run's folder is continued from: its newest whole one."""

    def learning_rates(self, config: RunConfig, steps: Sequence[int]) -> Sequence[float]:
        """Return the learning rates that the run's schedule gives these optimizer steps, counted from 0."""

    def read(self, folder: Path) -> tuple[RunConfig, Mapping[str, Tensor]]:
        """Return the configuration and the trained tensors, by name, of a folder of `save` or `import_reference`."""

    def export(self, lora: "Lora", base: "PreTrainedModel", folder: Path) -> None:
        """Write one document's LoRA as an adapter folder of PEFT."""

    def import_reference(self, file: Path, folder: Path) -> None:
        """Turn a checkpoint file of the reference into a checkpoint folder."""

    def gpu(self) -> str | None:
        """Return the GPU that the run would use, as torch names it; `None` without one."""

    def free_memory(self) -> int | None:
        """Return the free bytes of the GPU that the run would use; `None` without one."""

    def free_disk(self, config: RunConfig) -> int:
        """Return the free bytes where the run's folder would be."""


class Offered:
    """An implementation whose missing methods raise `NotOffered`."""

    def __init__(self, implementation: Any) -> None:
        self._implementation = implementation

    def __getattr__(self, name: str) -> Any:
        if (found := getattr(self._implementation, name, None)) is None:
            raise NotOffered(name)
        return found


def offered(part: Any, name: str) -> Any:
    """Return an attribute of a model or a stepper.

    Raises:
        NotOffered: it has none of that name.
    """
    if (found := getattr(part, name, None)) is None:
        raise NotOffered(f"{name} of its {'model' if hasattr(part, 'hypernet') else 'trainer'}")
    return found


@dataclass(frozen=True)
class Subject:
    """One run, before it starts.

    Attributes:
        name: how the report calls it, such as the config's file name.
        config: the resolved configuration.
        base_config: the real model's config.
        implementation: what would run it.
        tokenizer: the run's tokenizer, or `None` with the reason in `tokenizer_absent`.
        records: the run's data, or `None` with the reason in `records_absent`.
        identity: hashes of all that shapes the run, part by part; None where it is not a run of d2l.
        judged: what a verdict is about, for people: base model, tokenizer, data, versions, device.
    """

    name: str
    config: RunConfig
    base_config: "PreTrainedConfig" = field(repr=False)
    implementation: Implementation = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, repr=False)
    tokenizer_absent: str = ""
    records: "tuple[Record, ...] | None" = field(default=None, repr=False)
    records_absent: str = ""
    identity: "Fingerprint | None" = field(default=None, repr=False)
    judged: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        """Return one sha256 over all that shapes the run; empty where nothing was hashed."""
        return self.identity.total if self.identity else ""

    @cached_property
    def plan(self) -> "LoadPlan":
        """Return how the real base would be loaded."""
        return self.implementation.plan(self.config, self.base_config)

    @cached_property
    def chat(self) -> "ChatFormat":
        """Return the run's chat format; only with a tokenizer."""
        assert self.tokenizer is not None
        return self.implementation.chat(self.config, self.tokenizer)

    @cached_property
    def rows(self) -> "Tokenized":
        """Return the run's rows; only with a tokenizer and records."""
        assert self.records is not None
        return self.implementation.rows(self.config, self.chat, self.records)

    @cached_property
    def twin_config(self) -> RunConfig:
        """Return the run's configuration with the hypernetwork and the data budgets of a twin; every switch stays."""
        small = {"lora_r": min(self.config.lora_r, 3), "latent_size": 8, "n_latent_queries": 4, "warmup_steps": 0}
        depth = {"num_blocks": min(self.config.num_blocks, 2), "layer_idx": self._twin_exit()}
        return changed(self.config, **small, **depth, dtype="float32")

    def _twin_exit(self) -> int | None:
        """Return the early exit in proportion to the twin's depth, but never before an attention layer that the run has."""
        if self.config.layer_idx is None:
            return None
        layers, twin_layers = self.base_config.num_hidden_layers, self.twin_base_config.num_hidden_layers
        return min(twin_layers - 1, -(-self.config.layer_idx * twin_layers // layers))

    @cached_property
    def twin_base_config(self) -> "PreTrainedConfig":
        """Return the real model's config, shrunk."""
        from d2l.base.twin import twin_config

        return twin_config(self.base_config)

    def twin_base(self) -> "PreTrainedModel":
        """Return a fresh copy of a random base of the real one's kind, tiny and in float32, held as the run would hold it."""
        return deepcopy(self._twin_base)

    @cached_property
    def _twin_base(self) -> "PreTrainedModel":
        return self.implementation.build_base(self.twin_base_config, self.twin_plan, seed=0)

    def grouped_twin_base(self) -> "PreTrainedModel | None":
        """Return the same with packed experts computed a layer at once, in slices, as on a GPU; `None` without any."""
        return deepcopy(self._grouped_twin_base)

    @cached_property
    def _grouped_twin_base(self) -> "PreTrainedModel | None":
        from d2l.base.grouped import smallest_transient

        config, plan = self.twin_base_config, self.twin_plan
        if plan.experts.value != "packed":
            return None
        shape = config.num_local_experts, config.hidden_size, config.intermediate_size
        slices = smallest_transient(*shape, plan.torch_dtype)
        plan = replace(
            plan, expert_products=replace(plan.expert_products, value="grouped"), expert_transient_bytes=slices
        )
        return self.implementation.build_base(config, plan, seed=0)

    @cached_property
    def twin_plan(self) -> "LoadPlan":
        """Return how the twin's base is loaded: as the real one, but in float32 on the CPU."""
        return plan_on_cpu(self.implementation, self.twin_config, self.twin_base_config)

    def twin(self, seed: int = 0, base: "PreTrainedModel | None" = None) -> Model:
        """Make a fresh twin whose LoRA is not zero: parameters that start at zero (scaler_B, bias_B) are drawn at random.

        Args:
            seed: of the hypernetwork; the base is always the same.
        """
        return build_drawn(self.implementation, base or self.twin_base(), self.twin_config, seed)


def build_drawn(implementation: Implementation, base: "PreTrainedModel", config: RunConfig, seed: int) -> Model:
    """Build a model from a seed, and draw the parameters that start at zero at random, so that its LoRA is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = implementation.build(base, config)
    with torch.no_grad():
        for parameter in model.hypernet.parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def plan_on_cpu(implementation: Implementation, config: RunConfig, base_config: "PreTrainedConfig") -> "LoadPlan":
    """Return how a tiny base would be loaded: as the implementation plans it, on the CPU; plainly where it has no plan."""
    from d2l.base.attention import FLASH_4
    from d2l.base.load_plan import Choice, LoadPlan

    device, products = Choice("cpu", "a twin is tiny"), Choice("one_by_one", "a twin is on the CPU")
    try:
        if config.attn_implementation == FLASH_4:  # no CPU runs it
            config = changed(config, attn_implementation="auto")
        return replace(implementation.plan(config, base_config), device=device, expert_products=products)
    except NotOffered as absent:
        attention, experts, quantization, dtype = (
            Choice(value, str(absent)) for value in ("eager", "dense", "none", "float32")
        )
        return LoadPlan(attention, experts, quantization, dtype, device, products, expert_transient_bytes=0)


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """Return the configuration with other values, checked as if it had been read so."""
    return RunConfig(**{**config.model_dump(), **values})
