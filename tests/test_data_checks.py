"""The checks of stage `data`: green on clean data of every family, red by name for each bug in the real production code."""

import gzip
import json
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.chat_formats import CHATML, PLAIN, generic
from support.families import FAMILIES

from checks import preflight
from checks.data.expected import conversation_format
from checks.data.variants import PRINTED, variants
from checks.oracles.conversations import ConversationFormat
from checks.oracles.record_files import read_file
from checks.production import make_subject
from checks.report import plain_text
from checks.result import Report
from checks.rule import Fault, Rule
from checks.rules import RULES
from checks.runner import run_checks
from checks.subject import Subject, changed
from d2l import build
from d2l.config.descriptions import GROUPS
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data import cache, chunks, epochs, packing, tokenize
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.data.limits import Limits
from d2l.data.records import Record, read_records, write_records
from d2l.errors import DataError
from d2l.io.resources import resource

# Text beyond ASCII, control tokens and white space at the edges, several questions, answers that occur twice.
RECORDS = (
    Record(
        "Größe 42, 大きさ 🙂. The red fox sat near the old barn, and the blue whale slept beside the bridge.",
        ("How large?", " Wie groß? ", "Who slept?"),
        ("42", "Größe 42 — 四十二 🙂", "  the blue whale "),
        "a:1",
    ),
    Record(" A page with a control token, {end}, in it\nand a second line.\n", ("Which {end}?",), ("a token",), "a:2"),
    Record("Short.", ("What?", "Which?"), ("Short.", "Short."), "a:3"),
    Record("The value of amber dog is 12. The value of coral fox is 97. " * 6, ("amber dog?",), ("12",), "a:4"),
)
LIMITS: dict[str, dict[str, Any]] = {
    "roomy": {"max_packed_inp_len": 4096, "max_packed_ctx_len": 8192},
    "chunked": {
        "max_ctx_chunk_len": 110,
        "num_chunk_probs": {1: 0.2, 2: 0.4, 3: 0.4},
        "max_qas_per_sample": 2,
        "max_packed_inp_len": 400,
        "max_packed_ctx_len": 900,
    },
}


def subject_of(family: str, records: tuple[Record, ...] = RECORDS, **values: Any) -> Subject:
    """A run of this family on these records; control tokens in their texts are the family's own."""
    if family == "gpt_oss":
        made, end = make_subject(load_config()), "<|end|>"
    else:
        tokenizer = FAMILIES[family].tokenizer(FAMILIES[family].text)
        base_config = FAMILIES[family].base_config(len(tokenizer))
        base_config.max_position_embeddings = 2048
        end = FAMILIES[family].end
        made = replace(make_subject(load_config()), tokenizer=tokenizer, base_config=base_config)
    placed = tuple(
        replace(
            record,
            context=record.context.replace("{end}", end),
            prompts=tuple(prompt.replace("{end}", end) for prompt in record.prompts),
        )
        for record in records
    )
    config = changed(made.config, train_ds_names=(), cache=False, **values)
    return replace(made, config=config, records=placed)


# They take longer than all others together: one makes a run's rows forty times, one reads them with the base. Where they
# are not the point, `make test` leaves them out, and `make fuzz` runs all.
DEAR = ("CCH301", "TCH301", "EXP203", "EVL302", "SAV204", "DAT310")
each_check = pytest.mark.parametrize(
    "without", [pytest.param(DEAR, id="quick"), pytest.param((), id="all", marks=pytest.mark.slow)]
)


def data_report(subject: Subject, without: Collection[str] = ()) -> Report:
    chosen = [rule for rule in RULES if rule.stage in ("static", "data") and rule.code not in without]
    return run_checks(subject, chosen, stages=("data",))


def assert_green(report: Report) -> None:
    """Demand that nothing is found.

    That a run begins with short chunks is a warning, and these documents are cut on purpose; few of them cannot be held out.
    """
    expected = {("CHK301", "warn"), ("DAT310", "inapplicable"), ("DAT311", "inapplicable")}
    found = {outcome.outcome for outcome in report.outcomes if (outcome.code, outcome.outcome) not in expected}
    assert found == {"pass"}, plain_text(report)


def red(subject: Subject, without: Collection[str] = ()) -> set[str]:
    return {outcome.code for outcome in data_report(subject, without).outcomes if outcome.outcome in ("fail", "crash")}


