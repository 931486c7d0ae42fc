"""The values in a data file: lines of JSONL, items of JSON, rows of Parquet or of a folder of `datasets`, one after the other."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from d2l.errors import DataError

FORMS = "a JSONL, JSON (both also .gz) or Parquet file, or a folder written by `save_to_disk` of datasets"
_ENDINGS = {".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz"}


@dataclass(frozen=True)
class Unreadable:
    """Stands in for a line that holds no value; `text` says why."""

    text: str


def open_values(path: Path) -> tuple[str, Iterator[tuple[int, Any]]]:
    """Return what the parts of this kind of file are called, and the parts: (number from 1, value)."""
    if path.is_dir():
        return "row", _folder(path)
    if path.suffix == ".parquet":
        return "row", _parquet(path)
    with _binary(path) as file:
        start = file.read(4096)
    if start.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: is compressed by gzip; name it .jsonl.gz or .json.gz")
    if b"\0" in start:
        raise DataError(
            f"{path}: is binary (holds NUL bytes)\nexpected: JSONL in UTF-8, or Parquet under a name that ends "
            "in .parquet; convert or rename it"
        )
    return ("item", _json_list(path)) if path.name.removesuffix(".gz").endswith(".json") else ("line", _jsonl(path))


def _binary(path: Path) -> gzip.GzipFile | BufferedReader:
    """Open a file for its bytes, unpacked where its name ends in .gz."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with _binary(path) as file:  # bytes: only \n ends a line, and an undecodable line is named
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 (byte 0x{text[error.start]:02x} at position {error.start + 1})")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return Unreadable(f"invalid JSON: {error.msg} at {line}column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of open brackets
        return Unreadable(f"invalid JSON: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; of a key that is there twice, the first value would be lost.

    Raises:
        ValueError: there is such a key.
    """
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"`{next(key for key in names if names.count(key) > 1)}` is there twice")
    return value


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    with _binary(path) as file:
        value = _parse(file.read().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(value, Unreadable) or not isinstance(value, list):
        found = value.text if isinstance(value, Unreadable) else f"found {kind_of(value)}"
        raise DataError(f"{path}: expected one JSON list of records, {found}; name one-object-per-line files .jsonl")
    return enumerate(value, 1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _folder(path: Path) -> Iterator[tuple[int, Any]]:
    if not any((path / name).exists() for name in ("state.json", "dataset_info.json", "dataset_dict.json")):
        endings = sorted({"".join(file.suffixes[-2:]) for file in path.iterdir() if file.is_file()} & _ENDINGS)
        files = f"; for its files name a glob: {path / f'*{endings[0]}'}" if endings else ""
        raise DataError(f"{path}: is a folder that `save_to_disk` of datasets did not write{files}\nexpected: {FORMS}")
    import datasets  # here: it takes seconds to import, and most data is JSONL

    try:
        dataset = datasets.load_from_disk(str(path))
    except (FileNotFoundError, pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a dataset: {str(error).splitlines()[0]}") from None
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"{path}: holds several splits; name one of {', '.join(str(path / s) for s in dataset)}")
    return enumerate(dataset, 1)


def kind_of(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:30]!r}"
