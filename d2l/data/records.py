"""Documents with questions and answers: read from JSONL, JSON (also gzipped), Parquet or `datasets` folders.

Every record that cannot be used is reported with its file and line; nothing is skipped.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from d2l.data.tables import compact
from d2l.errors import DataError
from d2l.io.atomic import write_new_file

EXPECTED = (
    'expected: {"context": "…", "prompts": ["…", …], "responses": ["…", …]}, a response for each prompt '
    "(optional: logprobs_vals and logprobs_indices, nested as [prompt][supervised token][k])"
)
_FORMS = "a JSONL, JSON (both also .gz) or Parquet file, or a folder written by `save_to_disk` of datasets"
_ENDINGS = {".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz"}
SHOWN = 5  # problems that a message lists in full: it has to fit on one screen


@dataclass(frozen=True)
class Record:
    """One document with its questions and answers.

    `source` is where it stands (`file:line`). `logprobs_vals` and `logprobs_indices` are a teacher's top-k natural-log
    probabilities and token ids, nested as [prompt][supervised token][k]: of each prompt a `Table`, or nested tuples.
    """

    context: str
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    source: str
    logprobs_vals: tuple[Any, ...] | None = None
    logprobs_indices: tuple[Any, ...] | None = None


def listing(problems: Sequence[str]) -> str:
    """Return the first problems, one indented line each, and how many more there are."""
    rest = [f"and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
    return "\n".join(f"  {line}" for line in [*problems[:SHOWN], *rest])


def read_records(paths: Sequence[str | Path], limit: int | None = None) -> list[Record]:
    """Read every record of the files and folders, in order.

    Args:
        paths: `.parquet` files, `.json` files (one list of objects), folders written by `save_to_disk` of datasets;
            anything else is read as JSONL in UTF-8, blank lines apart. `.json.gz` and `.jsonl.gz` are unpacked. A name
            that does not exist may be a glob (`*`, `?`, `[...]`, and `**` for any folders), read in the order of names.
        limit: at most this many records from each path, or from all files of a glob together.

    Raises:
        DataError: for every path that cannot be read or holds an unusable record, with file and line.
    """
    if isinstance(paths, str):
        raise DataError(f"expected a list of paths, found the text {paths!r}: write [{paths!r}]")
    records: list[Record] = []
    failures: list[str] = []
    for name in paths:
        taken = 0
        try:
            for path in matching_paths(name):
                if limit is not None and taken >= limit:
                    break
                found = _read_path(path, None if limit is None else limit - taken)
                records += found
                taken += len(found)
        except DataError as error:
            failures.append(str(error))
        except OSError as error:
            failures.append(f"{name}: cannot be read: {error.strerror or error}")
    if failures:
        raise DataError("\n\n".join(failures))
    return records


def matching_paths(name: str | Path) -> list[Path]:
    """Return the path of that name, or what a glob matches, sorted.

    Raises:
        DataError: nothing has that name, or matches.
    """
    path, text = Path(name), str(name)
    if text == "-":
        raise DataError("-: standard input is not read; write the data to a file and name it")
    if path.exists():
        return [path]
    if glob.has_magic(text):
        if found := sorted(glob.glob(text, recursive=True)):
            return [Path(item) for item in found]
        raise DataError(f"{name}: the pattern matches no file\nexpected: {_FORMS}; {_where_from()}")
    missing = next((parent for parent in reversed(path.parents) if not parent.exists()), None)
    why = f"its folder {missing} does not exist" if missing is not None else "does not exist"
    raise DataError(f"{name}: {why}\nexpected: {_FORMS}; {_where_from()}")


def document_in_prompts(record: Record) -> Record:
    """Return the record with its document before every question, as a model without a LoRA has to be asked."""
    return replace(record, prompts=tuple(f"{record.context}\n\n{prompt}" for prompt in record.prompts))


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write records as JSONL that `read_records` reads back; `source` becomes the new file's own lines.

    Raises:
        DataError: the file exists, or cannot be written.
    """
    with write_new_file(path) as partial, partial.open("x", encoding="utf-8", newline="\n") as file:
        for record in records:
            values = {key: value for key, value in vars(record).items() if key != "source" and value is not None}
            file.write(json.dumps(values, ensure_ascii=False, default=list) + "\n")


