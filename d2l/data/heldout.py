"""Held-out documents, which a run is evaluated on and never trains on.

Where a run names none, some of its own are kept out of training. Their texts' hashes decide which: neither the order of
the records nor the seed changes the choice.
"""

from collections.abc import Collection, Sequence
from hashlib import sha256

from d2l.data.records import Record, listing
from d2l.data.shards import SomeRows, row_records
from d2l.data.tokenize import Row
from d2l.errors import DataError

SHARE = 10  # at most one document in ten is kept out


def choose_heldout(records: Sequence[Record], count: int) -> frozenset[int]:
    """Choose documents that are kept out of training, and return the indices of all of their records.

    Args:
        count: documents that are wanted; a document that several records have counts once.

    Raises:
        DataError: there are too few documents to keep two of them out.
    """
    documents = sorted({record.context for record in records}, key=lambda text: sha256(text.encode()).digest())
    chosen = frozenset(documents[: min(count, len(documents) // SHARE)])
    if len(chosen) < 2:
        raise DataError(
            f"eval_steps: evaluation keeps at most one document in {SHARE} out of training, and needs two: expected at "
            f"least {2 * SHARE} different documents, found {len(documents)}; name others in val_ds_names, or leave "
            "eval_steps out"
        )
    return frozenset(index for index, record in enumerate(records) if record.context in chosen)


def require_unseen(heldout: Sequence[Record], trained: Sequence[Record]) -> None:
    """Refuse held-out documents that training has too.

    Raises:
        DataError: the message lists where they stand.
    """
    seen = {record.context: record.source for record in trained}
    both = [f"{record.source} is {seen[record.context]}" for record in heldout if record.context in seen]
    if both:
        raise DataError(
            f"val_ds_names: expected documents that training has not, found {len(both):,} of {len(heldout):,} in "
            f"train_ds_names too:\n{listing(both)}\nremove them from one of the two"
        )


def without_records(rows: Sequence[Row], records: Collection[int]) -> Sequence[Row]:
    """Return the rows of all other records; the same sequence where there are none to leave out."""
    if not records:
        return rows
    return SomeRows(rows, [place for place, record in enumerate(row_records(rows)) if record not in records])


def one_row_each(rows: Sequence[Row], records: Sequence[Record], count: int) -> tuple[Row, ...]:
    """Return the first row of each document, `count` of them at most; a text that several records have counts once.

    Raises:
        DataError: there are no two documents, so that none can be answered under another one's LoRA.
    """
    found: dict[str, Row] = {}
    for row in rows:
        if len(found) == count:
            break
        found.setdefault(records[row.record].context, row)
    if len(found) < 2:
        raise DataError(
            f"eval_steps: evaluation needs two different held-out documents with a row each, found {len(found)} among "
            f"{len(records):,} records; name more in val_ds_names, raise eval_documents, or leave eval_steps out"
        )
    return tuple(found.values())
