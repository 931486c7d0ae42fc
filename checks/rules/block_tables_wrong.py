"""The block tables of flex_attention leave out nothing that a token sees, and show it nothing else.

What it does
------------
Makes the block mask of a packed row of documents of many lengths, as the run hands it to PyTorch's flex_attention, with the
base's window and without one, and writes its tables out: which tokens a kernel would read for each, forward and backward.

Why it matters
--------------
A kernel applies the rule of a mask only in blocks that the tables call partial; what they call full is read whole. A table
that is one block off lets documents read each other, or hides tokens, on GPUs alone and in rows of more than 128 tokens alone:
no twin on a CPU has such a row, and the loss falls.

How it is detected
------------------
Every pair of tokens must be visible where both are of one document, the second is not later, and within the window; and nowhere
else. The tables of the backward pass must be those of the forward pass, turned. Made on the CPU; what the kernels do with it is
ATT401's on the device.

How to fix
----------
Call a block full only where its last token sees all of it, and list each block once: as `create_block_mask` of PyTorch does.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from checks.subject import Subject

LENGTHS = (300, 1, 127, 128, 200, 44)  # of documents: within blocks, across their edges, whole ones; 800 tokens
WINDOWS = (None, 100, 128, 129)  # and the base's own
SIDES = {"forward": "kv", "backward": "q"}


def check(subject: "Subject") -> Result:
    """Compare every pair of tokens that the tables show with the formula, for each window."""
    own = getattr(subject.base_config.get_text_config(), "sliding_window", None)
    windows = dict.fromkeys((*WINDOWS, own))
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    for window in windows:
        mask = subject.implementation.block_mask(position_ids, window)
        expected = _visible(LENGTHS, window)
        for side, name in SIDES.items():
            found = _written_out(mask, name)[: len(expected), : len(expected)]
            if not torch.equal(found, expected):
                pairs = int((found != expected).sum())
                query, key = (int(it) for it in (found != expected).nonzero()[0])
                seen = "sees" if bool(found[query, key]) else "does not see"
                return Fail(
                    message=f"the block tables of the {side} pass show other tokens than a document's own",
                    expected=f"window {window}: pairs of one document, the second not later, and within the window",
                    actual=f"{pairs:,} of {expected.numel():,} pairs differ; token {query} {seen} token {key}",
                    remedy="call a block full only where its last token sees all of it, and list each block once",
                )
    return Pass(
        f"{sum(LENGTHS)} tokens of {len(LENGTHS)} documents see their own, with {len(windows)} windows, both ways"
    )


def _visible(lengths: Sequence[int], window: int | None) -> Tensor:
    """Return which token (row) sees which one (column), bool [T, T]."""
    documents = torch.repeat_interleave(torch.tensor(lengths))
    places = torch.arange(len(documents))
    distance = places[:, None] - places
    same = documents[:, None] == documents
    return same & (distance >= 0) & (distance < (len(places) if window is None else window))


def _written_out(mask: "BlockMask", side: str) -> Tensor:
    """Return what the tables of a side show: full blocks whole, partial ones where the mask's rule allows; bool [P, P].

    Args:
        side: `kv`, blocks of keys by blocks of queries, or `q`, the reverse, by which the backward pass goes.
    """
    rows, columns = mask.BLOCK_SIZE
    length = mask.shape[-1]
    places = torch.arange(length)
    zero = torch.zeros((), dtype=torch.long)
    rule = mask.mask_mod(zero, zero, places[:, None], places[None])
    shown = torch.zeros(length, length, dtype=torch.bool)
    for prefix, is_full in ((side, False), (f"full_{side}", True)):
        counts, indices = getattr(mask, f"{prefix}_num_blocks"), getattr(mask, f"{prefix}_indices")
        for number, count in enumerate(counts.flatten().tolist()):
            for other in indices[0, 0, number, :count].tolist():
                query, key = (number, other) if side == "kv" else (other, number)
                at = slice(query * rows, (query + 1) * rows), slice(key * columns, (key + 1) * columns)
                shown[at] = True if is_full else rule[at]
    return shown


def _masking(change: Callable[[Any], None]) -> Any:
    """Make a fault of the tables of a block mask."""

    def block_mask(healthy: Implementation, position_ids: Tensor, window: int | None) -> Any:
        mask = healthy.block_mask(position_ids, window)
        change(mask)
        return mask

    return override(block_mask=block_mask)


def _partial_as_full(mask: Any) -> None:
    """Read partial blocks whole."""
    for side in SIDES.values():
        counts = getattr(mask, f"{side}_num_blocks"), getattr(mask, f"full_{side}_num_blocks")
        indices = getattr(mask, f"{side}_indices"), getattr(mask, f"full_{side}_indices")
        first = counts[0] > 0
        for number in first.flatten().nonzero().flatten().tolist():
            place = int(counts[1][0, 0, number])
            if place < indices[1].shape[-1]:
                indices[1][0, 0, number, place] = indices[0][0, 0, number, 0]
                counts[1][0, 0, number] += 1


def _first_lost(mask: Any) -> None:
    """Leave out the first of the full blocks that a block of queries sees."""
    mask.full_kv_num_blocks.sub_((mask.full_kv_num_blocks > 0).to(mask.full_kv_num_blocks.dtype))


def _backward_shifted(mask: Any) -> None:
    """Go backward by tables that are one block off."""
    mask.q_indices.sub_(1).clamp_(min=0)


def _joined(healthy: Implementation, position_ids: Tensor, window: int | None) -> Any:
    """Make the mask of one document."""
    return healthy.block_mask(torch.arange(position_ids.shape[1])[None], window)


def _wider(healthy: Implementation, position_ids: Tensor, window: int | None) -> Any:
    """Let a window show one token more."""
    return healthy.block_mask(position_ids, None if window is None else window + 1)


RULE = Rule(
    code="ATT206",
    name="block-tables-wrong",
    stage="twin",
    severity="error",
    sources=("failure mode C44", "https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html"),
    requires=(),
    check=check,
    faults=(
        Fault("partial-as-full", "blocks that a token sees in part are read whole", _masking(_partial_as_full)),
        Fault("full-block-lost", "a block that is seen whole is left out", _masking(_first_lost)),
        Fault("backward-shifted", "the tables of the backward pass are one block off", _masking(_backward_shifted)),
        Fault("documents-joined", "all documents of a row are one", override(block_mask=_joined)),
        Fault("window-wider", "a window shows one token more", override(block_mask=_wider)),
    ),
)
