"""Documents to be internalized: files, folders of files and JSONL files, read one at a time, each under an id of its own.

What cannot be read is a document with a problem, in its place: nothing ends the stream. Without torch.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from d2l.data.document import decode_document
from d2l.errors import DataError

JSONL_ENDINGS = (".jsonl", ".jsonl.gz")
MOST_BYTES = 8 << 20  # of a document: tokenizing takes about 170 times its bytes in memory
EXPECTED = '{"context": "…", "id": "…"}, the id optional'

RESERVED = "index.jsonl"  # stands beside the adapters

_LONGEST_ID = 100  # characters: names of files may have 255 bytes
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Document:
    """A document, or the place of one that cannot be used.

    Attributes:
        id: name of its adapter: letters, digits and ._- only, unlike that of any other.
        name: what it is known by from run to run: the file within the folder that was given, or the id within the JSONL.
        source: where it stands, for messages.
        text: None with a problem, and where there are parts.
        problem: why it cannot be used.
        parts: documents that are one together: see `merge`.
    """

    id: str
    name: str
    source: str
    text: str | None
    problem: str | None = None
    parts: tuple["Document", ...] = ()

    @property
    def sha256(self) -> str:
        """The SHA-256 of the text, or of the hashes of all parts one after another, in hexadecimal."""
        hashed = "".join(part.sha256 for part in self.parts) if self.parts else self.text or ""
        return hashlib.sha256(hashed.encode()).hexdigest()

    def without_text(self) -> "Document":
        """Return the same, to be kept where there are many."""
        return replace(self, text=None, parts=())


def is_single(places: Sequence[str]) -> bool:
    """Return whether the places name one document, and not a folder or JSONL of them."""
    (first, *rest) = places
    return not rest and not Path(first).is_dir() and not first.endswith(JSONL_ENDINGS)


def count_documents(places: Sequence[str]) -> int:
    """Return how many documents the places hold, as far as that can be known without reading them."""
    return sum(_count(Path(place)) for place in dict.fromkeys(places))


def read_documents(places: Sequence[str], known: Mapping[str, str] | None = None) -> Iterator[Document]:
    """Read the documents of files, of folders (all files in them, hidden ones apart) and of JSONL files, lazily.

    Args:
        places: paths; one that is given twice is read once.
        known: ids that documents had in an earlier run, by `Document.name`.
    """
    names = _Names(known or {})
    for place in dict.fromkeys(places):
        path = Path(place)
        if place.endswith(JSONL_ENDINGS) and not path.is_dir():
            yield from _read_jsonl(path, names)
        elif path.is_dir():
            for file in _files(path):
                yield _read_file(file, file.relative_to(path).as_posix(), names)
        else:
            yield _read_file(path, path.name, names)


def merge(documents: Iterable[Document], id_: str) -> Document:
    """Make one document of several, whose adapter has the chunks of all of them.

    The parts stand in the order of their hashes, so that the same documents in another order are the same one.

    Args:
        id_: of the merged document, which is known by the names of its parts.

    Raises:
        DataError: a document cannot be used, two are the same, or there are fewer than two; the message has all problems.
    """
    parts: dict[str, Document] = {}
    problems = []
    for document in documents:
        if document.text is None:
            problems.append(f"{document.source}: {document.problem}")
        elif (first := parts.setdefault(document.sha256, document)) is not document:
            problems.append(f"{first.source} and {document.source} are the same document; pass it once")
    if problems:
        raise DataError("\n".join(problems))
    if len(parts) < 2:
        found = next((part.source for part in parts.values()), "none")
        raise DataError(f"expected several documents to merge, found {found}; a single one needs no --merge")
    names = " + ".join(sorted(part.name for part in parts.values()))
    ordered = tuple(part for _, part in sorted(parts.items()))
    return Document(id_, names, ", ".join(part.source for part in ordered), None, parts=ordered)


def read_text(path: Path, advice: str = "pass a text file, or - for stdin") -> str:
    """Read the text of a file.

    Args:
        advice: what to change where there is no such file.

    Raises:
        DataError: it cannot be read, is too large, or is not text.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"{path}: {_excess(size)}")
        return decode_document(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {advice}") from None


class _Names:
    """The ids that are taken, and what was known before."""

    def __init__(self, known: Mapping[str, str]) -> None:
        self._known = dict(known)
        self._owners = {RESERVED: ""} | {id_.casefold(): name for name, id_ in known.items()}
        self._used: set[str] = set()

    def give(self, wanted: str, name: str, source: str) -> tuple[str, str]:
        """Return id and name of a document: those it had before, else the wanted one made safe and unlike all others."""
        if name in self._used:
            name = source
        self._used.add(name)
        if name in self._known:
            return self._known[name], name
        safe = _UNSAFE.sub("-", wanted).strip("-.")[:_LONGEST_ID] or "document"
        if self._owners.get(safe.casefold(), name) != name:
            safe = f"{safe}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
        self._owners[safe.casefold()] = name
        return safe, name

    def is_used(self, name: str) -> bool:
        return name in self._used


def _files(folder: Path) -> list[Path]:
    """List the files below a folder in the order of their names, without hidden ones and what hidden folders hold."""
    return sorted(
        path
        for path in folder.rglob("*")
        if (path.is_file() or (path.is_symlink() and not path.is_dir()))  # no pipe, which would be waited for
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _count(path: Path) -> int:
    try:
        if path.is_dir():
            return len(_files(path))
        if not str(path).endswith(JSONL_ENDINGS):
            return 1
        with _open(path) as file:
            return sum(1 for line in file if line.strip())
    except (OSError, EOFError, zlib.error):
        return 1


def _read_file(path: Path, name: str, names: _Names) -> Document:
    id_, name = names.give(name.removesuffix(path.suffix), name, str(path))
    try:
        return Document(id_, name, str(path), read_text(path))
    except DataError as error:
        return Document(id_, name, str(path), None, str(error).removeprefix(f"{path}: "))


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_jsonl(path: Path, names: _Names) -> Iterator[Document]:
    """Read the documents of a JSONL file, line by line."""
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(2 * MOST_BYTES):  # escapes make JSON longer than its text
                number += 1
                whole = line.endswith(b"\n") or len(line) < 2 * MOST_BYTES
                while not whole:
                    rest = file.readline(MOST_BYTES)
                    whole = rest.endswith(b"\n") or len(rest) < MOST_BYTES
                    line = b"\0"  # a mark: too long to be parsed
                if line.strip():
                    yield _from_line(line, f"{stem}-{number:06d}", f"{path}:{number}", names)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        id_, name = names.give(stem, path.name, str(path))
        yield Document(id_, name, str(path), None, f"cannot be read after line {number}: {reason}")


def _from_line(line: bytes, default: str, source: str, names: _Names) -> Document:
    """Make the document of a line of JSONL."""
    value, problem = _parse(line)
    wanted, is_given = default, False
    if isinstance(value.get("id"), str | int) and str(value["id"]).strip():
        wanted, is_given = str(value["id"]), True
    is_repeated = is_given and names.is_used(f"#{wanted}")
    id_, name = names.give(wanted, f"#{wanted}", source)
    if is_repeated:
        problem = f"the id {wanted!r} is used by an earlier line too"
    text = value.get("context")
    if problem is None:
        problem = _problem(text)
    return Document(id_, name, source, None if problem else text, problem)


def _parse(line: bytes) -> tuple[dict[str, Any], str | None]:
    """Return the object of a line and no problem, or an empty one and a problem."""
    if line == b"\0":
        return {}, _excess(2 * MOST_BYTES)
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return {}, f"invalid JSON in UTF-8: {error}; expected {EXPECTED}"
    if not isinstance(value, dict):
        return {}, f"expected {EXPECTED}, found {type(value).__name__}"
    return value, None


def _problem(text: Any) -> str | None:
    """Return why the context of a line is no document."""
    if not isinstance(text, str):
        return f"context: expected a text, found {'nothing' if text is None else type(text).__name__}"
    if "\0" in text:
        return "context: holds a zero character; is it binary?"
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        return f"context: holds half of a surrogate pair at {error.start:,}"
    return _excess(size) if size > MOST_BYTES else None if text.strip() else "the document is empty"


def _excess(size: int) -> str:
    return f"the document is too large: at least {size:,} bytes > {MOST_BYTES:,}; split it"
