"""The chunks that the hypernetwork reads are the document, all of it and nothing else, as a user's message.

What it does
------------
Takes the chunks of every document from the packed batches of an epoch, all of them, removes what the template puts
around a user's message, and reads the rest back as text. A few records are cut into several chunks for this, whatever
the run's limits are.

Why it matters
--------------
A document that is cut short, or that lost its last chunk, cannot answer questions about its end; the loss only looks a
little worse. A doubled first token, or a message that never ends, is input that the base was not trained on.

How it is detected
------------------
The chunks, joined, must decode to the document, as the tokenizer's own encoding of it does; tokens of a `chunk_overlap`,
which stand in two chunks, are read once. Before and after each chunk there must be the tokens that the tokenizer library
writes around a user's message. The first documents of one chunk are compared with the whole message as it renders it.

How to fix
----------
Cut the document's tokens into pieces that lie side by side, and put the template's own tokens around each piece.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any

from checks.data.epoch import gather
from checks.data.packed import readings
from checks.faults import Override, override
from checks.implementation import Implementation
from checks.oracles.conversations import ConversationFormat
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "cut the document's tokens side by side, and put the chat template's tokens around each chunk, whole"


def check(subject: "Subject") -> Result:
    """Read the documents back from the chunks of all batches."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    found = readings(subject)
    problems = gather(found, "documents")
    evidence = {"documents": len(subject.records), "faults": problems.examples}
    if problems.count:
        return Fail(
            message=f"{problems.count:,} documents are not what the hypernetwork would read",
            expected="chunks that are the document, between the tokens around a user's message",
            actual=problems.examples[0],
            remedy=REMEDY,
            evidence=evidence,
        )
    chunks = sum(len(row.chunks) for row in found[1].tokenized.rows) if found[1].tokenized else 0
    return Pass(
        f"chunks of {len(subject.records):,} documents read back as the documents, {chunks} of them under a tight limit",
        evidence,
    )


def _with_chunks(change: Callable[[tuple[Any, ...], Any], tuple[Any, ...]]) -> Override:
    """Make a fault that changes the chunks of every row; it gets the chunks, and the tokens after a document."""

    def rows(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
        tokenized = healthy.rows(config, chat, records)
        day = date.fromisoformat(chat.current_date)
        _, after = ConversationFormat(chat.tokenizer, chat.template, chat.supervision, day).affixes[0]
        changed = tuple(replace(row, chunks=change(row.chunks, after)) for row in tokenized.rows)
        return replace(tokenized, rows=changed)

    return override(rows=rows)


def _short(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
    """Keep 60 characters of each document, or half of a shorter one."""
    cut = [replace(record, context=record.context[: min(60, len(record.context) // 2)]) for record in records]
    return healthy.rows(config, chat, cut)


def _without_tail(chunks: tuple[Any, ...], after: Any) -> tuple[Any, ...]:
    """Lose the last token of the document."""
    last = chunks[-1]
    end = len(last) - len(after)
    return (*chunks[:-1], (*last[: end - 1], *last[end:]))


RULE = Rule(
    code="DAT304",
    name="document-changed",
    stage="data",
    severity="error",
    sources=("failure mode 1", "https://huggingface.co/docs/transformers/chat_templating"),
    requires=("LBL101", "DAT301"),
    check=check,
    faults=(
        Fault("document-cut", "60 characters of each document are kept", override(rows=_short)),
        Fault(
            "last-chunk-lost",
            "the last of several chunks is lost",
            _with_chunks(lambda chunks, after: chunks[:-1] or chunks),
        ),
        Fault("tail-lost", "the last token of each document is lost", _with_chunks(_without_tail)),
        Fault(
            "end-token-lost",
            "the message around each chunk does not end",
            _with_chunks(lambda chunks, after: tuple(chunk[:-1] for chunk in chunks)),
        ),
        Fault(
            "first-token-doubled",
            "the token that opens a message stands there twice",
            _with_chunks(lambda chunks, after: tuple((chunk[0], *chunk) for chunk in chunks)),
        ),
    ),
)
