"""Documents into adapter folders, one after another: kept where they are right, from old chunks where those are, else read.

At most one document's chunks are in memory, or those of some packs; the documents are never held together.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from d2l.checkpoint import FoundCheckpoint
from d2l.data.chunks import Ids
from d2l.errors import CheckpointError, D2LError, DataError
from d2l.hypernet.lora import Lora
from d2l.inference.adapter import WEIGHTS, require_exportable, require_finite, shape_lora, write_adapter
from d2l.inference.cards import Card, file_sha256, read_card
from d2l.inference.documents import Document
from d2l.inference.load import TrainedModel
from d2l.inference.reading import chunk_hash, cut, describe_beyond, join, read_chunks, trained_bounds
from d2l.inference.servers import AdapterForm
from d2l.inference.written import is_whole, read_rows
from d2l.io.atomic import replace_folder
from d2l.io.run_folder import MANIFEST

_PACKS = 4  # that are gathered before they are read: more fill better and hold more LoRAs

Status = Literal["made", "kept", "failed"]
Part = dict[str, str | int]  # of a merged document: name, hash and number of chunks
OnChunks = Callable[[int, int], None]  # chunks read, and those to be read now


@dataclass(frozen=True)
class Outcome:
    """What became of a document.

    Attributes:
        card: the facts of its adapter; None where it failed.
        reason: why it failed.
        read, reused: chunks that went through the base, and that an earlier adapter or another document had.
        duplicate_of: id of an earlier document with the same text.
    """

    document: Document
    status: Status
    card: Card | None = None
    reason: str = ""
    read: int = 0
    reused: int = 0
    duplicate_of: str | None = None

    def without_text(self) -> "Outcome":
        """Return the same, for a list of many."""
        return replace(self, document=self.document.without_text())

    def entry(self, checkpoint_sha256: str) -> dict[str, Any]:
        """Return the document's line of the index."""
        entry: dict[str, Any] = {"id": self.document.id, "name": self.document.name, "source": self.document.source}
        entry["status"] = "failed" if self.card is None else "duplicate" if self.duplicate_of else "done"
        entry["checkpoint_sha256"] = checkpoint_sha256
        if self.card is None:
            return entry | {"reason": self.reason}
        card = self.card
        entry |= {"document_sha256": card.document["sha256"], "rank": card.rank, "chunks": card.chunks["used"]}
        entry |= {"bytes": card.weights["bytes"], "error": card.error, "warnings": list(card.warnings)}
        return entry | ({"duplicate_of": self.duplicate_of} if self.duplicate_of else {})


@dataclass(frozen=True)
class _Work:
    """A document that is to be written: its chunks, and what earlier adapters have of them."""

    document: Document
    digest: str
    chunks: tuple[Ids, ...]
    parts: tuple[Part, ...]
    hashes: tuple[str, ...]
    duplicate_of: str | None
    old: dict[str, Lora] = field(default_factory=dict)

    @property
    def missing(self) -> dict[str, Ids]:
        return {key: chunk for key, chunk in zip(self.hashes, self.chunks, strict=True) if key not in self.old}


