"""Seconds of a micro-batch from counted operations and what was measured on one H100.

A micro-batch takes a fixed time, in which Python dispatches kernels, then its operations at a rate, then the traffic of whole
score matrices at the card's bandwidth. The rate is one for all paths; the fixed time is the path's own. Both are fitted to
`MEASURED`: a new measurement is a new line there. Other cards are scaled by the smaller of the two ratios of their dense
bfloat16 rate and bandwidth to an H100's, with the same fixed time, and were not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from d2l.plan.base_memory import scores_bytes
from d2l.plan.cards import H100, Card
from d2l.plan.operations import count_operations, encoder_layers
from d2l.plan.rows import RowShape
from d2l.plan.sizes import Sizes

# Bytes moved for each byte of a layer's scores in one pass. Eager attention over 8,192 tokens of gpt-oss-20b took 2.08 s
# on the H100 and flex .255 s, in 24 layers of 8.6 GB: 26 times at the 3.0 TB/s that a copy reached.
_SCORE_PASSES = 26
_COPY = 3.0e12 / H100.bandwidth if H100.bandwidth else 1.0  # of the bandwidth of the data sheet
_LAYERS = 24  # of gpt-oss-20b, which the fixed times belong to


@dataclass(frozen=True)
class Measurement:
    """Steps that were measured: packed lengths of real documents, one micro-batch a step, after the first ones.

    Attributes:
        path: how experts are computed: packed, dequantize, or packed experts of whole layers at once.
        config: documented (configs/gpt_oss_20b.yaml) or recommended (configs/gpt_oss_20b_recommended.yaml).
        budget: max_packed_inp_len and max_packed_ctx_len.
        seconds: the least and the most of a step.
        teraflops: counted operations of a mean row, without those of scores' traffic.
    """

    path: str
    config: str
    budget: int
    seconds: tuple[float, float]
    teraflops: float

    @property
    def middle(self) -> float:
        """Seconds in the middle of the range."""
        return fmean(self.seconds)


WHOLE_LAYERS = "packed, whole layers at once"

# One H100 80 GB, torch 2.11+cu130, transformers 5.17, random weights of gpt-oss-20b's exact shapes, paragraphs of SQuAD with
# their questions, 2026-11-26. The last four are of a prototype.
MEASURED = (
    Measurement("packed", "documented", 1024, (2.8, 4.6), 30.9),
    Measurement("packed", "recommended", 1024, (2.4, 3.0), 21.1),
    Measurement("dequantize", "documented", 1024, (0.47, 0.85), 30.9),
    Measurement(WHOLE_LAYERS, "documented", 1024, (0.64, 0.81), 30.9),
    Measurement(WHOLE_LAYERS, "recommended", 1024, (0.69, 0.88), 21.1),
    Measurement(WHOLE_LAYERS, "recommended", 4096, (1.15, 1.45), 83.8),
    Measurement(WHOLE_LAYERS, "recommended", 8192, (1.46, 1.81), 180.4),
)
# The mean row of those documents at each budget, from packing them.
MEAN_ROWS = {
    1024: RowShape(520, 3, 3, 250, 960, 110, 45),
    4096: RowShape(2100, 11, 11, 290, 3800, 105, 180),
    8192: RowShape(4500, 25, 25, 310, 8180, 108, 390),
}


@dataclass(frozen=True)
class Efficiency:
    """What a path reaches on the H100: seconds of every micro-batch, then operations a second."""

    fixed: float
    flops: float


@cache
def efficiency(path: str) -> Efficiency:
    """Fit a path's fixed time and the rate of all paths to the measurements; a path without one gets the least.

    The rate is the slope of seconds over operations where lengths differ; the fixed time is the mean of what is left.
    """
    several = [it for it in MEASURED if it.path == WHOLE_LAYERS]
    flops = 1e12 / _slope([(it.teraflops, it.middle) for it in several])
    rest = {
        name: fmean(it.middle - it.teraflops * 1e12 / flops for it in MEASURED if it.path == name)
        for name in {it.path for it in MEASURED}
    }
    return Efficiency(max(0.0, rest.get(path, min(rest.values()))), flops)


def micro_batch_seconds(sizes: Sizes, row: RowShape, card: Card) -> float | None:
    """Return the seconds of forward and backward over a row on a card; None where the card's rates are not known."""
    if card.flops is None or card.bandwidth is None or H100.flops is None or H100.bandwidth is None:
        return None
    measured = efficiency(sizes.load.experts.value)
    scale = min(card.flops / H100.flops, card.bandwidth / H100.bandwidth)
    operations = sum(count_operations(sizes, row).values())
    traffic = _score_traffic(sizes, row) / (_COPY * card.bandwidth)
    return measured.fixed * sizes.base.layers / _LAYERS + operations / (measured.flops * scale) + traffic


def _score_traffic(sizes: Sizes, row: RowShape) -> float:
    """Return the bytes that whole score matrices move in all passes of a micro-batch."""
    document = encoder_layers(sizes) * scores_bytes(sizes, row.context_tokens, row.longest_document)
    passes = 3 if sizes.config.gradient_checkpointing else 2
    question = passes * sizes.base.layers * scores_bytes(sizes, row.question_tokens, row.longest_question)
    return float(_SCORE_PASSES * (document + question))


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line that fits points best."""
    x_mean, y_mean = fmean(x for x, _ in points), fmean(y for _, y in points)
    above = sum((x - x_mean) * (y - y_mean) for x, y in points)
    return above / sum((x - x_mean) ** 2 for x, _ in points)
