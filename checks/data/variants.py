"""Inputs of a token cache that differ in one thing each, one for every field that shapes rows.

They do not depend on the run's own limits: documents are cut by a draw, so that chunk lengths, counts, probabilities and
the seed all matter, and the template prints the date and the supervision.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import normalizers
from transformers import LlamaConfig

from checks.data.sizes import unlimited
from checks.oracles.conversations import ConversationFormat
from checks.subject import changed
from d2l.data.chat.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.config.schema import RunConfig
    from d2l.data.chat.format import ChatFormat
    from d2l.data.records import Record

SMALL_TOKENIZER = "configs/models/tiny_gpt_oss"
LARGE = 20_000  # ids: a tokenizer above takes half a second to fingerprint, which every variant would pay
TEXT, TOKENS = 300, 12  # at most so many characters of a document, and at least so many tokens
SEEDS = 2**32  # a seed is below
PIECES = 6  # more chunks than the draw of the base inputs takes
PRINTED = "{{ supervision }} {{ strftime_now('%Y-%m-%d') }} "


@dataclass(frozen=True)
class Inputs:
    """What a cache is asked for. `field` names what differs from the first inputs: of the configuration, or the data."""

    field: str
    config: "RunConfig"
    chat: "ChatFormat"
    records: "tuple[Record, ...]"

    @property
    def arguments(self) -> "tuple[RunConfig, ChatFormat, tuple[Record, ...]]":
        """Return the arguments of `rows` and `cached_rows`."""
        return self.config, self.chat, self.records


def variants(subject: "Subject", folder: Path) -> Iterator[Inputs]:
    """Yield the base inputs, then each variant.

    Args:
        folder: an empty folder, for the config of a base with another `max_position_embeddings`.
    """
    chat = _probe_chat(subject)
    form = _conversation_format(chat)
    records = _probe_records(subject, form)
    text = max(len(form.encode_contents(record.context)) for record in records)
    affixes = _longest_affixes(form)
    chats = _other_chats(chat).values()
    room = max(_longest_affixes(_conversation_format(it)) for it in chats)  # a template may write more on another day
    questions = [pair for record in records for pair in zip(record.prompts, record.responses, strict=True)]
    question = max(len(expected.ids) for expected in form.expected(questions) if expected)
    draw = dict.fromkeys(range(2, PIECES), 0.25)
    config = unlimited(
        subject.config,
        max_ctx_chunk_len=text + max(affixes, room),
        num_chunk_probs=draw,
        supervision=chat.supervision,
        control_tokens="text",
    )
    first = Inputs("nothing", config, chat, records)
    yield first
    yield first
    limits: dict[str, Any] = {
        "max_ctx_len": text + affixes - 1,
        "max_ctx_chunk_len": math.ceil(text / PIECES) + affixes,
        "min_ctx_chunk_len": text + affixes,
        "max_ctx_chunk_num": 1,
        "num_chunk_probs": {PIECES: 1.0},
        "chunking": "sentences",
        "chunk_overlap": 1,
        "max_qas_len": question - 1,
        "max_qas_per_sample": 1,
        "max_packed_inp_len": question - 1,
        "max_packed_ctx_len": text + affixes,
        "model_name_or_path": _other_base(len(chat.tokenizer), folder, affixes + text // PIECES),
    }
    for field, value in limits.items():
        yield replace(first, field=field, config=changed(config, **{field: value}))
    yield from (
        replace(first, field="seed", config=changed(config, seed=(config.seed + step) % SEEDS)) for step in (1, 2)
    )
    yield from _conversations(first)
    yield from _data(first, subject)


def _other_chats(chat: "ChatFormat") -> "dict[str, ChatFormat]":
    """Return chat formats that differ in one thing each: what becomes of control tokens, template, supervision, date."""
    other: Any = "sampled" if chat.supervision == "content" else "content"
    return {
        "control_tokens": replace(chat, control_tokens="keep"),
        "chat_template": replace(chat, template=f".{chat.template}"),
        "supervision": replace(chat, supervision=other),
        "current_date": replace(chat, current_date="2019-03-07"),
    }


def _conversations(first: Inputs) -> Iterator[Inputs]:
    """Yield another chat format, with a configuration that says so where it can, and another tokenizer."""
    for field, chat in _other_chats(first.chat).items():
        said = {} if field == "chat_template" else {field: getattr(chat, field)}
        yield replace(first, field=field, config=changed(first.config, **said), chat=chat)
    tokenizer = deepcopy(first.chat.tokenizer)
    backend = tokenizer.backend_tokenizer
    letter = next((letter for letter in first.records[0].context if letter.isalnum()), "e")
    other = normalizers.Replace(letter, "o" if letter != "o" else "e")
    backend.normalizer = normalizers.Sequence([*([backend.normalizer] if backend.normalizer else []), other])
    yield replace(first, field="tokenizer_name_or_path", chat=replace(first.chat, tokenizer=tokenizer))


def _conversation_format(chat: "ChatFormat") -> ConversationFormat:
    return ConversationFormat(chat.tokenizer, chat.template, chat.supervision, date.fromisoformat(chat.current_date))


def _longest_affixes(form: ConversationFormat) -> int:
    return max(len(prefix) + len(suffix) for prefix, suffix in form.affixes)


def _data(first: Inputs, subject: "Subject") -> Iterator[Inputs]:
    """Yield another document, question and answer, the records in another order, and a teacher's logprobs."""
    record, *others = first.records

    def changed_record(field: str, **values: Any) -> Inputs:
        return replace(first, field=field, records=(replace(record, **values), *others))

    yield changed_record("documents", context=f"{record.context} {record.context[:20]}")
    yield changed_record("prompts", prompts=(f"{record.prompts[0]} {record.prompts[0]}", *record.prompts[1:]))
    yield changed_record("responses", responses=(f"{record.responses[0]} {record.responses[0]}", *record.responses[1:]))
    yield replace(first, field="order of records", records=(*others, record))
    rows = [row for row in subject.implementation.rows(*first.arguments).rows if row.record == 0]
    labels = [query.n_labels for row in rows for query in row.queries]
    if len(labels) == len(record.prompts):
        for field, value, token in (("teacher", -0.5, 1), ("logprobs_vals", -0.7, 1), ("logprobs_indices", -0.7, 2)):
            values = tuple(tuple((value, -2.0) for _ in range(count)) for count in labels)
            indices = tuple(tuple((token, 3) for _ in range(count)) for count in labels)
            taught = replace(record, logprobs_vals=values, logprobs_indices=indices)
            yield replace(first, field=field, records=(taught,))


