"""Cache of token rows: equal to tokenizing anew, and never another run's rows, after damage, interruption and races."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2l import build as run_build
from d2l.config.schema import RunConfig
from d2l.data import cache, shards
from d2l.data.cache import MANIFEST, cached_rows, default_folder, key_parts
from d2l.data.chat.format import ChatFormat, Encoded, chat_format
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.data.epochs import epoch_batches
from d2l.data.needles import needle_records
from d2l.data.records import Record, read_records, write_records
from d2l.data.shards import row_sizes
from d2l.data.tokenize import Limits, Tokenized, tokenize_record, tokenize_records
from d2l.errors import DataError
from d2l.fingerprint import run_fingerprint

USER, ASSISTANT, END = 1, 2, 3


@dataclass(frozen=True)
class WordChat:
    """`<user> q <assistant> a <end>`, one token a word; supervised are the answer and its end token."""

    fingerprint: str = "template"
    tokenizer_fingerprint: str = "words"

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> Encoded:
        question, answer = (self.encode_text(message["content"]) for message in messages)
        if "forbidden" in messages[0]["content"]:
            raise DataError("the chat template refuses this conversation: it says forbidden")
        ids = [USER, *question, ASSISTANT, *answer, END]
        return Encoded(ids, [False] * (len(question) + 2) + [True] * (len(answer) + 1))

    def encode_text(self, text: str) -> list[int]:
        return [10 + len(word) for word in text.split()]

    def least_tokens(self, text: str) -> int:
        return 0

    def encode_contents(self, text: str) -> list[int]:
        return self.encode_text(text)

    def context_affixes(self) -> tuple[list[int], list[int]]:
        return [USER], [END]


CHAT = cast(ChatFormat, WordChat())
LIMITS = Limits(max_ctx_len=10, max_qas_len=9, max_ctx_chunk_len=8, num_chunk_probs={1: 0.5, 2: 0.5})


def teacher(n_labels: int) -> dict[str, Any]:
    values = tuple((-0.1 * (t + 1), -9.5) for t in range(n_labels))
    return {"logprobs_vals": (values,), "logprobs_indices": (tuple((t, 200_000) for t in range(n_labels)),)}


def some_records(count: int = 10) -> list[Record]:
    """Documents of 1 to `count` words: the last ones too long, and of every third one question."""
    return [
        Record("aa " * n, ("which one", "what"), ("bb", "c " * (9 if n % 3 == 0 else n % 2 + 1)), f"a.jsonl:{n}")
        for n in range(1, count + 1)
    ]


RECORDS = some_records()


@pytest.fixture(autouse=True)
def _three_records_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RECORDS_PER_SHARD", 3)


TOKENIZER = "configs/models/tiny_gpt_oss"


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return chat_format(load_tokenizer(TOKENIZER))


@pytest.fixture
def tokenized_records(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the records that are tokenized from now on."""
    indices: list[int] = []

    def spy(index: int, *arguments: Any) -> Any:
        indices.append(index)
        return tokenize_record(index, *arguments)

    monkeypatch.setattr(cache, "tokenize_record", spy)
    return indices


def build(folder: Path, records: Sequence[Record] = RECORDS, **hooks: Any) -> Tokenized:
    return cached_rows(records, CHAT, LIMITS, 7, folder, **hooks)


def assert_same(ours: Tokenized, fresh: Tokenized) -> None:
    assert tuple(ours.rows) == tuple(fresh.rows)
    assert replace(ours, rows=()) == replace(fresh, rows=())
    assert str(ours) == str(fresh)
    np.testing.assert_array_equal(row_sizes(ours.rows), [row.size for row in fresh.rows])


FRESH = tokenize_records(RECORDS, CHAT, LIMITS, 7)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(next(folder.iterdir()))) for path in folder.rglob("*") if path.is_file())


ALL_FILES = [MANIFEST, *(f"shard-{number:05d}.arrow" for number in range(4))]


# Equal to tokenizing anew


def test_cold_and_warm_are_equal_to_no_cache(tmp_path: Path, tokenized_records: list[int]) -> None:
    assert {drop.kind for drop in FRESH.dropped} == {"document too long", "question too long"}
    for _ in range(3):
        assert_same(build(tmp_path), FRESH)
    assert tokenized_records == list(range(10))
    assert files(tmp_path) == ALL_FILES


