"""Witnesses of the data: records, rows, packing, cache, chat formats, needles and the teacher's table."""

import gzip
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
from transformers import PreTrainedTokenizerFast

from d2l.build import Components, fitted_base_config, load_records, tokenize
from d2l.config.schema import RunConfig
from d2l.data.cache import cached_rows, key_parts
from d2l.data.chat.conversations import SUPERVISED
from d2l.data.chat.format import ChatFormat, chat_format
from d2l.data.chat.supervision import supervised_texts, supervision_faults
from d2l.data.epochs import epoch_batches, stage_rows
from d2l.data.limits import Limits
from d2l.data.logprobs import check_logprobs, require_teacher_logprobs
from d2l.data.needles import needle_records
from d2l.data.packing import PackedBatch, collate, pack
from d2l.data.records import Record, document_in_prompts, read_records, write_records
from d2l.data.shards import row_sizes
from d2l.data.tokenize import tokenize_record, tokenize_records
from d2l.errors import D2LError
from d2l.fingerprint import base_facts, run_fingerprint
from d2l.train.teacher import add_teacher_logprobs
from experiments.mutants.values import Values
from experiments.mutants.witnesses_training import training_configs
from experiments.mutants.workbench import configurations, document_records, llama_config

_TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/[^/]*/")


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except D2LError as error:
        return f"{type(error).__name__}: {_TEMPORARY.sub('', str(error))[:400]}"


def limits_of_every_kind() -> dict[str, Limits]:
    """Return limits that cut, drop, split and draw."""
    return {
        "none": Limits(),
        "chunks": Limits(max_ctx_chunk_len=140),
        "few chunks": Limits(max_ctx_chunk_len=100, max_ctx_chunk_num=3),
        "drawn": Limits(
            max_ctx_chunk_len=200,
            min_ctx_chunk_len=90,
            num_chunk_probs={1: 0.3, 2: 0.4, 4: 0.3},
            max_packed_ctx_len=700,
        ),
        "unevenly drawn": Limits(max_ctx_chunk_len=1000, num_chunk_probs={1: 0.9, 2: 0.05, 4: 0.05}),
        "per sample": Limits(max_qas_per_sample=2),
        "short documents": Limits(max_ctx_len=250),
        "short rows": Limits(max_packed_ctx_len=300, max_packed_inp_len=200),
        "questions": Limits(max_qas_len=180, max_qas_per_sample=2),
        "short questions": Limits(max_qas_len=76),
        "positions": Limits(max_position_embeddings=90),
    }


def rows(values: Values) -> None:
    """Tokenize documents under limits of every kind, with and without drawn chunks, and list what was dropped."""
    components = Components(configurations()["llama"])
    for name, limits in limits_of_every_kind().items():
        for seed in (None, 5):
            found = _outcome(
                lambda limits=limits, seed=seed: tokenize_records(components.records, components.chat, limits, seed)
            )
            values[f"{name} {seed}"] = found if isinstance(found, str) else _tokenized(found)
    plain = Components(llama_config())
    values["content"] = _tokenized(plain.tokenized)
    values["run"] = _tokenized(components.tokenized)
    values["needles"] = _tokenized(Components(training_configs()["ce"]).tokenized)
    bad = replace(components.records[0], responses=components.records[0].responses[::-1])
    values["teacher of others"] = list(tokenize_record(0, bad, components.chat, Limits(), 1).problems)
    values["wrong teacher"] = _outcome(lambda: _tokenized(tokenize_records([bad], components.chat, Limits(), 1)))
    values["mixed teachers"] = _outcome(
        lambda: _tokenized(tokenize_records([*components.records, *document_records()], components.chat, Limits(), 1))
    )
    values["limits"] = asdict(Limits.of(configurations()["llama"], components.base_config))
    values["without teacher"] = _outcome(
        lambda: _tokenized(
            tokenize(configurations()["llama"], components.base_config, components.chat, document_records())
        )
    )


def _tokenized(tokenized: Any) -> list[Any]:
    dropped = [[drop.record, drop.query, drop.kind, drop.reason] for drop in tokenized.dropped]
    return [[asdict(row) for row in tokenized.rows], dropped, tokenized.n_records, tokenized.n_queries]


def _batch(batch: PackedBatch) -> list[Any]:
    derived = [batch.label_positions, batch.prediction_positions, batch.label_queries]
    tables = [batch.logprobs_vals, batch.logprobs_indices]
    tensors = [batch.ctx_ids, batch.ctx_position_ids, batch.input_ids, batch.position_ids, batch.labels, *derived]
    lengths = [batch.chunks.lengths, batch.queries.lengths, batch.contexts.lengths]
    return [
        *[tensor.tolist() for tensor in tensors],
        *[None if table is None else table.tolist() for table in tables],
        *map(list, lengths),
        list(batch.n_ctx_chunks),
        list(batch.n_queries),
        list(batch.record_ids),
        batch.n_labels,
        batch.n_tokens,
    ]


