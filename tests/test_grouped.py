"""Packed experts of a whole layer at once against one expert at a time: values, gradients, what is kept, what waits."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dispatched import Dispatched, dispatched
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GptOssConfig

from checks.oracles import experts as oracle
from d2l.base import grouped
from d2l.base.experts import PackedExperts, group_packed_experts, pack_experts
from d2l.base.mxfp4 import BLOCK, quantize
from d2l.errors import ModelError

HIDDEN, INTERMEDIATE = 64, 96
SLICES = {"one slice": 2**40, "blocks": 1}  # bytes: everything at once, and a block of 32 columns at a time


def packed(experts: int, dtype: torch.dtype, seed: int = 0) -> PackedExperts:
    """Experts of random weights."""
    generator = torch.Generator().manual_seed(seed)
    module = PackedExperts(experts, HIDDEN, INTERMEDIATE, alpha=1.702, limit=7.0, dtype=dtype)
    for name, shape in (("gate_up_proj", (2 * INTERMEDIATE, HIDDEN)), ("down_proj", (HIDDEN, INTERMEDIATE))):
        blocks, scales = quantize(0.4 * torch.randn(experts, *shape, generator=generator))
        bias = 0.4 * torch.randn(experts, shape[0], generator=generator)
        module.load_state_dict(
            {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bias.to(dtype)}, strict=False
        )
    return module


def inputs(tokens: int, top_k: int, experts: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states so large that the clamp acts, indices, routing weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (3 * torch.randn(tokens, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    indices = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator).to(dtype).requires_grad_()
    return hidden, indices, weights


def results(module: PackedExperts, arguments: tuple[Tensor, Tensor, Tensor], transient: int | None) -> Iterator[Tensor]:
    """Output, and the gradients of hidden states and routing weights in one direction."""
    hidden, _, weights = arguments
    module.transient_bytes = transient
    output = module(*arguments)
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    yield output.detach()
    yield from torch.autograd.grad(output, (hidden, weights), direction)


def apart(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


# Values and gradients


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_a_layer_at_once_equals_one_expert_at_a_time(data: st.DataObject) -> None:
    """Any number of tokens and choices; experts without a token; an expert with all of them; slices of every size."""
    experts = data.draw(st.integers(1, 7), "experts")
    top_k = data.draw(st.integers(1, experts), "top_k")
    used = data.draw(st.integers(top_k, experts), "experts in use")
    tokens = data.draw(st.integers(1, 12), "tokens")
    dtype, bound = data.draw(st.sampled_from([(torch.float64, 1e-13), (torch.float32, 1e-6)]), "dtype")
    transient = data.draw(st.sampled_from([1, 2**16, 2**18, 2**40]), "bytes")
    hidden, indices, weights = inputs(tokens, top_k, used, dtype, seed=data.draw(st.integers(0, 9), "seed"))
    indices = (indices + data.draw(st.integers(0, experts - used), "first in use")).flip(-1)
    module = packed(experts, dtype)
    pairs = zip(
        results(module, (hidden, indices, weights), transient),
        results(module, (hidden, indices, weights), None),
        strict=True,
    )
    for at_once, one_by_one in pairs:
        assert at_once.shape == one_by_one.shape
        assert apart(at_once, one_by_one) <= bound


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 4), (2, 3), (7, 1)])
@torch.no_grad()
def test_few_routes_of_an_answer_dequantize_their_own_experts_alone(
    tokens: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, (hidden, indices, weights) = packed(8, torch.float32), inputs(tokens, top_k, 8, torch.float32)
    expected = module(hidden, indices, weights)
    module.transient_bytes = 2**40
    monkeypatch.setattr(grouped._GroupedExperts, "apply", None)
    dequantized: list[int] = []
    healthy = grouped.dequantize
    monkeypatch.setattr(
        grouped, "dequantize", lambda blocks, *rest: dequantized.append(len(blocks)) or healthy(blocks, *rest)
    )
    assert apart(module(hidden, indices, weights), expected) <= 1e-6
    assert dequantized == [tokens * top_k] * 2


@torch.no_grad()
def test_routes_as_many_as_experts_or_copies_beyond_the_bound_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = packed(8, torch.float32)
    monkeypatch.setattr(grouped, "_with_copies", None)
    for tokens, transient in ((2, 2**40), (1, 1)):
        arguments = inputs(tokens, 4, 8, torch.float32)
        expected = packed(8, torch.float32)(*arguments)
        module.transient_bytes = transient
        assert apart(module(*arguments), expected) <= 1e-6


@pytest.mark.parametrize("transient", SLICES.values(), ids=SLICES.keys())
@pytest.mark.parametrize("top_k", [1, 2])
def test_outputs_are_the_same_in_every_bit_where_the_order_of_the_sum_is(top_k: int, transient: int) -> None:
    """Of two numbers there is one order; of more, tokens sum their choices here and experts in ascending order there."""
    module, arguments = packed(6, torch.float32), inputs(23, top_k, 6, torch.float32)
    (at_once, *_), (one_by_one, *_) = results(module, arguments, transient), results(module, arguments, None)
    assert torch.equal(at_once, one_by_one)


@pytest.mark.parametrize("transient", SLICES.values(), ids=SLICES.keys())
def test_in_bfloat16_the_error_is_that_of_one_expert_at_a_time(transient: int) -> None:
    """Hidden states below the clamp: beside its bound the gradient is none or whole, whichever way the value was rounded."""
    hidden, *routes = inputs(50, 4, 8, torch.bfloat16)
    arguments = ((hidden.detach() / 10).requires_grad_(), *routes)
    exact_inputs = tuple(it.detach().double().requires_grad_() if it.is_floating_point() else it for it in arguments)
    module = packed(8, torch.bfloat16)
    exact = packed(8, torch.float64)
    exact.load_state_dict(module.state_dict())
    truth = list(results(exact, exact_inputs, None))
    errors = [
        [float((value.double() - true).norm() / true.norm()) for value, true in zip(found, truth, strict=True)]
        for found in (results(module, arguments, transient), results(module, arguments, None))
    ]
    for at_once, one_by_one in zip(*errors, strict=True):
        assert at_once <= 1.1 * one_by_one
        assert one_by_one < 0.01


def test_both_equal_the_formulas_of_the_reference_token_by_token() -> None:
    hidden, indices, weights = inputs(9, 3, 5, torch.float64)
    module = packed(5, torch.float64)
    state = {f"experts.{name}": tensor for name, tensor in module.state_dict().items()}
    router = {"router.weight": torch.zeros(5, HIDDEN), "router.bias": torch.zeros(5)}
    held = oracle.Weights.of_block(state | router)
    expected = torch.stack(
        [
            sum(float(w) * oracle.expert(token, held, int(e)) for w, e in zip(share, chosen, strict=True))
            for token, share, chosen in zip(hidden.detach(), weights.detach(), indices, strict=True)
        ]
    )
    for transient in (None, 1, 2**40):
        (output, *_) = results(module, (hidden, indices, weights), transient)
        assert apart(output, expected) < 1e-14


def test_gradients_are_those_of_small_differences() -> None:
    hidden, indices, weights = inputs(3, 2, 4, torch.float64)
    module = packed(4, torch.float64)
    module.transient_bytes = 1
    assert torch.autograd.gradcheck(lambda h, w: module(h, indices, w), (hidden, weights))


def test_checkpointing_does_not_change_the_gradient() -> None:
    module, (hidden, indices, weights) = packed(5, torch.float32), inputs(11, 2, 5, torch.float32)
    module.transient_bytes = 1
    plain, recomputed = (
        torch.autograd.grad(call(hidden, indices, weights).square().sum(), (hidden, weights))
        for call in (module, lambda *given: checkpoint(module, *given, use_reentrant=False))
    )
    assert all(torch.equal(*pair) for pair in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens_are_no_outputs_and_no_gradients(dtype: torch.dtype) -> None:
    module, arguments = packed(4, dtype), inputs(0, 2, 4, dtype)
    shapes = [tuple(it.shape) for it in results(module, arguments, 1)]
    assert shapes == [(0, HIDDEN), (0, HIDDEN), (0, 2)]


# Memory


def test_nothing_dequantized_is_kept_for_backward() -> None:
    """Kept are the packed bytes themselves, routes, routing weights, and the gates and ups [routes, 2 · intermediate]."""
    module, arguments = packed(6, torch.float32), inputs(23, 2, 6, torch.float32)
    buffers = {buffer.untyped_storage().data_ptr() for buffer in module.state_dict().values()}
    module.transient_bytes = 2**40
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        module(*arguments)
    own = [it for it in saved if it.untyped_storage().data_ptr() not in buffers]
    assert sum(it.dtype == torch.uint8 for it in saved) == 4
    assert not any(it.dtype == torch.uint8 for it in own)
    assert max(it.numel() for it in own if it.is_floating_point()) == 23 * 2 * 2 * INTERMEDIATE
    assert sum(it.numel() for it in own if it.is_floating_point()) == 23 * 2 * (2 * INTERMEDIATE + 1)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 200), st.integers(1, 10**6), st.integers(0, 10**10))
def test_slices_cover_a_width_once_within_their_bytes(blocks: int, column: int, most: int) -> None:
    width = blocks * BLOCK
    parts = grouped.slices(width, column, most)
    assert [column for part in parts for column in range(width)[part]] == list(range(width))
    sizes = [part.stop - part.start for part in parts]
    assert all(size % BLOCK == 0 for size in sizes)
    assert max(sizes) * column <= max(most, BLOCK * column)
    assert max(sizes) - min(sizes) <= BLOCK


class Products:
    """On the meta device: each dequantized slice in bytes, and the floating point operations of the products."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: list[int] = []
        self.flops = 0
        self._dequantize, self._grouped_mm = grouped.dequantize, grouped.grouped_mm
        monkeypatch.setattr(grouped, "dequantize", self.dequantize)
        monkeypatch.setattr(grouped, "grouped_mm", self.grouped_mm)

    def dequantize(self, *arguments: Any) -> Tensor:
        weights = self._dequantize(*arguments)
        self.bytes.append(weights.nbytes)
        return weights

    def grouped_mm(self, rows: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
        self.flops += 2 * rows.numel() * matrices.shape[2]
        return self._grouped_mm(rows, matrices, offs=offs)


@pytest.mark.parametrize(("gib", "count"), [(0.5, 7), (0.25, 17), (1.0, 4)])
def test_a_layer_of_gpt_oss_20b_stays_within_the_transient_and_multiplies_nothing_twice(
    gib: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, where nothing can be read by the host: every operation has to know its sizes."""
    tokens, top_k, experts, size = 8192, 4, 32, 2880
    products = Products(monkeypatch)
    with torch.device("meta"):
        module = PackedExperts(experts, size, size, alpha=1.702, limit=7.0, dtype=torch.bfloat16)
        hidden = torch.empty(tokens, size, dtype=torch.bfloat16, requires_grad=True)
        indices = torch.empty(tokens, top_k, dtype=torch.int64)
        weights = torch.empty(tokens, top_k, dtype=torch.bfloat16, requires_grad=True)
    module.transient_bytes = int(gib * 2**30)
    module(hidden[:1], indices[:1], weights[:1])  # the table of MXFP4 goes to a device once
    products.bytes, products.flops = [], 0
    with Dispatched() as mode:
        module(hidden, indices, weights).sum().backward()
    assert hidden.grad is not None
    assert weights.grad is not None
    assert max(products.bytes) <= gib * 2**30
    assert len(products.bytes) == count
    assert products.flops == 2 * (2 * tokens * top_k * 3 * size * size)  # forward, and as many backward: exact
    assert not mode.waits


def test_a_transient_that_holds_no_slice_is_refused_with_one_that_does() -> None:
    config = GptOssConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_local_experts=4, vocab_size=16, pad_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config)
    (experts,) = pack_experts(model)
    least = 2 * 32 * 4 * 64 * 4  # gates and ups of 32 columns or as wide a slice of the gradient, 4 experts, in float32
    with pytest.raises(ModelError, match=r"expert_transient_gib: 6.*e-05 .*4 experts.* Set it to 0.000976562 or more"):
        group_packed_experts(model, least - 1, torch.float32)
    group_packed_experts(model, least, torch.float32)
    assert experts.transient_bytes == least


# Work for the host


def layer(experts: int, transient: int | None, dtype: torch.dtype = torch.bfloat16) -> Dispatched:
    """What forward and backward of one layer dispatch, where every expert has tokens."""
    module, arguments = packed(experts, dtype), inputs(40, 2, experts, dtype)
    module.transient_bytes = transient
    return dispatched(lambda: module(*arguments).sum().backward())


def test_a_layer_at_once_never_waits_and_takes_as_many_operations_for_any_number_of_experts() -> None:
    at_once = {experts: layer(experts, 2**40) for experts in (4, 8, 32)}
    one_by_one = {experts: layer(experts, None) for experts in (4, 8, 32)}
    assert not any(it.waits for it in at_once.values())
    assert len({it.operations.total() for it in at_once.values()}) == 1
    assert at_once[32].operations.total() < one_by_one[32].operations.total() / 15
    assert one_by_one[32].operations.total() > 5 * one_by_one[4].operations.total()


def test_one_expert_at_a_time_waits_for_the_host() -> None:
    """The counter sees what it is for."""
    waits = layer(4, None).waits
    assert waits["aten::_unique2"] == 1
    assert waits["aten::nonzero"] == 4


def test_backwards_neither_put_by_index_nor_add_by_index() -> None:
    """On CUDA those sort, or add in another order every time."""
    names = set(layer(8, 1).operations)
    assert not {
        it
        for it in names
        if it.startswith(("aten::index_put", "aten::_index_put", "aten::index_add", "aten::scatter_add"))
    }
    assert "aten::_grouped_mm" in names


def test_no_strided_half_is_computed_with() -> None:
    """Gates and ups are halves of what the product returns: the rows are in that order when they are dequantized."""
    seen: list[tuple[int, ...]] = []

    def swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
        seen.extend((gate.stride(-1), up.stride(-1)))
        return original(gate, up, alpha, limit)

    original = grouped.clamped_swiglu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "clamped_swiglu", swiglu)
        layer(4, 1)
    assert set(seen) == {1}


# On a GPU


@pytest.mark.gpu
def test_on_cuda_nothing_waits_and_values_are_those_of_one_expert_at_a_time() -> None:
    """Layers of gpt-oss-20b's width in bfloat16: torch raises where the host would wait. Compared with float64 there."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs CUDA SM 90 or 100")
    with torch.device("cuda"):
        module = PackedExperts(8, 2880, 2880, alpha=1.702, limit=7.0, dtype=torch.bfloat16)
        for buffer in module.buffers():
            buffer.random_(118, 122) if buffer.shape[-1] != 16 else buffer.random_()
        for bias in module.parameters():
            bias.data.normal_()
        hidden = torch.randn(200, 2880, dtype=torch.bfloat16, requires_grad=True)
        indices = torch.rand(200, 7).argsort(-1)[:, :4]  # the last expert has no token
        weights = torch.rand(200, 4, dtype=torch.bfloat16, requires_grad=True)
    module.transient_bytes = 2**27
    module(hidden, indices, weights).sum().backward()  # compiles, and compares the kernel with the table
    hidden.grad = weights.grad = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode of torch's is a prototype
            torch.cuda.set_sync_debug_mode("error")
        at_once = list(results(module, (hidden, indices, weights), 2**27))
        with torch.autocast("cuda", torch.bfloat16):  # makes sums float32
            assert module(hidden, indices, weights).dtype == torch.bfloat16
    finally:
        torch.cuda.set_sync_debug_mode("default")
    one_by_one = list(results(module, (hidden, indices, weights), None))
    double = [it.detach().double().requires_grad_() for it in (hidden, weights)]
    truth = results(module.double(), (double[0], indices, double[1]), None)
    for found, other, true in zip(at_once, one_by_one, truth, strict=True):
        errors = [float((it.double() - true).norm() / true.norm()) for it in (found, other)]
        assert errors[0] <= 1.2 * errors[1] < 0.05
