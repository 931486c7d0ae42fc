"""A short run of a trainer that moves the weights: observed steps of two micro-batches each, over two epochs of five rows.

Every row is a micro-batch by itself, and no token occurs in two places, so the token ids that the base reads name the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from checks.training.observed import Observed, observed_step
from checks.training.steps import light_config, light_model, shared
from d2l.data.tokenize import Query, Row

if TYPE_CHECKING:
    from checks.implementation import Model, Stepper
    from checks.subject import Subject
    from d2l.config.schema import RunConfig

ROWS, CHUNK, QUESTION, LABELS = 5, 3, 4, 2  # rows, and tokens of each
PER_STEP = 2
STEPS = 6  # at most: five are two epochs, one more where the last step of an epoch takes less, and not from the next

PLAN: dict[str, Any] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "max_steps": STEPS,
    "gradient_accumulation_steps": PER_STEP,
    "max_packed_inp_len": QUESTION,
    "max_packed_ctx_len": CHUNK,
}


@dataclass(frozen=True)
class ShortRun:
    """What was seen of the run.

    Attributes:
        config: its plan.
        trainer: after the last step.
        rows: what it trained on.
        steps: in order.
        base_before: the base's parameters and buffers before the first step.
        hooks: hooks on the base's modules after each step.
    """

    config: "RunConfig"
    trainer: "Stepper"
    rows: Sequence[Row]
    steps: Sequence[Observed]
    base_before: dict[str, Tensor]
    hooks: Sequence[int]


def short_run(subject: "Subject") -> ShortRun:
    """Return the run, made once for all checks of a subject."""
    return shared(subject, "short_run", lambda: _run(subject))


def _run(subject: "Subject") -> ShortRun:
    config = light_config(subject, **PLAN)
    model = light_model(subject, config)
    rows = unique_rows()
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    trainer = subject.implementation.trainer(model, rows, config)
    steps: list[Observed] = []
    hooks = []
    while len(steps) < STEPS - 1 or (len(steps) < STEPS and _questions_read(steps, rows) < 2 * ROWS):
        steps.append(observed_step(trainer))
        hooks.append(count_hooks(model))
    return ShortRun(config, trainer, rows, steps, before, hooks)


def _questions_read(steps: Sequence[Observed], rows: Sequence[Row]) -> int:
    return sum(len(rows_read(step, rows)[1]) for step in steps)


def unique_rows(n_rows: int = ROWS) -> list[Row]:
    """Make rows of which no two share a token; all ids are below 7 times the number of rows."""
    size = CHUNK + QUESTION
    rows = []
    for index in range(n_rows):
        ids = tuple(range(index * size, (index + 1) * size))
        chunk, question = ids[:CHUNK], ids[CHUNK:]
        labels = (*[-100] * (QUESTION - LABELS), *question[-LABELS:])
        rows.append(Row(record=index, chunks=(chunk,), queries=(Query(input_ids=question, labels=labels),)))
    return rows


def rows_read(step: Observed, rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Return whose documents a step read, and whose questions, as indices of rows in the order of reading."""
    ids = torch.cat(step.ids).tolist() if step.ids else []
    documents = {row.chunks[0][0]: index for index, row in enumerate(rows)}
    questions = {row.queries[0].input_ids[0]: index for index, row in enumerate(rows)}
    return [documents[token] for token in ids if token in documents], [questions[t] for t in ids if t in questions]


def count_hooks(model: "Model") -> int:
    """Count the forward and backward hooks, and the replaced forwards, on the base's modules and on all modules."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    everywhere = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    own = sum(len(getattr(module, table)) for module in model.base.modules() for table in tables)
    replaced = sum("forward" in vars(module) for module in model.base.modules())
    return own + replaced + sum(len(getattr(nn.modules.module, table)) for table in everywhere)
