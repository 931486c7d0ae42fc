"""`packed_flex` is eager attention in value and gradient: its formula, and the function that CUDA compiles, run by PyTorch's
composite of the same operation. The compiled kernels themselves need a GPU: ATT401.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import BASES
from support.sizes import VOCABULARY
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from transformers import AutoModelForCausalLM, PreTrainedModel

from d2l.base import flex
from d2l.base.blocks import block_mask, first_visible
from d2l.base.flex import PACKED_FLEX
from d2l.base.masks import packed_masks
from d2l.hypernet.model import checkpoint_layers

HEADS, KEY_HEADS, SIZE = 4, 2, 16


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def draw(
    lengths: list[int], dtype: torch.dtype = torch.float64, heads: tuple[int, int] = (HEADS, KEY_HEADS)
) -> list[Tensor]:
    """Draw query, key and value as projections leave them: [1, heads, T, size], the heads of a token side by side."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(1, sum(lengths), n, SIZE) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def on_kernels(monkeypatch: pytest.MonkeyPatch, backend: Any = "aot_eager") -> None:
    """Let the function for CUDA run here, traced and compiled with this backend; PyTorch refuses a backward on a CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    torch._dynamo.reset()
    compiled = torch.compile(flex._attend, dynamic=False, fullgraph=True, backend=backend)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)


def softmax_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, sinks: Tensor, cap: float | None
) -> Tensor:
    """Compute attention token by token and head by head: a softmax over what is seen and one sink more."""
    rows, starts = (
        [],
        [start for length, end in zip(lengths, accumulated(lengths), strict=True) for start in [end - length] * length],
    )
    for token, start in enumerate(starts):
        first = start if window is None else max(start, token - window + 1)
        heads = []
        for head in range(HEADS):
            shared = head // (HEADS // KEY_HEADS)
            scores = [
                float(query[0, head, token] @ key[0, shared, t]) / math.sqrt(SIZE) for t in range(first, token + 1)
            ]
            scores = scores if cap is None else [cap * math.tanh(score / cap) for score in scores]
            weights = torch.tensor([*scores, float(sinks[head])], dtype=torch.float64).softmax(0)[:-1]
            heads.append(weights @ value[0, shared, first : token + 1])
        rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


def accumulated(lengths: list[int]) -> list[int]:
    return [sum(lengths[: index + 1]) for index in range(len(lengths))]


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.none() | st.integers(1, 6), st.none() | st.just(2.0))
def test_the_formula_is_a_softmax_with_one_column_more(
    lengths: list[int], window: int | None, cap: float | None
) -> None:
    row, sinks = draw(lengths), torch.linspace(-2, 3, HEADS, dtype=torch.float64)
    mask = block_mask(first_visible(positions(lengths), window))
    found = flex._by_formula(*row, mask, sinks, 1 / math.sqrt(SIZE), cap)
    torch.testing.assert_close(found, softmax_with_sinks(*row, lengths, window, sinks, cap), atol=1e-12, rtol=1e-12)


CASES: list[tuple[list[int], int | None, float | None, bool]] = [
    ([300, 1, 83], None, None, True),
    ([256], 100, None, True),  # one document, whole blocks
    ([40, 7], 5, 20.0, False),
    ([384], None, 3.0, True),
]


EVERYTHING, QUERY, NOTHING = "query key value sinks", "query", ""
# Each case is compiled for one kind of training in `make test`, and each kind in one case or more
QUICK = {(0, EVERYTHING), (1, QUERY), (2, EVERYTHING), (3, NOTHING)}


@pytest.mark.parametrize(
    ("lengths", "window", "cap", "with_sinks", "training"),
    [
        pytest.param(*case, training, marks=() if (number, training) in QUICK else pytest.mark.slow)
        for number, case in enumerate(CASES)
        for training in (EVERYTHING, QUERY, NOTHING)
    ],
)
def test_what_is_compiled_computes_the_formula_in_value_and_gradient(
    lengths: list[int],
    window: int | None,
    cap: float | None,
    with_sinks: bool,
    training: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_kernels(monkeypatch)
    mask = block_mask(first_visible(positions(lengths), window))
    sinks = torch.linspace(-2, 3, HEADS) if with_sinks else None
    results = []
    for attend in (flex._by_formula, flex._by_kernels):
        inputs = dict(zip(("query", "key", "value"), draw(lengths), strict=True))
        inputs |= {} if sinks is None else {"sinks": sinks.double()}
        leaves = {name: x.detach().clone(memory_format=torch.preserve_format) for name, x in inputs.items()}
        trained = [x.requires_grad_() for name, x in leaves.items() if name in training.split()]
        output = attend(leaves["query"], leaves["key"], leaves["value"], mask, leaves.get("sinks"), 0.3, cap)
        results.append([output, *(torch.autograd.grad(output.pow(2).sum(), trained) if trained else ())])
        assert output.requires_grad == bool(trained)
    for found, expected in zip(results[1], results[0], strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # the graph takes the log-sum-exp for float32


def test_sinks_are_applied_in_float32_whatever_the_dtype() -> None:
    """In bfloat16 a log-sum-exp of 40.1 is 40, which gives a sink of 41 a share of .73 instead of .71."""
    output, lse = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.tensor([[[40.1]]])
    kept = flex._finished(output.float(), lse, torch.tensor([41.0], dtype=torch.bfloat16), torch.float32)
    assert float(kept) == pytest.approx(1 / (1 + math.exp(41 - 40.1)), rel=1e-5)


def test_a_run_compiles_two_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients and without: for every length, number of documents, window, layer, and under autocast or not.

    1,024 tokens are as many blocks as GPT-OSS has key heads, and 8,192 as many as a head has numbers.
    """
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Callable[..., tuple[Tensor]]:
        graphs.append(graph)
        return lambda *arguments: (
            next(x for x in arguments if isinstance(x, Tensor) and x.dim() == 4).transpose(1, 2),
        )

    on_kernels(monkeypatch, keep)
    sinks, lengths = torch.zeros(64), ([1024], [300, 501, 223], [8192], [256], [3000, 65], [100], [1])
    for row in lengths:
        for window in (None, 128):
            mask = block_mask(first_visible(positions(row), window))
            for training, autocast in (("all", False), ("query", False), ("none", False), ("no_grad", True)):
                shapes = [(1, sum(row), heads, 64) for heads in (64, 8, 8)]
                query, key, value = (torch.empty(shape, dtype=torch.bfloat16).transpose(1, 2) for shape in shapes)
                query.requires_grad_(training in ("all", "query"))
                key.requires_grad_(training == "all")
                value.requires_grad_(training == "all")
                context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()
                with torch.set_grad_enabled(training != "no_grad"), context:
                    flex._by_kernels(query, key, value, mask, sinks, 0.125, None)
    assert len(graphs) == 2


