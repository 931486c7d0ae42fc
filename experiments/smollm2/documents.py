"""Real English prose found on this machine: what its packages document themselves with, as lists of clean sentences."""

import ast
import gzip
import hashlib
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d2l.errors import DataError

Split = Literal["train", "heldout"]

PLACES = ("/usr/share/doc", "/usr/share/perl", "/usr/share/vim", "/usr/share/info")
ENDINGS = (".txt", ".md", ".rst", ".pod", ".info")  # also gzipped
MOST_FILES = (
    4000  # drawn by the hash of their paths: reading 4,000 takes half a minute, and a site-packages may have 50,000
)
MOST_BYTES = 400_000  # of a file, after unpacking; change logs and word lists are longer
FEWEST_WORDS, MOST_WORDS = 7, 40  # of a sentence
HELDOUT_SHARE = 5  # one file in so many is held out
LEAST_PASSAGES = 50  # fewer are no material

_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'()\-?!]*[.!?]")  # no markup, paths, code or tables
_COMMON_WORDS = "the a an of to in is are and for that this it be with by on or as from was can not"
_COMMON = frozenset(_COMMON_WORDS.split())


@dataclass(frozen=True)
class Passage:
    """Consecutive sentences of one file."""

    sentences: tuple[str, ...]
    split: Split


def find_passages(places: Sequence[Path] | None = None) -> list[Passage]:
    """Read the prose of all files, each sentence once.

    Args:
        places: folders to look into; default: the documentation of Debian's packages and all modules of this Python.

    Raises:
        DataError: there is almost none.
    """
    folders = [*map(Path, PLACES), *_python_folders()] if places is None else places
    seen: set[str] = set()
    passages = []
    files = {file for folder in folders for file in folder.rglob("*") if _is_wanted(file)}
    for file in sorted(files, key=lambda it: _hash(str(it)))[:MOST_FILES]:
        split: Split = "heldout" if _hash(file.name) % HELDOUT_SHARE == 0 else "train"
        for paragraph in _paragraphs(file):
            sentences = [it for it in clean_sentences(paragraph) if it not in seen]
            seen.update(sentences)
            if len(sentences) > 1:
                passages.append(Passage(tuple(sentences), split))
    if len(passages) < LEAST_PASSAGES:
        where = ", ".join(map(str, folders))
        raise DataError(
            f"{where}: expected at least {LEAST_PASSAGES} passages of English prose, found {len(passages)}; "
            "install packages with documentation"
        )
    return passages


def clean_sentences(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph that are plain prose, white space made single spaces."""
    text = " ".join(paragraph.split())
    return [sentence for sentence in _SENTENCE_END.split(text) if _is_prose(sentence)]


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    common = sum(word.lower().strip(",.;:") in _COMMON for word in words)
    return FEWEST_WORDS <= len(words) <= MOST_WORDS and common >= 2 and bool(_PROSE.fullmatch(sentence))


def _python_folders() -> list[Path]:
    """Return the folders of the standard library and of installed packages."""
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]


def _is_wanted(file: Path) -> bool:
    name = file.name.removesuffix(".gz")
    is_text = name.endswith(ENDINGS) or name.startswith("README") or name in {"METADATA", "copyright"}
    return (is_text or name.endswith(".py")) and "/tests/" not in file.as_posix() and file.is_file()


def _paragraphs(file: Path) -> Iterator[str]:
    """Yield the paragraphs of a text, or of the docstrings of a Python module; nothing where it cannot be read."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            text = stream.read(MOST_BYTES).decode("utf-8")
        texts = [text] if file.suffix != ".py" else _docstrings(text)
    except (OSError, EOFError, zlib.error, ValueError, SyntaxError, RecursionError):
        return
    for part in texts:
        yield from _PARAGRAPH.split(part)


def _docstrings(source: str) -> list[str]:
    """Return the docstrings of a module, its classes and functions."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [text for text in found if text]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big")
