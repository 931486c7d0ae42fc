"""Every packed question is the run's own question with its own answer, and nothing else.

What it does
------------
Reads every question of the packed batches of an epoch, all of them, and compares its token ids with what the tokenizer
library makes of the data: the template applied to question i and response i. A few records are packed again under tight
limits, so that splits are seen whatever the run's limits are.

Why it matters
--------------
With the document in the prompt the model reads the answer there, and the LoRA learns nothing, while the loss is the best
ever seen. With another question's answer it learns to be wrong. Both leave labels, losses and gradients healthy.

How it is detected
------------------
The ids must equal those of one question of the data, as `apply_chat_template` and the tokenizer write it: a formula
that shares no code with the run.

How to fix
----------
Build each conversation from prompt i and response i alone; give the document to the hypernetwork, not to the prompt.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.data.epoch import gather
from checks.data.packed import readings
from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "make each conversation of one question and its own answer, by the run's chat template, and of nothing else"


def check(subject: "Subject") -> Result:
    """Compare the ids of every packed question with those that the library makes of the data."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    found = readings(subject)
    problems, questions = gather(found, "texts"), sum(reading.questions for reading in found)
    evidence = {"questions": questions, "faults": problems.examples}
    if problems.count:
        return Fail(
            message=f"{problems.count:,} of {questions:,} packed questions are no question of the data with its answer",
            expected="the ids that the chat template and the tokenizer give for prompt i and response i",
            actual=problems.examples[0],
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(f"{questions:,} packed questions are what the tokenizer library makes of the data", evidence)


def _document_in_prompts(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Ask every question below the beginning of its document."""

    def asked(record: Any) -> Any:
        return replace(record, prompts=tuple(f"{record.context[:80]}\n\n{prompt}" for prompt in record.prompts))

    return healthy.rows(config, chat, [asked(record) for record in records])


def _rotated(healthy: Implementation, config: Any, chat: Any, records: Any, part: str) -> Any:
    """Give every question the prompt or the response of the one after it, and no teacher, whose labels would differ."""
    values = [value for record in records for value in getattr(record, part)]
    following = iter([*values[1:], values[0]])
    moved = [
        replace(
            record,
            **{part: tuple(next(following) for _ in record.prompts)},
            logprobs_vals=None,
            logprobs_indices=None,
        )
        for record in records
    ]
    return healthy.rows(changed(config, loss="ce"), chat, moved)


def _other_answers(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    return _rotated(healthy, config, chat, records, "responses")


def _other_questions(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    return _rotated(healthy, config, chat, records, "prompts")


RULE = Rule(
    code="DAT302",
    name="questions-misencoded",
    stage="data",
    severity="error",
    sources=("failure mode C16", "failure mode 30", "https://huggingface.co/docs/transformers/chat_templating"),
    requires=("LBL101", "DAT301", "LBL301"),
    check=check,
    faults=(
        Fault("document-in-prompt", "the document stands before every question", override(rows=_document_in_prompts)),
        Fault("answer-of-another", "every question gets another one's answer", override(rows=_other_answers)),
        Fault("question-of-another", "every answer gets another one's question", override(rows=_other_questions)),
    ),
)
