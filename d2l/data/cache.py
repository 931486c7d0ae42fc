"""Token rows on disk, under a key of everything that shapes them: a changed template, say, never meets old rows.

    CACHE/3f8a…c1/               the key
        shard-00000.arrow        rows of the first thousand records, and what was dropped of them
        shard-00001.arrow
        manifest.json            what the key is made of; rows, bytes and sha256 of each shard

Every file is written beside its place and renamed, a shard before the manifest that lists it. A shard that is not
listed, or not as listed, is built again: so an interrupted build goes on where it stopped, and damage is mended.
Builders of the same key at the same time write the same bytes, and never over a file that is being read.
"""

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from d2l.data import limits as limits_code
from d2l.data import tokenize as tokenize_code
from d2l.data.chat import format as chat_code
from d2l.data.chat.format import ChatFormat
from d2l.data.records import Record
from d2l.data.shards import MappedRows, Shard, write_shard
from d2l.data.tokenize import Limits, OnProgress, Part, Tokenized, complete, tokenize_record
from d2l.errors import DataError

MANIFEST = "manifest.json"
RECORDS_PER_SHARD = 1000  # what an interruption can lose, a few seconds of work
_FORMAT = 1  # of the files; count it up when they change

# Read when it is loaded: it is this code that makes the rows, whatever an editor writes meanwhile.
_CODE = hashlib.sha256("\0".join(map(inspect.getsource, (chat_code, limits_code, tokenize_code))).encode()).hexdigest()


def default_folder() -> Path:
    """`d2l` in the user's folder for caches: `XDG_CACHE_HOME`, else `~/.cache`.

    Raises:
        DataError: the user has no home.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (configured if configured.is_absolute() else Path.home() / ".cache") / "d2l"
    except RuntimeError:
        raise DataError(
            "no home folder to keep tokenized rows in; --set cache_dir=FOLDER, or --set cache=false"
        ) from None


def key_parts(records: Sequence[Record], chat: ChatFormat, limits: Limits, seed: int | None) -> dict[str, str]:
    """Everything that shapes rows, by name. A record's `source` does not: data may move."""
    content = hashlib.sha256()
    for record in records:
        values = (record.context, record.prompts, record.responses, record.logprobs_vals, record.logprobs_indices)
        content.update(json.dumps(values).encode())
    return {
        "chat": chat.fingerprint,
        "tokenizer": chat.tokenizer_fingerprint,
        "records": content.hexdigest(),
        "limits": json.dumps(asdict(limits)),  # not sorted: the order of chunk counts decides what is drawn
        "seed": str(seed),
        "code": _CODE,
        "files": f"format {_FORMAT}, {RECORDS_PER_SHARD} records each",
        **{package: metadata.version(package) for package in ("jinja2", "tokenizers", "transformers")},
    }


def cached_rows(
    records: Sequence[Record],
    chat: ChatFormat,
    limits: Limits,
    seed: int | None,
    folder: Path,
    on_progress: OnProgress = lambda done, total: None,
) -> Tokenized:
    """What `tokenize_records` makes of the same arguments, kept below `folder`; rows are read as they are used.

    Args:
        folder: of all keys; it is made, and may be removed between runs.
        on_progress: called after every record that is tokenized and every shard that is found.

    Raises:
        ConfigError: `max_ctx_chunk_len` has no room for text.
        DataError: as `tokenize_records`, or the folder cannot be written.
    """
    store = _Store(folder, key_parts(records, chat, limits, seed))
    shards: list[Shard] = []
    failed: list[Part] = []
    for number, start in enumerate(range(0, len(records), RECORDS_PER_SHARD)):
        stop = min(start + RECORDS_PER_SHARD, len(records))
        shard = store.read(number)
        if shard is None:
            parts = []
            for index in range(start, stop):
                parts.append(tokenize_record(index, records[index], chat, limits, seed))
                on_progress(index + 1, len(records))
            if any(part.problems for part in parts):
                failed += parts  # there will be no rows: go on only to name every problem
                continue
            shard = store.write(number, parts)
        on_progress(stop, len(records))
        shards.append(shard)
    return complete(records, MappedRows(shards), failed + [shard.account(records) for shard in shards])


class _Store:
    """The files of one key."""

    def __init__(self, folder: Path, parts: Mapping[str, str]) -> None:
        self._folder = folder / hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self._parts = parts
        self._shards = self._listed()

    def read(self, number: int) -> Shard | None:
        """A shard, or `None` where there is none that is as listed."""
        path = self._path(number)
        try:
            whole = path.name in self._shards and _identity(path).items() <= self._shards[path.name].items()
            return Shard(path) if whole else None
        except OSError:
            return None

    def write(self, number: int, parts: Sequence[Part]) -> Shard:
        """Write a shard, and then the manifest that lists it.

        Raises:
            DataError: the disk is full, or not ours.
        """
        path = self._path(number)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _replacing(path) as beside:
                write_shard(beside, parts)
                entry = {"rows": sum(len(part.rows) for part in parts)} | _identity(beside)
            self._shards = self._listed() | self._shards | {path.name: entry}  # another builder may be ahead
            manifest = {"parts": self._parts, "shards": self._shards}
            with _replacing(self._folder / MANIFEST) as beside:
                beside.write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
            return Shard(path)
        except OSError as error:
            raise DataError(
                f"cannot keep tokenized rows in {self._folder}: {error.strerror or error}\n"
                "make room, name another folder (--set cache_dir=FOLDER), or do without (--set cache=false)"
            ) from error

    def _listed(self) -> dict[str, Any]:
        """The shards of the manifest; none where it is absent, damaged or of another key."""
        try:
            manifest = json.loads((self._folder / MANIFEST).read_bytes())
            return {name: dict(entry) for name, entry in manifest["shards"].items() if manifest["parts"] == self._parts}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.arrow"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A place for this writer alone, beside `path`; what is written there becomes `path`, whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        beside = Path(folder) / path.name
        yield beside
        beside.replace(path)


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
