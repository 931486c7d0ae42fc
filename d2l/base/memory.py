"""Bytes by component of a run: while the base loads, at the peak of a training step, and steadily between steps.

Weights are counted from the model's shapes and are exact. Activations are estimates from the same shapes, within a
factor of 1.5 of what autograd keeps. The hypernetwork is in float32 with its optimizer's states, as it is trained.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from d2l.base.attention import PER_DOCUMENT
from d2l.base.experts import expert_projections
from d2l.base.load import LoadPlan, skeleton
from d2l.base.mxfp4 import BITS_PER_WEIGHT
from d2l.config.schema import RunConfig

_FLOAT32 = 4
# Bytes an element, measured on a CPU: the result, its transpose, indices, casts. CUDA takes fewer.
_DEQUANTIZE_TRANSIENT = 10
# Copies of a layer's attention scores beside the one kept for backward: masked, with sinks, shifted, softmax.
_SCORES_AT_WORK = 4
# The modality projection, a SwiGLU four times as wide as its input, keeps gate, up, silu(gate) and their product.
_PROJECTION_VALUES = 4 * 4
# Bytes a logit beside itself: in float32, its softmax, its gradient.
_LOGITS = 3 * _FLOAT32


@dataclass(frozen=True)
class Component:
    """Bytes of one part of the run, while the base loads, at the peak of a step, and between steps."""

    name: str
    loading: int
    peak: int
    steady: int


@dataclass(frozen=True)
class MemoryPlan:
    """The components of a run; their sums are the run's."""

    components: tuple[Component, ...]

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


@dataclass(frozen=True)
class WeightCount:
    """Numbers of weights, not bytes."""

    total: int
    experts: int  # those that MXFP4 holds: the projections, not their biases
    largest_expert_tensor: int
    largest_tensor: int  # of the others


def count_weights(base_config: PreTrainedConfig) -> WeightCount:
    """Count a model's weights without allocating it."""
    model = skeleton(base_config)
    projections = {id(projection): projection.numel() for projection in expert_projections(model)}
    others = [parameter.numel() for parameter in model.parameters() if id(parameter) not in projections]
    experts = sum(projections.values())
    return WeightCount(sum(others) + experts, experts, max(projections.values(), default=0), max(others))


def memory_plan(
    config: RunConfig,
    base_config: PreTrainedConfig,
    plan: LoadPlan,
    *,
    hypernet_parameters: int,
    optimizer_values: int,
    label_tokens: int | None = None,
) -> MemoryPlan:
    """Compute the bytes of a run on one device, with full packed rows.

    Args:
        hypernet_parameters: numbers that are trained, in float32, and as many gradients.
        optimizer_values: numbers that the optimizer keeps between steps, in float32.
        label_tokens: supervised tokens of a row, the only ones with logits; by default a whole row.
    """
    weights = count_weights(base_config)
    size = plan.torch_dtype.itemsize
    queries, context = config.max_packed_inp_len, config.max_packed_ctx_len
    labels = queries if label_tokens is None else label_tokens
    base, transient = _base_bytes(weights, plan, size)
    chunk = context if config.max_ctx_chunk_len == -1 else min(context, config.max_ctx_chunk_len)
    query = queries if config.max_qas_len == -1 else min(queries, config.max_qas_len)
    layers = base_config.num_hidden_layers
    encoder = _activations(base_config, plan, size, context, chunk, kept_layers=1, checkpointing=False)
    step = _activations(base_config, plan, size, queries, query, layers, config.gradient_checkpointing)
    logits = labels * base_config.vocab_size * (size + _LOGITS)
    trained, kept = hypernet_parameters * _FLOAT32, optimizer_values * _FLOAT32
    feature_layers = layers if config.ctx_encoder_type == "per_layer_activations" else 1
    width = base_config.hidden_size * (layers if config.ctx_encoder_type == "concat_layers" else 1)
    tokens = context * feature_layers * _FLOAT32  # bytes a value of every token's features
    features = width * tokens
    projection = _PROJECTION_VALUES * width * tokens
    cross_attentions = max(1, config.num_blocks) * (width + 2 * config.latent_size) * tokens
    return MemoryPlan(
        (
            Component("base weights", base, base, base),
            Component("loading the base", transient, 0, 0),
            Component("context encoder", 0, 0, 0),  # the base's own layers: no second copy
            Component("hypernetwork", trained, trained, trained),
            Component("gradients", 0, trained, 0),
            Component("optimizer states", 0, kept, kept),
            Component("context features", 0, features, 0),
            Component("hypernetwork activations", 0, projection + cross_attentions, 0),
            Component("base activations", 0, max(encoder, step), 0),
            Component("logits", 0, logits, 0),
        )
    )


def _base_bytes(weights: WeightCount, plan: LoadPlan, size: int) -> tuple[int, int]:
    """Compute the bytes of the frozen weights, and those that loading the largest tensor takes for a moment."""
    if plan.experts.value in ("packed", "native"):
        packed = int(weights.experts * BITS_PER_WEIGHT / 8)
        held = packed + (weights.total - weights.experts) * size
        transient = max(weights.largest_tensor * size, int(weights.largest_expert_tensor * BITS_PER_WEIGHT / 8))
        return held, transient
    transient = _DEQUANTIZE_TRANSIENT * weights.largest_expert_tensor if plan.experts.value == "dequantize" else 0
    return weights.total * size, max(transient, weights.largest_tensor * size)


def _activations(
    base_config: PreTrainedConfig,
    plan: LoadPlan,
    size: int,
    tokens: int,
    longest: int,
    kept_layers: int,
    checkpointing: bool,
) -> int:
    """Compute the bytes that a forward over a packed row keeps for its backward, and those at work in one layer.

    Args:
        tokens: of the row; longest: of one document or question in it.
    """
    hidden, heads = base_config.hidden_size, base_config.num_attention_heads
    head_dim = getattr(base_config, "head_dim", None) or hidden // heads
    key_value_heads = getattr(base_config, "num_key_value_heads", None) or heads
    seen = {"eager": tokens, PER_DOCUMENT: longest}  # tokens that each token has a score for
    scores = heads * tokens * seen.get(plan.attention.value, 0)
    routes = getattr(base_config, "num_experts_per_tok", None)
    width = getattr(base_config, "moe_intermediate_size", None) if routes else None
    width = width or getattr(base_config, "intermediate_size", None) or 4 * hidden
    mlp = routes * (6 * width + 2 * hidden) if routes else 3 * width
    attention = (3 * heads + 2 * key_value_heads) * head_dim
    layer = tokens * (3 * hidden + attention + mlp) + scores
    kept = kept_layers * tokens * hidden + layer if checkpointing else kept_layers * layer
    return (kept + _SCORES_AT_WORK * scores) * size + _dequantized(base_config, plan, width * hidden * size)


def _dequantized(base_config: PreTrainedConfig, plan: LoadPlan, matrix: int) -> int:
    """Compute the bytes of packed experts that are dequantized at a time: a slice of all experts, or one expert.

    Args:
        matrix: bytes of one expert's down projection; gate and up are twice as large.
    """
    if plan.experts.value != "packed":
        return 0
    if plan.expert_products.value == "grouped":
        return min(plan.expert_transient_bytes, 2 * base_config.num_local_experts * matrix)
    return 3 * matrix
