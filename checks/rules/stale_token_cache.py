"""Cached token rows are those of this run's template, tokenizer, data, limits and seed, also where a file is damaged.

What it does
------------
Tokenizes two short records made of the run's texts through its cache, in a temporary folder; then again with one thing
changed at a time: each limit, the chunk draw and its seed, the base's longest text, template, supervision, date and
tokenizer, documents, questions, answers, their order, and a teacher's logprobs. Packs cached rows into batches. Then it
exchanges the cache's files, and asks once more.

Why it matters
--------------
A cache whose key leaves out the template serves old labels after the template was fixed: the mask is fixed on paper and
the loss stays what it was. One that leaves out answers or limits trains on data that is no longer there. People remedy
that by hand (`rm -rf data/processed_datasets`), once they have thought of it.

How it is detected
------------------
Each time, rows and reports of what was dropped must equal those of tokenizing anew, without a cache, and so must the
batches. Every change is one that changes the rows, whatever the run's own limits are. Files that were exchanged must be
noticed: by the same rows, or by an error.

How to fix
----------
Key the cache by everything that shapes rows: template, supervision, date, tokenizer, data, limits and seed.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.data.variants import variants
from checks.faults import Override, override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.data.tokenize import Row
from d2l.errors import D2LError, DataError

if TYPE_CHECKING:
    from checks.subject import Subject

CHUNK_LIMITS = (
    *("max_ctx_chunk_len", "min_ctx_chunk_len", "max_ctx_chunk_num", "num_chunk_probs"),
    *("chunking", "chunk_overlap"),
)
OTHER_LIMITS = ("max_ctx_len", "max_qas_len", "max_qas_per_sample", "max_packed_inp_len", "max_packed_ctx_len")
REMEDY = "key the cache by everything that shapes rows, or remove its folder and set cache: false"


def check(subject: "Subject") -> Result:
    """Compare rows through one cache with rows without, for inputs that differ in one thing each."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    implementation = subject.implementation
    results: dict[str, list[Any]] = {}
    stale: list[str] = []
    with tempfile.TemporaryDirectory(prefix="d2l-") as cache, tempfile.TemporaryDirectory(prefix="d2l-") as base:
        for inputs in variants(subject, Path(base)):
            fresh = _outcome(implementation.rows, *inputs.arguments)
            results.setdefault(inputs.field, []).append(fresh)
            if _outcome(implementation.cached_rows, *inputs.arguments, Path(cache)) != fresh:
                stale.append(inputs.field)
    first = results["nothing"][0]
    idle = [field for field, found in results.items() if field != "nothing" and all(it == first for it in found)]
    evidence = {"changed": list(results), "stale": stale, "without_effect": idle}
    if stale:
        return Fail(
            message=f"the cache gives stale rows where these change: {', '.join(dict.fromkeys(stale))}",
            expected="the rows of tokenizing anew",
            actual="other rows, or other reports of what was dropped",
            remedy=REMEDY,
            evidence=evidence,
        )
    if finding := _stored_rows(subject):
        return finding
    without = f" ({', '.join(idle)}: without effect here)" if idle else ""
    return Pass(
        f"rows from the cache are those of tokenizing anew, with {len(results) - 1} things changed{without}", evidence
    )


def _stored_rows(subject: "Subject") -> Result | None:
    """Pack rows that are read from the cache under tight budgets; then exchange its files, and ask again."""
    implementation = subject.implementation
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder, tempfile.TemporaryDirectory(prefix="d2l-") as base:
        inputs = next(variants(subject, Path(base)))
        fresh = implementation.rows(*inputs.arguments)
        for _ in range(2):  # written, then read
            stored = implementation.cached_rows(*inputs.arguments, Path(folder))
        widest = [max(row.size[side] for row in fresh.rows) for side in (0, 1)]
        tight = changed(inputs.config, max_packed_inp_len=widest[0], max_packed_ctx_len=widest[1])
        expected, actual = (_batches(implementation, tight, rows.rows) for rows in (fresh, stored))
        if actual != expected:
            return Fail(
                message="rows from the cache are packed otherwise than rows that were just made",
                expected=f"batches of {expected}",
                actual=f"batches of {actual}",
                remedy="give rows from the cache the sizes of their tokens: of questions, and of documents",
            )
        what = _exchange(Path(folder))
        try:
            found = _outcome(implementation.cached_rows, *inputs.arguments, Path(folder))
        except Exception:  # an error of any kind is one that is noticed
            return None
        if isinstance(found, str) or found == _outcome(implementation.rows, *inputs.arguments):
            return None
        return Fail(
            message="the cache gives rows of damaged files",
            expected="the rows of tokenizing anew, or an error",
            actual=f"other rows, after {what}",
            remedy="keep a hash of every file of the cache, and build one that differs again",
        )


def _batches(implementation: Implementation, config: Any, rows: Any) -> Any:
    """Return records and numbers of tokens of every batch, or why there are none."""
    try:
        batches = implementation.batches(config, rows)
        return [(list(it.record_ids), it.input_ids.shape[1], it.ctx_ids.shape[1]) for it in batches]
    except D2LError as error:
        return str(error).splitlines()[0]


