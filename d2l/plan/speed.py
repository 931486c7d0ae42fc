"""Seconds of a micro-batch from counted operations and what was measured on one H100.

A micro-batch takes a fixed time, in which Python dispatches kernels, then its operations at a rate, then the traffic of whole
score matrices at the card's bandwidth. The fixed time belongs to how experts are computed, the rate to the attention: one
whose memory is linear, or another. Both are fitted to `MEASURED`: a new measurement is a new line there. Other cards are
scaled by the smaller of the two ratios of their dense bfloat16 rate and bandwidth to an H100's, with the same fixed time,
and were not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from d2l.base.attention import PER_DOCUMENT
from d2l.base.flex import PACKED_FLEX
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


# The mean row of the measured documents at each budget of max_packed_inp_len and max_packed_ctx_len, from packing them.
MEAN_ROWS = {
    1024: RowShape(520, 3, 3, 250, 960, 110, 45),
    4096: RowShape(2100, 11, 11, 290, 3800, 105, 180),
    8192: RowShape(4500, 25, 25, 310, 8180, 108, 390),
}
_DOCUMENTS = {
    tokens: RowShape(tokens, 1, 1, tokens, questions, 120, 6) for tokens, questions in ((8065, 120), (32_563, 170))
}


@dataclass(frozen=True)
class Measurement:
    """Steps that were measured: one micro-batch a step, after the first ones.

    Attributes:
        path: how experts are computed, see `Sizes.experts_path`.
        attention: as LoadPlan names it.
        config: documented (configs/gpt_oss_20b.yaml) or recommended (configs/gpt_oss_20b_recommended.yaml).
        row: the mean one.
        seconds: the least and the most of a step.
        teraflops: counted operations of the mean row, without those of scores' traffic.
    """

    path: str
    attention: str
    config: str
    row: RowShape
    seconds: tuple[float, float]
    teraflops: float

    @property
    def middle(self) -> float:
        """Seconds in the middle of the range."""
        return fmean(self.seconds)


# One H100 80 GB, torch 2.11+cu130, transformers 5.17, random weights of gpt-oss-20b's exact shapes, paragraphs of SQuAD with
# their questions, or one document, 2026-11-26. The grouped rows are of a prototype, the last three with an own block mask
# for flex_attention; d2l's grouped experts and packed_flex were not measured since, nor was the Perceiver in pieces.
MEASURED = (
    Measurement("one_by_one", "eager", "documented", MEAN_ROWS[1024], (2.8, 4.6), 30.9),
    Measurement("one_by_one", PER_DOCUMENT, "recommended", MEAN_ROWS[1024], (2.4, 3.0), 21.1),
    Measurement("dequantize", "eager", "documented", MEAN_ROWS[1024], (0.47, 0.85), 30.9),
    Measurement("grouped", "eager", "documented", MEAN_ROWS[1024], (0.64, 0.81), 30.9),
    Measurement("grouped", PER_DOCUMENT, "recommended", MEAN_ROWS[1024], (0.69, 0.88), 21.1),
    Measurement("grouped", PER_DOCUMENT, "recommended", MEAN_ROWS[4096], (1.15, 1.45), 83.8),
    Measurement("grouped", PER_DOCUMENT, "recommended", MEAN_ROWS[8192], (1.46, 1.81), 180.4),
    Measurement("grouped", PACKED_FLEX, "recommended", MEAN_ROWS[8192], (1.06, 1.21), 179.8),
    Measurement("grouped", PACKED_FLEX, "recommended", _DOCUMENTS[8065], (0.76, 0.76), 57.2),
    Measurement("grouped", PACKED_FLEX, "recommended", _DOCUMENTS[32_563], (1.67, 1.67), 303.0),
)


@dataclass(frozen=True)
class Efficiency:
    """What experts and attention reach on the H100: seconds of every micro-batch, then operations a second."""

    fixed: float
    flops: float


@cache
def efficiency(path: str, *, linear_attention: bool) -> Efficiency:
    """Fit the fixed time of the experts' path and the rate of the attention; a path without a measurement gets the least.

    The rate is the slope of seconds over operations where lengths differ; the fixed time is the mean of what is left.
    """
    flops = {linear: _rate(linear) for linear in (False, True)}
    rest = {
        name: fmean(it.middle - it.teraflops * 1e12 / flops[_is_linear(it)] for it in MEASURED if it.path == name)
        for name in {it.path for it in MEASURED}
    }
    return Efficiency(max(0.0, rest.get(path, min(rest.values()))), flops[linear_attention])


def micro_batch_seconds(sizes: Sizes, row: RowShape, card: Card) -> float | None:
    """Return the seconds of forward and backward over a row on a card; None where the card's rates are not known."""
    if card.flops is None or card.bandwidth is None or H100.flops is None or H100.bandwidth is None:
        return None
    measured = efficiency(sizes.experts_path, linear_attention=sizes.linear_attention)
    scale = min(card.flops / H100.flops, card.bandwidth / H100.bandwidth)
    operations = sum(count_operations(sizes, row).values())
    traffic = _score_traffic(sizes, row) / (_COPY * card.bandwidth)
    return measured.fixed * sizes.base.layers / _LAYERS + operations / (measured.flops * scale) + traffic


def _is_linear(measurement: Measurement) -> bool:
    return measurement.attention == PACKED_FLEX


def _rate(linear: bool) -> float:
    """Return the operations a second of the grouped runs of the recommended configuration, with this kind of attention."""
    runs = [it for it in MEASURED if it.config == "recommended" and it.path == "grouped" and _is_linear(it) == linear]
    return 1e12 / _slope([(it.teraflops, it.middle) for it in runs])


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