# Every family with every kind of limits and supervision. In `make test`, GPT-OSS with two cases that have each of them,
# and other families with one case each and without the dear checks.
ALL_CHECKS = {("gpt_oss", "roomy", "sampled"), ("gpt_oss", "chunked", "content")}
CLEAN = [
    pytest.param(*case, (), marks=() if case in ALL_CHECKS else pytest.mark.slow, id="-".join(case))
    for case in product(["gpt_oss", *FAMILIES], LIMITS, ["content", "sampled"])
] + [pytest.param(family, "chunked", "content", DEAR, id=f"{family}-quick") for family in FAMILIES]


@pytest.mark.parametrize(("family", "limits", "supervision", "without"), CLEAN)
def test_clean_data_of_every_family_is_green(
    family: str, limits: str, supervision: str, without: Collection[str]
) -> None:
    report = data_report(subject_of(family, supervision=supervision, **LIMITS[limits]), without)
    assert_green(report)


SENTENCES = LIMITS["chunked"] | {"chunking": "sentences"}
CHUNK_RULES = ("DAT304", "DAT305", "DAT306", "DAT309")


@each_check
@pytest.mark.parametrize(("family", "overlap"), [("gpt_oss", 0), ("gpt_oss", 7), ("mistral", 7)])
def test_chunks_of_whole_sentences_and_overlaps_are_green(family: str, overlap: int, without: Collection[str]) -> None:
    subject = subject_of(family, **SENTENCES, chunk_overlap=overlap)
    report = data_report(subject, without)
    assert_green(report)


@each_check
@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        pytest.param(rule, fault, id=f"{rule.code}-{fault.name}", marks=pytest.mark.slow if number > 1 else ())
        for rule in RULES
        if rule.code in CHUNK_RULES
        for number, fault in enumerate(rule.faults)
    ],
)
def test_planted_faults_are_found_in_chunks_of_sentences_with_overlaps(
    rule: Rule, fault: Fault, without: Collection[str]
) -> None:
    subject = subject_of("gpt_oss", **SENTENCES, chunk_overlap=7)
    assert red(fault.plant(subject), without) == {rule.code}


@each_check
@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["chatml", "plain"])
def test_a_template_whose_text_merges_with_the_document_is_green(
    template: str, without: Collection[str], tmp_path: Path
) -> None:
    """`User: ` and a newline around the document, and a template that writes no generation prompt."""
    path = tmp_path / "template.jinja"
    path.write_text(template, encoding="utf-8")
    clean = replace(subject_of("gpt_oss", chat_template=str(path), **LIMITS["chunked"]), tokenizer=generic)
    report = data_report(clean, {*without, "EVL301"})
    assert_green(report)
    (asked,) = run_checks(clean, RULES, select=("EVL301",)).outcomes
    assert (asked.outcome, "generation prompt" in asked.remedy) == ("fail", True)  # questions would have no header


def test_a_template_that_prints_the_date_by_the_clock_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    days = "{{ strftime_now('%d %b %Y') }}|{{ strftime_now(\"%A\") }}"
    path.write_text(days + CHATML + "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}", encoding="utf-8")
    clean = replace(subject_of("gpt_oss", chat_template=str(path), current_date="2024-02-09"), tokenizer=generic)
    form = conversation_format(clean)
    assert form.document("x").startswith("09 Feb 2024|Friday<|start|>user")
    assert form.document("x") == clean.chat.render([{"role": "user", "content": "x"}])
    assert red(clean) == set()


def taught(subject: Subject) -> Subject:
    """The same run with a teacher's logprobs, other ones for every question, and the KL loss."""
    assert subject.records is not None
    labels: dict[int, list[int]] = {}
    for row in subject.rows.rows:
        labels.setdefault(row.record, []).extend(query.n_labels for query in row.queries)
    records = tuple(
        replace(
            record,
            logprobs_vals=tuple(
                tuple((-0.5 - 0.01 * place, -2.0) for _ in range(count)) for place, count in enumerate(labels[number])
            ),
            logprobs_indices=tuple(
                tuple((place + 1, number + 7) for _ in range(count)) for place, count in enumerate(labels[number])
            ),
        )
        for number, record in enumerate(subject.records)
    )
    return replace(subject, records=records, config=changed(subject.config, loss="kl"))


