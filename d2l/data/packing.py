"""Packed batches: which rows share one, and its tensors.

`pack` fills two budgets at once, tokens of questions and tokens of documents; `collate` lays rows one after another
with positions that restart. Every row is packed or reported.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from d2l.base.segments import Segments, segment_starts
from d2l.base.transfer import moved
from d2l.data.tokenize import IGNORE_INDEX, Row

_JITTER = 0.1  # of a row's size when it is put in order: other groups for every seed, at no measurable cost in fill
_BINS_PER_WINDOW = 256  # fewer waste more in each window's last batches, more take longer; see benchmarks/packing.py


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One packed row of contexts and of their queries. Ids, positions and labels are int64.

    Positions restart for every chunk and every query; that is how their borders are known. `labels[t]` equals
    `input_ids[t]` where supervised, else -100: not shifted.

    Attributes:
        ctx_ids, ctx_position_ids: [1, Tc], the chunks of all contexts in order.
        input_ids, position_ids, labels: [1, T], the queries of all contexts in order.
        n_ctx_chunks, n_queries: of each context.
        logprobs_vals, logprobs_indices: [n_labels, k] float32 and int64, a teacher's top-k for each label in order.
        record_ids: the record that each context came from.
    """

    ctx_ids: Tensor
    ctx_position_ids: Tensor
    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    n_ctx_chunks: tuple[int, ...]
    n_queries: tuple[int, ...]
    logprobs_vals: Tensor | None
    logprobs_indices: Tensor | None
    record_ids: tuple[int, ...]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the same batch with its tensors on `device`.

        What is read off its tensors is read before: on a GPU, the host would wait for each.
        """
        place = torch.device(device)

        def on_device(names: Iterable[str]) -> dict[str, Any]:  # vars() holds the cached properties too
            values = {name: getattr(self, name) for name in names}
            return {name: moved(x, place) if isinstance(x, Tensor) else x for name, x in values.items()}

        batch = replace(self, **on_device(field.name for field in fields(self)))
        vars(batch).update(on_device(name for name, it in vars(PackedBatch).items() if isinstance(it, cached_property)))
        return batch

    @property
    def n_labels(self) -> int:
        """Supervised tokens."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def n_tokens(self) -> int:
        """Tokens of the queries, T."""
        return self.input_ids.shape[1]

    @cached_property
    def chunks(self) -> Segments:
        """The chunks in `ctx_ids`, those of the first context first."""
        return Segments.from_position_ids(self.ctx_position_ids)

    @cached_property
    def queries(self) -> Segments:
        """The queries in `input_ids`, those of the first context first."""
        return Segments.from_position_ids(self.position_ids)

    @cached_property
    def contexts(self) -> Segments:
        """The contexts in `input_ids`: all queries of each."""
        return self.queries.joined(self.n_queries)

    @cached_property
    def label_positions(self) -> Tensor:
        """Positions in `input_ids` of the tokens to be predicted, int64 [N], in order.

        The first token of a query has no token before it in its own query, so a label there is never used.
        """
        supervised = self.labels[0] != IGNORE_INDEX
        return (supervised & ~segment_starts(self.position_ids)).nonzero().squeeze(-1)

    @cached_property
    def prediction_positions(self) -> Tensor:
        """Positions whose logits predict the tokens at `label_positions`, int64 [N]: each the one before."""
        return self.label_positions - 1

    @cached_property
    def label_queries(self) -> Tensor:
        """The query of each token at `label_positions`, counted from 0 over the packed row, int64 [N]."""
        return segment_starts(self.position_ids).cumsum(0)[self.label_positions] - 1

    @cached_property
    def label_weights(self) -> Tensor:
        """The weight of each token at `label_positions` in a sum over contexts, float32 [N].

        A context is the mean over its queries, a query the mean over its label tokens; one that has none is left out.
        """
        query = self.label_queries
        tokens = torch.bincount(query, minlength=sum(self.n_queries))
        context = torch.repeat_interleave(torch.tensor(self.n_queries))  # [queries]
        labelled = torch.zeros(len(self.n_queries)).index_add(0, context, (tokens > 0).float())
        return 1 / (tokens[query] * labelled[context[query]])

    @cached_property
    def largest_teacher_id(self) -> int:
        """The largest token id of the teacher's; -1 without a teacher."""
        ids = self.logprobs_indices
        return -1 if ids is None or not ids.numel() else int(ids.max())


def collate(rows: Sequence[Row]) -> PackedBatch:
    """Lay rows one after another into a batch, on the CPU."""
    assert rows, "a batch needs a row"
    chunks = [chunk for row in rows for chunk in row.chunks]
    queries = [query for row in rows for query in row.queries]
    vals = [query.logprobs_vals for query in queries if query.logprobs_vals is not None]
    indices = [query.logprobs_indices for query in queries if query.logprobs_indices is not None]
    assert len(vals) == len(indices) in (0, len(queries)), "teacher logprobs for every query or for none"
    return PackedBatch(
        ctx_ids=_laid_out(chunks),
        ctx_position_ids=_positions(chunks),
        input_ids=_laid_out([query.input_ids for query in queries]),
        position_ids=_positions([query.input_ids for query in queries]),
        labels=_laid_out([query.labels for query in queries]),
        n_ctx_chunks=tuple(len(row.chunks) for row in rows),
        n_queries=tuple(len(row.queries) for row in rows),
        logprobs_vals=torch.tensor(list(chain.from_iterable(vals)), dtype=torch.float32) if vals else None,
        logprobs_indices=torch.tensor(list(chain.from_iterable(indices)), dtype=torch.int64) if indices else None,
        record_ids=tuple(row.record for row in rows),
    )


