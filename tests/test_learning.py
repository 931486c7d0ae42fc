"""It learns: a change that breaks learning cannot land. A short version of `make prove`, with its controls."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2l.build import Components, load_records
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.epochs import epoch_batches
from d2l.data.needles import needle_records
from d2l.data.packing import PackedBatch
from d2l.data.records import Record, document_in_prompts
from d2l.data.tokenize import Row
from d2l.hypernet.lora import Lora
from d2l.hypernet.model import DocToLora
from d2l.train.loop import Trainer
from d2l.train.losses import Normalizer, compute_loss
from d2l.train.processes import OneProcess

STEPS, DOCUMENTS, ASKED = 120, 6000, 200
PAIRS, DIGITS = 2, 1
CURRICULUM = "[{pairs: 1, digits: 1}, {pairs: 2, digits: 1}]"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    changes = {"curriculum": CURRICULUM, "needle_documents": DOCUMENTS, "decay_steps": 50, "seed": 0, "cache": False}
    return load_config(
        Path("configs/needle_tiny.yaml"), {key: str(value) for key, value in changes.items()}, max_steps=STEPS
    )


@pytest.fixture(scope="module")
def model(config: RunConfig) -> DocToLora:
    components = Components(config)
    rows = tuple(components.rows)
    trainer = Trainer(components.model, rows, config, OneProcess(torch.device("cpu")))
    for _ in range(STEPS):
        trainer.step()
    return trainer.model


def rows_of(config: RunConfig, records: tuple[Record, ...]) -> tuple[Row, ...]:
    return tuple(Components(config, records=records).rows)


def unseen(config: RunConfig) -> tuple[Record, ...]:
    """Documents whose pairs never stood together in training. One digit leaves too few pairs to hold any out."""
    seen = {frozenset(record.responses) for record in load_records(config)}
    drawn = needle_records(2 * ASKED, PAIRS, DIGITS, 0, seed=999, style="pairs")
    return tuple(record for record in drawn if frozenset(record.responses) not in seen)[:ASKED]


def exact_match(model: DocToLora, batches: list[PackedBatch], loras: list[Lora | None]) -> float:
    """Share of the questions whose every answer token is the likeliest."""
    normalizer = Normalizer.of(batches, 1)
    share = 0.0
    for batch, lora in zip(batches, loras, strict=True):
        logits = model.logits(batch, lora, positions=batch.prediction_positions)
        share += float(compute_loss(logits, batch, lora or model.lora(batch), normalizer).exact_match)
    return share


@torch.no_grad()
def test_unseen_documents_are_recalled_from_their_own_lora_alone(model: DocToLora, config: RunConfig) -> None:
    records = unseen(config)
    assert len(records) == ASKED
    batches = list(epoch_batches(config, rows_of(config, records), epoch=0))
    loras = [model.lora(batch) for batch in batches]
    others = [
        replace(lora, A={k: v.roll(1, 0) for k, v in lora.A.items()}, B={k: v.roll(1, 0) for k, v in lora.B.items()})
        for lora in loras
    ]
    assert exact_match(model, batches, [*loras]) >= 0.8
    assert exact_match(model, batches, [*others]) <= 0.16  # chance is .1
    assert exact_match(model, batches, [None] * len(batches)) <= 0.16


@torch.no_grad()
def test_the_shipped_base_reads_documents_in_its_prompt(model: DocToLora, config: RunConfig) -> None:
    records = needle_records(ASKED, 4, 2, 0, seed=0, split="heldout", style="pairs")
    rows = rows_of(config, tuple(document_in_prompts(record) for record in records))
    batches = list(epoch_batches(config, rows, epoch=0))
    assert exact_match(model, batches, [None] * len(batches)) >= 0.97
