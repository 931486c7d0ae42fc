"""Validation of teacher logprobs: the top-k natural-log probabilities and token ids that records carry."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from d2l.data.records import Record, listing
from d2l.data.tables import Table
from d2l.errors import DataError

_MASS_TOLERANCE = 0.01  # a teacher's probabilities rounded to bfloat16 sum to at most this much above 1


def check_logprobs(vals: Sequence[Sequence[float]], indices: Sequence[Sequence[int]], n_labels: int) -> None:
    """Check the top-k of a teacher for one question: k finite natural-log probabilities and k token ids for each label.

    Args:
        vals, indices: log-probabilities and token ids, [supervised token][k].
        n_labels: number of supervised tokens.

    Raises:
        DataError: shapes or types differ, or values are not finite or sum to a probability above 1.
    """
    try:
        table, ids = np.asarray(vals, dtype=np.float64), np.asarray(indices)
    except (TypeError, ValueError):
        raise DataError("teacher logprobs: expected numbers, as many for every token") from None
    if table.ndim != 2 or table.shape[1] == 0 or ids.shape != table.shape or ids.dtype.kind != "i" or ids.min() < 0:
        raise DataError(
            f"teacher logprobs: expected values and token ids of one shape [supervised token, k], "
            f"found {list(table.shape)} and {list(ids.shape)} ({ids.dtype})"
        )
    if len(table) != n_labels:
        raise DataError(
            f"teacher logprobs: {len(table)} entries for {n_labels} supervised tokens; make them again with this chat "
            "template and supervision"
        )
    if not np.isfinite(table).all():
        raise DataError("teacher logprobs: some are not finite")
    mass = np.exp(table).sum(axis=1).max()
    if mass > 1 + _MASS_TOLERANCE:
        raise DataError(f"teacher logprobs: the probabilities of a token sum to {mass:.3g} > 1; expected natural logs")


def require_teacher_logprobs(records: Sequence[Record], vocabulary: int) -> None:
    """Refuse records whose teacher logprobs a KL loss cannot use.

    Args:
        vocabulary: number of token ids that the base has logits for.

    Raises:
        DataError: records without teacher logprobs, or with token ids beyond the vocabulary; the message names them.
    """
    missing, beyond = [], []
    for index, record in enumerate(records):
        name = f"record {index} ({record.source})"
        if record.logprobs_vals is None or record.logprobs_indices is None:
            missing.append(name)
            continue
        for position, ids in enumerate(record.logprobs_indices):
            if (largest := _largest_id(ids)) >= vocabulary:
                beyond.append(f"{name}, prompt {position}: token id {largest:,}")
    if missing:
        raise DataError(
            f"loss: kl needs teacher logprobs; {len(missing):,} of {len(records):,} records have none:\n"
            f"{listing(missing)}\nadd logprobs_vals and logprobs_indices to them, or --set loss=ce"
        )
    if beyond:
        raise DataError(
            f"teacher logprobs of {len(beyond):,} prompts hold token ids beyond the {vocabulary:,} of the base model:\n"
            f"{listing(beyond)}\nmake them with the base model's own tokenizer"
        )


def list_top_k_examples(records: Sequence[Record], top_k: Iterable[int]) -> str:
    """List one record for every k (logprobs per token; 0: no teacher), one indented line each."""
    found: dict[int, str] = {}
    for index, record in enumerate(records):
        for vals in record.logprobs_vals or ((),):
            found.setdefault(_top_k_of(vals), f"record {index} ({record.source})")
    return listing([f"{k}: {found[k]}" for k in sorted(top_k)])


def _top_k_of(vals: Any) -> int:
    """Return k of the first token; 0 where there is none, or in a malformed table of a record that was dropped."""
    return len(vals[0]) if isinstance(vals, tuple | Table) and vals and isinstance(vals[0], tuple) else 0


def _largest_id(ids: Any) -> int:
    """Return the largest token id in a nested list; -1 where there is none or the list is malformed."""
    try:
        return int(np.asarray(ids).max(initial=-1))
    except (TypeError, ValueError):  # in a record that was dropped before its logprobs were checked
        return -1
