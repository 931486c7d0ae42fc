"""Cache of token rows on disk, under a key of everything that shapes them: a changed template never finds old rows.

    CACHE/3f8a…c1/               the key
        shard-00000.arrow        rows of the first thousand records, and what was dropped of them
        shard-00001.arrow
        manifest.json            what the key is made of; rows, bytes and sha256 of each shard

Every file is written beside its place and renamed, a shard before the manifest that lists it. A shard that is not
listed, or differs from its entry, is built again: an interrupted build continues where it stopped, and damaged files
are replaced. Processes that build the same key at the same time write the same bytes; each replaces a file as a whole,
so rows that are being read from the old one stay valid.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from d2l.data import chunks as chunks_code
from d2l.data import division as division_code
from d2l.data import limits as limits_code
from d2l.data import sentences as sentences_code
from d2l.data import tokenize as tokenize_code
from d2l.data.chat import control_tokens as control_code
from d2l.data.chat import format as chat_code
from d2l.data.chat import rendering as rendering_code
from d2l.data.chat.format import ChatFormat
from d2l.data.records import Record
from d2l.data.shards import MappedRows, Shard, write_shard
from d2l.data.tokenize import Limits, OnProgress, Tokenized, TokenizedPart, combine_parts, tokenize_record
from d2l.errors import DataError
from d2l.io.atomic import replace_file

MANIFEST = "manifest.json"
RECORDS_PER_SHARD = 1000  # an interruption loses at most one shard, a few seconds of work
_FORMAT = 1  # version of the file layout; raise it when the layout changes

# Hashed on import: this is the code that makes the rows, even if its files change while the process runs.
_MODULES = (
    chat_code,
    chunks_code,
    control_code,
    division_code,
    limits_code,
    rendering_code,
    sentences_code,
    tokenize_code,
)
_CODE = hashlib.sha256("\0".join(map(inspect.getsource, _MODULES)).encode()).hexdigest()


def default_folder() -> Path:
    """Return `d2l` in the user's cache folder: in `XDG_CACHE_HOME`, else in `~/.cache`.

    Raises:
        DataError: the user has no home folder.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (configured if configured.is_absolute() else Path.home() / ".cache") / "d2l"
    except RuntimeError:
        raise DataError(
            "no home folder to keep tokenized rows in; --set cache_dir=FOLDER, or --set cache=false"
        ) from None


def key_parts(
    records: Sequence[Record], chat: ChatFormat, limits: Limits, seed: int | None, per_shard: int | None = None
) -> dict[str, str]:
    """Return everything that shapes rows, by name. A record's `source` is not part of it: data may move."""
    content = hashlib.sha256()
    for record in records:
        values = (record.context, record.prompts, record.responses, record.logprobs_vals, record.logprobs_indices)
        content.update(json.dumps(values, default=list).encode())
    return {
        "chat": chat.fingerprint,
        "tokenizer": chat.tokenizer_fingerprint,
        "records": content.hexdigest(),
        "limits": json.dumps(asdict(limits)),  # not sorted: the order of chunk counts decides what is drawn
        "seed": str(seed),
        "code": _CODE,
        "files": f"format {_FORMAT}, {per_shard or RECORDS_PER_SHARD} records each",
        **_versions(),
    }


def cached_rows(
    records: Sequence[Record],
    chat: ChatFormat,
    limits: Limits,
    seed: int | None,
    folder: Path,
    on_progress: OnProgress = lambda done, total: None,
    per_shard: int | None = None,
) -> Tokenized:
    """Return the result of `tokenize_records`, kept on disk below `folder`; rows are read when they are used.

    Args:
        folder: cache folder for all keys; it is made if needed, and may be removed between runs.
        on_progress: called after every record that is tokenized and every shard that is found.
        per_shard: records of a shard; default: `RECORDS_PER_SHARD`.

    Raises:
        ConfigError: `max_ctx_chunk_len` has no room for text.
        DataError: as `tokenize_records`, or the folder cannot be written.
    """
    per_shard = per_shard or RECORDS_PER_SHARD
    store = _Store(folder, key_parts(records, chat, limits, seed, per_shard))
    shards: list[Shard] = []
    failed: list[TokenizedPart] = []
    for number, start in enumerate(range(0, len(records), per_shard)):
        stop = min(start + per_shard, len(records))
        shard = store.read(number)
        if shard is None:
            parts = []
            for index in range(start, stop):
                parts.append(tokenize_record(index, records[index], chat, limits, seed))
                on_progress(index + 1, len(records))
            if any(part.problems for part in parts):
                failed += parts  # the call will fail: continue only to name every problem
                continue
            shard = store.write(number, parts)
        on_progress(stop, len(records))
        shards.append(shard)
    return combine_parts(records, MappedRows(shards), failed + [shard.read_dropped(records) for shard in shards])


@cache
def _versions() -> dict[str, str]:
    """Return the versions of the packages that make rows."""
    return {package: metadata.version(package) for package in ("jinja2", "tokenizers", "transformers")}


class _Store:
    """Files of one key: reads and writes shards and the manifest."""

    def __init__(self, folder: Path, parts: Mapping[str, str]) -> None:
        self._folder = folder / hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self._parts = parts
        self._shards = self._read_manifest()

    def read(self, number: int) -> Shard | None:
        """Return a shard, or `None` where it is absent or differs from its entry in the manifest."""
        path = self._path(number)
        try:
            is_valid = path.name in self._shards and _hash_file(path).items() <= self._shards[path.name].items()
            return Shard(path) if is_valid else None
        except OSError:
            return None

    def write(self, number: int, parts: Sequence[TokenizedPart]) -> Shard:
        """Write a shard, and then the manifest that lists it.

        Raises:
            DataError: the folder cannot be written, or the disk is full.
        """
        path = self._path(number)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as partial:
                write_shard(partial, parts)
                entry = {"rows": sum(len(part.rows) for part in parts)} | _hash_file(partial)
            # another process may have listed more shards meanwhile
            self._shards = self._read_manifest() | self._shards | {path.name: entry}
            manifest = {"parts": self._parts, "shards": self._shards}
            with replace_file(self._folder / MANIFEST) as partial:
                partial.write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
            return Shard(path)
        except OSError as error:
            raise DataError(
                f"cannot keep tokenized rows in {self._folder}: {error.strerror or error}\n"
                "make room, name another folder (--set cache_dir=FOLDER), or do without (--set cache=false)"
            ) from error

    def _read_manifest(self) -> dict[str, Any]:
        """Return the manifest's entries by shard; none where it is absent, damaged or belongs to another key."""
        try:
            manifest = json.loads((self._folder / MANIFEST).read_bytes())
            return {name: dict(entry) for name, entry in manifest["shards"].items() if manifest["parts"] == self._parts}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.arrow"


def _hash_file(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the sha256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