def batches(values: Values) -> None:
    """Pack the rows of several epochs and stages, and list every batch."""
    configs = {**configurations(), "curriculum": training_configs()["curriculum"]}
    for name, config in configs.items():
        made = Components(config).rows
        values[f"{name} sizes"] = row_sizes(made).tolist()
        values[f"{name} stages"] = [[r.start, r.stop] for r in stage_rows(config, made)]
        among = stage_rows(config, made)[-1]
        for epoch in range(2):
            packed = epoch_batches(config, made, epoch, among)
            values[f"{name} {epoch}"] = [_batch(batch) for batch in packed]
            values[f"{name} {epoch} slice"] = [_batch(batch) for batch in packed[1:3]]
    generator = Random(0)
    sizes = [(generator.randint(1, 120), generator.randint(1, 300)) for _ in range(1500)]
    packing = pack(sizes, 100, 250, seed=3)
    values["groups"] = [list(group) for group in packing.groups]
    values["oversized"] = [[one.row, one.reason] for one in packing.oversized]
    moved = collate(Components(configurations()["llama"]).rows[:2])
    values["moved"] = _batch(moved.to("cpu"))


def cache(values: Values) -> None:
    """Keep rows in a cache, read them back, and make keys for every input that shapes rows."""
    config = configurations()["llama"]
    components = Components(config)
    records, chat = components.records, components.chat
    limits = replace(limits_of_every_kind()["drawn"], max_qas_len=76)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for turn in range(2):
            found = cached_rows(records, chat, limits, 5, folder)
            values[f"turn {turn}"] = [*_tokenized(found), row_sizes(found.rows).tolist()]
        for shard in folder.glob("*/shard-*.arrow"):  # damage the ids: the shard has to be made anew
            shard.write_bytes(shard.read_bytes().replace(b"\x26\x00\x00\x00", b"\x27\x00\x00\x00"))
        values["damaged"] = _tokenized(cached_rows(records, chat, limits, 5, folder))
        many = needle_records(1003, 1, 2, 0, seed=1)
        for _ in range(2):
            found = cached_rows(many, chat, Limits(), 5, folder)
            values["many"] = [len(found.rows), [asdict(found.rows[place]) for place in (0, 999, 1000, 1002)]]
    values |= _keys(records, chat, limits)
    rest = RunConfig(**config.model_dump() | {"loss": "ce", "cache": False})
    values["tokenize"] = len(tokenize(rest, fitted_base_config(rest, chat.tokenizer), chat, records).rows)


def _keys(records: tuple[Record, ...], chat: ChatFormat, limits: Limits) -> Values:
    """List which inputs share a key."""
    other = replace(records[0], responses=("no", *records[0].responses[1:]))
    question = replace(records[0], prompts=("no", *records[0].prompts[1:]))
    value = replace(records[0], logprobs_vals=None)
    index = replace(records[0], logprobs_indices=None)
    renamed = PreTrainedTokenizerFast(tokenizer_object=chat.tokenizer.backend_tokenizer, eos_token="<|end|>")
    variants: dict[str, tuple[Any, ...]] = {
        "same": (records, chat, limits, 5),
        "document": ((replace(records[0], context="other"), *records[1:]), chat, limits, 5),
        "answer": ((other, *records[1:]), chat, limits, 5),
        "question": ((question, *records[1:]), chat, limits, 5),
        "teacher": ((value, *records[1:]), chat, limits, 5),
        "ids": ((index, *records[1:]), chat, limits, 5),
        "seed": (records, chat, limits, 6),
        "limits": (records, chat, replace(limits, max_ctx_chunk_len=101), 5),
        "questions": (records, chat, replace(limits, max_qas_per_sample=1), 5),
        "template": (records, replace(chat, template=chat.template + " "), limits, 5),
        "supervision": (records, replace(chat, supervision="content"), limits, 5),
        "date": (records, replace(chat, current_date="2020-01-01"), limits, 5),
        "tokenizer": (records, replace(chat, tokenizer=renamed), limits, 5),
    }
    keys = {name: json.dumps(key_parts(*arguments)) for name, arguments in variants.items()}
    return {f"key {name}": key == keys["same"] for name, key in keys.items()}


