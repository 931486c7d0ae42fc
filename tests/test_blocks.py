"""The block mask of a packed row is the mask that transformers makes for it, block by block, and cost no wait."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import BASES
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AutoModelForCausalLM

from d2l.base.blocks import BLOCK, block_mask, first_visible
from d2l.base.masks import packed_masks

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=6)
WINDOWS = st.none() | st.integers(1, 400)


def positions(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def seen(mask: BlockMask) -> Tensor:
    """Write a block mask's rule out, [P, P]."""
    places = torch.arange(mask.shape[-1])
    return mask.mask_mod(places, places, places[:, None], places)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 400))
def test_the_rule_is_the_mask_that_transformers_makes(lengths: list[int], window: int) -> None:
    """Of a model with sliding and full layers, under eager attention and packed positions."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            BASES["gpt_oss"].tiny(sliding_window=window), attn_implementation="eager"
        )
    where, n = positions(lengths), sum(lengths)
    dense = packed_masks(base, where)
    assert isinstance(dense, dict)
    for kind, reach in (("full_attention", None), ("sliding_attention", window)):
        rule = seen(block_mask(first_visible(where, reach)))
        theirs = dense[kind]
        assert isinstance(theirs, Tensor)
        assert torch.equal(rule[:n, :n], theirs[0, 0] == 0), kind
        assert not rule[:n, n:].any(), "a token sees padding"
        assert torch.equal(rule[n:, :], torch.eye(len(rule), dtype=torch.bool)[n:]), "padding sees itself only"


@settings(derandomize=True, deadline=None, max_examples=40)
@given(LENGTHS, WINDOWS)
def test_the_blocks_are_those_that_pytorch_finds_by_looking_at_every_pair(lengths: list[int], window: int) -> None:
    mask = block_mask(first_visible(positions(lengths), window))
    length = mask.shape[-1]
    assert length % BLOCK == 0
    assert length - sum(lengths) < BLOCK or length == 2 * BLOCK
    theirs = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    for side in ("kv", "full_kv", "q", "full_q"):
        counts, tables = (
            [getattr(x, f"{side}_{name}")[0, 0] for x in (mask, theirs)] for name in ("num_blocks", "indices")
        )
        assert torch.equal(*counts), side
        assert tables[0].dtype == torch.int32
        assert tables[0].min() >= 0
        assert tables[0].max() < length // BLOCK
        for count, ours, others in zip(counts[0], *tables, strict=True):
            assert torch.equal(ours[:count], others[:count].sort().values), side


def test_nothing_waits_for_the_device() -> None:
    """On the meta device there are no values that could be waited for."""
    mask = block_mask(first_visible(positions([300, 501, 223], "meta"), 128))
    assert mask.kv_indices.device.type == "meta"
    assert mask.shape == (1, 1, 1024, 1024)


def test_tables_stay_small_beside_the_row() -> None:
    """16 bytes for each pair of blocks, and as many for their transposes: 1 MiB each at 32,768 tokens."""
    mask = block_mask(first_visible(positions([32_768], "meta")))
    tables = [getattr(mask, f"{side}_indices") for side in ("kv", "full_kv", "q", "full_q")]
    assert sum(table.nbytes for table in tables) == 4 * 4 * (32_768 // BLOCK) ** 2 == 2**20


@pytest.mark.parametrize("window", [None, 1, 4])
def test_first_places_never_fall(window: int | None) -> None:
    first = first_visible(positions([7, 1, 1, 9]), window)
    assert (first.diff() >= 0).all()
    assert first.dtype == torch.int32
