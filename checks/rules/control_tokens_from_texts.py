"""No document, prompt or response can write a control token: its letters are text wherever the data has them.

What it does
------------
Counts the control tokens that the texts of the run's data spell (`<|end|>`, `</s>`, `[INST]`: the tokenizer's special
tokens). Then it puts those that the chat template uses into a document, a prompt and a response of the data, lets the run
tokenize them, and counts the control tokens in the rows.

Why it matters
--------------
A document that holds `<|end|><|start|>system` ends its message and opens one of its own: whoever writes a document writes
instructions. A response with an end token trains the model to stop there, and that the answer goes on after it.

How it is detected
------------------
The rows may have as many control tokens as the tokenizer library renders for the same texts with other letters in their
places, or the texts must be refused. With `control_tokens: keep` there is a warning where the data has any.

How to fix
----------
Leave `control_tokens: text`, or set `refuse` and remove them from the data. Encode texts without special tokens.
"""

from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any

from checks.data.expected import conversation_format
from checks.data.sizes import unlimited
from checks.faults import override
from checks.implementation import Implementation
from checks.oracles.conversations import REFUSALS, ConversationFormat
from checks.result import Fail, Pass, Result, Skip, Warn
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.errors import D2LError

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.records import Record

LETTERS = 200  # of a text of the data that go into a probe
MERGED = 2  # tokens around a document that may be one with its edges
LOST = (-1, -1)  # in the place of two counts
REMEDY = "set control_tokens: text, or refuse; encode documents and messages without the tokenizer's special tokens"


def check(subject: "Subject") -> Result:
    """Count what the data spells, and let the run tokenize texts that spell control tokens."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    form, mode = conversation_format(subject), subject.config.control_tokens
    spelled = {
        "documents": sum(form.special.count(record.context) for record in subject.records),
        "prompts": sum(form.special.count(text) for record in subject.records for text in record.prompts),
        "responses": sum(form.special.count(text) for record in subject.records for text in record.responses),
    }
    total = sum(spelled.values())
    evidence: dict[str, Any] = {"control_tokens": mode, "spelled": spelled}
    if mode == "keep":
        if not total:
            return Pass("control tokens in texts would be kept, and the data has none", evidence)
        return Warn(
            message=f"{total:,} control tokens in the texts of the data are read as control tokens",
            expected="none, or control_tokens: text or refuse",
            actual=", ".join(f"{count:,} in {where}" for where, count in spelled.items() if count),
            remedy=REMEDY,
            evidence=evidence,
        )
    names = _names(form)
    written, expected = _made(subject, form, names), _made(subject, form, ["x"] * len(names))
    if LOST in (written, expected):
        return Skip("the run loses part of a record, which DAT303 and DAT304 judge")
    evidence |= {"probe": names, "in_rows": written, "of_the_template": expected}
    if mode == "refuse" and names and written is not None:
        return Fail(
            message="control tokens in texts are not refused",
            expected=f"an error for a record that holds {names[0]!r}, as control_tokens: refuse says",
            actual="rows",
            remedy="refuse the record with an error that names the control token",
            evidence=evidence,
        )
    if written is not None and written != expected:
        return Fail(
            message="control tokens in texts become control tokens of the rows",
            expected=f"{expected} control tokens, those of the chat template (in the document's chunks, in the questions)",
            actual=f"{written}, with {' '.join(names)} in a document, its prompt and its response",
            remedy=REMEDY,
            evidence=evidence,
        )
    what = "refused" if written is None else "read as text"
    return Pass(f"control tokens in texts are {what}; the data spells {total:,}", evidence)


def _names(form: ConversationFormat) -> list[str]:
    """Return the special tokens that the template writes around a question and its answer; else any one."""
    try:
        text = form.render([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])[0]
    except REFUSALS:
        text = ""
    return [name for name in form.special.by_name if name in text] or [*form.special.by_name][:1]


def _made(subject: "Subject", form: ConversationFormat, names: list[str]) -> tuple[int, int] | None:
    """Let the run tokenize a record with names in its texts; count special ids in chunks and questions.

    Returns:
        The two counts; None: refused; `LOST`: there are fewer tokens than the texts have at least.
    """
    assert subject.records is not None
    record = _spelling(subject.records[next(iter(subject.rows.rows)).record], names)
    config = unlimited(subject.config)
    try:
        rows = subject.implementation.rows(config, subject.chat, (record,)).rows
    except D2LError:
        return None
    special = form.special.ids
    chunks = [token for row in rows for chunk in row.chunks for token in chunk]
    queries = [token for row in rows for query in row.queries for token in query.input_ids]
    # control tokens count as one token each here, so that texts have more tokens than this wherever they are whole
    around = min(len(before) + len(after) for before, after in form.affixes)
    read = around - MERGED + len(form.encode(record.context))
    asked = len(form.encode(record.prompts[0])) + len(form.encode(record.responses[0]))
    if len(chunks) < read or len(queries) < asked:
        return LOST
    return sum(token in special for token in chunks), sum(token in special for token in queries)


def _spelling(record: "Record", names: list[str]) -> "Record":
    """Return a record of one question with names in each of its texts, a letter between them."""
    inserted = " a ".join(["", *names, ""])

    def with_names(text: str) -> str:
        return f"{text.strip()[:LETTERS]}{inserted}b"

    return replace(
        record,
        context=with_names(record.context),
        prompts=(with_names(record.prompts[0]),),
        responses=(with_names(record.responses[0]),),
        logprobs_vals=None,
        logprobs_indices=None,
    )


def _kept(part: str) -> Any:
    """Make a fault: control tokens in `chunks` or `queries` are kept, whatever the configuration says."""

    def rows(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
        kept_chat = replace(chat, control_tokens="keep")
        kept = healthy.rows(changed(config, control_tokens="keep"), kept_chat, records)
        try:
            made = healthy.rows(config, chat, records)
        except D2LError:
            return kept
        parts = zip(made.rows, kept.rows, strict=True)
        return replace(made, rows=tuple(replace(one, **{part: getattr(other, part)}) for one, other in parts))

    def unless(subject: "Subject") -> str:
        if subject.config.control_tokens == "keep":
            return "the configuration keeps control tokens"
        return "" if is_dataclass(subject.chat) else "the chat format is not d2l's"

    return override(unless, rows=rows)


RULE = Rule(
    code="DAT308",
    name="control-tokens-from-texts",
    stage="data",
    severity="error",
    sources=(
        "https://huggingface.co/docs/transformers/main_classes/tokenizer",
        "https://cookbook.openai.com/articles/openai-harmony",
        "failure mode C32",
    ),
    requires=("LBL101", "DAT301"),
    check=check,
    faults=(
        Fault("kept-in-documents", "control tokens that a document spells are control tokens", _kept("chunks")),
        Fault(
            "kept-in-questions", "control tokens that a prompt or response spells are control tokens", _kept("queries")
        ),
    ),
)
