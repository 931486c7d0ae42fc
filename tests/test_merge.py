"""Several documents in one LoRA: by the formula in float64, by the merging of chunks, and by the reference's numbers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import ACCOUNT, OUTPUTS, assert_close, load_case
from test_lora import random_lora

from d2l.hypernet.lora import Lora, merge_chunks
from d2l.inference.merge import merge_documents

SIZES = {"q_proj": (5, 7), "v_proj": (5, 3)}
LAYERS, RANK = 3, 2


def hypernetwork(n_chunks: int, with_bias: bool = True) -> tuple[Lora, Lora | None]:
    """LoRAs of chunks and the bias beside them, in float64."""
    chunks, bias = (random_lora(SIZES, n, rank=RANK, seed=n)._map(lambda x: x.detach().double()) for n in (n_chunks, 1))
    return chunks, bias if with_bias else None


def documents(chunks: Lora, bias: Lora | None, counts: Sequence[int]) -> list[Lora]:
    """Each document by itself, of so many of the chunks."""
    found, first = [], 0
    for count in counts:
        found.append(merge_chunks(chunks[first : first + count], [count], bias))
        first += count
    return found


def delta(lora: Lora, name: str, layer: int) -> torch.Tensor:
    """What a LoRA adds to a weight: scale · Bᵀ A, [d_out, d_in]."""
    return lora.scale * sum(
        (
            torch.outer(b, a)
            for context in range(lora.n_contexts)
            for a, b in zip(lora.A[name][context, layer], lora.B[name][context, layer], strict=True)
        ),
        torch.zeros(SIZES[name][1], SIZES[name][0], dtype=torch.float64),
    )


def assert_equal(one: Lora, other: Lora) -> None:
    assert (one.scale, one.bias_rank) == (other.scale, other.bias_rank)
    for name in SIZES:
        assert torch.equal(one.A[name], other.A[name])
        assert torch.equal(one.B[name], other.B[name])


@settings(derandomize=True, deadline=None, max_examples=15)
@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=4), with_bias=st.booleans())
def test_deltas_of_all_chunks_add_up_and_the_bias_counts_once(counts: list[int], with_bias: bool) -> None:
    chunks, bias = hypernetwork(sum(counts), with_bias)
    merged = merge_documents(documents(chunks, bias, counts))
    for name in SIZES:
        for layer in range(LAYERS):
            expected = delta(chunks, name, layer) + (0 if bias is None else delta(bias, name, layer))
            torch.testing.assert_close(delta(merged, name, layer), expected, rtol=1e-12, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_documents_of_whole_chunks_are_one_document_of_these_chunks(counts: list[int]) -> None:
    chunks, bias = hypernetwork(sum(counts))
    assert_equal(
        merge_documents(documents(chunks, bias, counts)),
        merge_chunks(chunks, [sum(counts)], bias),
    )


def test_one_document_stays_as_it_is() -> None:
    (document,) = documents(*hypernetwork(2), [2])
    assert_equal(merge_documents([document]), document)


def test_padding_of_a_batch_does_not_come_between() -> None:
    chunks, bias = hypernetwork(4)
    padded = merge_chunks(chunks, [1, 3], bias)
    assert padded[0].rank == padded[1].rank
    assert_equal(merge_documents([padded[0], padded[1]]), merge_chunks(chunks, [4], bias))
    assert_equal(merge_documents([padded[1], padded[0]]), merge_documents(documents(chunks, bias, [1, 3])[::-1]))


def test_a_bias_that_ends_in_zeros_is_kept_whole() -> None:
    chunks, bias = hypernetwork(2)
    assert bias is not None
    for side in (bias.A, bias.B):
        for x in side.values():
            x[:, :, -1] = 0
    assert_equal(merge_documents(documents(chunks, bias, [1, 1])), merge_chunks(chunks, [2], bias))
    zeroed = documents(chunks, bias, [1])[0].zeroed()
    assert merge_documents([zeroed, zeroed]).rank == RANK


@pytest.mark.golden
def test_the_reference_has_the_same_rows_for_a_document_of_all_chunks(shared: Path) -> None:
    case = load_case(shared, "combine_02_2_1")
    modules = case.config["modules"]
    chunks = Lora(*({m: case[f"in.{m}.{side}"] for m in modules} for side in "AB"), 1.0)
    bias = Lora(*({m: case[f"in.{m}.bias_{side}"][None] for m in modules} for side in "AB"), 1.0)
    assert case.config["n_chunks"] == [2, 1]
    merged = merge_documents([merge_chunks(chunks[place], [1], bias) for place in (0, 1)])
    for m in modules:
        for side, name in ((merged.A, "A"), (merged.B, "B")):
            expected = case[f"out.{m}.{name}"][:1]
            assert_close(side[m], expected, OUTPUTS)
            ACCOUNT.compare(case.name, expected)


def test_what_does_not_belong_together_is_refused() -> None:
    chunks, bias = hypernetwork(2)
    one, other = documents(chunks, bias, [1, 1])
    assert bias is not None
    foreign = merge_chunks(chunks[1], [1], bias._map(lambda x: x + 1))
    foreign_A, foreign_B = replace(other, A=foreign.A), replace(other, B=foreign.B)
    for wrong in (
        foreign,
        foreign_A,
        foreign_B,
        replace(other, scale=1.0),
        replace(other, bias_rank=0),
        merge_chunks(chunks[1], [1]),
    ):
        with pytest.raises(ValueError, match=r"document 2 .* of another checkpoint"):
            merge_documents([one, wrong])
    fewer = Lora({"q_proj": other.A["q_proj"]}, {"q_proj": other.B["q_proj"]}, other.scale, other.bias_rank)
    with pytest.raises(ValueError, match="document 2"):
        merge_documents([one, fewer])
    with pytest.raises(ValueError, match="one context each, a LoRA has 2"):
        merge_documents([merge_chunks(chunks, [1, 1], bias)])
    with pytest.raises(ValueError, match="no document"):
        merge_documents([])
