"""Generated needles are those that the configuration asks for, in every stage, in training and held out.

What it does
------------
Generates needles in the run's style for two stages of the check's own: documents of one needle of a digit without filler, and
of two needles of two digits between 8 and 24 words of filler; and divides them as a run that evaluates itself does.

Why it matters
--------------
A curriculum goes from easy documents to hard ones, and passes a stage by the answers it gets. Where all stages have the documents
of the first, or are evaluated on them, a run reports that it has learnt what it never saw.

How it is detected
------------------
The numbers of documents, needles, digits and words of each stage are counted, with filler that is not the same in all; every
answer must stand in its document; and a held-out document of a stage must have as many questions as needles. Not applicable to
runs without needles.

How to fix
----------
Generate each stage, in training and held out, by its own `pairs`, `digits`, `filler_words`, `min_filler_words` and `documents`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from checks.data.sizes import unlimited
from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Inapplicable, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.config.schema import NEEDLE, CurriculumStage, RunConfig

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.records import Record

STAGES = (
    CurriculumStage(pairs=1, digits=1, documents=8),
    CurriculumStage(pairs=2, digits=2, filler_words=24, min_filler_words=8, documents=12),
)
HELDOUT = 2  # documents of each stage
STATING_WORDS, SENTENCE_WORDS = 7, 8  # of "The value of amber falcon is 42.", and of a sentence of filler


def check(subject: "Subject") -> Result:
    """Count what is generated for two stages, and what of it is held out."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    if NEEDLE not in subject.config.train_ds_names:
        return Inapplicable("the run has no generated needles")
    config = unlimited(subject.config, train_ds_names=(NEEDLE,), curriculum=STAGES, max_train_samples_per_ds=None)
    config = changed(config, eval_steps=100, eval_documents=HELDOUT)
    implementation = subject.implementation
    records = implementation.records(config)
    rows = implementation.rows(config, subject.chat, records)
    _, heldout = implementation.divided(config, subject.chat, records, rows)
    for expected, actual in (*_problems(config, records), *_heldout_problems(heldout)):
        return Fail(
            message="generated needles are not those that the configuration asks for",
            expected=expected,
            actual=actual,
            remedy="generate each stage, in training and held out, by its own settings",
        )
    return Pass(f"{len(records)} documents of {len(STAGES)} stages are as asked for, and so are those held out")


def _problems(config: RunConfig, records: "Sequence[Record]") -> Iterator[tuple[str, str]]:
    """Yield what is expected of the documents of each stage, and what is found."""
    start = 0
    for number, stage in enumerate(STAGES, start=1):
        some = records[start : start + (stage.documents or 0)]
        start += len(some)
        yield from _stage_problems(config.needle_style, stage, number, some)
    if len(records) != start or len(some) != stage.documents:
        yield f"{sum(stage.documents or 0 for stage in STAGES)} documents", f"{len(records)}"


def _stage_problems(
    style: str, stage: CurriculumStage, number: int, records: "Sequence[Record]"
) -> Iterator[tuple[str, str]]:
    """Yield what is expected of the documents of one stage, and what is found."""
    stated, unit = (STATING_WORDS, SENTENCE_WORDS) if style == "sentences" else (1 + stage.digits, 1 + stage.digits)
    least = stage.filler_words if stage.min_filler_words is None else stage.min_filler_words
    bounds = [-(-words // unit) * unit for words in (least, stage.filler_words)]
    fillers = [len(record.context.split()) - stage.pairs * stated for record in records]
    for record, filler in zip(records, fillers, strict=True):
        where = f"stage {number}, {record.source}"
        if len(record.prompts) != stage.pairs:
            yield f"{where}: {stage.pairs} needles", f"{len(record.prompts)}"
        digits = [sum(letter.isdigit() for letter in response) for response in record.responses]
        if set(digits) != {stage.digits}:
            yield f"{where}: answers of {stage.digits} digits", f"{digits}"
        if not all(f" {response}" in f" {record.context}" for response in record.responses):
            yield f"{where}: a document that states its answers", record.context[:80]
        if not bounds[0] <= filler <= bounds[1]:
            yield f"{where}: {bounds[0]} to {bounds[1]} words of filler", f"{filler}"
    if least < stage.filler_words and len(set(fillers)) < 2:
        yield f"stage {number}: filler of unequal length in {len(records)} documents", f"{fillers[0]} words in each"


def _heldout_problems(heldout: Sequence[Sequence[Any]]) -> Iterator[tuple[str, str]]:
    """Yield what is expected of the held-out documents of each stage, and what is found."""
    if len(heldout) != len(STAGES):
        yield f"held-out documents of {len(STAGES)} stages", f"of {len(heldout)}"
    for number, (stage, rows) in enumerate(zip(STAGES, heldout, strict=False), start=1):
        questions = {len(row.queries) for row in rows}
        if questions != {stage.pairs}:
            yield f"held-out documents of stage {number} with {stage.pairs} questions each", f"{sorted(questions)}"


def _with_stages(change: Callable[[CurriculumStage], dict[str, Any]]) -> Any:
    """Make a fault of documents that are generated by other settings of their stages."""

    def records(healthy: Implementation, config: RunConfig) -> Any:
        stages = tuple(stage.model_copy(update=change(stage)) for stage in config.curriculum)
        return healthy.records(config.model_copy(update={"curriculum": stages}))

    return override(records=records)


def _first_held_out(healthy: Implementation, *arguments: Any) -> Any:
    """Hold out documents of the first stage for all."""
    trained, stages = healthy.divided(*arguments)
    return trained, [stages[0]] * len(stages)


RULE = Rule(
    code="DAT311",
    name="needles-unlike-asked",
    stage="data",
    severity="error",
    sources=("sanity run",),
    requires=("DAT301", "DAT303", "DAT310"),
    check=check,
    faults=(
        Fault(
            "first-stage-held-out",
            "every stage is evaluated on documents of the first",
            override(divided=_first_held_out),
        ),
        Fault(
            "filler-not-drawn", "min_filler_words is ignored", _with_stages(lambda stage: {"min_filler_words": None})
        ),
        Fault("one-digit", "values have one digit in every stage", _with_stages(lambda stage: {"digits": 1})),
        Fault("one-needle", "documents have one needle in every stage", _with_stages(lambda stage: {"pairs": 1})),
        Fault(
            "filler-lost",
            "documents are without filler",
            _with_stages(lambda stage: {"filler_words": 0, "min_filler_words": 0}),
        ),
    ),
)
