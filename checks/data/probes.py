"""A few of a run's records under tight limits: what the run's own limits never engage is seen there.

Three epochs: one in which every document is cut into chunks and every question has a row of its own, one in which a
question and a document are one size too long and have to be reported, and one on a base for shorter texts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig

from checks.data.expected import conversation_format
from checks.subject import changed

if TYPE_CHECKING:
    from checks.oracles.conversations import ConversationFormat
    from checks.subject import Subject
    from d2l.config.schema import RunConfig
    from d2l.data.records import Record

AMONG, PICKED = 32, 6  # the records with the shortest documents, among the first rows: a probe costs little
PIECES = 3  # chunks that the longest of them needs at least


@dataclass(frozen=True)
class TightRun:
    """A probe: its name, the run's configuration with tight limits, records, and the base's `max_position_embeddings`."""

    name: str
    config: "RunConfig"
    records: "tuple[Record, ...]"
    base_limit: int | None


def tight_runs(subject: "Subject", folder: Path) -> Iterator[TightRun]:
    """Yield the probes.

    Args:
        folder: an empty folder, for the config of the base for shorter texts.
    """
    assert subject.records is not None
    assert subject.tokenizer is not None
    rows = sorted(subject.rows.rows[:AMONG], key=lambda row: row.size[1])
    numbers = [*dict.fromkeys(row.record for row in rows)][:PICKED]
    records = tuple(subject.records[number] for number in numbers)
    form = conversation_format(subject)
    lengths = [len(form.encode_contents(record.context)) for record in records]
    affixes = max(len(prefix) + len(suffix) for prefix, suffix in form.affixes)
    base_limit = getattr(subject.base_config, "max_position_embeddings", None)
    refusing, more = _refusing(subject.config, form, records, max(lengths) + affixes)
    yield TightRun("cut into chunks", _chunked(subject.config, form, more, max(lengths), affixes), more, base_limit)
    longest = records[lengths.index(max(lengths))]
    more = (*more, replace(longest, context=f"{longest.context}\n{longest.context}"))
    yield TightRun("one size too long", refusing, more, base_limit)
    limit = max(refusing.max_qas_len, refusing.max_ctx_len)
    vocabulary = max(len(subject.tokenizer), subject.base_config.vocab_size)
    LlamaConfig(vocab_size=vocabulary, max_position_embeddings=limit).save_pretrained(folder)
    unlimited = {"max_ctx_len": -1, "max_qas_len": -1, "max_ctx_chunk_len": -1, "min_ctx_chunk_len": -1}
    whole = {"max_ctx_chunk_num": None, "num_chunk_probs": None, "model_name_or_path": str(folder)}
    yield TightRun("a base for shorter texts", changed(refusing, **unlimited, **whole), more, limit)


def _chunked(
    config: "RunConfig", form: "ConversationFormat", records: "tuple[Record, ...]", longest: int, affixes: int
) -> "RunConfig":
    """Return limits under which the longest document needs several chunks, and a row takes one question."""
    room = max(math.ceil(longest / PIECES), 1)
    if config.max_ctx_chunk_len >= 0:
        room = max(min(room, config.max_ctx_chunk_len - affixes), 1)
    overlap = min(config.chunk_overlap, room // 4)
    most = math.ceil(longest / (room - overlap)) + 1
    return changed(
        config,
        max_ctx_len=-1,
        max_ctx_chunk_len=room + affixes,
        min_ctx_chunk_len=-1,
        max_ctx_chunk_num=most,
        num_chunk_probs={1: 0.5, most: 0.1, most + 1: 0.4},  # one is too few for the longest, the last above the limit
        max_qas_len=-1,
        max_qas_per_sample=1,
        max_packed_inp_len=2 * _longest_question(form, records)[0],
        chunk_overlap=overlap,
        max_packed_ctx_len=longest + (most + 1) * (affixes + overlap),
        cache=False,
    )


def _refusing(
    config: "RunConfig", form: "ConversationFormat", records: "tuple[Record, ...]", longest: int
) -> "tuple[RunConfig, tuple[Record, ...]]":
    """Return limits that hold for these records, and the records, one of them with a question more that is too long."""
    length, number, place = _longest_question(form, records)
    record = records[number]
    prompt = record.prompts[place]
    more: dict[str, Any] = {
        "prompts": (*record.prompts, f"{prompt}\n{prompt}"),
        "responses": (*record.responses, record.responses[place]),
    }
    if record.logprobs_vals is not None and record.logprobs_indices is not None:
        more["logprobs_vals"] = (*record.logprobs_vals, record.logprobs_vals[place])
        more["logprobs_indices"] = (*record.logprobs_indices, record.logprobs_indices[place])
    kept = (*records[:number], replace(record, **more), *records[number + 1 :])
    return changed(config, max_qas_len=length, max_ctx_len=longest, cache=False), kept


def _longest_question(form: "ConversationFormat", records: "tuple[Record, ...]") -> tuple[int, int, int]:
    """Return the tokens of the longest question with its answer, its record, and its place there."""
    found = [
        (len(expected.ids), number, place)
        for number, record in enumerate(records)
        for place, expected in enumerate(form.expected(list(zip(record.prompts, record.responses, strict=True))))
        if expected is not None
    ]
    return max(found)
