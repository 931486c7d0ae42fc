"""Shards of token rows: Arrow files, written from tokenized records and read memory-mapped, row by row.

A shard is one Arrow batch: the index of the record and the nested lists of each row, ids as int32. Records and questions
without a row (dropped ones) are listed in the schema's metadata, so that one hash covers everything.
"""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
import pyarrow.ipc

from d2l.data.records import Record
from d2l.data.tokenize import Dropped, Query, Row, TokenizedPart

# Nesting depth and value type of each column. A query without teacher logprobs has empty lists.
_COLUMNS = {
    "chunks": (2, pyarrow.int32()),
    "input_ids": (2, pyarrow.int32()),
    "labels": (2, pyarrow.int32()),
    "logprobs_vals": (3, pyarrow.float64()),
    "logprobs_indices": (3, pyarrow.int64()),
}


def write_shard(path: Path, parts: Sequence[TokenizedPart]) -> None:
    """Write the rows and dropped questions of some records; the same parts give the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [row for part in parts for row in part.rows]
    values: dict[str, list[Any]] = {
        "chunks": [row.chunks for row in rows],
        "input_ids": [[query.input_ids for query in row.queries] for row in rows],
        "labels": [[query.labels for query in row.queries] for row in rows],
        "logprobs_vals": [[query.logprobs_vals or () for query in row.queries] for row in rows],
        "logprobs_indices": [[query.logprobs_indices or () for query in row.queries] for row in rows],
    }
    arrays = {"record": pyarrow.array([row.record for row in rows], pyarrow.int64())}
    for name, (depth, kind) in _COLUMNS.items():
        for _ in range(depth):
            kind = pyarrow.large_list(kind)
        arrays[name] = pyarrow.array(values[name], kind)
    rest = {
        "dropped": [(drop.record, drop.query, drop.kind, drop.reason) for part in parts for drop in part.dropped],
        "top_k": sorted({k for part in parts for k in part.top_k}),
    }
    batch = pyarrow.RecordBatch.from_pydict(arrays, metadata={name: json.dumps(value) for name, value in rest.items()})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


class Shard:
    """Memory-mapped file that `write_shard` wrote.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with pyarrow.memory_map(str(path)) as file:  # the map outlives the file handle, of which a process may have few
            batch = pyarrow.ipc.open_file(file).get_batch(0)
        self.records = batch.column("record").to_numpy()
        self._columns = {name: _Nested.of(batch.column(name), depth) for name, (depth, _) in _COLUMNS.items()}
        self._metadata = batch.schema.metadata

    def __len__(self) -> int:
        return len(self.records)

    @property
    def sizes(self) -> np.ndarray:
        """Return `Row.size` of every row, int64 [rows, 2]."""
        return np.stack([self._columns["input_ids"].sizes, self._columns["chunks"].sizes], axis=1)

    def row(self, index: int) -> Row:
        """Read one row from the file."""
        chunks, *columns = (column.row(index) for column in self._columns.values())
        queries = (
            Query(ids, labels, vals or None, indices or None)
            for ids, labels, vals, indices in zip(*columns, strict=True)
        )
        return Row(int(self.records[index]), chunks, tuple(queries))

    def read_dropped(self, records: Sequence[Record]) -> TokenizedPart:
        """Return a part without rows: the dropped records and questions, with the present `source` of each record."""
        dropped = (
            Dropped(index, records[index].source, query, kind, reason)
            for index, query, kind, reason in json.loads(self._metadata[b"dropped"])
        )
        return TokenizedPart(dropped=tuple(dropped), top_k=frozenset(json.loads(self._metadata[b"top_k"])))


class _RowsOnAccess(Sequence[Row]):
    """Rows that are made when they are asked for."""

    @abstractmethod
    def _row(self, place: int) -> Row:
        """Make the row at a place counted from the first."""

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        places = range(len(self))[index]
        return self._row(places) if isinstance(places, int) else [self._row(place) for place in places]


class MappedRows(_RowsOnAccess):
    """Rows of some shards: each row is made on access, and only its own tokens are read."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _row(self, place: int) -> Row:
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._shards[shard].row(place - int(self._starts[shard]))

    @property
    def sizes(self) -> np.ndarray:
        """Return `Row.size` of every row, int64 [rows, 2], without reading tokens."""
        return np.concatenate([shard.sizes for shard in self._shards])

    @property
    def records(self) -> list[int]:
        """Return the index of each row's record, without reading tokens."""
        return [int(record) for shard in self._shards for record in shard.records]


class SomeRows(_RowsOnAccess):
    """Some of the rows, in order; each is made on access where the rows are.

    Args:
        places: indices of the rows that are kept, ascending.
    """

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def _row(self, place: int) -> Row:
        return self._rows[self._places[place]]

    @property
    def sizes(self) -> np.ndarray:
        """Return `Row.size` of every row, int64 [rows, 2]."""
        return row_sizes(self._rows)[np.asarray(self._places)]


def row_records(rows: Sequence[Row]) -> Sequence[int]:
    """Return the index of each row's record, without reading tokens."""
    return rows.records if isinstance(rows, MappedRows) else [row.record for row in rows]


def row_sizes(rows: Sequence[Row]) -> np.ndarray:
    """Return `Row.size` of every row, int64 [rows, 2]: tokens of the queries, tokens of the chunks."""
    if isinstance(rows, MappedRows | SomeRows):
        return rows.sizes
    return np.array([row.size for row in rows], dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True, eq=False)
class _Nested:
    """Column of nested lists, as views of its file: offsets of the lists by level, outermost first, and the values."""

    offsets: tuple[np.ndarray, ...]
    values: np.ndarray

    @classmethod
    def of(cls, column: Any, depth: int) -> "_Nested":
        """View a column of Arrow lists that are nested `depth` times."""
        offsets = []
        for _ in range(depth):
            offsets.append(column.offsets.to_numpy())
            column = column.values
        return cls(tuple(offsets), column.to_numpy())

    @property
    def sizes(self) -> np.ndarray:
        """Return the number of values in each row of a column of depth 2, int64 [rows]."""
        rows, lists = self.offsets
        return np.diff(lists[rows])

    def row(self, index: int) -> tuple[Any, ...]:
        """Return the lists of one row as nested tuples."""
        return self._tuples(0, index, index + 1)[0]

    def _tuples(self, level: int, start: int, stop: int) -> tuple[Any, ...]:
        if level == len(self.offsets):
            return tuple(self.values[start:stop].tolist())
        offsets = self.offsets[level][start : stop + 1].tolist()
        return tuple(self._tuples(level + 1, *pair) for pair in pairwise(offsets))
