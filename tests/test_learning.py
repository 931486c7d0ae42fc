"""It learns: a change that breaks learning cannot land. A small version of `make prove`, with its controls."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2l.build import Components
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.epochs import epoch_batches
from d2l.data.needles import needle_records
from d2l.data.packing import PackedBatch
from d2l.data.records import Record, document_in_prompts
from d2l.hypernet.lora import Lora
from d2l.hypernet.model import DocToLora
from d2l.train.loop import Trainer
from d2l.train.losses import Normalizer, compute_loss
from d2l.train.processes import OneProcess

STEPS, DOCUMENTS, ASKED = 34, 1000, 200
PAIRS, DIGITS = 1, 1
# The shipped curriculum's first stage alone, one block instead of two, and a sixth of the documents in a step
CHANGES = {
    "curriculum": f"[{{pairs: {PAIRS}, digits: {DIGITS}}}]",
    "needle_documents": DOCUMENTS,
    "num_blocks": 1,
    "max_packed_inp_len": 224,
    "warmup_steps": 5,
    "decay_steps": 15,
    "cache": False,
}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    changes = {key: str(value) for key, value in CHANGES.items()}
    return load_config(Path("configs/needle_tiny.yaml"), changes | {"seed": "0"}, max_steps=STEPS)


@pytest.fixture(scope="module")
def model(config: RunConfig) -> DocToLora:
    components = Components(config)
    rows = tuple(components.rows)
    trainer = Trainer(components.model, rows, config, OneProcess(torch.device("cpu")))
    for _ in range(STEPS):
        trainer.step()
    return trainer.model


def batches_of(config: RunConfig, records: Sequence[Record]) -> list[PackedBatch]:
    """Pack documents without the short limit of training's steps."""
    wide = config.model_copy(update={"max_packed_inp_len": 1344})
    return list(epoch_batches(wide, Components(wide, records=records).rows, epoch=0))


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
    """The pairs of these documents, a key with its value, occur in none of training."""
    batches = batches_of(config, needle_records(ASKED, PAIRS, DIGITS, 0, seed=999, split="heldout", style="pairs"))
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
    batches = batches_of(config, [document_in_prompts(record) for record in records])
    assert exact_match(model, batches, [None] * len(batches)) >= 0.97
