"""Order of the rows in training: the packed batches of an epoch, and the rows of each curriculum stage."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

from d2l.config.schema import RunConfig
from d2l.data.packing import PackedBatches, pack
from d2l.data.shards import row_sizes
from d2l.data.tokenize import Row
from d2l.errors import DataError


def stage_rows(config: RunConfig, rows: Sequence[Row]) -> list[range]:
    """Return the range of rows of each curriculum stage; without a curriculum, one range of all rows."""
    if not config.curriculum:
        return [range(len(rows))]
    firsts = accumulate((config.documents_of(stage) for stage in config.stages), initial=0)
    bounds = [bisect_left(range(len(rows)), first, key=lambda row: rows[row].record) for first in firsts]
    return [range(*pair) for pair in pairwise(bounds)]


def epoch_batches(config: RunConfig, rows: Sequence[Row], epoch: int, among: range | None = None) -> PackedBatches:
    """Pack the rows of an epoch, in the order of that epoch; each batch is made on access.

    Args:
        among: range of the rows to pack; default: all.

    Raises:
        DataError: no row fits the packed lengths.
    """
    among = range(len(rows)) if among is None else among
    sizes = row_sizes(rows)[among.start : among.stop]
    packing = pack(sizes, config.max_packed_inp_len, config.max_packed_ctx_len, seed=config.seed + epoch)
    if not packing.groups:
        raise DataError(f"no row fits max_packed_inp_len and max_packed_ctx_len: {packing.oversized[0].reason}")
    return PackedBatches(rows, [[among[row] for row in group] for group in packing.groups])
