"""Reading of the questions of packed batches: which question of the data each is, its labels, its teacher's logprobs."""

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from checks.data.epoch import SHOWN

if TYPE_CHECKING:
    from checks.data.epoch import EpochReading
    from checks.data.expected import ExpectedData
    from d2l.data.packing import PackedBatch

IGNORE_INDEX = -100


class QuestionReader:
    """Files every difference of a batch's questions from the data in a reading, under `texts`, `labels` or `pairing`.

    Attributes:
        seen: how often each question of the data was in a batch so far, int64 [questions].
    """

    def __init__(self, reading: "EpochReading", data: "ExpectedData") -> None:
        self.reading, self.data, self.form = reading, data, data.form
        self.seen = np.zeros(len(data), dtype=np.int64)
        self._needs_teacher = reading.config.needs_teacher
        self._stops = set(data.form.tokenizer.get_added_vocab().values())

    def read(self, batch: "PackedBatch", queries: np.ndarray) -> None:
        """Read every question of a batch; `queries` is where each starts, int64 [questions]."""
        ids, labels = batch.input_ids[0].numpy(), batch.labels[0].numpy()
        records = np.repeat(batch.record_ids, batch.n_queries).tolist()
        supervised = labels != IGNORE_INDEX
        self.reading.questions += len(records)
        self.reading.tokens += len(ids)
        self.reading.label_tokens += int(supervised.sum())
        before = np.concatenate([[0], supervised.cumsum()])
        for record, start, stop in zip(records, queries.tolist(), [*queries[1:].tolist(), len(ids)], strict=True):
            place = self._place(record, ids[start:stop])
            if place is None:
                self._read_unknown(record, ids[start:stop], labels[start:stop])
                continue
            problem = self._label_problem(place, ids[start:stop], labels[start:stop])
            problem = problem or self._teacher_problem(place, batch, before[start], before[stop])
            if problem:
                self.reading.labels.add(f"{self.reading.name}{self.data.describe(place)}: {problem}")

    def _read_unknown(self, record: int, ids: np.ndarray, labels: np.ndarray) -> None:
        """File a question that is none of the data's: under labels, where they are no whole answer, else under texts."""
        problem = self._problem_of_unknown(record, ids, labels)
        kind = self.reading.labels if problem else self.reading.texts
        if not problem and kind.count < SHOWN:
            problem = self.data.difference(record, ids.tolist())
        kind.add(f"{self.reading.name}record {record} ({self.data.records[record].source}): {problem}")

    def _place(self, record: int, ids: np.ndarray) -> int | None:
        """Find which question this is, and count it; one of another record is filed under pairing."""
        places = self.data.find(ids, record)
        first, last = self.data.offsets[record], self.data.offsets[record + 1]
        own = [place for place in places if first <= place < last]
        if places and not own:
            other = self.data.describe(places[0])
            self.reading.pairing.add(f"{self.reading.name}{other} is asked about the document of record {record}")
        if not places:
            return None
        place = min(own or places, key=lambda place: self.seen[place])
        self.seen[place] += 1
        return place

    def _label_problem(self, place: int, ids: np.ndarray, labels: np.ndarray) -> str:
        """Compare the labels of a question with the range that is supervised; empty where they agree."""
        start, stop = int(self.data.starts[place]), int(self.data.stops[place])
        inside = slice(start, stop)
        supervised = labels != IGNORE_INDEX
        if int(supervised.sum()) == stop - start and (labels[inside] == ids[inside]).all():
            return ""
        found = labels[supervised]
        if not len(found):
            return "no label"
        if not np.array_equal(found, ids[supervised]):
            return "labels are not the input's ids at their places"
        return f"labels {_shown(self.form.decode(found.tolist()))}, expected {_shown(self.form.decode(ids[inside].tolist()))}"

    def _problem_of_unknown(self, record: int, ids: np.ndarray, labels: np.ndarray) -> str:
        """Judge the labels of a question whose ids are not expected: a whole answer with its end token, or not."""
        on = labels != IGNORE_INDEX
        kept = labels[on]
        if not len(kept):
            return "no label"
        if not np.array_equal(kept, ids[on]):
            return "labels are not the input's ids"
        text = self.form.decode(kept.tolist())
        if not any(response.strip() in text for response in self._own_responses(record)):
            pieces = [piece.strip() for piece in self.form.control_tokens.split(text) if piece.strip()]
            if not pieces or pieces[-1] not in self._all_responses:
                return f"{text[-60:]!r} holds none of its responses"
        if self._stops and not any(int(token) in self._stops for token in kept[-2:]):
            return f"{text[-60:]!r} does not end with a control token"
        return ""

    def _own_responses(self, record: int) -> list[str]:
        """Return the record's responses, also as a tokenizer that lacks some of their letters reads them back."""
        responses = self.data.records[record].responses
        return [*responses, *(self.form.decode(self.form.encode_contents(response)) for response in responses)]

    @cached_property
    def _all_responses(self) -> set[str]:
        """Responses of all records: an answer of another question is whole, if wrong."""
        return {response.strip() for record in self.data.records for response in record.responses}

    def _teacher_problem(self, place: int, batch: "PackedBatch", first: int, last: int) -> str:
        """Compare a teacher's logprobs with those of the question in the data; empty where they agree."""
        record = self.data.record_of(place)
        values, indices = self.data.records[record].logprobs_vals, self.data.records[record].logprobs_indices
        if batch.logprobs_vals is None or batch.logprobs_indices is None:
            return "no teacher logprobs, which the loss needs" if self._needs_teacher else ""
        question = place - self.data.offsets[record]
        if values is None or indices is None:
            return "teacher logprobs, of which the data has none"
        same = np.array_equal(
            batch.logprobs_vals[first:last].numpy(), np.asarray(values[question], dtype=np.float32)
        ) and np.array_equal(batch.logprobs_indices[first:last].numpy(), np.asarray(indices[question]))
        return "" if same else "teacher logprobs that are not this question's"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:25]} … {text[-25:]}")
