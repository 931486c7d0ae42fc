"""An evaluation asks as training did, and reads an answer as its text, up to its end.

What it does
------------
Encodes questions of the data as an evaluation asks them, and decodes their answers as it reads those that a model writes, with
tokens behind the one that ends them, as they stand in a batch whose other answers are longer. One more answer spells a control
token.

Why it matters
--------------
Training sees a whole conversation, an evaluation the beginning of one. A header, a space or a system message more or less between
them, and the model is asked what it never saw: a good adapter answers badly, and nothing says why. So it is where the text of an
answer keeps a header, loses its first word or goes on behind its end: exact match is 0 for right answers.

How it is detected
------------------
The prompt must be the tokens of the question's conversation up to the first one that is supervised, as the tokenizer library
writes it, and the text of the supervised tokens, written twice, must be the answer of the data, but for white space around it.

How to fix
----------
Make prompts by the template that training uses, with the generation prompt, up to where supervision begins. A template of your
own has to write where `add_generation_prompt` is set what it writes before an answer. End an answer at the token that ends those
of training.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from checks.data.expected import conversation_format
from checks.faults import override
from checks.result import Fail, Inapplicable, Pass, Result, Skip
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.implementation import Implementation
    from checks.oracles.conversations import ConversationFormat, Expected
    from checks.subject import Subject

QUESTIONS = 50  # of the data's first ones
SHOWN = 8  # tokens at the end of a prompt
SPELLED = "ends a turn"  # beside the control token that an answer spells


def check(subject: "Subject") -> Result:
    """Compare prompts and texts of the first questions with the library's."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    form = conversation_format(subject)
    found = list(_questions(subject, form))
    for where, question, answer, expected in found:
        trained = expected.ids[: expected.start]
        asked = list(subject.implementation.prompt(subject.chat, question))
        if asked != trained:
            return _finding(
                f"{where} is asked otherwise than in training",
                f"{len(trained)} tokens that end in {form.decode(trained[-SHOWN:])!r}",
                f"{len(asked)} tokens that end in {form.decode(asked[-SHOWN:])!r}",
            )
        written = expected.ids[expected.start : expected.stop]
        text = subject.implementation.answer(subject.chat, [*written, *written])
        if text.strip() != answer.strip():
            return _finding(f"the answer of {where} is read as another text", repr(answer.strip()), repr(text))
    if not found:
        return Inapplicable("the template refuses the data's first questions")
    return Pass(
        f"{len(found)} questions are asked as in training, and their answers read as they are",
        {"questions": len(found)},
    )


def _questions(subject: "Subject", form: "ConversationFormat") -> "Iterator[tuple[str, str, str, Expected]]":
    """Yield where a question stands, its text, its answer and its tokens in training, of the first that are not refused."""
    records = subject.records or ()
    pairs = (
        (f"{record.source}, question {index + 1}", *pair)
        for record in records
        for index, pair in enumerate(zip(record.prompts, record.responses, strict=True))
    )
    for where, question, answer in islice(pairs, QUESTIONS):
        (expected,) = form.expected([(question, answer)])
        if expected is not None:
            yield where, question, answer, expected
    if spelled := _spelled(form):
        (expected,) = form.expected([(SPELLED, spelled)])
        if expected is not None:
            yield f"a question whose answer is {spelled!r}", SPELLED, spelled, expected


def _spelled(form: "ConversationFormat") -> str:
    """Return an answer that spells the tokenizer's end token; empty where that is kept, or cannot be written as text."""
    text = f"{form.tokenizer.eos_token} {SPELLED}"
    return text if form.has_special(text) and form.decode(form.encode_contents(text)).strip() == text else ""


def _finding(message: str, expected: str, actual: str) -> Fail:
    return Fail(
        message=message,
        expected=expected,
        actual=actual,
        remedy="let the template write as its generation prompt (add_generation_prompt) what it writes before an answer, and "
        "read an answer from where supervision begins",
    )


def _asked(change: Callable[[list[int]], list[int]]) -> Any:
    """Make a fault of the tokens that ask a question."""

    def prompt(healthy: "Implementation", chat: Any, question: str) -> list[int]:
        return change(list(healthy.prompt(chat, question)))

    return override(prompt=prompt)


def _read_on(healthy: "Implementation", chat: Any, ids: Sequence[int]) -> str:
    """Read each half of what was written, which is an answer and then the same again."""
    half = len(ids) // 2
    return " ".join(healthy.answer(chat, part) for part in (ids[:half], ids[half:]))


def _without_spelled(healthy: "Implementation", chat: Any, ids: Sequence[int]) -> str:
    text = healthy.answer(chat, ids)
    for token in chat.tokenizer.get_added_vocab():
        text = text.replace(token, "")
    return text


def _unspelled(subject: "Subject") -> str:
    spelled = subject.tokenizer is not None and _spelled(conversation_format(subject))
    return "" if spelled else "control tokens in texts are kept, or the tokenizer cannot write one as text"


RULE = Rule(
    code="EVL301",
    name="asked-otherwise-than-trained",
    stage="data",
    severity="error",
    sources=("failure mode 30", "https://huggingface.co/docs/transformers/chat_templating"),
    requires=("LBL301", "DAT302"),
    check=check,
    faults=(
        Fault("header-lost", "the last token before an answer is not in the prompt", _asked(lambda ids: ids[:-1])),
        Fault("opened-twice", "the prompt opens with its first token twice", _asked(lambda ids: [ids[0], *ids])),
        Fault(
            "first-letter-cut",
            "the first letter of an answer is not in its text",
            override(answer=lambda healthy, chat, ids: healthy.answer(chat, ids)[1:]),
        ),
        Fault("end-overlooked", "an answer goes on behind its end", override(answer=_read_on)),
        Fault(
            "spelled-token-lost",
            "a control token that an answer spells is not in its text",
            override(answer=_without_spelled, unless=_unspelled),
        ),
    ),
)
