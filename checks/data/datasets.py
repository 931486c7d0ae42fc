"""Counts for each data set of a run: what its records became in the packed batches of one epoch."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from d2l.data.packing import PackedBatch
    from d2l.data.records import Record
    from d2l.data.tokenize import Tokenized

IGNORE_INDEX = -100
COUNTED = ("rows", "cut_documents", "questions_in_rows", "tokens", "supervised_tokens", "ending_in_stop_token")


class DatasetCounts:
    """Counts of an epoch for each file of the data; generated documents of one kind count as a file.

    Args:
        stops: ids of the control tokens, one of which ends a supervised answer.
    """

    def __init__(self, records: "Sequence[Record]", stops: "set[int]") -> None:
        names: dict[str, int] = {}
        self._of_record = np.array(
            [names.setdefault(record.source.rpartition(":")[0], len(names)) for record in records], dtype=np.int32
        )
        self._names, self._records, self._stops = [*names], records, np.array(sorted(stops), dtype=np.int64)
        self._counts = {name: np.zeros(len(names), dtype=np.int64) for name in COUNTED}
        self._rows_of_record = np.zeros(len(records), dtype=np.int32)

    def read(self, batch: "PackedBatch", queries: np.ndarray) -> None:
        """Count a batch; `queries` is where each question starts, int64 [questions]."""
        records = np.array(batch.record_ids)
        np.add.at(self._rows_of_record, records, 1)
        of_row = self._of_record[records]
        of_query = np.repeat(of_row, batch.n_queries)
        labels = batch.labels[0].numpy()
        supervised = labels != IGNORE_INDEX
        lengths = np.diff([*queries, len(labels)])
        per_query = np.add.reduceat(supervised, queries, dtype=np.int64)
        places = np.where(supervised, np.arange(len(labels)), 0)
        last = labels[np.maximum.reduceat(places, queries)]
        self._add("rows", of_row)
        self._add("cut_documents", of_row, np.array(batch.n_ctx_chunks) > 1)
        self._add("questions_in_rows", of_query)
        self._add("tokens", of_query, lengths)
        self._add("supervised_tokens", of_query, per_query)
        self._add("ending_in_stop_token", of_query, (per_query > 0) & np.isin(last, self._stops))

    def table(self, tokenized: "Tokenized") -> list[dict[str, Any]]:
        """Return the counts of each data set by name, with those of its records that no batch shows."""
        dropped: list[Counter[str]] = [Counter() for _ in self._names]
        kept = np.ones(len(self._records), dtype=bool)  # documents, whatever became of their questions
        for drop in tokenized.dropped:
            dropped[self._of_record[drop.record]][drop.kind] += 1
            kept[drop.record] &= drop.query is not None
        documents = np.array([hash(record.context) for record in self._records], dtype=np.int64)
        whole = np.array([hash((it.context, it.prompts, it.responses)) for it in self._records], dtype=np.int64)
        questions = np.bincount(self._of_record, [len(it.prompts) for it in self._records], len(self._names))
        in_rows = self._rows_of_record
        by_record = {
            "records": np.ones(len(self._records), dtype=bool),
            "packed_records": in_rows > 0,
            "split_records": in_rows > 1,
            "documents_without_questions": kept & (in_rows == 0),
            "duplicates": _repeated(whole),
            "repeated_documents": _repeated(documents),
        }
        counts = {
            name: np.bincount(self._of_record, held, len(self._names)).astype(int) for name, held in by_record.items()
        } | self._counts
        return [
            {
                "name": name,
                **{key: int(values[place]) for key, values in counts.items()},
                "questions": int(questions[place]),
                "dropped": dict(dropped[place]),
            }
            for place, name in enumerate(self._names)
        ]

    def _add(self, name: str, datasets: np.ndarray, weights: np.ndarray | None = None) -> None:
        self._counts[name] += np.bincount(datasets, weights, len(self._names)).astype(np.int64)


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """Tell which values stand at an earlier place too, bool [records]."""
    first = np.ones(len(hashes), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = False
    return first


def dataset_rows(table: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the table in words: for each data set its name and a few lines."""
    return [(str(it["name"]), _described(it)) for it in table]


def _described(it: dict[str, Any]) -> str:
    asked, tokens = it["questions_in_rows"], it["tokens"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in it["dropped"].items()) or "none"
    return "\n".join(
        [
            f"{it['packed_records']:,} of {it['records']:,} records with {asked:,} of {it['questions']:,} questions in "
            f"{it['rows']:,} rows; {it['split_records']:,} records split over rows, rows of documents cut into chunks: "
            f"{it['cut_documents']:,}",
            f"dropped: {reasons}; documents without questions: {it['documents_without_questions']:,}",
            f"supervised: {_share(it['supervised_tokens'], tokens)} of tokens; answers that end in a stop token: "
            f"{_share(it['ending_in_stop_token'], asked)}",
            f"duplicates: {it['duplicates']:,} records, {it['repeated_documents']:,} documents",
        ]
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
