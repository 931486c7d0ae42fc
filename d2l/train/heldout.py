"""Scores of held-out documents while a run trains: under their own LoRA, under another document's, and without one.

Answers are given, not generated: loss and exact match are those of the training's own metrics. Nothing is drawn and no
weight changes, so that a run goes on as it would have without.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, get_args

import torch
from torch.nn import functional

from d2l.config.schema import LossName, RunConfig
from d2l.data.epochs import epoch_batches
from d2l.data.packing import PackedBatch
from d2l.data.tokenize import Row
from d2l.hypernet.distance import UpdateProducts, compare_updates, mean_distance
from d2l.hypernet.lora import Lora
from d2l.hypernet.model import DocToLora
from d2l.train.losses import Normalizer, compute_loss, context_losses
from d2l.train.metrics import LOSS_SUFFIX

Control = Literal["document", "other", "none"]
CONTROLS: tuple[Control, ...] = get_args(Control)
DISTANCE = "lora_distance"


@dataclass(frozen=True)
class Answers:
    """The task's loss in nats, the share of questions answered exactly, and each document's mean loss a token."""

    loss: float
    exact_match: float
    by_document: tuple[float, ...]


@dataclass(frozen=True)
class HeldoutScores:
    """Scores of the held-out documents at a step.

    Attributes:
        loss: the name of the task's loss.
        answers: under the document's own LoRA, under another document's, and without one.
        pairs: each document's LoRA beside the other one, without the learned bias that all of them share.
    """

    loss: LossName
    answers: dict[Control, Answers]
    pairs: Sequence[UpdateProducts]

    @property
    def gaps(self) -> list[float]:
        """Each document's loss under another document's LoRA, minus that under its own, in nats a token."""
        own, other = (self.answers[control].by_document for control in ("document", "other"))
        return [theirs - mine for mine, theirs in zip(own, other, strict=True)]

    @property
    def gap(self) -> float:
        """The mean of `gaps`."""
        return fmean(self.gaps)

    @property
    def gap_error(self) -> float:
        """The standard error of `gap`."""
        return stdev(self.gaps) / len(self.gaps) ** 0.5

    @property
    def distance(self) -> float:
        """The mean distance of two documents' updates, each at norm 1; see `UpdateProducts.distance`."""
        return mean_distance(self.pairs)

    @property
    def is_zero(self) -> bool:
        """Whether no document's LoRA does anything."""
        return not any(any(pair.one.values()) for pair in self.pairs)

    def to_json(self) -> dict[str, float]:
        """Return them as flat JSON values, as evaluation.jsonl has them."""
        values: dict[str, float] = {"documents": len(self.gaps)}
        for control, found in self.answers.items():
            values[f"{control}_{self.loss}{LOSS_SUFFIX}"] = found.loss
            values[f"{control}_exact_match"] = found.exact_match
        values |= {"swap_gap": self.gap, "swap_gap_error": self.gap_error, DISTANCE: self.distance}
        return values | {f"{DISTANCE}_{name}": mean_distance(self.pairs, name) for name in self.pairs[0].one}


class Heldout:
    """Held-out documents, packed as for training, and the base's own answers, which no training changes.

    Args:
        rows: one for each document, of at least two documents.
    """

    def __init__(self, model: DocToLora, rows: Sequence[Row], config: RunConfig) -> None:
        self._model, self._config = model, config
        self._batches = list(epoch_batches(config, rows, epoch=0))
        self._normalizer = Normalizer.of(self._batches, config.lora_r)
        self._alone: Answers | None = None

    @torch.no_grad()
    def evaluate(self) -> HeldoutScores:
        """Score the model as it is; the host waits for the device.

        Raises:
            DataError: the loss needs a teacher's logprobs, and a document has none.
        """
        controls = CONTROLS if self._alone is None else CONTROLS[:2]
        parts: dict[Control, list[Answers]] = {control: [] for control in controls}
        pairs: list[UpdateProducts] = []
        for batch, lora, others in self._loras():
            bound: dict[Control, Lora | None] = {"document": lora, "other": others, "none": None}
            for control in controls:
                parts[control].append(self._answer(batch, bound[control]))
            pairs += compare_updates(lora, others, self._model.hypernet.bias())
        answers = {control: _joined(part) for control, part in parts.items()}
        self._alone = answers.get("none", self._alone)
        assert self._alone is not None
        answers["none"] = self._alone
        return HeldoutScores(self._config.loss, answers, pairs)

    def _loras(self) -> Iterator[tuple[PackedBatch, Lora, Lora]]:
        """Yield each batch with its documents' LoRAs and, for each of them, that of the document before it.

        The first document has the last one before it.
        """
        device = self._model.base.device
        last = self._batches[-1]
        before = self._model.lora(last.to(device))[-1]
        for batch in self._batches:
            moved = batch.to(device)
            lora = self._model.lora(moved)
            yield moved, lora, _joined_loras(before, lora[:-1])
            before = lora[-1]

    def _answer(self, batch: PackedBatch, lora: Lora | None) -> Answers:
        """Answer a batch's questions; their sums over batches are means over all."""
        config = self._config
        logits = self._model.logits(batch, lora, positions=batch.prediction_positions)
        per_context = config.use_per_ctx_average_loss
        loss = compute_loss(
            logits, batch, lora, self._normalizer, loss=config.loss, use_per_ctx_average_loss=per_context
        )
        by_document = context_losses(logits, batch, config.loss).tolist()
        return Answers(float(loss.task), float(loss.exact_match), tuple(by_document))


def _joined(parts: Sequence[Answers]) -> Answers:
    """Put the answers of batches together, whose losses are shares of the whole."""
    by_document = tuple(loss for part in parts for loss in part.by_document)
    return Answers(sum(it.loss for it in parts), sum(it.exact_match for it in parts), by_document)


def _joined_loras(first: Lora, rest: Lora) -> Lora:
    """Put the contexts of two LoRAs one after another, padded with zeros to a common rank."""
    rank = max(first.rank, rest.rank)
    A, B = (
        {
            name: torch.cat([functional.pad(it[name], (0, 0, 0, rank - it[name].shape[2])) for it in (one, other)])
            for name in one
        }
        for one, other in ((first.A, rest.A), (first.B, rest.B))
    )
    return Lora(A, B, first.scale)
