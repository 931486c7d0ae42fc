"""Limits on the sizes of batches, rows and chunks: what exceeds them, counted on the batches themselves; and none at all."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from checks.subject import changed

if TYPE_CHECKING:
    from d2l.config.schema import RunConfig
    from d2l.data.packing import PackedBatch


ROOM = 1 << 20  # tokens of a packed row that holds whatever there is


def unlimited(config: "RunConfig", **values: Any) -> "RunConfig":
    """Return a configuration that drops and splits nothing and makes one chunk of a document; no teacher, no cache."""
    none = dict.fromkeys(
        ("max_ctx_len", "max_qas_len", "max_qas_per_sample", "max_ctx_chunk_len", "min_ctx_chunk_len"), -1
    )
    packed = {"max_packed_inp_len": ROOM, "max_packed_ctx_len": ROOM, "loss": "ce", "cache": False}
    cuts = {"max_ctx_chunk_num": None, "num_chunk_probs": None, "chunking": "equal", "chunk_overlap": 0}
    return changed(config, **{**none, **packed, **cuts, **values})


def size_problems(
    batch: "PackedBatch",
    chunks: np.ndarray | None,
    questions: np.ndarray | None,
    config: "RunConfig",
    base_limit: int | None,
    affixes: int,
) -> Iterator[str]:
    """Yield what exceeds a limit in one batch, with the limit's name.

    Args:
        chunks, questions: where each starts in the batch, int64; None where that is not known.
        base_limit: `max_position_embeddings` of the base, for every chunk and every question.
        affixes: tokens that the template puts around a document.
    """
    n_chunks, n_questions = np.array(batch.n_ctx_chunks), np.array(batch.n_queries)
    yield from _above(
        "questions in the batch", batch.input_ids.shape[1], "max_packed_inp_len", config.max_packed_inp_len
    )
    yield from _above("documents in the batch", batch.ctx_ids.shape[1], "max_packed_ctx_len", config.max_packed_ctx_len)
    yield from _above("questions of a row", n_questions, "max_qas_per_sample", config.max_qas_per_sample, "")
    yield from _above("chunks of a document", n_chunks, "max_ctx_chunk_num", config.max_ctx_chunk_num, "")
    if questions is not None:
        lengths = np.diff([*questions, batch.input_ids.shape[1]])
        yield from _above("questions of a row", _sums(lengths, n_questions), "max_qas_len", config.max_qas_len)
        yield from _above("a question", lengths, "max_position_embeddings", base_limit)
    if chunks is not None:
        lengths = np.diff([*chunks, batch.ctx_ids.shape[1]])
        whole = _sums(lengths, n_chunks) - (n_chunks - 1) * (affixes + config.chunk_overlap)  # at least so many
        yield from _above("a document", whole, "max_ctx_len", config.max_ctx_len)
        yield from _above("a chunk", lengths, "max_ctx_chunk_len", config.max_ctx_chunk_len)
        yield from _above("a chunk", lengths, "max_position_embeddings", base_limit)


def _above(what: str, sizes: np.ndarray | int, name: str, limit: int | None, unit: str = "tokens of ") -> Iterator[str]:
    """Yield the largest size where it exceeds a limit; None and -1 are none."""
    largest = int(np.max(sizes))
    if limit is not None and 0 <= limit < largest:
        yield f"{largest:,} {unit}{what} > {name} {limit:,}"


def _sums(lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum the lengths of each group, int64 [groups]; `counts` says how many lengths each has."""
    return np.add.reduceat(lengths, np.cumsum([0, *counts[:-1]]))
