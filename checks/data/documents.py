"""Reading of the documents of packed batches: chunks without the template's affixes and overlap, joined, are the document."""

from typing import TYPE_CHECKING

import numpy as np

from checks.data.epoch import Problems
from checks.data.expected import id_hash
from checks.oracles import chunks as chunk_oracle
from checks.oracles.conversations import REFUSALS

if TYPE_CHECKING:
    from checks.data.epoch import EpochReading
    from checks.data.expected import ExpectedData
    from d2l.data.packing import PackedBatch

RENDERED = 16  # documents that are rendered as a whole message: the tokens around the others are those around these


class DocumentReader:
    """Files every difference of a batch's documents from the data in a reading, under `documents` or `pairing`."""

    def __init__(self, reading: "EpochReading", data: "ExpectedData") -> None:
        self.reading, self.data, self.form = reading, data, data.form
        self._verified: dict[int, int] = {}  # record -> hash of its chunks, found equal to its document
        self._by_text: dict[str, int] | None = None
        self._rendered = 0

    def read(self, batch: "PackedBatch", chunks: np.ndarray) -> None:
        """Read every document of a batch; `chunks` is where each chunk starts, int64 [chunks]."""
        ids = batch.ctx_ids[0].numpy()
        pieces = np.split(ids, chunks[1:])
        starts = np.cumsum([0, *batch.n_ctx_chunks]).tolist()
        for record, start, stop in zip(batch.record_ids, starts, starts[1:], strict=False):
            key = hash(tuple(map(id_hash, pieces[start:stop])))
            if self._verified.get(record) == key:
                continue
            problem = self._document_problem(record, [piece.tolist() for piece in pieces[start:stop]])
            problem = problem or self._message_problem(record, pieces[start:stop])
            if problem is None:
                self._verified[record] = key
            else:
                kind, text = problem
                kind.add(f"{self.reading.name}record {record} ({self.data.records[record].source}): {text}")

    def _document_problem(self, record: int, chunks: list[list[int]]) -> tuple[Problems, str] | None:
        """Compare chunks without affixes, joined, with the record's document; None where they agree."""
        document = self.data.records[record].context
        overlap = self.reading.config.chunk_overlap if len(chunks) > 1 else 0
        ids = self.form.encode_contents(document) if overlap else []
        texts = []
        for prefix, suffix in self.form.affixes:
            cut = [without_affixes(chunk, prefix, suffix) for chunk in chunks]
            if None in cut:
                continue
            joined = chunk_oracle.joined([piece or [] for piece in cut], ids, overlap)
            text = self.form.decode(joined)
            if text == document:
                return None
            ids = ids or self.form.encode_contents(document)
            if joined == ids or text == self.form.decode(ids):
                return None
            texts.append(text)
        if not texts:
            return self.reading.documents, self._affix_problem(chunks)
        if self._by_text is None:
            self._by_text = {record.context: index for index, record in enumerate(self.data.records)}
        if texts[0] in self._by_text:
            return self.reading.pairing, f"its questions stand beside the document of record {self._by_text[texts[0]]}"
        place = next((at for at, (a, b) in enumerate(zip(texts[0], document, strict=False)) if a != b), None)
        place = min(len(texts[0]), len(document)) if place is None else place
        nearby = slice(max(place - 20, 0), place + 40)
        return self.reading.documents, (
            f"{len(texts[0]):,} characters for {len(document):,}; from character {nearby.start:,} on "
            f"{texts[0][nearby]!r} instead of {document[nearby]!r}"
        )

    def _affix_problem(self, chunks: list[list[int]]) -> str:
        """Name the first chunk that does not stand between the template's tokens."""
        prefix, suffix = self.form.affixes[0]
        number = next((at for at, chunk in enumerate(chunks) if without_affixes(chunk, prefix, suffix) is None), 0)
        around = f"{self.form.decode(chunks[number][:8])!r} … {self.form.decode(chunks[number][-4:])!r}"
        wanted = f"{self.form.decode(prefix[:8])!r} … {self.form.decode(suffix[-4:])!r}"
        return f"chunk {number} of {len(chunks)} is no user's message: {around} instead of {wanted}"

    def _message_problem(self, record: int, chunks: list[np.ndarray]) -> tuple[Problems, str] | None:
        """Compare a document that is one chunk with the whole message that the library renders; None where they agree."""
        document = self.data.records[record].context
        if len(chunks) > 1 or self._rendered == RENDERED or document != document.strip():
            return None  # some templates strip the document's edges
        self._rendered += 1
        try:
            message = self.form.encode(self.form.document(document))
        except REFUSALS:
            return None
        ids = chunks[0].tolist()
        if ids == message or self.form.decode(ids) == self.form.decode(message):
            return None
        return self.reading.documents, "the chunk is not the user's message that the template renders"


def without_affixes(chunk: list[int], prefix: list[int], suffix: list[int]) -> list[int] | None:
    """Return a chunk without its affixes; None where they are not there."""
    stop = len(chunk) - len(suffix)
    if stop < len(prefix) or chunk[: len(prefix)] != prefix or chunk[stop:] != suffix:
        return None
    return chunk[len(prefix) : stop]
