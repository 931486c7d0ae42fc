"""What a run's data becomes in tokens according to the oracle, question by question, ready to be looked up."""

from bisect import bisect_right
from collections.abc import Sequence
from datetime import date
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from checks.oracles.conversations import ConversationFormat, Expected

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.records import Record

LATER = 1_000_000  # characters of a record's questions that are encoded only where a batch has one of them
_KEPT = 4  # sets of records whose expectations stay in memory: the run's own and those of the probes
_known: list["ExpectedData"] = []


def conversation_format(subject: "Subject") -> ConversationFormat:
    """Return the oracle for the run's tokenizer, template text, supervision and date."""
    assert subject.tokenizer is not None
    day = subject.config.current_date or subject.chat.current_date
    return ConversationFormat(
        subject.tokenizer,
        subject.chat.template,
        subject.config.supervision,
        date.fromisoformat(day),
        keeps_control_tokens=subject.config.control_tokens == "keep",
    )


def expected_data(form: ConversationFormat, records: "Sequence[Record]") -> "ExpectedData":
    """Return the expectations for some records; the latest ones are kept, as several checks compare with them."""
    for known in _known:
        if known.form == form and known.records == records:
            return known
    made = ExpectedData(form, records)
    _known[:] = [made, *_known[: _KEPT - 1]]
    return made


class ExpectedData:
    """Every question of some records with its answer, as a hash of its token ids and the range that is supervised.

    Questions are counted from 0 over all records. Hashes instead of ids keep this small for large data.
    """

    def __init__(self, form: ConversationFormat, records: "Sequence[Record]") -> None:
        self.form, self.records = form, records
        self.offsets = [*accumulate((len(record.prompts) for record in records), initial=0)]
        self.starts = np.zeros(self.offsets[-1], dtype=np.int32)
        self.stops = np.zeros(self.offsets[-1], dtype=np.int32)
        self._places: dict[int, list[int]] = {}
        for offset, record in zip(self.offsets, records, strict=False):
            if sum(map(len, (*record.prompts, *record.responses))) > LATER:
                continue
            for place, expected in enumerate(self._expected(record, each=False), offset):
                if expected is not None:
                    self.starts[place], self.stops[place] = expected.start, expected.stop
                    self._places.setdefault(id_hash(np.asarray(expected.ids, dtype=np.int64)), []).append(place)

    def __len__(self) -> int:
        """Return the number of questions."""
        return self.offsets[-1]

    def find(self, ids: np.ndarray, record: int) -> list[int]:
        """Return the questions that these token ids, int64 [T], are expected for; none where they are of no question.

        Args:
            record: where they stand; its questions are rendered one by one where no question is found.
        """
        if found := self._places.get(id_hash(ids)):
            return found
        wanted = ids.tolist()
        for place, expected in enumerate(self._expected(self.records[record]), self.offsets[record]):
            if expected is not None and expected.ids == wanted:
                self.starts[place], self.stops[place] = expected.start, expected.stop
                return [place]
        return []

    def record_of(self, place: int) -> int:
        """Return the record of a question."""
        return bisect_right(self.offsets, place) - 1

    def describe(self, place: int) -> str:
        """Name a question by its record, the record's source, and its number there."""
        record = self.record_of(place)
        return f"record {record} ({self.records[record].source}), prompt {place - self.offsets[record]}"

    def difference(self, record: int, ids: Sequence[int]) -> str:
        """Describe where token ids depart from those of the record's nearest question, as text."""
        found = self.form.decode(ids)
        texts = [self.form.decode(expected.ids) for expected in self._expected(self.records[record]) if expected]
        if not texts:
            return f"{found[:80]!r}, where the template refuses every question of the record"
        nearest = max(texts, key=lambda text: _common(text, found) + _common(text[::-1], found[::-1]))
        place = max(_common(nearest, found) - 20, 0)
        return f"{found[place : place + 80]!r} instead of {nearest[place : place + 80]!r}"

    def _expected(self, record: "Record", each: bool = True) -> list[Expected | None]:
        return self.form.expected(list(zip(record.prompts, record.responses, strict=True)), each=each)


def id_hash(ids: np.ndarray) -> int:
    """Return a hash of token ids, int64 [T]."""
    return hash(ids.tobytes())


def _common(one: str, other: str) -> int:
    """Return the length of the longest common prefix."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)
