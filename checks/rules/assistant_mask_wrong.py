"""The chat template supervises what the assistant writes, all of it and nothing else.

What it does
------------
Renders conversations (one turn, several turns, reasoning, text beyond ASCII) with the run's tokenizer and template,
decodes the supervised tokens, and compares them turn by turn with the messages' text.

Why it matters
--------------
The template that GPT-OSS ships has no `{% generation %}` tags: the mask is zero, every label is -100, and the loss is
NaN or a quiet 0.0 with `grad_norm: 0`, while `gen_lora_l1_norm` looks healthy. Tags in a Jinja comment satisfy a search
for the word. Tags inside a macro shift the mask. A mask that stops before the stop token gives a model that never stops.

How it is detected
------------------
Per turn, the decoded text must be the message and its end token, by a rule that does not look at the template.

How to fix
----------
Use the shipped template (leave `chat_template` unset), or put `{% generation %}` around what the assistant writes, end
token included, outside of macros. Token caches made with the old template are void.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.faults import Override, override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from d2l.data.chat.conversations import SUPERVISED
from d2l.data.chat.supervision import supervision_faults
from d2l.errors import DataError, ModelError

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "leave chat_template unset to use the shipped one, or put generation tags around what the assistant writes"


def check(subject: "Subject") -> Result:
    """Look for faults in the supervised text of every conversation."""
    if subject.tokenizer is None:
        return Skip(subject.tokenizer_absent)
    expected = "the text and end token of every assistant message, and nothing else"
    try:
        chat = subject.chat
        faults = [fault for messages in SUPERVISED for fault in supervision_faults(chat, messages)]
        supervised = sum(sum(chat.encode(messages).supervised) for messages in SUPERVISED)
    except (ModelError, DataError) as error:
        return Fail(message="the chat template cannot be used", expected=expected, actual=str(error), remedy=REMEDY)
    evidence = {
        "convention": chat.supervision,
        "supervised_tokens": supervised,
        "faults": faults,
        "date": chat.current_date,
    }
    if supervised == 0:
        return Fail(
            message="no token is supervised: the loss would be nan or 0.0",
            expected=expected,
            actual="0 supervised tokens",
            remedy=REMEDY,
            evidence=evidence,
        )
    if faults:
        return Fail(
            message="the wrong tokens are supervised",
            expected=expected,
            actual=faults[0],
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(
        f"{supervised} tokens of {len(SUPERVISED)} conversations, as expected per turn ({chat.supervision})",
        evidence,
    )


def _with_template(change: Callable[[str], str]) -> Override:
    """Make a fault of the run's template, changed."""

    def chat(healthy: Implementation, config: Any, tokenizer: Any) -> Any:
        made = healthy.chat(config, tokenizer)
        return replace(made, template=change(made.template))

    def unless(subject: "Subject") -> str:
        if subject.tokenizer is None:
            return subject.tokenizer_absent
        changed = change(subject.chat.template) != subject.chat.template
        return "" if changed else "the template has no generation tags to spoil"

    return override(chat=chat, unless=unless)


def _tagless(template: str) -> str:
    """Remove the generation tags, as in the official template."""
    for tag in ("generation", "endgeneration"):
        for opening in ("{%-", "{%"):
            for closing in ("-%}", "%}"):
                template = template.replace(f"{opening} {tag} {closing}", "")
    return template


def _in_comment(template: str) -> str:
    """Leave the tags in a comment only."""
    bare = _tagless(template)
    return template if bare == template else "{# {% generation %}{% endgeneration %} #}" + bare


def _shifted_mask(healthy: Implementation, config: Any, tokenizer: Any) -> Any:
    """Move the mask by one token, as tags inside a macro do."""
    made = healthy.chat(config, tokenizer)
    encode = type(made).encode

    class Shifted(type(made)):  # type: ignore[misc]
        def encode(self, messages: Any, **options: Any) -> Any:
            encoded = encode(self, messages, **options)
            return replace(encoded, supervised=[False, *encoded.supervised[:-1]])

    return Shifted(**{name: getattr(made, name) for name in made.__dataclass_fields__})


RULE = Rule(
    code="LBL101",
    name="assistant-mask-wrong",
    stage="static",
    severity="error",
    sources=(
        "fix 8",
        "failure mode F8",
        "failure mode 3",
        "failure mode 7",
        "failure mode 9",
        "failure mode 37",
        "failure mode C32",
        "failure mode C33",
    ),
    check=check,
    faults=(
        Fault(
            "no-generation-tags", "a template without generation tags, as the official one", _with_template(_tagless)
        ),
        Fault("tags-in-comment", "the tags only stand in a Jinja comment", _with_template(_in_comment)),
        Fault(
            "mask-shifted",
            "every mark is one token late",
            override(chat=_shifted_mask, unless=lambda subject: subject.tokenizer_absent),
        ),
    ),
)
