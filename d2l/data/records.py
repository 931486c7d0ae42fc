"""Documents with questions and answers: read from JSONL, JSON (also gzipped), Parquet or `datasets` folders.

Every record that cannot be used is reported with its file and line; nothing is skipped.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from d2l.data.record_files import FORMS, Unreadable, kind_of, open_values
from d2l.data.tables import compact
from d2l.errors import DataError
from d2l.io.atomic import write_new_file

EXPECTED = (
    'expected: {"context": "…", "prompts": ["…", …], "responses": ["…", …]}, a response for each prompt '
    "(optional: logprobs_vals and logprobs_indices, nested as [prompt][supervised token][k])"
)
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
        raise DataError(f"{name}: the pattern matches no file\nexpected: {FORMS}; {_where_from()}")
    missing = next((parent for parent in reversed(path.parents) if not parent.exists()), None)
    why = f"its folder {missing} does not exist" if missing is not None else "does not exist"
    raise DataError(f"{name}: {why}\nexpected: {FORMS}; {_where_from()}")


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
    unit, values = open_values(path)
    records: list[Record] = []
    problems: list[str] = []
    for number, value in islice(values, limit):
        problem = value.text if isinstance(value, Unreadable) else _problem(value)
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


def _where_from() -> str:
    return f"a relative path starts from {Path.cwd()}"


def _problem(value: Any) -> str | None:
    """Return why a value cannot be a record, or None."""
    if not isinstance(value, Mapping):
        return f"expected an object, found {kind_of(value)}"
    for key in ("context", "prompts", "responses"):
        if value.get(key) is None:
            return f"`{key}` is missing (found: {', '.join(map(str, value)) or 'nothing'})"
    if problem := _text_problem("context", value["context"]):
        return problem
    if not value["context"].strip():
        return "`context` is empty: there is no document"
    for key in ("prompts", "responses"):
        if not isinstance(value[key], list):
            return f"`{key}` must be a list of strings, found {kind_of(value[key])}"
        for index, text in enumerate(value[key]):
            if problem := _text_problem(f"{key}[{index}]", text):
                return problem
    if not value["prompts"]:
        return "`prompts` is empty: there is no question"
    if len(value["prompts"]) != len(value["responses"]):
        return f"{len(value['prompts'])} prompts but {len(value['responses'])} responses"
    for index, text in enumerate(value["responses"]):
        if not text.strip():
            return f"`responses[{index}]` is blank: write what the model is to answer, or leave the question out"
    return _logprobs_problem(value)


def _text_problem(name: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"`{name}` must be a string, found {kind_of(value)}"
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