def test_teacher_logprobs_come_back_exactly(tmp_path: Path) -> None:
    records = [Record("a b", ("q",), ("b " * n,), "s", **teacher(n + 1)) for n in range(1, 6)]
    lines = tmp_path / "records.jsonl"
    write_records(lines, records)
    cache = tmp_path / "cache"
    for same in (records, read_records([lines]), records):  # read as tables, which change no key
        ours = cached_rows(same, CHAT, Limits(), None, cache)
        assert_same(ours, tokenize_records(records, CHAT, Limits()))
        assert len([*cache.iterdir()]) == 1
    assert ours.rows[4].queries[0].logprobs_vals == records[4].logprobs_vals[0]  # type: ignore[index]


def test_rows_are_indexed_like_a_tuple(tmp_path: Path) -> None:
    ours, fresh = build(tmp_path).rows, FRESH.rows
    for index in (0, 5, -1, -len(fresh), slice(2, 7), slice(None, None, -2), slice(90, 95)):
        assert ours[index] == (list(fresh[index]) if isinstance(index, slice) else fresh[index])
    for index in (len(fresh), -len(fresh) - 1):
        with pytest.raises(IndexError):
            ours[index]


def test_a_shard_without_rows(tmp_path: Path) -> None:
    long = [Record("a " * 30, ("q",), ("b",), f"s:{n}") for n in range(3)]
    for records in ([*long, *RECORDS], [*RECORDS[:3], *long]):
        for _ in range(2):
            assert_same(build(tmp_path, records), tokenize_records(records, CHAT, LIMITS, 7))


def test_moved_data_is_the_same_data_and_is_reported_where_it_is_now(
    tmp_path: Path, tokenized_records: list[int]
) -> None:
    build(tmp_path)
    del tokenized_records[:]
    moved = [replace(record, source=f"b/{record.source}") for record in RECORDS]
    assert_same(build(tmp_path, moved), tokenize_records(moved, CHAT, LIMITS, 7))
    assert tokenized_records == []


@pytest.mark.parametrize(
    "records",
    [
        [
            *RECORDS,
            Record("a", ("forbidden", "q"), ("b", "b"), "s:1"),
            *RECORDS,
            Record("a", ("forbidden",), ("b",), "s:2"),
        ],
        [*RECORDS, Record("a b", ("q",), ("b",), "s", **teacher(2))],
        [Record("a " * 30, ("q",), ("b",), "s")] * 8,
    ],
    ids=["refused by the template", "teachers differ", "no row is left"],
)
def test_unusable_records_give_the_same_error_every_time(tmp_path: Path, records: list[Record]) -> None:
    with pytest.raises(DataError) as expected:
        tokenize_records(records, CHAT, LIMITS, 7)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            build(tmp_path, records)
        assert str(caught.value) == str(expected.value)


words = st.integers(1, 14).map(lambda n: "a " * n)
record_lists = st.lists(
    st.builds(
        lambda context, answers: Record(context, ("q",) * len(answers), tuple(answers), "s"),
        words,
        st.lists(words, min_size=1, max_size=4),
    ),
    max_size=7,
)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    record_lists,
    st.builds(
        Limits,
        max_ctx_len=st.sampled_from([-1, 9]),
        max_ctx_chunk_len=st.sampled_from([6, 30]),
        num_chunk_probs=st.sampled_from([None, {1: 0.5, 3: 0.5}]),
        max_qas_len=st.sampled_from([-1, 10]),
        max_qas_per_sample=st.sampled_from([-1, 2]),
    ),
    st.none() | st.integers(0, 3),
)
def test_any_records_and_limits(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], limits: Limits, seed: int | None
) -> None:
    records = [*records, Record("a", ("q",), ("b",), "s")]  # one that fits
    folder = tmp_path_factory.mktemp("cache")
    fresh = tokenize_records(records, CHAT, limits, seed)
    for _ in range(2):
        assert_same(cached_rows(records, CHAT, limits, seed, folder), fresh)


# Interruption, damage, concurrent builds


class Stopped(Exception):
    pass


