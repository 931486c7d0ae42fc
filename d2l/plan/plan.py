"""What a run takes on a card: memory, the largest packing that fits, what saves most, time and cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from pydantic import ValidationError

from d2l.base.attention import PER_DOCUMENT
from d2l.base.flex import PACKED_FLEX
from d2l.base.sharding import sharding_obstacle
from d2l.config.schema import RunConfig
from d2l.errors import D2LError
from d2l.plan.cards import Card
from d2l.plan.memory import MemoryPlan, memory_plan
from d2l.plan.operations import count_operations
from d2l.plan.rows import UNLIMITED, Rows, RowShape
from d2l.plan.sizes import Model, Sizes
from d2l.plan.speed import micro_batch_seconds

PAPER_CONTEXT_TOKENS = 200_000  # a step, about; Doc-to-LoRA, https://arxiv.org/abs/2602.15902
_GRAIN = 128  # tokens: budgets of the largest packing are multiples
_WORTH = 0.005  # of the peak: a change that saves less is not named


@dataclass(frozen=True)
class Saving:
    """A change of the configuration and the bytes that it takes off the peak."""

    settings: Mapping[str, Any]
    saved_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Packing:
    """The largest budgets, in the configuration's proportion, with which the run fits.

    Attributes:
        limited_by: the card, or the rows, of which no larger budget would make others.
    """

    max_packed_inp_len: int
    max_packed_ctx_len: int
    peak_bytes: int
    tokens_per_second: float | None
    limited_by: Literal["card", "rows"]


@dataclass(frozen=True)
class Plan:
    """A run on a card, reckoned.

    Attributes:
        operations: floating-point operations of a mean micro-batch by part.
        seconds_per_step: None, as what follows from it, where the card's rates are not known.
        context_tokens_per_step: document tokens of an optimizer step, of all processes.
        cost: in the currency of the price; None without one.
        largest_packing: None where nothing fits.
        savings: what takes bytes off the peak, most first.
    """

    card: Card
    dtype: str
    memory: MemoryPlan
    processes: int
    operations: Mapping[str, int]
    seconds_per_step: float | None
    tokens_per_second: float | None
    context_tokens_per_step: int
    hours: float | None
    cost: float | None
    largest_packing: Packing | None
    savings: tuple[Saving, ...]
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the run fits into what tensors can take of the card's memory."""
        return self.memory.needed <= self.card.usable

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values; memory in bytes, operations in numbers of them."""
        return {
            "gpu": {"name": self.card.name, "memory_bytes": self.card.memory, "usable_bytes": self.card.usable},
            "dtype": self.dtype,
            "fits": self.fits,
            "peak_bytes": self.memory.peak,
            "start_peak_bytes": self.memory.loading,
            "steady_bytes": self.memory.steady,
            "peak_phase": self.memory.phase,
            "peak_row": asdict(self.memory.row),
            "components": [asdict(component) for component in self.memory.components],
            "largest_packing": None if self.largest_packing is None else asdict(self.largest_packing),
            "savings": [{**asdict(saving), "settings": dict(saving.settings)} for saving in self.savings],
            "context_tokens_per_step": self.context_tokens_per_step,
            "paper_context_tokens_per_step": PAPER_CONTEXT_TOKENS,
            "operations": dict(self.operations),
            "processes": self.processes,
            "seconds_per_step": self.seconds_per_step,
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
            "cost": self.cost,
            "assumptions": list(self.assumptions),
        }


def make_plan(
    model: Model,
    config: RunConfig,
    rows: Rows,
    card: Card,
    *,
    price_per_hour: float | None = None,
) -> Plan:
    """Reckon a run.

    Args:
        price_per_hour: of one card.

    Raises:
        ModelError: no model can be made for the configuration.
    """
    sizes, shapes = model.sizes(config), rows.shapes(config)
    memory = memory_plan(sizes, shapes)
    micro_batches, processes = config.gradient_accumulation_steps, sizes.processes
    tokens, seconds = _pace(sizes, shapes, card)
    step_seconds = None if seconds is None else micro_batches * seconds
    hours = None if step_seconds is None else config.max_steps * step_seconds / 3600
    mean_context = fmean(row.context_tokens for row in shapes)
    return Plan(
        card=card,
        dtype=sizes.load.dtype.value,
        memory=memory,
        processes=processes,
        operations=_mean_operations(sizes, shapes),
        seconds_per_step=step_seconds,
        tokens_per_second=None if seconds is None else processes * tokens / seconds,
        context_tokens_per_step=round(mean_context * micro_batches * processes),
        hours=hours,
        cost=None if hours is None or price_per_hour is None else hours * price_per_hour * processes,
        largest_packing=_largest_packing(model, config, rows, card),
        savings=tuple(_savings(model, config, rows, memory.peak)),
        assumptions=_assumptions(sizes, rows, card),
    )


def _pace(sizes: Sizes, rows: Sequence[RowShape], card: Card) -> tuple[float, float | None]:
    """Return the tokens of a mean row, and its seconds."""
    tokens = fmean(row.context_tokens + row.question_tokens for row in rows)
    seconds = [micro_batch_seconds(sizes, row, card) for row in rows]
    known = [it for it in seconds if it is not None]
    return tokens, fmean(known) if known else None


def _mean_operations(sizes: Sizes, rows: Sequence[RowShape]) -> dict[str, int]:
    counted = [count_operations(sizes, row) for row in rows]
    return {part: round(fmean(row[part] for row in counted)) for part in counted[0]}


def _largest_packing(model: Model, config: RunConfig, rows: Rows, card: Card) -> Packing | None:
    """Search the largest document budget that fits by halving, the questions' in proportion."""
    proportion = config.max_packed_inp_len / config.max_packed_ctx_len

    def packed(units: int) -> tuple[dict[str, int], Sequence[RowShape]]:
        context = units * _GRAIN
        budgets = {"max_packed_inp_len": max(1, round(context * proportion)), "max_packed_ctx_len": context}
        return budgets, rows.shapes(config.model_copy(update=budgets))

    def fits(units: int) -> bool:
        _, shapes = packed(units)
        return not shapes or memory_plan(sizes, shapes).needed <= card.usable  # no record may fit so small a row

    sizes = model.sizes(config)
    low, high = 0, -(-rows.most_tokens // _GRAIN)
    most = high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low == 0:
        return None
    budgets, shapes = packed(low)
    if not shapes:
        return None
    tokens, seconds = _pace(sizes, shapes, card)
    speed = None if seconds is None else sizes.processes * tokens / seconds
    peak = memory_plan(sizes, shapes).peak
    return Packing(**budgets, peak_bytes=peak, tokens_per_second=speed, limited_by="rows" if low == most else "card")


def _savings(model: Model, config: RunConfig, rows: Rows, peak: int) -> list[Saving]:
    """Try every change by itself; return those that save, most first."""
    found = []
    for settings in _changes(model.sizes(config), rows.shapes(config)):
        try:
            changed = RunConfig(**config.model_dump() | settings)
            shapes = rows.shapes(changed)
            less = memory_plan(model.sizes(changed), shapes).peak if shapes else peak
        except (ValidationError, D2LError):  # this change does not go with another key of the run
            continue
        if peak - less > _WORTH * peak:
            found.append(Saving(settings, peak - less, less))
    return sorted(found, key=lambda saving: -saving.saved_bytes)


def _changes(sizes: Sizes, rows: Sequence[RowShape]) -> Iterator[dict[str, Any]]:
    """Name the changes that a run has open."""
    config = sizes.config
    if sizes.load.experts.value == "dequantize":
        yield {"expert_weights": "packed"}
    if config.base_sharding == "none" and not sharding_obstacle(sizes.load, sizes.processes):
        yield {"base_sharding": "full"}
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if sizes.load.dtype.value == "float32":
        yield {"dtype": "bfloat16"}
    if not sizes.linear_attention:
        yield {"attn_implementation": PACKED_FLEX}
    if sizes.load.attention.value == "eager":
        yield {"attn_implementation": PER_DOCUMENT}
    if config.ctx_encoder_type == "per_layer_activations":
        yield from ({"ctx_encoder_type": kind} for kind in ("concat_layers", "early_exit"))
    longest = max(row.longest_document for row in rows)
    if config.max_ctx_chunk_len == UNLIMITED or longest <= config.max_ctx_chunk_len:
        yield {"max_ctx_chunk_len": max(1, longest // 2)}
    for key in ("max_packed_inp_len", "max_packed_ctx_len", "n_latent_queries"):
        if (value := getattr(config, key)) > 1:
            yield {key: value // 2}
    if config.muon_learning_rate is None:
        yield {"muon_learning_rate": 8 * config.learning_rate}


def _assumptions(sizes: Sizes, rows: Rows, card: Card) -> tuple[str, ...]:
    """State what the figures rest on."""
    load = sizes.load
    base = [f"rows: {rows.source}", f"the base in {load.dtype.value}: {load.dtype.reason}"]
    base.append(f"attention: {load.attention.value}; {load.attention.reason}")
    if sizes.config.base_sharding == "full":
        obstacle = sharding_obstacle(load, sizes.processes)
        base.append(f"base_sharding: {obstacle or f'each of {sizes.shares} processes holds a share of every weight'}")
    if load.experts.value == "packed":
        base.append(f"experts: {load.expert_products.value}; {load.expert_products.reason}")
    if card.flops is None:
        return (*base, "time and cost: unknown, as the card is named by its memory alone; name a card such as H100")
    speed = (
        "time: counted operations at the rate and fixed time a step that were measured on one H100, for grouped experts "
        "and flex_attention those of a prototype (d2l/plan/speed.py)"
    )
    if "H100" in card.name:
        return (*base, speed)
    scaled = "scaled to this card by the smaller of its bfloat16 rate and bandwidth over an H100's; not measured on it"
    return (*base, f"{speed}, {scaled}")
