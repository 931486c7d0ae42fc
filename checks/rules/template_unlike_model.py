"""The chat template writes a question as the model's own template does, and opens it once.

What it does
------------
Renders a question, up to where the answer begins, with the run's template and with the one that came with the tokenizer.

Why it matters
--------------
A base knows one way of being asked. Gemma 7B without its `<bos>` has a perplexity of millions where it has 3.5 with it; others
suffer from one that stands there twice. Nothing fails: the hypernetwork learns to make up for it, and its adapters are of little
use where the model is asked as it should be.

How it is detected
------------------
Both texts are rendered by the tokenizer library and must have the same tokens, and no special token may stand twice at their
start. Where the tokenizer came without a template the second alone is judged.

How to fix
----------
Leave `chat_template` unset: d2l takes the model's own, or a shipped one with generation tags that writes the same. In a template
of your own, write what the model's own writes, and the opening token once.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from datetime import date
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from checks.faults import Override, override
from checks.implementation import Implementation
from checks.oracles.conversations import QUESTION, REFUSALS, ConversationFormat
from checks.oracles.special_tokens import SpecialTokens
from checks.result import Inapplicable, Pass, Result, Skip, Warn
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.chat.format import ChatFormat

REMEDY = "leave chat_template unset, or write what the model's own template writes, and its opening token once"


def check(subject: "Subject") -> Result:
    """Compare the tokens of a question under both templates."""
    if subject.tokenizer is None:
        return Skip(subject.tokenizer_absent)
    own: Any = subject.chat.tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    ours, theirs = _asked(subject, subject.chat.template), _asked(subject, own)
    if ours is None:
        return Inapplicable("the chat template refuses a question")
    decode = subject.chat.decode
    evidence = {"template": decode(ours), "own": decode(theirs or [])}
    if ours[0] == ours[1] and ours[0] in SpecialTokens(subject.tokenizer).ids:
        return Warn(
            message="the chat template writes the token that opens a conversation twice",
            expected=f"{decode(ours[:1])} once",
            actual=decode(ours[:3]),
            remedy=REMEDY,
            evidence=evidence,
        )
    if theirs is not None and ours != theirs:
        place = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))))
        return Warn(
            message="the chat template does not ask as the model's own template does",
            expected=f"{decode(theirs[place : place + 8])!r} from token {place + 1} on",
            actual=repr(decode(ours[place : place + 8])),
            remedy=REMEDY,
            evidence=evidence,
        )
    if theirs is None:
        return Pass("the opening token stands once; the tokenizer came without a template to compare with", evidence)
    return Pass(f"a question is asked in {len(ours)} tokens, as by the model's own template", evidence)


def _asked(subject: "Subject", template: Any) -> list[int] | None:
    """Return the tokens of a question up to its answer; None without a template, or where it refuses the question."""
    if not isinstance(template, str):
        return None
    chat = subject.chat
    conversation = ConversationFormat(chat.tokenizer, template, chat.supervision, date.fromisoformat(chat.current_date))
    try:
        (text,) = conversation.render([[{"role": "user", "content": QUESTION}]], prompt=True)
    except REFUSALS:
        return None
    return conversation.encode(text)


def _with_prefix(prefix: Callable[["ChatFormat"], str], unless: Callable[["Subject"], str]) -> Override:
    """Make a fault of a template that writes more at its start than the tokenizer's own, which is the healthy one."""

    def chat(healthy: Implementation, config: Any, tokenizer: Any) -> Any:
        made = healthy.chat(config, tokenizer)
        with_own = copy(tokenizer)
        with_own.chat_template = made.template
        return replace(made, tokenizer=with_own, template=prefix(made) + made.template)

    return override(unless, chat=chat)


def _opening(chat: "ChatFormat") -> str:
    """Return Jinja that writes the token with which a conversation begins."""
    ids = chat.encode([{"role": "user", "content": QUESTION}]).input_ids
    return "{{ '" + chat.decode(ids[:1]) + "' }}"


def _opens_with_none(subject: "Subject") -> str:
    """Say why a template's opening token cannot be doubled; empty where it can."""
    if subject.tokenizer is None:
        return subject.tokenizer_absent
    ids = _asked(subject, subject.chat.template)
    return "" if ids and ids[0] in SpecialTokens(subject.tokenizer).ids else "the template opens with no special token"


RULE = Rule(
    code="LBL102",
    name="template-unlike-model",
    stage="static",
    severity="warning",
    sources=(
        "failure mode 30",
        "https://github.com/EleutherAI/lm-evaluation-harness/pull/1465",
        "https://huggingface.co/docs/transformers/chat_templating",
    ),
    requires=("LBL101",),
    check=check,
    faults=(
        Fault("opened-twice", "the template writes its opening token twice", _with_prefix(_opening, _opens_with_none)),
        Fault(
            "instruction-added",
            "the template has an instruction that the model's own has not",
            _with_prefix(lambda chat: "Answer from memory. ", lambda subject: subject.tokenizer_absent),
        ),
    ),
)
