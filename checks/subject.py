"""The subject of the checks: a run's configuration and inputs, and the implementation of Doc-to-LoRA that would run them.

Checks reach an implementation through the protocol `checks.implementation.Implementation` only. A planted fault is a
changed configuration (`configure`) or an implementation with one method replaced (`override`).
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from checks.implementation import Implementation, Model
from checks.result import NotOffered
from d2l.config.schema import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from d2l.base.load_plan import LoadPlan
    from d2l.data.chat.format import ChatFormat
    from d2l.data.records import Record
    from d2l.data.tokenize import Tokenized
    from d2l.fingerprint import Fingerprint


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configs call their number
TAKEN = 2  # of which a token takes at most so many, out of twice as many: routing has a choice


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
        small |= {"perceiver_heads": min(self.config.perceiver_heads, 8)}  # four queries to a key: two keys
        small |= {"perceiver_head_dim": min(self.config.perceiver_head_dim, 8)}
        blocks = 3 if self.config.shared_weights else 2  # of three, two share their weights
        depth = {"num_blocks": min(self.config.num_blocks, blocks), "layer_idx": self._twin_exit()}
        return changed(self.config, **small, **depth, dtype="float32")

    def _twin_exit(self) -> int | None:
        """Return the early exit in proportion to the twin's depth, but never before an attention layer that the run has."""
        if self.config.layer_idx is None:
            return None
        layers, twin_layers = self.base_config.num_hidden_layers, self.twin_base_config.num_hidden_layers
        return min(twin_layers - 1, -(-self.config.layer_idx * twin_layers // layers))

    @cached_property
    def twin_base_config(self) -> "PreTrainedConfig":
        """Return the real model's config, shrunk; of its experts a token takes two at most, out of twice as many."""
        from d2l.base.twin import twin_config

        return with_few_experts(twin_config(self.base_config))

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

        config = self.twin_base_config
        if self.twin_plan.experts.value != "packed":
            return None
        shape = config.num_local_experts, config.hidden_size, config.intermediate_size
        return self._grouped(config, smallest_transient(*shape, self.twin_plan.torch_dtype))

    def answering_twin_base(self) -> "PreTrainedModel | None":
        """Return one with more experts and room for copies of some, as a GPU takes them for a few tokens of an answer."""
        return deepcopy(self._answering_twin_base)

    @cached_property
    def _answering_twin_base(self) -> "PreTrainedModel | None":
        config = deepcopy(self.twin_base_config)
        if self.twin_plan.experts.value != "packed":
            return None
        config.num_local_experts = 4 * config.num_experts_per_tok
        return self._grouped(config, self.twin_plan.expert_transient_bytes)

    def _grouped(self, config: "PreTrainedConfig", transient_bytes: int) -> "PreTrainedModel":
        """Build a base whose packed experts are computed a layer at once."""
        products = replace(self.twin_plan.expert_products, value="grouped")
        plan = replace(self.twin_plan, expert_products=products, expert_transient_bytes=transient_bytes)
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


def build_drawn(
    implementation: Implementation, base: "PreTrainedModel", config: RunConfig, seed: int, spread: float = 0.3
) -> Model:
    """Build a model from a seed, and draw the parameters that start at zero at random, so that its LoRA is not zero.

    Args:
        spread: standard deviation of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = implementation.build(base, config)
    with torch.no_grad():
        for parameter in model.hypernet.parameters():
            if not parameter.any():
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def plan_on_cpu(implementation: Implementation, config: RunConfig, base_config: "PreTrainedConfig") -> "LoadPlan":
    """Return how a tiny base would be loaded: as the implementation plans it, on the CPU; plainly where it has no plan."""
    from d2l.base.attention import FLASH_4
    from d2l.base.load_plan import Choice, LoadPlan

    device, products = Choice("cpu", "a twin is tiny"), Choice("one_by_one", "a twin is on the CPU")
    for plans in _noting_plans:
        plans.append((config, base_config))
    try:
        if config.attn_implementation == FLASH_4:  # no CPU runs it
            config = changed(config, attn_implementation="auto")
        return replace(implementation.plan(config, base_config), device=device, expert_products=products)
    except NotOffered as absent:
        attention, experts, quantization, dtype = (
            Choice(value, str(absent)) for value in ("eager", "dense", "none", "float32")
        )
        return LoadPlan(attention, experts, quantization, dtype, device, products, expert_transient_bytes=0)


@contextmanager
def plans_noted() -> "Iterator[list[tuple[RunConfig, PreTrainedConfig]]]":
    """Note what `plan_on_cpu` is asked for: it takes the method `plan` once for each."""
    plans: list[tuple[RunConfig, PreTrainedConfig]] = []
    _noting_plans.append(plans)
    try:
        yield plans
    finally:
        _noting_plans.remove(plans)


_noting_plans: "list[list[tuple[RunConfig, PreTrainedConfig]]]" = []


def with_few_experts(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return a twin's config with few experts; itself where it has none, or chooses among groups of them."""
    top_k = getattr(config, "num_experts_per_tok", None)
    if top_k is None or getattr(config, "n_group", None):
        return config
    few = min(TAKEN, top_k)
    wanted = {"num_experts_per_tok": few, **dict.fromkeys(EXPERTS, 2 * few)}
    names = {config.attribute_map.get(name, name): size for name, size in wanted.items()}
    values = config.to_dict()
    smaller = {name: min(size, values[name]) for name, size in names.items() if values.get(name) is not None}
    return type(config).from_dict(values | smaller)


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """Return the configuration with other values, checked as if it had been read so."""
    made = RunConfig(**{**config.model_dump(), **values})
    _set_fields[id(made)] = fields_set(config) | values.keys()
    weakref.finalize(made, _set_fields.pop, id(made)).atexit = False
    return made


_set_fields: dict[int, frozenset[str]] = {}  # of every configuration that `changed` made and that is still there


def fields_set(config: RunConfig) -> frozenset[str]:
    """Name the fields that `changed` has set on the way to this configuration, whatever they were before."""
    return _set_fields.get(id(config), frozenset())