def records(values: Values) -> None:
    """Read records from files of every form, malformed ones too."""
    some = [{key: value for key, value in vars(record).items() if key != "source"} for record in document_records()[:4]]
    plain = [{key: value for key, value in record.items() if value is not None} for record in some]
    lines = [json.dumps(record, ensure_ascii=False) for record in plain]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
        (folder / "b.json").write_text("[" + ",".join(lines) + "]", encoding="utf-8")
        (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), folder / "d.parquet")
        broken = [
            *lines,
            '{"context": " ", "prompts": ["a"], "responses": ["b"]}',
            '{"context": "x", "prompts": ["a"]}',
        ]
        more = ['{"context": "x", "prompts": ["a", "b"], "responses": ["b"]}', "{", '{"context": "x", "prompts": []}']
        (folder / "e.jsonl").write_text("\n".join([*broken, *more]), encoding="utf-8")
        for path in sorted(folder.iterdir()):
            values[path.name] = _outcome(lambda path=path: _plain(read_records([path]), folder))
        for limit in (1, 3, 6):
            values[f"limit {limit}"] = _plain(
                read_records([folder / "[ab].json*", folder / "d.parquet"], limit), folder
            )
        write_records(folder / "w.jsonl", document_records())
        values["written"] = _plain(read_records([folder / "w.jsonl"]), folder)
        data = [str(folder / "a.jsonl"), str(folder / "d.parquet"), "needle"]
        config = RunConfig(train_ds_names=data, max_train_samples_per_ds=3, needle_documents=5)
        values["of a run"] = _plain(load_records(config), folder)
    values["in prompts"] = _plain([document_in_prompts(record) for record in document_records()], folder)
    values["of a curriculum"] = _plain(load_records(training_configs()["curriculum"]), folder)


def _plain(found: Any, folder: Path) -> list[Any]:
    return [{**vars(record), "source": record.source.replace(str(folder), "")} for record in found]


def chat(values: Values) -> None:
    """Encode conversations by both conventions and by a template that is not harmony's; affixes, texts, fingerprints."""
    tokenizer = Components(llama_config()).tokenizer
    own = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|return|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    formats = {
        "content": chat_format(tokenizer),
        "sampled": chat_format(tokenizer, supervision="sampled", current_date="2024-02-09"),
        "own": chat_format(tokenizer, template=own),
    }
    for name, form in formats.items():
        for number, turns in enumerate(SUPERVISED):
            encoded = form.encode(turns)
            values[f"{name} {number}"] = [encoded.input_ids, encoded.supervised, supervised_texts(form, encoded)]
            values[f"{name} {number} faults"] = list(supervision_faults(form, turns))
        values[f"{name} affixes"] = [list(side) for side in form.context_affixes()]
        values[f"{name} prompt"] = form.encode(SUPERVISED[0][:1], add_generation_prompt=True).input_ids
        values[f"{name} text"] = [form.encode_text(" a  b "), form.decode(form.encode_text("Größe  42 <|end|>"))]
        spelled = [{"role": turn["role"], "content": f"<|end|>{turn['content']}"} for turn in SUPERVISED[0]]
        values[f"{name} spelled"] = [form.encode_contents("a <|end|>"), form.encode(spelled).input_ids]
        values[f"{name} fingerprint"] = [form.fingerprint[:9], form.tokenizer_fingerprint[:9], form.has_generation_tags]
        values[f"{name} day"] = date.fromisoformat(form.current_date).toordinal()


def needles(values: Values) -> None:
    """Make needles of both styles and splits."""
    for style in ("sentences", "pairs"):
        for split in ("train", "heldout"):
            made = needle_records(6, 3, 2, 40, seed=1, split=split, style=style, min_filler_words=8)
            values[f"{style} {split}"] = [vars(record) for record in made]


def teacher(values: Values) -> None:
    """Compute a teacher's table, and check tables of every kind."""
    components = Components(llama_config())
    records = document_records()[:3]
    made = add_teacher_logprobs(records, components.base, components.chat, top_k=3, packed_tokens=900)
    values |= {"table": [[record.logprobs_vals, record.logprobs_indices] for record in made]}
    good, ids = [[-1.0, -2.0], [-0.5, -3.0]], [[1, 2], [3, 4]]
    for name, arguments in {
        "good": (good, ids, 2),
        "length": (good, ids, 3),
        "not finite": ([[-1.0, float("nan")], [-0.5, -3.0]], ids, 2),
        "mass": ([[-0.1, -0.2], [-0.5, -3.0]], ids, 2),
        "shape": (good, [[1, 2]], 2),
        "negative": (good, [[1, -2], [3, 4]], 2),
    }.items():
        values[name] = _outcome(lambda arguments=arguments: check_logprobs(*arguments))
    values["required"] = _outcome(lambda: require_teacher_logprobs([*made, records[0]], 1024))
    values["beyond"] = _outcome(lambda: require_teacher_logprobs(made, 100))
    config, base_config = components.config, components.base_config
    for name, other in {"same": records, "answers": [replace(records[0], responses=records[0].prompts)]}.items():
        values[f"fingerprint {name}"] = run_fingerprint(config, base_config, components.chat, other, {}).total
    values["facts"] = base_facts(base_config)