@pytest.mark.parametrize("last", range(1, 11))
def test_an_interrupted_build_continues_at_the_first_missing_shard(
    tmp_path: Path, tokenized_records: list[int], last: int
) -> None:
    def stop(done: int, total: int) -> None:
        if len(tokenized_records) == last:
            raise Stopped

    with pytest.raises(Stopped):
        build(tmp_path, on_progress=stop)
    del tokenized_records[:]
    assert_same(build(tmp_path), FRESH)
    assert tokenized_records == list(range((last - 1) // 3 * 3, 10))
    assert files(tmp_path) == ALL_FILES


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("moved", [False, True])
def test_an_interruption_around_each_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenized_records: list[int], place: int, moved: bool
) -> None:
    renamed = []

    def stopping(self: Path, target: Path) -> None:
        renamed.append(target)
        if len(renamed) <= place or moved:
            os.replace(self, target)
        if len(renamed) > place:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping)
        with pytest.raises(Stopped):
            build(tmp_path)
    assert not list(tmp_path.rglob(".partial-*"))
    del tokenized_records[:]
    assert_same(build(tmp_path), FRESH)
    listed = (place + moved) // 2  # a shard, its manifest, the next shard, …
    assert tokenized_records == list(range(listed * 3, 10))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(folder: Path) -> None:
    first, second = folder / ALL_FILES[1], folder / ALL_FILES[2]
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, tuple[Any, list[int]]] = {
    "a byte": (lambda folder: flip(folder / ALL_FILES[2]), [3, 4, 5]),
    "cut off": (lambda folder: os.truncate(folder / ALL_FILES[3], 100), [6, 7, 8]),
    "empty": (lambda folder: os.truncate(folder / ALL_FILES[1], 0), [0, 1, 2]),
    "longer": (lambda folder: os.truncate(folder / ALL_FILES[4], 90_000), [9]),
    "gone": (lambda folder: (folder / ALL_FILES[4]).unlink(), [9]),
    "swapped": (swap, [0, 1, 2, 3, 4, 5]),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), list(range(10))),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 50), list(range(10))),
    "no JSON object": (lambda folder: (folder / MANIFEST).write_text("[1]"), list(range(10))),
    "another key's manifest": (lambda folder: rewrite(folder / MANIFEST, parts={"seed": "8"}), list(range(10))),
    "shards of no kind": (lambda folder: rewrite(folder / MANIFEST, shards=[1, 2]), list(range(10))),
    "a shard of no kind": (lambda folder: rewrite(folder / MANIFEST, shards={ALL_FILES[1]: 5}), list(range(10))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_rebuilt_and_no_others(tmp_path: Path, tokenized_records: list[int], damage: str) -> None:
    build(tmp_path)
    (folder,) = tmp_path.iterdir()
    spoil, rebuilt = DAMAGE[damage]
    spoil(folder)
    for expected in (rebuilt, []):  # and then it is whole
        del tokenized_records[:]
        assert_same(build(tmp_path), FRESH)
        assert tokenized_records == expected


def test_rows_that_are_being_read_survive_a_rebuild(tmp_path: Path) -> None:
    reading = build(tmp_path)
    (next(tmp_path.iterdir()) / MANIFEST).unlink()
    build(tmp_path)
    assert_same(reading, FRESH)


@pytest.mark.parametrize("when", range(1, 11))
def test_another_build_during_a_build(tmp_path: Path, tokenized_records: list[int], when: int) -> None:
    def meanwhile(done: int, total: int) -> None:
        if done == when:
            assert_same(build(tmp_path), FRESH)

    assert_same(build(tmp_path, on_progress=meanwhile), FRESH)
    del tokenized_records[:]
    assert_same(build(tmp_path), FRESH)
    assert tokenized_records == []
    assert files(tmp_path) == ALL_FILES


def test_what_another_build_has_listed_stays_listed(tmp_path: Path) -> None:
    """Two that have begun at once, neither with the other's shards."""
    parts = [[tokenize_record(number, record, CHAT, LIMITS, 7)] for number, record in enumerate(RECORDS[:2])]
    stores = [cache._Store(tmp_path, {"key": "one"}) for _ in parts]
    for number, (store, part) in enumerate(zip(stores, parts, strict=True)):
        store.write(number, part)
    assert all(cache._Store(tmp_path, {"key": "one"}).read(number) for number in range(2))


def test_two_processes_build_the_same_key_at_the_same_time(tmp_path: Path, chat: ChatFormat) -> None:
    records = needle_records(60, 1, 2, 8, seed=0)
    fresh = tokenize_records(records, chat, Limits(), 0)
    fork = get_context("fork")
    both_ready = fork.Barrier(2, timeout=60)

    def build_three_times() -> None:
        both_ready.wait()
        for _ in range(3):
            assert_same(cached_rows(records, chat, Limits(), 0, tmp_path), fresh)

    other = fork.Process(target=build_three_times)
    other.start()
    build_three_times()
    other.join(60)
    assert other.exitcode == 0
    (folder,) = tmp_path.iterdir()
    assert len(json.loads((folder / MANIFEST).read_text())["shards"]) == 20
    assert len(list(folder.iterdir())) == 21


def test_a_folder_that_cannot_be_written_is_an_error_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Not a directory\nmake room, name another folder .*cache_dir=") as caught:
        build(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


# The key


def other_tokenizer(change: Any) -> ChatFormat:
    tokenizer = load_tokenizer(TOKENIZER)
    change(tokenizer)
    return chat_format(tokenizer)


FIRST = Record("a document", ("q", "r"), ("b", "c"), "s:1")
OTHER_LIMITS: dict[str, Any] = {field.name: 5 for field in fields(Limits)} | {"num_chunk_probs": {1: 0.5, 3: 0.5}}


def test_the_key_depends_on_everything_that_shapes_rows(chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    usual: dict[str, Any] = {"records": [FIRST, RECORDS[0]], "chat": chat, "limits": Limits(), "seed": 1}

    def key(**changes: Any) -> str:
        return json.dumps(key_parts(**usual | changes))

    def with_first(**changes: Any) -> str:
        return key(records=[replace(FIRST, **changes), RECORDS[0]])

    keys = {
        "usual": key(),
        "template": key(chat=replace(chat, template=chat.template + " ")),
        "supervision": key(chat=replace(chat, supervision="sampled")),
        "date": key(chat=replace(chat, current_date="2025-08-06")),
        "a token": key(chat=other_tokenizer(lambda it: it.add_tokens(["zyzzyva"]))),
        "normalizer": key(chat=other_tokenizer(lambda it: it.backend_tokenizer.__setattr__("normalizer", lower()))),
        "special token": key(chat=other_tokenizer(lambda it: it.__setattr__("bos_token", "<|start|>"))),
        "special tokens as text": key(chat=other_tokenizer(lambda it: it.__setattr__("split_special_tokens", True))),
        "context": with_first(context="a document."),
        "prompts": with_first(prompts=("q", "s")),
        "responses": with_first(responses=("b", "d")),
        "moved between texts": with_first(prompts=("q", "rb"), responses=("", "c")),
        "logprobs": with_first(**teacher(1)),
        "order of records": key(records=[RECORDS[0], FIRST]),
        "fewer records": key(records=[FIRST]),
        "seed": key(seed=2),
        "no seed": key(seed=None),
        **{name: key(limits=Limits(**{name: value})) for name, value in OTHER_LIMITS.items()},
        "order of chunk counts": key(limits=Limits(num_chunk_probs={3: 0.5, 1: 0.5})),
    }
    patches: dict[str, tuple[Any, str, Any]] = {
        "records a shard": (cache, "RECORDS_PER_SHARD", 4),
        "format": (cache, "_FORMAT", cache._FORMAT + 1),
        "code": (cache, "_CODE", "other"),
    }
    for package in ("jinja2", "tokenizers", "transformers"):
        patches[package] = (metadata, "version", lambda name, of=package: "9.9" if name == of else "1.0")
    patches["one version"] = (metadata, "version", lambda name: "1.0")
    for name, patch in patches.items():
        with monkeypatch.context() as context:
            context.setattr(*patch)
            cache._versions.cache_clear()
            keys[name] = key()
    cache._versions.cache_clear()
    assert len(set(keys.values())) == len(keys)


def lower() -> Any:
    from tokenizers.normalizers import Lowercase

    return Lowercase()


def test_the_key_depends_on_nothing_else(chat: ChatFormat) -> None:
    def truncating(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.enable_truncation(5)
        tokenizer.backend_tokenizer.enable_padding(length=9)

    usual = key_parts([FIRST], chat, Limits(), 1)
    assert key_parts((replace(FIRST, source="elsewhere"),), chat, Limits(), 1) == usual
    assert key_parts([FIRST], other_tokenizer(truncating), Limits(), 1) == usual
    chat.encode_text("a call")
    assert key_parts([FIRST], replace(chat), Limits(), 1) == usual


def test_a_changed_template_finds_no_old_rows(tmp_path: Path, chat: ChatFormat) -> None:
    records = needle_records(4, 1, 2, 8, seed=0)
    for template in (chat.template, f".{chat.template}", chat.template):
        changed = replace(chat, template=template)
        assert_same(
            cached_rows(records, changed, Limits(), 0, tmp_path), tokenize_records(records, changed, Limits(), 0)
        )
    assert len(list(tmp_path.iterdir())) == 2


# Read as it is used


def test_sizes_and_packing_read_no_tokens_and_a_batch_reads_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = build(tmp_path).rows
    read: list[int] = []
    row_of = shards.Shard.row

    def spy(self: shards.Shard, index: int) -> Any:
        read.append(index)
        return row_of(self, index)

    monkeypatch.setattr(shards.Shard, "row", spy)
    config = RunConfig.model_validate({"max_packed_inp_len": 30, "max_packed_ctx_len": 30})
    batches = epoch_batches(config, rows, epoch=0)
    assert read == []
    assert len(batches) > 2
    expected = epoch_batches(config, FRESH.rows, epoch=0)
    for ours, theirs in zip(batches, expected, strict=True):
        assert ours.record_ids == theirs.record_ids
        assert ours.input_ids.equal(theirs.input_ids)
        assert ours.ctx_ids.equal(theirs.ctx_ids)
        assert len(read) == len(theirs.record_ids)
        del read[:]
    assert [batch.record_ids for batch in batches[1:3]] == [expected[1].record_ids, expected[2].record_ids]


def test_rows_stay_in_the_file(tmp_path: Path) -> None:
    records = [Record("a " * 100_000, ("q",), ("b",), "s")] * 5
    limits = Limits()
    cached_rows(records, CHAT, limits, 0, tmp_path)
    before = pyarrow.total_allocated_bytes()
    rows = cached_rows(records, CHAT, limits, 0, tmp_path).rows
    assert pyarrow.total_allocated_bytes() - before < 10_000
    assert len(rows[3].chunks[0]) == 100_002


def test_many_shards_keep_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(cache, "RECORDS_PER_SHARD", 1)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, allowed[1]))
    try:
        assert len(build(tmp_path, [Record("a", ("q",), ("b",), "s")] * 150).rows) == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


def test_progress_is_reported_for_records_and_for_shards_found(tmp_path: Path) -> None:
    progress: list[int] = []

    def hook(done: int, total: int) -> None:
        assert total == 10
        progress.append(done)

    build(tmp_path, on_progress=hook)
    assert sorted(set(progress)) == list(range(1, 11))
    assert progress == sorted(progress)
    del progress[:]
    build(tmp_path, on_progress=hook)
    assert progress == [3, 6, 9, 10]


# Where a run keeps it


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/caches", "HOME": "/home/me"}, "/caches/d2l"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "/home/me"}, "/home/me/.cache/d2l"),  # relative: to be ignored
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/d2l"),
        ({"HOME": "/home/me"}, "/home/me/.cache/d2l"),
    ],
)
def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == Path(expected)