def _exchange(folder: Path) -> str:
    """Let two files of one kind change places, or cut the largest in half where there is only one; return what was done."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.suffix, path))
    for one, other in pairwise(files):
        if one.suffix == other.suffix and one.read_bytes() != other.read_bytes():
            contents = one.read_bytes(), other.read_bytes()
            one.write_bytes(contents[1])
            other.write_bytes(contents[0])
            return f"{one.name} and {other.name} were exchanged"
    if not files:
        return "nothing: the cache keeps no files"
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    return f"{largest.name} was cut in half"


def _outcome(tokenize: Callable[..., Any], *inputs: Any) -> Any:
    """Return rows and what was dropped, or why there are none."""
    try:
        tokenized = tokenize(*inputs)
    except DataError as error:
        return str(error)
    return tuple(tokenized.rows), tokenized.dropped


def _key_without(*forgotten: str) -> Override:
    """Make a fault of a cache whose key leaves some things out."""
    kept: dict[str, Any] = {}  # by folder too, and every check has a folder of its own

    def cached_rows(healthy: Implementation, config: Any, chat: Any, records: Any, folder: Path) -> Any:
        parts = {name: getattr(config, name) for name in (*CHUNK_LIMITS, *OTHER_LIMITS, "seed")}
        parts |= {name: getattr(chat, name) for name in ("template", "supervision", "current_date")}
        parts |= {"base": config.model_name_or_path, "tokenizer": id(chat.tokenizer)}
        for name in ("context", "prompts", "responses", "logprobs_vals", "logprobs_indices"):
            parts[name] = [getattr(record, name) for record in records]
        key = repr([folder, *(value for name, value in parts.items() if name not in forgotten)])
        if key not in kept:
            kept[key] = healthy.cached_rows(config, chat, records, folder)
        return kept[key]

    return override(cached_rows=cached_rows)


class _Swapped(Row):
    """A row whose sizes are read the wrong way round; equal to the row as it is."""

    __hash__ = Row.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and vars(self) == vars(other)

    @property
    def size(self) -> tuple[int, int]:
        return super().size[::-1]


def _sizes_swapped(healthy: Implementation, config: Any, chat: Any, records: Any, folder: Path) -> Any:
    """Read the sizes of cached rows the wrong way round."""
    found = healthy.cached_rows(config, chat, records, folder)
    return replace(found, rows=[_Swapped(**vars(row)) for row in found.rows])


def _files_trusted() -> Override:
    """Make a fault of a cache that reads its files in their order, whatever they hold."""
    written: dict[Path, dict[Path, bytes]] = {}

    def cached_rows(healthy: Implementation, config: Any, chat: Any, records: Any, folder: Path) -> Any:
        files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        before = written.get(folder, {})
        exchanged = any(path in files and files[path] != content for path, content in before.items())
        found = healthy.cached_rows(config, chat, records[::-1] if exchanged else records, folder)
        written[folder] = {path: path.read_bytes() for path in folder.rglob("*.arrow")}
        return found

    return override(cached_rows=cached_rows)


RULE = Rule(
    code="CCH301",
    name="stale-token-cache",
    stage="data",
    severity="error",
    sources=("stale cache", "failure mode 5", "failure mode 36", "failure mode C24"),
    requires=("LBL101", "DAT301", "DAT308", "LBL301", "DAT302", "DAT303", "DAT304", "DAT305", "DAT309"),
    check=check,
    faults=(
        Fault("key-without-template", "another chat template meets the old rows", _key_without("template")),
        Fault("key-without-supervision", "the other supervision meets the old rows", _key_without("supervision")),
        Fault("key-without-date", "another day meets the old rows", _key_without("current_date")),
        Fault("key-without-tokenizer", "another tokenizer meets the old rows", _key_without("tokenizer")),
        Fault("key-without-data", "another document meets the old rows", _key_without("context")),
        Fault("key-without-questions", "other questions meet the old rows", _key_without("prompts")),
        Fault("key-without-answers", "other answers meet the old rows", _key_without("responses")),
        Fault(
            "key-without-teacher",
            "another teacher's logprobs meet the old rows",
            _key_without("logprobs_vals", "logprobs_indices"),
        ),
        Fault("key-without-limits", "another limit meets the old rows", _key_without(*OTHER_LIMITS)),
        Fault("key-without-chunk-limits", "another chunk limit meets the old rows", _key_without(*CHUNK_LIMITS)),
        Fault("key-without-base", "a base for shorter texts meets the old rows", _key_without("base")),
        Fault("key-without-seed", "another draw of chunk counts meets the old rows", _key_without("seed")),
        Fault(
            "sizes-swapped", "sizes of cached rows are read the wrong way round", override(cached_rows=_sizes_swapped)
        ),
        Fault("files-trusted", "files of the cache that were exchanged are read as they are", _files_trusted()),
    ),
)
