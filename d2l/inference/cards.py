"""What is written beside adapters: a card in each one's folder, and an index of all. Without torch.

FOLDER/
    index.jsonl                   a line for each document: id, hash, rank, chunks, bytes, status, reason
    ID/adapter_config.json        the two files that servers read
    ID/adapter_model.safetensors
    ID/d2l.json                   the card: base, document, checkpoint, chunks, error, settings
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2l.errors import CheckpointError
from d2l.inference.documents import RESERVED, Document
from d2l.io.atomic import make_folders, remove_leftovers, replace_file, require_writable
from d2l.io.lock import lock_folder

CARD, INDEX = "d2l.json", RESERVED


@dataclass(frozen=True)
class Card:
    """Facts of an adapter.

    Attributes:
        base: hub id or folder of the base.
        document: `id`, `name` and `sha256` of its text.
        checkpoint: `folder`, and `sha256` of its manifest.
        chunks: how many were `used` and the `longest` of them in tokens; at most how many and how long ones the
            checkpoint's limits let it see in training, `trained` and `trained_longest`.
        chunk_hashes: of each chunk's tokens, in order.
        rank: of the file; `generated_rank` is what the chunks and the bias have.
        error: largest relative error of a delta by a smaller rank; 0 where none was needed.
        settings: what shaped the file; with hash of document and checkpoint they decide whether it is still right.
        weights: `sha256` and `bytes` of the safetensors file.
        warnings: what was unlike training.
        parts: `name`, `sha256` and number of `chunks` of each of several documents that are merged, in the order of rows.
    """

    base: str
    document: Mapping[str, str]
    checkpoint: Mapping[str, str]
    chunks: Mapping[str, int | None]
    chunk_hashes: tuple[str, ...]
    rank: int
    generated_rank: int
    error: float
    settings: Mapping[str, Any]
    weights: Mapping[str, str | int]
    warnings: tuple[str, ...] = ()
    parts: tuple[Mapping[str, str | int], ...] = ()

    @property
    def is_refactored(self) -> bool:
        return self.rank < self.generated_rank

    def write(self, folder: Path) -> None:
        """Write the card into an adapter's folder."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_card(folder: Path) -> Card | None:
    """Return the card of an adapter's folder; None where there is none, or none of this version."""
    try:
        card = Card(**json.loads((folder / CARD).read_text(encoding="utf-8")))
        card.document["sha256"], card.checkpoint["sha256"], card.weights["sha256"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return card


def require_place_for_one(folder: Path, document: Document) -> None:
    """Refuse a folder for one adapter that holds anything but an adapter of the same document, or of the same ones merged.

    Raises:
        CheckpointError: the message says what it holds, or that nothing can be written there.
    """
    require_writable(folder.absolute().parent)  # it is written beside, and renamed
    if not os.path.lexists(folder):
        return
    card = read_card(folder)
    if card is None:
        raise CheckpointError(f"{folder} exists and is never written over: remove it or choose another folder")
    parts = sorted(str(part["name"]) for part in card.parts)
    # a single file may have the name that several have together
    if (card.document.get("name"), parts) != (document.name, sorted(part.name for part in document.parts)):
        merged = f" ({len(parts)} documents, merged)" if parts else ""
        raise CheckpointError(
            f"{folder} exists, holds the adapter of {card.document.get('name')}{merged} and is never written over with "
            "another document's: choose another folder"
        )


def require_place_for_many(folder: Path) -> None:
    """Refuse a folder for several adapters that exists without an index of them.

    Raises:
        CheckpointError: the message names what to do; or nothing can be written there.
    """
    if os.path.lexists(folder) and not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} exists and is never written over: remove it or choose another folder (one with {INDEX}, which an "
            "earlier `d2l internalize` of several documents wrote, is gone on with)"
        )
    require_writable(folder)


class Index:
    """Lines about the documents of a folder, by id; every change is in the file at once, in order when it is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / INDEX
        self.entries = {entry["id"]: entry for entry in _read_lines(self.path)}

    @property
    def known(self) -> dict[str, str]:
        """The ids of all documents by their names."""
        return {entry["name"]: id_ for id_, entry in self.entries.items() if isinstance(entry.get("name"), str)}

    def require_checkpoint(self, sha256: str) -> None:
        """Refuse a folder whose adapters are another checkpoint's.

        Raises:
            CheckpointError: the message names one of them.
        """
        for id_, entry in self.entries.items():
            if (other := entry.get("checkpoint_sha256", sha256)) != sha256:
                raise CheckpointError(
                    f"{self.folder} holds adapters of another checkpoint: {id_} is of {str(other)[:12]}…, this one is "
                    f"{sha256[:12]}…; choose another folder, or the checkpoint of these"
                )

    def add(self, entry: Mapping[str, Any]) -> None:
        """Put in the line of a document, in the place of an earlier one."""
        self.entries[entry["id"]] = dict(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))

    def close(self) -> None:
        """Write every document's last line, in the order of ids; a removed adapter's is left out."""
        lines = [
            _line(entry)
            for id_, entry in sorted(self.entries.items())
            if entry.get("status") == "failed" or (self.folder / id_).is_dir()
        ]
        with replace_file(self.path) as partial:
            partial.write_text("".join(lines), encoding="utf-8")


@contextmanager
def open_index(folder: Path) -> Iterator[Index]:
    """Yield the index of a folder, which is made where it is absent, and hold the folder's lock meanwhile.

    Raises:
        CheckpointError: another process writes into the folder, or it cannot be written.
    """
    try:
        make_folders(folder)
        with lock_folder(folder):
            remove_leftovers(folder, only_writer=True)
            (folder / INDEX).touch()
            index = Index(folder)
            try:
                yield index
            finally:
                index.close()
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}; choose another place") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of an index; a line that a killed writer left torn is passed over."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            yield entry
