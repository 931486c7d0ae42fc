"""The numbers that memory and operations of a run are counted from, read off a base model's config and a configuration."""

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from d2l.base.config import skeleton
from d2l.base.experts import expert_projections
from d2l.base.load_plan import LoadPlan, plan_load
from d2l.base.masks import attention_layout
from d2l.base.sharding import sharding_obstacle, sharding_units
from d2l.config.schema import RunConfig
from d2l.errors import ModelError
from d2l.hypernet.hypernetwork import Hypernetwork
from d2l.hypernet.model import DocToLora
from d2l.hypernet.shape import HypernetShape
from d2l.train.optimizer import optimizer_values, step_bytes

HOPPER = (9, 0)  # compute capability of an H100


@dataclass(frozen=True)
class WeightCount:
    """Numbers of weights, not bytes."""

    total: int
    experts: int  # those that MXFP4 holds: the projections, not their biases
    largest_expert_tensor: int
    largest_tensor: int  # of the others
    largest_unit: int  # of what a sharded base gathers at a time: a layer or the embeddings
    rest: int  # outside these units; gathered once a pass: the last norm, and tied embeddings


def count_weights(model: PreTrainedModel) -> WeightCount:
    """Count a model's weights; its skeleton will do."""
    projections = {id(projection): projection.numel() for projection in expert_projections(model)}
    others = [parameter.numel() for parameter in model.parameters() if id(parameter) not in projections]
    experts = sum(projections.values())
    total = sum(others) + experts
    units = [sum(it.numel() for it in unit.parameters()) for unit in sharding_units(model)]
    return WeightCount(
        total=total,
        experts=experts,
        largest_expert_tensor=max(projections.values(), default=0),
        largest_tensor=max(others),
        largest_unit=max(units),
        rest=total - sum(units),
    )


@dataclass(frozen=True)
class BaseSizes:
    """Widths of a base model's layers."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int  # of one expert, where there are experts
    experts: int  # 0: a dense MLP
    routes: int  # experts that a token goes through; 1 for a dense MLP
    vocabulary: int
    layer_kinds: int  # with masks of their own: full attention, sliding attention
    window: int  # tokens that a layer of sliding attention sees; 0 without one
    windowed: float  # share of the layers with sliding attention

    @classmethod
    def of(cls, base_config: PreTrainedConfig) -> "BaseSizes":
        """Read them off a config of transformers."""
        hidden, heads, layout = base_config.hidden_size, base_config.num_attention_heads, attention_layout(base_config)
        routes = getattr(base_config, "num_experts_per_tok", None) or 0
        experts = getattr(base_config, "num_local_experts", None) or getattr(base_config, "num_experts", None)
        width = getattr(base_config, "moe_intermediate_size", None) if routes else None
        return cls(
            layers=base_config.num_hidden_layers,
            hidden=hidden,
            heads=heads,
            key_heads=getattr(base_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(base_config, "head_dim", None) or hidden // heads,
            intermediate=width or getattr(base_config, "intermediate_size", None) or 4 * hidden,
            experts=(experts or routes) if routes else 0,
            routes=routes or 1,
            vocabulary=base_config.vocab_size,
            layer_kinds=len(layout.kinds),
            window=layout.window or 0,
            windowed=layout.layer_types.count("sliding_attention") / len(layout.layer_types),
        )

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.key_heads)

    @property
    def expert_weights(self) -> int:
        """Weights of one expert, or of a dense MLP: gate, up and down."""
        return 3 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Sizes:
    """All that a plan needs to know of a model in training.

    Attributes:
        trained: numbers of the hypernetwork that are trained, in float32.
        optimizer: numbers that the optimizer keeps between steps, in float32.
        optimizer_work: bytes that the optimizer's step works with.
        processes: those that share each optimizer step.
    """

    config: RunConfig
    base: BaseSizes
    weights: WeightCount
    load: LoadPlan
    shape: HypernetShape
    trained: int
    optimizer: int
    optimizer_work: int
    processes: int = 1

    @property
    def shares(self) -> int:
        """Processes that the base is sharded over; 1 where each holds it whole."""
        sharded = self.config.base_sharding == "full" and not sharding_obstacle(self.load, self.processes)
        return self.processes if sharded else 1

    @property
    def element(self) -> int:
        """Bytes of a number of the base."""
        return self.load.torch_dtype.itemsize

    @property
    def on_gpu(self) -> bool:
        """Whether the run is on CUDA."""
        return self.load.device.value.startswith("cuda")

    @property
    def mixed(self) -> bool:
        """Whether the float32 hypernetwork computes in bfloat16 (`DocToLora._hypernet_precision`)."""
        return self.on_gpu and self.load.torch_dtype == torch.bfloat16

    @property
    def linear_attention(self) -> bool:
        """Whether attention's memory is linear in the length: it takes grouped heads, and skips blocks that masks hide."""
        return "flex" in self.load.attention.value

    @property
    def experts_path(self) -> str:
        """How experts are computed: packed ones grouped or one_by_one, else as the loading plan names them."""
        return self.load.expert_products.value if self.load.experts.value == "packed" else self.load.experts.value

    @property
    def feature_layers(self) -> int:
        """Layers of the base that the features are of, by themselves."""
        return self.base.layers if self.shape.per_layer_features else 1


class Model:
    """A base model without weights, and the sizes of any run on it; its skeleton is built once.

    Args:
        device: as torch names it, on which the run would be; it need not be here.
        capability: the compute capability of that device, where it is CUDA and not here.
        processes: those that share each optimizer step, each with such a device.

    Raises:
        ModelError: transformers does not have the model, or it has no such target modules.
    """

    def __init__(
        self,
        base_config: PreTrainedConfig,
        device: str | None = None,
        capability: tuple[int, int] | None = None,
        processes: int = 1,
    ) -> None:
        self.base_config, self._device, self._capability = base_config, device, capability
        self._processes = processes

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        return skeleton(self.base_config)

    @cached_property
    def weights(self) -> WeightCount:
        """How many weights the base has."""
        return count_weights(self._skeleton)

    def sizes(self, config: RunConfig) -> Sizes:
        """Return the sizes of a run.

        Raises:
            ModelError: no hypernetwork can be made for it.
        """
        return self.sizes_of(config, plan_load(config, self.base_config, self._device, self._capability))

    def sizes_of(self, config: RunConfig, load: LoadPlan) -> Sizes:
        """Return the sizes of a run whose base is loaded in this way.

        Raises:
            ModelError: no hypernetwork can be made for it.
        """
        hypernet = self._hypernetwork(config)
        return Sizes(
            config=config,
            base=BaseSizes.of(self.base_config),
            weights=self.weights,
            load=load,
            shape=hypernet.shape,
            trained=sum(parameter.numel() for parameter in hypernet.parameters()),
            optimizer=optimizer_values(hypernet, config),
            optimizer_work=step_bytes(hypernet, config, load.device.value),
            processes=self._processes,
        )

    def _hypernetwork(self, config: RunConfig) -> Hypernetwork:
        try:
            with torch.device("meta"):
                return DocToLora(self._skeleton, config).hypernet
        except RuntimeError as error:  # torch cannot count so many
            raise ModelError(
                f"no hypernetwork can have these sizes: {str(error).splitlines()[0]}; lower latent_size, lora_r, "
                "n_latent_queries, perceiver_heads or perceiver_head_dim"
            ) from error