def test_too_many_graphs_are_an_error_and_not_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    on_kernels(monkeypatch)
    mask, row = block_mask(first_visible(positions([9]))), draw([9])
    with torch._dynamo.config.patch(recompile_limit=1):
        flex._by_kernels(*row, mask, None, 0.1, None)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            flex._by_kernels(*row, mask, None, 0.2, None)


def saved_bytes(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """Count what one forward of GPT-OSS's kind of row keeps for its backward, tables of the mask left out."""
    mask = block_mask(first_visible(positions(lengths)))
    tables = {
        getattr(mask, f"{s}_{n}").data_ptr()
        for s in ("kv", "full_kv", "q", "full_q")
        for n in ("num_blocks", "indices")
    }
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in tables and x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    row = [x.requires_grad_() for x in draw(lengths, torch.bfloat16)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = flex._by_kernels(*row, mask, torch.zeros(HEADS), 0.25, None)
    assert output.requires_grad
    return sum(kept.values())


def test_memory_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for the backward pass: query, keys, values and output, and in float32 the log-sum-exp and what it leaves."""
    on_kernels(monkeypatch)
    first, second = saved_bytes([512], monkeypatch), saved_bytes([1024], monkeypatch)
    assert second <= 2 * first
    per_token = 2 * SIZE * (2 * HEADS + 2 * KEY_HEADS)
    assert per_token <= first / 512 <= per_token + 5 * 4 * HEADS


def model(implementation: str, kind: str = "gpt_oss") -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(BASES[kind].tiny(), attn_implementation=implementation)
        for name, parameter in base.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
    return base.eval()


def step(base: PreTrainedModel, ids: Tensor, lengths: list[int]) -> list[Tensor]:
    """Return the logits of a packed row, and the gradients of all parameters."""
    base.zero_grad()
    where = positions(lengths)
    logits = base(input_ids=ids, position_ids=where, attention_mask=packed_masks(base, where), use_cache=False).logits
    logits.pow(2).mean().backward()
    return [logits, *(parameter.grad for parameter in base.parameters() if parameter.grad is not None)]


SLOW_LENGTHS = [pytest.param(lengths, marks=pytest.mark.slow) for lengths in ([140, 130], [256], [5])]


@pytest.mark.parametrize("lengths", [[11, 1, 9], *SLOW_LENGTHS])
@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_model_on_what_is_compiled_is_the_eager_model(
    kind: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks in GPT-OSS, soft caps in Gemma 2, one kind of layer in Llama; with checkpointing, which computes a layer anew."""
    on_kernels(monkeypatch)
    monkeypatch.setattr(flex, "_by_formula", flex._by_kernels)
    ids = torch.randint(VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    expected = step(model("eager", kind), ids, lengths)
    own = model(PACKED_FLEX, kind)
    checkpointed = model(PACKED_FLEX, kind)
    checkpoint_layers(checkpointed, {"use_reentrant": False})
    checkpointed.train()
    for base in (own, checkpointed):
        for found, wanted in zip(step(base, ids, lengths), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("head_size", "triton", "capability", "reason"),
    [
        (64, True, (9, 0), None),
        (64, True, (8, 0), None),
        (8, True, (9, 0), "heads of 16"),
        (64, False, (9, 0), "Triton"),
        (64, True, (7, 5), "SM 75"),
    ],
)
def test_where_the_kernels_run(
    head_size: int, triton: bool, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    obstacle = flex.kernel_obstacle(head_size)
    assert obstacle is None if reason is None else reason in str(obstacle)


def test_without_a_compiler_its_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "find_spec", lambda name: True)
    monkeypatch.setattr(flex, "which", lambda name: None)
    assert flex.kernel_obstacle(64) == "its kernels need a C compiler, and neither gcc nor clang is installed"
    assert flex.kernel_obstacle(64, (9, 0)) is None, "of a card that is elsewhere this machine's compiler says nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[300, 129, 83], [384], [77]])
def test_compiled_kernels_compute_the_formula(lengths: list[int]) -> None:
    mask = block_mask(first_visible(positions(lengths).cuda(), 128))
    sinks, results = torch.linspace(-2, 3, HEADS).cuda(), []
    for attend in (flex._by_formula, flex._by_kernels):
        row = [x.cuda().requires_grad_() for x in draw(lengths, torch.float32)]
        output = attend(*row, mask, sinks, 0.25, 20.0)
        results.append([output, *torch.autograd.grad(output.pow(2).sum(), row)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