class PackedBatches(Sequence[PackedBatch]):
    """The batch of each group of rows, collated on access: an epoch of them need not fit in memory."""

    def __init__(self, rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> None:
        self._rows, self._groups = rows, groups

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> PackedBatch: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedBatch]: ...

    def __getitem__(self, index: int | slice) -> PackedBatch | list[PackedBatch]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return collate([self._rows[row] for row in self._groups[index]])


def _laid_out(parts: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)[None]


def _positions(parts: Sequence[Sequence[int]]) -> Tensor:
    return _laid_out([range(len(part)) for part in parts])


@dataclass(frozen=True)
class Oversized:
    """A row that no batch can hold: its index, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Packing:
    """Which rows share a batch.

    Attributes:
        groups: row indices of each batch, in training order.
        oversized: rows in no group; with the groups, every row exactly once.
    """

    groups: tuple[tuple[int, ...], ...]
    oversized: tuple[Oversized, ...]


def pack(
    sizes: Sequence[tuple[int, int]] | np.ndarray, max_packed_inp_len: int, max_packed_ctx_len: int, seed: int
) -> Packing:
    """Group rows so that few batches hold them all.

    Windows of rows drawn at random are packed by first-fit decreasing, the size being the sum of the two shares of the
    budgets (Panigrahy et al. 2011, "Heuristics for Vector Bin Packing") with some jitter; the groups are shuffled. A
    window makes a bounded number of batches, so time is linear in the rows, and every seed mixes them anew.

    Args:
        sizes: (tokens of queries, tokens of chunks) of each row, `Row.size`.
        max_packed_inp_len, max_packed_ctx_len: the budgets of a batch, in tokens.
        seed: same arguments, same packing.
    """
    budgets = np.array([max_packed_inp_len, max_packed_ctx_len])
    table = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    fits = (table <= budgets).all(axis=1)
    generator = np.random.default_rng(seed)
    rows = generator.permutation(np.flatnonzero(fits))
    groups = _first_fit_decreasing(table, rows, budgets, generator) if len(rows) else []
    return Packing(
        groups=tuple(groups[i] for i in generator.permutation(len(groups))),
        oversized=tuple(Oversized(int(row), _excess(table[row], budgets)) for row in np.flatnonzero(~fits)),
    )


def _excess(size: np.ndarray, budgets: np.ndarray) -> str:
    names = (("questions", "max_packed_inp_len"), ("document", "max_packed_ctx_len"))
    return "; ".join(
        f"{length:,} tokens of {what} > {name} {budget:,}; raise {name} to at least {length:,}"
        for (what, name), length, budget in zip(names, size.tolist(), budgets.tolist(), strict=True)
        if length > budget
    )


def _first_fit_decreasing(
    table: np.ndarray, rows: np.ndarray, budgets: np.ndarray, generator: np.random.Generator
) -> list[tuple[int, ...]]:
    """Pack `rows` of the table, window by window; all windows advance together, one row of each at a time.

    Shapes: S windows of W rows, each into at most W bins. Short windows are filled up with rows of size 0.
    """
    shares = table[rows] / budgets
    bins = max(1, math.ceil(shares.sum(axis=0).max()))  # no packing has fewer
    n_windows = math.ceil(bins / _BINS_PER_WINDOW)
    width = math.ceil(len(rows) / n_windows)
    padding = n_windows * width - len(rows)
    row_ids = np.pad(rows, (0, padding), constant_values=-1).reshape(n_windows, width)
    keys = shares.sum(axis=1) * generator.uniform(1 - _JITTER, 1 + _JITTER, len(rows))
    decreasing = np.argsort(-np.pad(keys, (0, padding)).reshape(n_windows, width), axis=1, kind="stable")
    row_ids = np.take_along_axis(row_ids, decreasing, axis=1)
    needs = np.where(row_ids[..., None] >= 0, table[row_ids], 0).astype(np.int32)  # [S, W, 2]

    windows = np.arange(n_windows)
    free_inp, free_ctx = (np.full((n_windows, _BINS_PER_WINDOW), budget, dtype=np.int32) for budget in budgets)
    placed = np.empty_like(row_ids)
    opened = 0  # bins in use in any window; bin `opened` is still empty everywhere
    for step in range(width):
        if opened == free_inp.shape[1]:
            free_inp, free_ctx = (
                np.hstack([free, np.full_like(free, budget)])
                for free, budget in zip((free_inp, free_ctx), budgets, strict=True)
            )
        inp, ctx = needs[:, step].T
        room = (free_inp[:, : opened + 1] >= inp[:, None]) & (free_ctx[:, : opened + 1] >= ctx[:, None])
        bin_ids = room.argmax(axis=1)  # the first with room: an empty bin always has it
        free_inp[windows, bin_ids] -= inp
        free_ctx[windows, bin_ids] -= ctx
        placed[:, step] = bin_ids
        opened = max(opened, int(bin_ids.max()) + 1)
    return _grouped(row_ids, placed + windows[:, None] * opened)


def _grouped(row_ids: np.ndarray, bin_ids: np.ndarray) -> list[tuple[int, ...]]:
    """Group row ids of equal bin id, without the padding."""
    real = row_ids >= 0
    row_ids, bin_ids = row_ids[real], bin_ids[real]
    order = np.argsort(bin_ids, kind="stable")
    row_ids, bin_ids = row_ids[order], bin_ids[order]
    borders = [0, *(np.flatnonzero(np.diff(bin_ids)) + 1).tolist(), len(row_ids)]
    ids = row_ids.tolist()
    return [tuple(ids[start:end]) for start, end in pairwise(borders)]