def _read_path(path: Path, limit: int | None) -> list[Record]:
    try:
        return _read_records(path, limit)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as gzip: {error}") from None


def _read_records(path: Path, limit: int | None) -> list[Record]:
    unit, values = _open(path)
    records: list[Record] = []
    problems: list[str] = []
    for number, value in islice(values, limit):
        problem = value.text if isinstance(value, _Unreadable) else _problem(value)
        if problem:
            problems.append(f"{unit} {number}: {problem}")
        else:
            records.append(_record(value, f"{path}:{number}"))
    if problems:
        count = f"{len(problems):,} of {len(problems) + len(records):,} records"
        raise DataError(f"{path}: {count} cannot be used\n{listing(problems)}\n{EXPECTED}\nfix or remove them")
    if not records:
        raise DataError(f"{path}: holds no records\n{EXPECTED}")
    return records


@dataclass(frozen=True)
class _Unreadable:
    """Stands in for a line that holds no value; `text` says why."""

    text: str


def _where_from() -> str:
    return f"a relative path starts from {Path.cwd()}"


def _open(path: Path) -> tuple[str, Iterator[tuple[int, Any]]]:
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
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Unreadable(f"not UTF-8 (byte 0x{text[error.start]:02x} at position {error.start + 1})")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return _Unreadable(f"invalid JSON: {error.msg} at {line}column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of open brackets
        return _Unreadable(f"invalid JSON: {error}")


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    with _binary(path) as file:
        value = _parse(file.read().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(value, _Unreadable) or not isinstance(value, list):
        found = value.text if isinstance(value, _Unreadable) else f"found {_kind(value)}"
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
        raise DataError(f"{path}: is a folder that `save_to_disk` of datasets did not write{files}\nexpected: {_FORMS}")
    import datasets  # here: it takes seconds to import, and most data is JSONL

    try:
        dataset = datasets.load_from_disk(str(path))
    except (FileNotFoundError, pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a dataset: {str(error).splitlines()[0]}") from None
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"{path}: holds several splits; name one of {', '.join(str(path / s) for s in dataset)}")
    return enumerate(dataset, 1)


def _problem(value: Any) -> str | None:
    """Return why a value cannot be a record, or None."""
    if not isinstance(value, Mapping):
        return f"expected an object, found {_kind(value)}"
    for key in ("context", "prompts", "responses"):
        if value.get(key) is None:
            return f"`{key}` is missing (found: {', '.join(map(str, value)) or 'nothing'})"
    if problem := _text_problem("context", value["context"]):
        return problem
    if not value["context"].strip():
        return "`context` is empty: there is no document"
    for key in ("prompts", "responses"):
        if not isinstance(value[key], list):
            return f"`{key}` must be a list of strings, found {_kind(value[key])}"
        for index, text in enumerate(value[key]):
            if problem := _text_problem(f"{key}[{index}]", text):
                return problem
    if not value["prompts"]:
        return "`prompts` is empty: there is no question"
    if len(value["prompts"]) != len(value["responses"]):
        return f"{len(value['prompts'])} prompts but {len(value['responses'])} responses"
    return _logprobs_problem(value)


def _text_problem(name: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"`{name}` must be a string, found {_kind(value)}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"`{name}` holds half of a surrogate pair at character {error.start + 1}, which no tokenizer accepts"
    return None


def _logprobs_problem(value: Mapping[str, Any]) -> str | None:
    vals, indices = value.get("logprobs_vals"), value.get("logprobs_indices")
    if (vals is None) != (indices is None):
        return "`logprobs_vals` and `logprobs_indices` come together; one is missing"
    for key in ("logprobs_vals", "logprobs_indices"):
        if vals is not None and (not isinstance(value[key], list) or len(value[key]) != len(value["prompts"])):
            return f"`{key}` must be a list with an entry for each of the {len(value['prompts'])} prompts"
    return None


def _record(value: Mapping[str, Any], source: str) -> Record:
    return Record(
        context=value["context"],
        prompts=tuple(value["prompts"]),
        responses=tuple(value["responses"]),
        source=source,
        logprobs_vals=_tables(value.get("logprobs_vals")),
        logprobs_indices=_tables(value.get("logprobs_indices")),
    )


def _tables(value: list[Any] | None) -> tuple[Any, ...] | None:
    return None if value is None else tuple(map(compact, value))


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:30]!r}"