def test_a_user_without_a_home_folder_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(DataError, match="--set cache_dir=FOLDER"):
        default_folder()


@pytest.mark.parametrize(
    ("settings", "count", "place"),
    [
        ({}, 9, None),
        ({}, 10, "home/d2l"),
        ({"cache": False}, 10, None),
        ({"cache_dir": "mine"}, 10, "mine"),
        ({"cache_dir": "mine", "cache": False}, 10, None),
    ],
)
def test_a_run_caches_many_records_and_not_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], count: int, place: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run_build, "CACHED_FROM", 10)
    progress: list[tuple[int, int]] = []
    config, records = RunConfig.model_validate(settings), RECORDS[:count]
    rows = run_build.tokenize(
        config,
        run_build.fitted_base_config(config, None),
        CHAT,
        records,
        lambda done, total: progress.append((done, total)),
    )
    assert_same(rows, tokenize_records(records, CHAT, Limits.of(config), config.seed))
    assert progress[-1] == (count, count)
    written = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("?" * 64)}
    assert written == ({place} if place else set())


def test_the_cache_folder_is_no_part_of_the_fingerprint() -> None:
    config = RunConfig.model_validate({})
    elsewhere = RunConfig.model_validate({"cache": False, "cache_dir": "mine"})
    base_config = run_build.fitted_base_config(config, None)
    first, second = (run_fingerprint(it, base_config, None, None, {}).total for it in (config, elsewhere))
    assert first == second