@pytest.mark.parametrize("limits", [pytest.param("roomy", marks=pytest.mark.slow), "chunked"])
@each_check
def test_a_teachers_logprobs_are_green_and_red_where_they_are_another_questions(
    limits: str, without: Collection[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = taught(subject_of("gpt_oss", **LIMITS[limits]))
    assert red(clean) == set()
    collate = packing.collate

    def reversed_teacher(rows: Any) -> Any:
        batch = collate(rows)
        assert batch.logprobs_vals is not None
        return replace(batch, logprobs_vals=batch.logprobs_vals.flip(0))

    monkeypatch.setattr(packing, "collate", reversed_teacher)
    assert red(replace(clean), without) == {"LBL301"}


# Bugs in the production code itself: what is replaced, by what, and the check that names it

Plant = Callable[[pytest.MonkeyPatch], None]


def after(module: Any, name: str, change: Callable[..., Any]) -> Plant:
    """Replace a function of production by one whose result is changed; `change` gets the result, then the arguments."""
    healthy = getattr(module, name)
    return lambda monkeypatch: monkeypatch.setattr(
        module, name, lambda *args, **kwargs: change(healthy(*args, **kwargs), *args)
    )


def before(module: Any, name: str, change: Callable[..., tuple[Any, ...]]) -> Plant:
    """Replace a function of production by one that gets other arguments."""
    healthy = getattr(module, name)
    return lambda monkeypatch: monkeypatch.setattr(
        module, name, lambda *args, **kwargs: healthy(*change(*args), **kwargs)
    )


def relabelled(change: Callable[[list[int]], list[int]]) -> Plant:
    """Label other places of a question than those of the mask."""

    def labels(made: tuple[int, ...], ids: list[int], supervised: list[bool]) -> tuple[int, ...]:
        places = change([place for place, label in enumerate(made) if label != -100])
        return tuple(token if place in places else -100 for place, token in enumerate(ids))

    return after(tokenize, "labels_from_mask", labels)


def with_field(field: str, change: Callable[[Record], Any]) -> Plant:
    """Make questions of a record with one field changed."""
    return before(
        tokenize,
        "_make_query",
        lambda record, position, *rest: (replace(record, **{field: change(record)}), position, *rest),
    )


def batch_with(**changes: Callable[[Any], Any]) -> Plant:
    """Change tensors of every batch."""
    return after(
        packing,
        "collate",
        lambda batch, rows: replace(batch, **{name: change(getattr(batch, name)) for name, change in changes.items()}),
    )


def documents_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = packing.collate
    monkeypatch.setattr(
        packing,
        "collate",
        lambda rows: healthy([replace(row, chunks=rows[place - 1].chunks) for place, row in enumerate(rows)]),
    )


def last_label_lost(labels: Any) -> Any:
    changed_labels = labels.clone()
    changed_labels[0, (labels[0] != -100).nonzero()[-1]] = -100
    return changed_labels


def unlimited(name: str) -> Plant:
    """Ignore a limit where rows are made."""
    value = None if name in ("max_ctx_chunk_num", "num_chunk_probs") else -1
    return before(
        tokenize,
        "tokenize_record",
        lambda index, record, chat, limits, seed: (index, record, chat, replace(limits, **{name: value}), seed),
    )


BUGS: dict[str, tuple[Plant, str]] = {
    "labels on the prompt": (relabelled(lambda places: [*range(1, places[-1] + 1)]), "LBL301"),
    "labels on the header": (relabelled(lambda places: [places[0] - 1, *places]), "LBL301"),
    "stop token not trained": (relabelled(lambda places: places[:-1]), "LBL301"),
    "first label lost": (relabelled(lambda places: places[1:]), "LBL301"),
    "labels a place early": (relabelled(lambda places: [place - 1 for place in places]), "LBL301"),
    "labels shifted in the batch": (batch_with(labels=lambda labels: labels.roll(1)), "LBL301"),
    "last label of a batch lost": (batch_with(labels=last_label_lost), "LBL301"),
    "another question": (with_field("prompts", lambda it: it.prompts[1:] + it.prompts[:1]), "DAT302"),
    "another answer": (with_field("responses", lambda it: it.responses[1:] + it.responses[:1]), "DAT302"),
    "document in the prompt": (
        with_field("prompts", lambda it: tuple(f"{it.context[:40]}\n\n{prompt}" for prompt in it.prompts)),
        "DAT302",
    ),
    "positions that never restart": (batch_with(position_ids=lambda ids: ids + 1), "DAT302"),
    "positions that never restart, of documents too": (
        after(packing, "_positions", lambda positions, parts: positions + 1),
        "DAT302",
    ),
    "chunk positions that never restart": (batch_with(ctx_position_ids=lambda ids: ids + 1), "DAT304"),
    "first question of a row dropped": (
        after(tokenize, "split_queries", lambda groups, *_: [group[1:] or group for group in groups]),
        "DAT303",
    ),
    "last row of a record dropped": (
        after(tokenize, "split_queries", lambda groups, *_: groups[:-1] or groups),
        "DAT303",
    ),
    "drops unreported": (after(tokenize, "tokenize_record", lambda part, *_: replace(part, dropped=())), "DAT303"),
    "batch lost": (before(epochs, "PackedBatches", lambda rows, groups: (rows, groups[:-1])), "DAT303"),
    "batch twice": (before(epochs, "PackedBatches", lambda rows, groups: (rows, [*groups, groups[0]])), "DAT303"),
    "document of the row before": (documents_of_neighbours, "DAT303"),
    "needles lost": (after(build, "needle_records", lambda records, **_: records[:-1]), "DAT307"),
    "document cut to 60 characters": (
        before(tokenize, "chunk_document", lambda text, *rest: (text[:60], *rest)),
        "DAT304",
    ),
    "last chunk lost": (after(chunks, "split_context", lambda chunks, *_: chunks[:-1] or chunks), "DAT304"),
    "tail lost": (before(chunks, "split_context", lambda text, *rest: (text[:-1] or text, *rest)), "DAT304"),
    "end token lost": (
        before(chunks, "split_context", lambda text, prefix, suffix, *rest: (text, prefix, suffix[:-1], *rest)),
        "DAT304",
    ),
    "first token doubled": (
        before(chunks, "split_context", lambda text, prefix, *rest: (text, [prefix[0], *prefix], *rest)),
        "DAT304",
    ),
    "packed rows over their limit": (
        before(epochs, "pack", lambda sizes, inp, ctx: (sizes, 2 * inp, 2 * ctx)),
        "DAT305",
    ),
    **{
        f"{name} ignored": (unlimited(name), "DAT305")
        for name in (
            "max_position_embeddings",
            "max_qas_len",
            "max_qas_per_sample",
            "max_ctx_len",
            "max_ctx_chunk_len",
            "max_ctx_chunk_num",
        )
    },
}


FEW = {"needle_documents": "12", "eval_documents": "2"}  # still in several batches


@each_check
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_production_is_red_by_the_check_that_names_it(
    bug: str, without: Collection[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, code = BUGS[bug]
    plant(monkeypatch)
    report = data_report(make_subject(load_config(None, FEW)), without)
    found = {outcome.code for outcome in report.outcomes if outcome.outcome in ("fail", "crash")}
    assert found == {code}, plain_text(report)


# The cache


def part_of_key(name: str) -> Plant:
    """Leave one part out of the cache's key."""
    return after(cache, "key_parts", lambda parts, *_: {key: value for key, value in parts.items() if key != name})


def field_of_records(name: str) -> Plant:
    """Leave one field of the records out of the cache's key."""
    blank = {"context": "", "prompts": (), "responses": (), "logprobs_vals": None, "logprobs_indices": None}
    return before(
        cache,
        "key_parts",
        lambda records, *rest: ([replace(record, **{name: blank[name]}) for record in records], *rest),
    )


def limit_of_key(name: str) -> Plant:
    return before(
        cache,
        "key_parts",
        lambda records, chat, limits, *rest: (records, chat, replace(limits, **{name: None}), *rest),
    )


KEYS: dict[str, tuple[Plant, str]] = {
    "chat": (part_of_key("chat"), "control_tokens, chat_template, supervision, current_date"),
    "tokenizer": (part_of_key("tokenizer"), "tokenizer_name_or_path"),
    "seed": (part_of_key("seed"), "seed"),
    "context": (field_of_records("context"), "documents"),
    "prompts": (field_of_records("prompts"), "prompts"),
    "responses": (field_of_records("responses"), "responses"),
    "logprobs_vals": (field_of_records("logprobs_vals"), "logprobs_vals"),
    "logprobs_indices": (field_of_records("logprobs_indices"), "logprobs_indices"),
    **{
        field.name: (
            limit_of_key(field.name),
            "model_name_or_path" if field.name == "max_position_embeddings" else field.name,
        )
        for field in fields(Limits)
    },
}


QUICK_KEYS = {"chat", "context", "max_ctx_len"}  # one of each kind; the others are looked at in `make fuzz`


@pytest.mark.parametrize(
    "key", [pytest.param(name, marks=() if name in QUICK_KEYS else pytest.mark.slow) for name in KEYS]
)
def test_a_cache_key_without_something_is_red_and_names_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, named = KEYS[key]
    plant(monkeypatch)
    (outcome,) = run_checks(make_subject(load_config()), RULES, select=("CCH301",)).outcomes
    assert outcome.outcome == "fail", outcome.message
    assert outcome.message == f"the cache gives stale rows where these change: {named}"


# Fields of the configuration that shape no rows beside the records themselves, and why
SHAPE_NO_ROWS = {
    "attn_implementation": "how the base computes",
    "dtype": "how the base computes",
    "expert_weights": "how the base computes",
    "expert_transient_gib": "how the base computes",
    "base_sharding": "where the base lies",
    "device_memory": "where it computes",
    "train_ds_names": "which records there are: their contents are in the key",
    "max_train_samples_per_ds": "which records there are",
    **dict.fromkeys(
        ("needle_documents", "needle_pairs", "needle_digits", "needle_style", "needle_filler_words", "curriculum"),
        "which records there are",
    ),
    "cache": "whether there is a cache",
    "cache_dir": "where the cache lies",
}


def test_every_field_that_shapes_rows_has_a_variant_that_changes_them(tmp_path: Path) -> None:
    subject = make_subject(load_config())
    found = list(variants(subject, tmp_path))
    varied = {inputs.field for inputs in found} - {"nothing"}
    data = {*GROUPS["Base model and tokenizer"], *GROUPS["Data"], "seed"}
    assert data - SHAPE_NO_ROWS.keys() == {name for name in varied if name in RunConfig.model_fields}
    assert {field.name for field in fields(Limits)} - {"max_position_embeddings"} <= varied
    contents = {field.name for field in fields(Record)} - {"source"}
    assert contents - varied == {"context"}  # its variant is called documents
    (outcome,) = run_checks(subject, RULES, select=("CCH301",)).outcomes
    assert outcome.evidence["without_effect"] == []


def test_a_template_may_write_more_on_another_day_than_a_document_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("checks.data.variants.PRINTED", PRINTED + "{{ 'word ' * 90 if strftime_now('%Y') == '2019' }}")
    (outcome,) = run_checks(make_subject(load_config()), RULES, select=("CCH301",)).outcomes
    assert outcome.outcome == "pass", outcome.message
    assert outcome.evidence["without_effect"] == []


# Oracles


@pytest.mark.parametrize("supervision", ["content", "sampled"])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("family", ["gpt_oss", *FAMILIES])
def test_questions_are_expected_alike_whether_each_is_rendered_or_not(
    family: str, each: bool, supervision: Any
) -> None:
    """The ids are those of the rendered text, and what is supervised decodes to the answer and its end token."""
    subject = subject_of(family, supervision=supervision)
    form = conversation_format(subject)
    pairs = [pair for record in RECORDS for pair in zip(record.prompts, record.responses, strict=True)]
    for (question, answer), expected in zip(pairs, form.expected(pairs, each=each), strict=True):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert expected is not None
        assert expected.ids == form.encode(form.render([turns])[0])
        found = form.decode(expected.ids[expected.start : expected.stop])
        end = "<|return|>" if family == "gpt_oss" else FAMILIES[family].end
        assert found.endswith(end)
        control = form.control_tokens.split(found.removesuffix(end))
        header = "final" if family == "gpt_oss" and supervision == "sampled" else ""
        assert "".join(control).removeprefix(header).strip() == answer.strip()


def test_supervised_text_is_that_of_the_golden_renders(shared: Path) -> None:
    """Spans of an official render, made without this project; see golden/chat."""
    lines = (shared / "golden/chat/golden.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = load_tokenizer(str(shared / "tokenizers/gpt-oss"))
    compared = 0
    for case in map(json.loads, lines):
        turns = case["messages"]
        plain = [[*turn] for turn in turns] == [["role", "content"]] * 2 and not case["tools"] and "error" not in case
        if not plain or case["kwargs"] not in ({}, {"add_generation_prompt": False}):
            continue
        for supervision in ("content", "sampled"):
            template = resource("chat_templates/openai/gpt-oss-20b.jinja").read_text(encoding="utf-8")
            form = ConversationFormat(tokenizer, template, supervision, date.fromisoformat(case["date"]))
            (expected,) = form.expected([(turns[0]["content"], turns[1]["content"])])
            ((start, stop),) = case[f"{supervision}_spans"]
            assert expected is not None
            assert form.decode(expected.ids) == case["rendered"]
            assert form.decode(expected.ids[expected.start : expected.stop]) == case["rendered"][start:stop]
            compared += 1
    assert compared >= 10


def test_a_refused_conversation_is_expected_nowhere() -> None:
    form = conversation_format(subject_of("gpt_oss"))
    refused = "<|channel|>final<|message|>"
    first, second = form.expected([("Who?", refused), ("Who?", "Me.")])
    assert first is None
    assert second is not None


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "folder", "glob"])
def test_files_are_read_as_the_run_reads_them(kind: str, tmp_path: Path) -> None:
    rows = [
        {"context": record.context, "prompts": [*record.prompts], "responses": [*record.responses]}
        for record in RECORDS
    ]
    name = str(tmp_path / f"data.{kind}")
    if kind == "json":
        Path(name).write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    elif kind == "folder":
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(name)
    else:
        text = "\n\n".join(json.dumps(row) for row in rows).encode()
        data = gzip.compress(text) if kind.endswith("gz") else text
        for path in (tmp_path / "b.jsonl", tmp_path / "a.jsonl") if kind == "glob" else (Path(name),):
            path.write_bytes(data)
        name = str(tmp_path / "*.jsonl") if kind == "glob" else name
    for limit in (None, 3, 6):
        expected = [(record.context, record.prompts, record.responses) for record in read_records([name], limit)]
        assert read_file(name, limit) == expected


def test_records_that_differ_from_their_file_are_red(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_records(path, [replace(record, context=record.context.replace("{end}", "end")) for record in RECORDS])
    clean = make_subject(load_config(None, {"train_ds_names": f"[{path}]", "max_packed_inp_len": "4096"}))
    assert red(clean) == set()
    assert clean.records is not None
    first, *others = clean.records
    for read in (
        (first, *others[1:]),
        (replace(first, responses=("forty-two", *first.responses[1:])), *others),
        (*others, first),
        (first, *others, first),
    ):
        assert red(replace(clean, records=read)) == {"DAT307"}


def test_data_is_read_only_where_a_check_of_stage_data_is_requested(tmp_path: Path) -> None:
    config = changed(load_config(), train_ds_names=(str(tmp_path / "absent.jsonl"),))
    assert preflight(config, stages=("static",)).exit_code() == 0
    for stages in ((), ("static", "data")):
        with pytest.raises(DataError, match=r"train_ds_names\[0\] .*absent.jsonl: does not exist"):
            preflight(config, stages=stages)


@each_check
@pytest.mark.parametrize("pairs", [1, 4])
def test_the_shipped_needles_are_green_in_every_stage_of_their_curriculum(pairs: int, without: Collection[str]) -> None:
    stage = f"[{{pairs: {pairs}, digits: 1}}]"
    config = load_config(Path("configs/needle_tiny.yaml"), {"curriculum": stage, "needle_documents": "40"})
    assert red(make_subject(config), without) == set()


def test_documents_of_which_the_base_reads_no_three_at_once_are_green() -> None:
    """Its chunks hold 4,096 tokens, a document 1,900."""
    config = load_config(None, {"needle_filler_words": "1600", "needle_documents": "4", "max_packed_ctx_len": "9000"})
    assert_green(data_report(make_subject(config)))