def _probe_chat(subject: "Subject") -> "ChatFormat":
    """Return the run's chat format with a template that prints the date and the supervision, on a tokenizer of its size."""
    assert subject.tokenizer is not None
    tokenizer = subject.tokenizer if len(subject.tokenizer) <= LARGE else load_tokenizer(SMALL_TOKENIZER)
    chat = subject.implementation.chat(subject.config, tokenizer)
    return replace(chat, template=PRINTED + chat.template, control_tokens="text")


def _probe_records(subject: "Subject", form: ConversationFormat) -> "tuple[Record, ...]":
    """Return two short records made of the run's own texts: long enough to be cut, with two questions and with one.

    The first question spells a control token.
    """
    assert subject.records is not None
    numbers = [*dict.fromkeys(row.record for row in subject.rows.rows[:20])][:2]
    made: list[Record] = []
    for record in (subject.records[number] for number in numbers):
        context = record.context.strip()[:TEXT]
        while len(form.encode_contents(context)) < TOKENS:
            context = f"{context} {context}"
        prompts, responses = (record.prompts * 2)[:2], (record.responses * 2)[:2]
        if len(record.prompts) == 1:
            prompts = (prompts[0], f"{prompts[0]} {prompts[0]}")
        if not made:
            prompts = (f"{prompts[0]} {_spelled(form)}", *prompts[1:])
        asked = 1 if made else 2
        short = replace(record, context=context, prompts=prompts[:asked], responses=responses[:asked])
        made.append(replace(short, logprobs_vals=None, logprobs_indices=None))
    if len(made) == 1:
        made.append(replace(made[0], context=f"{made[0].context} {made[0].context}"))
    return tuple(made)


def _spelled(form: ConversationFormat) -> str:
    """Return the letters of a control token that the tokenizer can read as text; empty where its vocabulary cannot."""
    readable = (it for it in form.special.by_name if form.special.ids.isdisjoint(form.encode_contents(it)))
    return next(readable, "")


def _other_base(vocabulary: int, folder: Path, longest: int) -> str:
    """Write the config of a base with another `max_position_embeddings`, all that rows take from one; return its folder."""
    LlamaConfig(vocab_size=vocabulary, max_position_embeddings=longest).save_pretrained(folder)
    return str(folder)
