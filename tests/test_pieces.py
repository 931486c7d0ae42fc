"""The Perceiver in pieces is the Perceiver in one go, and the bytes that it keeps are those of its formula."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hypernet_shapes import hypernet_shape
from torch import Tensor

from d2l.base.segments import Segments
from d2l.config.load import load_config
from d2l.hypernet import memory
from d2l.hypernet.hypernetwork import Hypernetwork
from d2l.hypernet.memory import activation_bytes, cut, perceiver_bytes, perceiver_parameters, total_bytes
from d2l.hypernet.shape import HypernetShape

LAYERS, FEATURES = 4, 96
GIB = 2**30
few = settings(derandomize=True, deadline=None, max_examples=30)
LENGTHS = [(300,), (40,) * 8, (40, 33, 38, 36), (7, 60, 8, 55, 1)]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_self_attn_per_block": 2, "shared_weights": True},
    {"per_layer": False, "num_pre_head_layers": 2, "per_layer_processing": False},
    {"per_rank_gen": False, "num_blocks": 1},
]


def wide_shape(**values: Any) -> HypernetShape:
    sizes = {"latent_size": 64, "n_latent_queries": 24, "num_blocks": 3, "perceiver_heads": 8, "perceiver_head_dim": 32}
    options = {**sizes, "lora_r": 4, "use_bias": False, **values}
    return hypernet_shape({"q_proj": (96, 128)}, n_layers=LAYERS, feature_size=FEATURES, **options)


def hypernetwork(shape: HypernetShape) -> Hypernetwork:
    torch.manual_seed(0)
    return Hypernetwork(shape)


def features_of(shape: HypernetShape, lengths: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (1, LAYERS, sum(lengths), FEATURES) if shape.per_layer_features else (1, sum(lengths), FEATURES)
    return torch.randn(size, generator=generator)


def precision(autocast: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()


class Kept:
    """Counts the bytes of what autograd keeps while it is open, without that which is there anyway."""

    def __init__(self, *there: Tensor) -> None:
        self._there = {x.untyped_storage().data_ptr() for x in there}
        self._kept: dict[int, Tensor] = {}  # held, so that no address is used a second time
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def __enter__(self) -> "Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__()

    def _pack(self, x: Tensor) -> Tensor:
        if (place := x.untyped_storage().data_ptr()) not in self._there:
            self._kept[place] = x
        return x

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self._kept.values())


def values_and_gradients(model: Hypernetwork, features: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    features = features.requires_grad_()
    latents = model.aggregator(features, Segments(lengths))
    probe = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(latents)
    return [latents, *torch.autograd.grad((latents * probe).sum(), [features, *model.aggregator.parameters()])]


def crossed(lengths: Sequence[tuple[int, ...]]) -> pytest.MarkDecorator:
    """Cross lengths with variants; `make test` takes each variant with two lengths, and `make kills` all."""
    return pytest.mark.parametrize(
        ("lengths", "variant"),
        [
            pytest.param(those, variant, marks=() if (row - column) % len(lengths) < 2 else pytest.mark.slow)
            for row, those in enumerate(lengths)
            for column, variant in enumerate(VARIANTS)
        ],
    )


@crossed([*LENGTHS, (0, 3)])
def test_the_smallest_pieces_give_the_same_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    model = hypernetwork(wide_shape(**variant)).double()
    features = features_of(model.shape, lengths).double()
    expected = values_and_gradients(model, features, lengths)
    monkeypatch.setattr(memory, "PIECE_BYTES", 1)
    pieces = [piece for group in cut(model.shape, Segments(lengths), 8) for piece in group]
    assert len(pieces) == len(lengths) * model.shape.feature_layers
    for actual, wanted in zip(values_and_gradients(model, features, lengths), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def test_under_autocast_the_gradients_of_pieces_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 pieces: their sum in bfloat16 would be off by several of its roundings, and is in none of them."""
    lengths = (40,) * 8
    model = hypernetwork(wide_shape())
    features = features_of(model.shape, lengths)
    exact = values_and_gradients(model, features, lengths)
    with precision(autocast=True):
        whole = values_and_gradients(model, features.bfloat16().float(), lengths)
        monkeypatch.setattr(memory, "PIECE_BYTES", 1)
        pieces = values_and_gradients(model, features.bfloat16().float(), lengths)
    for one, many, truth in zip(whole, pieces, exact, strict=True):
        error, bound = (many - truth).norm(), (one - truth).norm()
        assert error <= 1.1 * bound + 1e-6
    assert all(gradient.dtype == torch.float32 for gradient in pieces)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_piece_recomputes_in_the_precision_of_its_forward(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    model = hypernetwork(wide_shape(per_layer=False))
    features = features_of(model.shape, (40,))
    with precision(autocast):
        expected = values_and_gradients(model, features, (40,))
    monkeypatch.setattr(memory, "PIECE_BYTES", 1)
    with precision(autocast):
        latents = model.aggregator(features, Segments((40,)))
    probe = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(latents)
    found = torch.autograd.grad((latents * probe).sum(), [features, *model.aggregator.parameters()])  # outside of it
    for actual, wanted in zip([latents, *found], expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_groups_of_chunks_come_out_in_the_order_of_the_row() -> None:
    model, lengths = hypernetwork(wide_shape()).double(), (7, 60, 8, 55, 1)
    features = features_of(model.shape, lengths).double()
    assert len(cut(model.shape, Segments(lengths), 8)) == 3
    together = model.aggregator(features, Segments(lengths))
    for latents, chunk, length in zip(together, features.split(lengths, dim=2), lengths, strict=True):
        torch.testing.assert_close(latents, model.aggregator(chunk, Segments((length,)))[0], rtol=1e-9, atol=1e-9)


@crossed(LENGTHS)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_bytes_that_are_kept_are_those_of_the_formula(
    variant: dict[str, Any], lengths: tuple[int, ...], autocast: bool
) -> None:
    model = hypernetwork(wide_shape(**variant))
    shape, chunks, itemsize = model.shape, Segments(lengths), 2 if autocast else 4
    features = features_of(shape, lengths).to(torch.bfloat16 if autocast else torch.float32)
    with precision(autocast), Kept(features, *model.parameters()) as kept:
        model.aggregator(features, chunks)
    groups = cut(shape, chunks, itemsize)
    copies = features.numel() * features.element_size() if len(groups) > 1 else 0  # those of a group's chunks
    counted = total_bytes(shape, groups, chunks, itemsize)
    assert counted + copies == pytest.approx(kept.bytes, rel=0.06)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_bytes_of_a_whole_row_are_those_of_the_formula(autocast: bool) -> None:
    model, lengths, itemsize = hypernetwork(wide_shape()), (40,) * 8, 2 if autocast else 4
    features = features_of(model.shape, lengths).to(torch.bfloat16 if autocast else torch.float32)
    with precision(autocast), Kept(features, *model.parameters()) as kept:
        model(features, Segments(lengths))
    found = activation_bytes(model.shape, lengths, feature_bytes=itemsize, compute_bytes=itemsize)
    assert found.features == features.numel() * features.element_size()
    assert found.kept == pytest.approx(kept.bytes, rel=0.03)


def test_pieces_keep_their_latents_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = hypernetwork(wide_shape()), (40,) * 8
    features = features_of(model.shape, lengths)
    monkeypatch.setattr(memory, "PIECE_BYTES", 2**21)
    with Kept(features, *model.parameters()) as kept:
        model(features, Segments(lengths))
    found = activation_bytes(model.shape, lengths, feature_bytes=4, compute_bytes=4)
    assert kept.bytes <= found.kept <= kept.bytes + 8 * LAYERS * 4 * 64 * 4  # nothing else of a latent keeps it
    assert found.kept < 0.05 * total_bytes(model.shape, cut(model.shape, Segments(lengths), 4), Segments(lengths), 4)


@few
@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=12).map(tuple),
    bound=st.integers(10**5, 10**9),
    per_layer=st.booleans(),
)
def test_every_chunk_is_read_once_under_every_layer_within_the_bound(
    lengths: tuple[int, ...], bound: int, per_layer: bool
) -> None:
    shape, chunks = wide_shape(per_layer=per_layer), Segments(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "PIECE_BYTES", bound)
        groups = cut(shape, chunks, 4)
    read = [(chunk, layer) for group in groups for piece in group for chunk in piece.chunks for layer in piece.layers]
    assert sorted(read) == [(chunk, layer) for chunk in range(len(lengths)) for layer in range(shape.feature_layers)]
    for group in groups:
        assert len({piece.chunks for piece in group}) == 1
        assert [layer for piece in group for layer in piece.layers] == [*range(shape.feature_layers)]
        for piece in group:
            width = max(lengths[i] for i in piece.chunks)
            padded = width * len(piece.chunks)
            size = perceiver_bytes(shape, len(piece.layers), len(piece.chunks), padded, padded, 4)
            assert size <= 1.1 * bound or len(piece.layers) == 1 or len(piece.chunks) == 1