class Internalizer:
    """Turns documents into adapter folders with a trained model.

    Args:
        trained: from `load_model`.
        form: of the adapters.
        place: the folder of an id.
        pack_tokens: tokens that are read in one pass; None: each chunk by itself, so that an adapter depends on its
            document alone, to the last bit.
        on_chunks: called after every pass.

    Raises:
        CheckpointError: no adapter format supports a target module, or the model is of no checkpoint.
    """

    def __init__(
        self,
        trained: TrainedModel,
        form: AdapterForm,
        place: Callable[[str], Path],
        pack_tokens: int | None = None,
        on_chunks: OnChunks = lambda done, total: None,
    ) -> None:
        require_exportable(trained.config.target_modules)
        self.trained, self.form, self.place = trained, form, place
        self.pack_tokens, self.on_chunks = pack_tokens, on_chunks
        self.checkpoint = checkpoint_identity(trained.source)
        self.settings = form.settings() | {"pack_tokens": pack_tokens}
        self._first: dict[str, str] = {}  # hash of a text → id of the first document with it

    def run(self, documents: Iterable[Document]) -> Iterator[Outcome]:
        """Yield what becomes of each document, in order up to some packs; a failure of one is its own."""
        room = 0 if self.pack_tokens is None else _PACKS * self.pack_tokens
        waiting: list[_Work] = []
        tokens = 0
        for document in documents:
            begun = self._begin(document)
            if isinstance(begun, Outcome):
                yield begun
                continue
            waiting.append(begun)
            tokens += sum(map(len, begun.missing.values()))
            if tokens >= room:
                yield from self._finish(waiting)
                waiting, tokens = [], 0
        yield from self._finish(waiting)

    def _begin(self, document: Document) -> Outcome | _Work:
        """Look at a document and at its folder: it is wrong, or done, or work."""
        if document.problem is not None:
            return Outcome(document, "failed", reason=document.problem)
        digest = document.sha256
        duplicate_of = self._first.setdefault(digest, document.id)
        duplicate = None if duplicate_of == document.id else duplicate_of
        folder = self.place(document.id)
        card = read_card(folder)
        if card is not None and self._is_right(card, folder, digest):
            return Outcome(document, "kept", card, duplicate_of=duplicate)
        try:
            if card is None and os.path.lexists(folder):
                raise CheckpointError(f"{folder} exists, is no adapter with a card, and is never written over")
            if card is not None and not self._is_alike(card):
                raise CheckpointError(
                    f"{folder} holds an adapter of another checkpoint or base ({card.checkpoint.get('folder')}, {card.base}) "
                    "and is never written over with one of this: choose another folder"
                )
            chunks, parts = self._cut(document)
        except D2LError as error:
            return Outcome(document, "failed", reason=str(error))
        hashes = tuple(map(chunk_hash, chunks))
        work = _Work(document.without_text(), digest, chunks, parts, hashes, duplicate)
        for earlier in dict.fromkeys((document.id, duplicate_of)):
            work.old.update(self._old_chunks(self.place(earlier), work))
        return work

    def _cut(self, document: Document) -> tuple[tuple[Ids, ...], tuple[Part, ...]]:
        """Return the chunks of a document, those of its parts one after another; and its parts, none for a single one.

        Raises:
            DataError: one has no chunks, or none that fit; the message names the part.
        """
        chunks: list[Ids] = []
        parts: list[Part] = []
        for part in document.parts or (document,):
            try:
                found = cut(self.trained, part.text or "", before=len(chunks))
            except DataError as error:
                raise DataError(f"{part.source}: {error}" if document.parts else str(error)) from error
            chunks += found
            parts.append({"name": part.name, "sha256": part.sha256, "chunks": len(found)})
        return tuple(chunks), tuple(parts) if document.parts else ()

    def _is_right(self, card: Card, folder: Path, digest: str) -> bool:
        """Return whether an adapter is what this document would become, and whole."""
        return (
            card.document["sha256"] == digest
            and self._is_alike(card)
            and dict(card.settings) == self.settings
            and is_whole(card, folder)
        )

    def _is_alike(self, card: Card) -> bool:
        """Return whether an adapter is of the same checkpoint and base."""
        same_checkpoint = card.checkpoint["sha256"] == self.checkpoint["sha256"]
        return same_checkpoint and card.base == self.trained.config.model_name_or_path

    def _old_chunks(self, folder: Path, work: _Work) -> dict[str, Lora]:
        """Return the LoRAs of those chunks that an earlier adapter has with the bits that reading them anew would give."""
        card, wanted = read_card(folder), set(work.missing)
        if card is None or not wanted & set(card.chunk_hashes) or not self._is_alike(card) or card.is_refactored:
            return {}
        if card.settings.get("pack_tokens") != self.pack_tokens:
            return {}
        rank = self._rank(len(work.chunks))
        same_dtype = card.settings.get("dtype") == self.form.dtype and self.form.rank_for(rank) >= rank
        if card.settings.get("dtype") != "float32" and not same_dtype:
            return {}
        return read_rows(card, folder, self.trained, wanted) if is_whole(card, folder) else {}

    def _rank(self, chunks: int) -> int:
        config = self.trained.config
        return config.lora_r * (chunks + config.use_bias)

    def _finish(self, works: list[_Work]) -> Iterator[Outcome]:
        """Read what is missing, then write each document's adapter."""
        missing: dict[str, Ids] = {}
        owners: dict[str, int] = {}  # which document a chunk is read for: the others reuse it
        for number, work in enumerate(works):
            for key, chunk in work.missing.items():
                missing.setdefault(key, chunk)
                owners.setdefault(key, number)
        found: dict[str, Lora] = {}
        for key, lora in read_chunks(self.trained.model, missing, self.pack_tokens):
            found[key] = lora
            self.on_chunks(len(found), len(missing))
        for number, work in enumerate(works):
            read = sum(owner == number for owner in owners.values())
            try:
                card = self._write(work, [work.old[key] if key in work.old else found[key] for key in work.hashes])
            except D2LError as error:
                yield Outcome(work.document, "failed", reason=str(error), read=read)
            else:
                reused = len(work.chunks) - read
                yield Outcome(work.document, "made", card, "", read, reused, work.duplicate_of)

    def _write(self, work: _Work, chunks: list[Lora]) -> Card:
        """Write the adapter of a document from the LoRAs of its chunks."""
        model = self.trained.model
        lora = join(model, chunks)
        require_finite(lora, model.base)
        if not any(b.any() for b in lora.B.values()):
            raise CheckpointError(
                "its B is zero, so the adapter would change nothing: use a checkpoint that has learnt"
            )
        shaped = shape_lora(lora, self.form)
        most, longest = trained_bounds(self.trained.config)
        lengths = {"used": len(chunks), "longest": max(map(len, work.chunks))}
        base = self.trained.config.model_name_or_path
        with replace_folder(self.place(work.document.id), "adapter") as partial:
            write_adapter(shaped.lora, model.base, partial, base, self.form)
            weights = partial / WEIGHTS
            card = Card(
                base=base,
                document={"id": work.document.id, "name": work.document.name, "sha256": work.digest},
                checkpoint=self.checkpoint,
                chunks=lengths | {"trained": most, "trained_longest": longest},
                chunk_hashes=work.hashes,
                rank=shaped.lora.rank,
                generated_rank=lora.rank,
                error=shaped.error,
                settings=self.settings,
                weights={"sha256": file_sha256(weights), "bytes": weights.stat().st_size},
                warnings=tuple(describe_beyond(self.trained.config, work.chunks)),
                parts=work.parts,
            )
            card.write(partial)
        return card


def checkpoint_identity(source: FoundCheckpoint | None) -> dict[str, str]:
    """Return folder and hash of a checkpoint: that of its manifest, which holds those of its files.

    Raises:
        CheckpointError: the model was not loaded from a checkpoint.
    """
    if source is None:
        raise CheckpointError("the model was not loaded from a checkpoint, so its adapters could not name one")
    return {"folder": str(source.folder), "sha256": file_sha256(source.folder / MANIFEST)}
