"""A run through the stages of a curriculum, whose rows the twin is made to answer right, or wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from checks.training.short_run import CHUNK, QUESTION, unique_rows
from checks.training.steps import light_config, light_model, shared
from d2l.config.schema import CurriculumStage
from d2l.data.packing import collate
from d2l.data.tokenize import Row

if TYPE_CHECKING:
    from checks.implementation import Model, Stepper
    from checks.subject import Subject

PER_STAGE, PER_STEP = 4, 2  # rows, each a micro-batch by itself: an epoch of a stage is two steps
LAYERS = 1  # of the base: what is read, saved and resumed is the hypernetwork's, and the place in the data
PLAN: dict[str, Any] = {
    "train_ds_names": ("needle",),
    "max_train_samples_per_ds": None,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "max_steps": 6,
    "gradient_accumulation_steps": PER_STEP,
    "max_packed_inp_len": QUESTION,
    "max_packed_ctx_len": CHUNK,
}


@dataclass(frozen=True)
class Stage:
    """A stage: the moving average of exact match that ends it, and whether its questions are answered right."""

    passing: float
    answered: bool = True


def staged_trainer(subject: "Subject", stages: Sequence[Stage], seed: int = 0, **values: Any) -> "Stepper":
    """Make a trainer of a light twin with a base of one layer, over `PER_STAGE` rows for each stage.

    Args:
        stages: empty for a run without a curriculum, whose rows are answered right.
        seed: of the hypernetwork; the answers are those of seed 0.
        values: other settings than those of `PLAN`.
    """
    curriculum = tuple(
        CurriculumStage(pairs=1, digits=1, passing=stage.passing, documents=PER_STAGE) for stage in stages
    )
    config = light_config(subject, LAYERS, **{**PLAN, "curriculum": curriculum, **values})
    model = light_model(subject, config, seed, layers=LAYERS)
    answered = tuple(stage.answered for stage in stages) or (True,)
    rows = shared(subject, f"staged_rows {answered}", lambda: _rows(model, answered))
    return subject.implementation.trainer(model, rows, config)


@torch.no_grad()
def _rows(model: "Model", answered: Sequence[bool]) -> list[Row]:
    """Make the rows of all stages, whose labels are the model's likeliest tokens, or its least likely ones."""
    rows = unique_rows(PER_STAGE * len(answered))
    batch = collate(rows)
    order = model.logits(batch, model.lora(batch)).argsort(-1)  # ascending
    labelled = []
    for index, row in enumerate(rows):
        (query,), start = row.queries, index * QUESTION
        rank = -1 if answered[index // PER_STAGE] else 0
        labels = tuple(
            -100 if label == -100 else int(order[start + place - 1, rank]) for place, label in enumerate(query.labels)
        )
        labelled.append(replace(row, queries=(replace(query, labels=labels),)))
    return labelled