@pytest.mark.parametrize("variant", [*VARIANTS, {"num_blocks": 1, "shared_weights": True}])
def test_the_perceivers_parameters_are_counted(variant: dict[str, Any]) -> None:
    shape = wide_shape(**variant)
    assert perceiver_parameters(shape) == sum(p.numel() for p in hypernetwork(shape).aggregator.parameters())


@pytest.mark.parametrize("encoder", ["per_layer_activations", "concat_layers"])
@pytest.mark.parametrize("lengths", [(32_768,), (8_192,) * 4, (1_024,) * 32, (512,) * 64])
def test_the_published_shapes_fit_at_32768_tokens(encoder: str, lengths: tuple[int, ...]) -> None:
    """Beside a base of 13 GiB and its question pass, on a card of 80 GB."""
    config = load_config("configs/gpt_oss_20b.yaml", {"ctx_encoder_type": encoder})
    size = 2880 * (24 if encoder == "concat_layers" else 1)
    shape = HypernetShape(config=config, modules={"q_proj": (2880, 4096)}, n_layers=24, feature_size=size)
    found = activation_bytes(shape, lengths, feature_bytes=2, compute_bytes=2)
    assert found.features == pytest.approx(4.22 * GIB, rel=0.01)
    assert found.features + found.kept + found.backward < 13 * GIB
