"""A light twin that reads the run's tokenizer, and the checkpoint that a run would save of it."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from checks.data.sizes import unlimited
from checks.offered import offered
from checks.subject import build_drawn
from checks.training.steps import light_base, light_config, shared

if TYPE_CHECKING:
    from checks.implementation import Model
    from checks.subject import Subject
    from d2l.config.schema import RunConfig
    from d2l.data.records import Record


# What a twin reads decides the likeliest token: the Perceiver attends to few tokens, what all documents share is small, and
# the LoRA is strong.
SHARP = {"perceiver_query_scale": 30.0}
SPREAD, STRENGTH = 0.1, 100.0


def reading_config(subject: "Subject", **values: Any) -> "RunConfig":
    """Return a light configuration that drops nothing and cuts no document, with other values."""
    return unlimited(light_config(subject), **SHARP, **values)


def reading_twin(subject: "Subject") -> "Model":
    """Return a twin that writes the tokens of the run's tokenizer, and whose LoRA is not zero; made once for all checks."""

    def make() -> "Model":
        assert subject.tokenizer is not None
        base = deepcopy(light_base(subject, vocabulary=len(subject.tokenizer)))
        model = build_drawn(subject.implementation, base, reading_config(subject), 0, SPREAD)
        with torch.no_grad():
            for name, parameter in model.hypernet.named_parameters():
                parameter.mul_(STRENGTH if "scaler_B" in name else 1.0)
        return model

    return shared(subject, "reading_twin", make)


def row_of(subject: "Subject", config: "RunConfig", record: "Record") -> Any:
    """Return the row of training of a record with one question."""
    return subject.implementation.rows(config, subject.chat, (record,)).rows[0]


def first_records(subject: "Subject", count: int = 1) -> "list[Record]":
    """Return the first records that the run keeps and whose documents differ, without a teacher."""
    assert subject.records is not None
    kept = (subject.records[number] for number in dict.fromkeys(row.record for row in subject.rows.rows))
    found: dict[str, Record] = {}
    for record in kept:
        found.setdefault(record.context, replace(record, logprobs_vals=None, logprobs_indices=None))
        if len(found) == count:
            break
    return list(found.values())


@contextmanager
def saved(subject: "Subject", config: "RunConfig", rows: Sequence[Any]) -> Iterator[Path]:
    """Save the twin as a checkpoint of a run that begins on these rows, in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="d2l-") as place:
        checkpoint = Path(place) / "step-000001"
        trainer = subject.implementation.trainer(reading_twin(subject), rows, config)
        offered(trainer, "save")(checkpoint)
        yield checkpoint


@contextmanager
def other_weights(hypernet: torch.nn.Module) -> Iterator[None]:
    """Double every weight meanwhile; halved again they are the same to the last bit."""
    with torch.no_grad():
        for parameter in hypernet.parameters():
            parameter.mul_(2)
        try:
            yield
        finally:
            for parameter in hypernet.parameters():
                parameter.div_(2)
