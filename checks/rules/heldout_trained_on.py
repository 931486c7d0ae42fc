"""Documents that a run is evaluated on are two or more, usable, and not among those that it trains on.

What it does
------------
Divides the run's records as a run with `eval_steps` does: into rows to train on, and a row of each held-out document for
every stage. Where the run does not evaluate itself, it is looked at as if it did.

Why it matters
--------------
An evaluation on documents of training measures memory: it rises with the training loss, early stopping and the choice of
a checkpoint follow it, and documents that were never seen are answered as badly as before. With one document there is no
control with another one's LoRA. A `val_ds_names` that cannot be used ends the run after it has loaded its base.

How it is detected
------------------
The tokens of held-out documents, all of their chunks, are compared with those of every row of training; of generated
needles also those of each question with its answer. The sizes by
which those rows are packed must be their own. What refuses the held-out data, such as a KL loss without a teacher's logprobs
in it, refuses it here.

How to fix
----------
Name files with other documents in `val_ds_names`, or leave it out: then some of the run's own are kept out of training.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Inapplicable, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.config.schema import NEEDLE, RunConfig
from d2l.data.shards import SomeRows, row_sizes
from d2l.errors import DataError

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.tokenize import Row

    Divided = tuple[Sequence[Row], Sequence[Sequence[Row]]]  # rows of training, and held-out ones for each stage

REMEDY = "keep held-out documents, whatever records have them, out of the rows of training; name others in val_ds_names"
NEEDLES = 100  # held-out documents of needles, where a few may share no pair with training by luck
LOOKED_AT = 64  # rows of training whose sizes are compared, spread over all
STEPS = 100  # of a run that does not evaluate itself; any number divides its records alike


def check(subject: "Subject") -> Result:
    """Compare held-out documents with each other and with those of training."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    evaluated = subject.config.eval_steps is not None
    config = subject.config if evaluated else changed(subject.config, eval_steps=STEPS)
    try:
        trained, stages = subject.implementation.divided(config, subject.chat, subject.records, subject.rows)
    except DataError as error:
        if evaluated:
            raise
        return Inapplicable(f"the run does not evaluate itself, and could not: {str(error).splitlines()[0]}")
    seen = {hash(row.chunks) for row in trained}  # of a million rows the tokens themselves would fill the memory
    both = [row for rows in stages for row in rows if hash(row.chunks) in seen]
    fewest = min((len({row.chunks for row in rows}) for rows in stages), default=0)
    evidence = {"stages": len(stages), "held_out": sum(map(len, stages)), "trained_on": len(both), "fewest": fewest}
    if both or fewest < 2:
        found = f"{len(both):,} of {evidence['held_out']:,} in training too" if both else f"{fewest:,} in a stage"
        return Fail(
            message="documents that the run is evaluated on are trained on" if both else "too few held-out documents",
            expected="two or more held-out documents in every stage, none of which training reads",
            actual=found,
            remedy=REMEDY,
            evidence=evidence,
        )
    if NEEDLE in config.train_ds_names and (known := _known_needles(subject, config)):
        return Fail(
            message="needles that the run is evaluated on are among those of training",
            expected="a key with its value either in training or held out",
            actual=f"{known:,} questions with the answers that training gives them",
            remedy="draw the two splits from pairs of key and value that they do not share",
            evidence=evidence,
        )
    if wrong := _wrong_size(trained):
        return Fail(
            message="rows of training are packed by other sizes than theirs",
            expected="the sizes of the rows that are left beside the held-out ones",
            actual=wrong,
            remedy="take the sizes of the rows that are left, not of the first ones",
            evidence=evidence,
        )
    said = "" if evaluated else "; the run does not evaluate itself (eval_steps)"
    return Pass(f"{evidence['held_out']:,} held-out documents are in no row of training{said}", evidence)


def _known_needles(subject: "Subject", config: RunConfig) -> int:
    """Count the questions about many held-out needles that training asks too, with the same answer."""
    assert subject.records is not None
    many = changed(config, eval_documents=max(NEEDLES, config.eval_documents))
    trained, stages = subject.implementation.divided(many, subject.chat, subject.records, subject.rows)
    seen = {hash(query.input_ids) for row in trained for query in row.queries}
    return sum(hash(query.input_ids) in seen for rows in stages for row in rows for query in row.queries)


def _wrong_size(rows: "Sequence[Row]") -> str:
    """Describe a row, among some, that packing would take for one of another size; empty where there is none."""
    sizes = row_sizes(rows)
    for place in range(0, len(rows), max(1, len(rows) // LOOKED_AT)):
        size, taken = rows[place].size, tuple(sizes[place].tolist())
        if size != taken:
            return f"row {place}: {size[0]:,} and {size[1]:,} tokens, taken for {taken[0]:,} and {taken[1]:,}"
    return ""


class _HalfAsLong(SomeRows):
    """Rows that are said to be half as long as they are."""

    @property
    def sizes(self) -> np.ndarray:
        return super().sizes // 2


def _of_other_sizes(healthy: Implementation, *arguments: Any) -> "Divided":
    """Give training's rows other sizes."""
    trained, stages = healthy.divided(*arguments)
    return _HalfAsLong(trained, range(len(trained))), stages


def _with_heldout(healthy: Implementation, *arguments: Any) -> "Divided":
    """Train on everything, also on what is held out."""
    trained, stages = healthy.divided(*arguments)
    return [*trained, *(row for rows in stages for row in rows)], stages


def _asked_in_training(healthy: Implementation, *arguments: Any) -> "Divided":
    """Ask about held-out documents what training asks."""
    trained, stages = healthy.divided(*arguments)
    return trained, [[replace(row, queries=trained[0].queries) for row in rows] for rows in stages]


def _one(healthy: Implementation, *arguments: Any) -> "Divided":
    """Hold out one document, again and again."""
    trained, stages = healthy.divided(*arguments)
    return trained, [[rows[0]] * len(rows) for rows in stages]


RULE = Rule(
    code="DAT310",
    name="heldout-trained-on",
    stage="data",
    severity="error",
    sources=("https://scikit-learn.org/stable/common_pitfalls.html#data-leakage",),
    requires=("LBL101", "DAT301"),
    check=check,
    faults=(
        Fault("heldout-in-training", "training reads the held-out documents too", override(divided=_with_heldout)),
        Fault(
            "answers-of-training",
            "held-out needles are those of training",
            override(divided=_asked_in_training).under(train_ds_names=(NEEDLE,)),
        ),
        Fault("other-sizes", "training packs its rows by other sizes", override(divided=_of_other_sizes)),
        Fault("one-document", "the same document stands for all that are held out", override(divided=_one)),
    ),
)
