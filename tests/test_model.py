"""DocToLora: one frozen base with a LoRA for each context bound to it, and gradients of the hypernetwork alone."""

from dataclasses import replace

import pytest
import torch
from support.sizes import LAYERS, RANK, VOCABULARY
from support.tiny_model import random_batch, random_rows, run_config, tiny_base, tiny_model
from torch import Tensor

from d2l.base.experts import PackedExperts
from d2l.build import build_model
from d2l.data.packing import PackedBatch, collate
from d2l.hypernet.encoder import EncoderType
from d2l.hypernet.model import DocToLora
from d2l.train.loop import batch_loss
from d2l.train.losses import Normalizer

ENCODERS: tuple[EncoderType, ...] = ("per_layer_activations", "early_exit", "embed_only", "concat_layers")

every_family = pytest.mark.parametrize("family", ["gpt_oss", "llama"])
every_encoder = pytest.mark.parametrize("encoder_type", ENCODERS)


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def loss_of(model: DocToLora, batch: PackedBatch) -> Tensor:
    return batch_loss(model, batch, Normalizer.of([batch], RANK), run_config()).total


def gradients(model: DocToLora) -> dict[str, Tensor]:
    """Of every parameter that has one; their slots are emptied."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


# Forward


@every_family
@every_encoder
def test_shapes(family: str, encoder_type: EncoderType) -> None:
    model, batch = tiny_model(run_config(ctx_encoder_type=encoder_type), family), random_batch()
    features, latents, lora = model.features(batch), model.latents(batch), model.lora(batch)
    tokens, chunks = batch.ctx_ids.shape[1], sum(batch.n_ctx_chunks)
    sizes = {"per_layer_activations": (LAYERS, tokens, 32), "concat_layers": (tokens, LAYERS * 32)}
    assert features.shape == (1, *sizes.get(encoder_type, (tokens, 32)))
    assert latents.shape == (chunks, LAYERS, 2, RANK, 16)
    assert (lora.n_contexts, lora.rank) == (3, RANK * (3 + 1))
    assert lora.A["q_proj"].shape == (3, LAYERS, lora.rank, 32)
    assert model.logits(batch, lora).shape == (batch.n_tokens, VOCABULARY)


@every_family
def test_logits_at_positions_are_those_of_all_logits(family: str) -> None:
    model, batch = tiny_model(run_config(), family), random_batch()
    with torch.no_grad():
        for lora in (model.lora(batch), None):
            everywhere = model.logits(batch, lora)
            for positions in ([3, 0, 7], [batch.n_tokens - 1], []):
                some = model.logits(batch, lora, torch.tensor(positions, dtype=torch.int64))
                torch.testing.assert_close(some, everywhere[positions], rtol=1e-6, atol=1e-6)


@every_family
@every_encoder
def test_packed_contexts_come_out_as_each_alone(family: str, encoder_type: EncoderType) -> None:
    """Contexts of 1, 2 and 3 chunks: packed, their LoRAs are padded to the longest one's rank, alone they are not."""
    model, rows = tiny_model(run_config(ctx_encoder_type=encoder_type), family), random_rows(3)
    with torch.no_grad():
        together = model.logits(collate(rows), model.lora(collate(rows)))
        alone = [model.logits(batch, model.lora(batch)) for batch in (collate([row]) for row in rows)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@every_encoder
def test_a_document_changes_the_answers_to_its_own_questions_alone(encoder_type: EncoderType) -> None:
    model, batch = tiny_model(run_config(ctx_encoder_type=encoder_type)), random_batch()
    first, *_ = batch.chunks.lengths
    other_ids = batch.ctx_ids.clone()
    other_ids[0, :first] = (other_ids[0, :first] + 1) % VOCABULARY  # the first context has one chunk
    other = replace(batch, ctx_ids=other_ids)
    with torch.no_grad():
        change = (model.logits(other, model.lora(other)) - model.logits(batch, model.lora(batch))).abs().amax(-1)
    own = batch.contexts.lengths[0]
    assert (change[:own] > 1e-4).any()
    assert change[own:].max() < 1e-5


@every_family
def test_a_new_hypernetwork_leaves_the_base_as_it_is(family: str) -> None:
    model, batch = tiny_model(run_config(), family, nonzero=False), random_batch()
    with torch.no_grad():
        torch.testing.assert_close(model.logits(batch, model.lora(batch)), model.logits(batch, None))


# One base, frozen


def test_initial_weights_follow_from_the_seed_alone() -> None:
    def head(seed: int, draws: int) -> Tensor:
        torch.manual_seed(draws)
        return build_model(run_config(seed=seed), tiny_base()).hypernet.get_parameter("head.weight")

    assert torch.equal(head(seed=3, draws=0), head(seed=3, draws=1))
    assert not torch.equal(head(seed=3, draws=0), head(seed=4, draws=0))


@every_family
def test_the_base_is_not_copied_and_only_the_hypernetwork_trains(family: str) -> None:
    base = tiny_base(family=family)
    model = DocToLora(base, run_config())
    assert model.base is base
    assert model.encoder.decoder is base.get_decoder()
    ours = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("base.")}
    assert set(ours) == {f"hypernet.{name}" for name, _ in model.hypernet.named_parameters()}
    assert {id(p) for p in model.parameters()} - {id(p) for p in base.parameters()} == {id(p) for p in ours.values()}
    assert all(parameter.requires_grad for parameter in ours.values())
    assert not any(parameter.requires_grad for parameter in base.parameters())


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_is_bit_for_bit_what_it_was_after_a_step(family: str, checkpointing: bool) -> None:
    model, batch = tiny_model(run_config(), family), random_batch()
    weights = {name: value.clone() for name, value in model.base.state_dict().items()}
    before = model.logits(batch, None)
    if checkpointing:
        model.gradient_checkpointing_enable({})
    loss_of(model, batch).backward()
    exact(model.logits(batch, None), before)
    for name, value in model.base.state_dict().items():
        exact(value, weights[name])
    assert not any(parameter.grad is not None for parameter in model.base.parameters())


# Gradients


@every_family
@every_encoder
def test_every_parameter_of_the_hypernetwork_gets_a_gradient(family: str, encoder_type: EncoderType) -> None:
    model = tiny_model(run_config(ctx_encoder_type=encoder_type), family)
    loss_of(model, random_batch()).backward()
    found = gradients(model)
    assert set(found) == {f"hypernet.{name}" for name, _ in model.hypernet.named_parameters()}
    assert all(value.isfinite().all() and value.any() for value in found.values())


@pytest.mark.parametrize("what", ["chunk_loras", "latents"])
def test_the_base_reads_documents_outside_of_autocast(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast makes every sum float32, and so the experts' output and all layers behind it."""
    model, seen = tiny_model(run_config()), {}
    monkeypatch.setattr(model, "_hypernet_precision", lambda: torch.autocast("cpu", torch.bfloat16))
    linear = next(it for it in model.hypernet.modules() if isinstance(it, torch.nn.Linear))
    for name, module in {"base": model.base.get_decoder().layers[0], "hypernetwork": linear}.items():
        module.register_forward_pre_hook(lambda *_, it=name: seen.update({it: torch.is_autocast_enabled("cpu")}))
    getattr(model, what)(random_batch())
    assert seen == {"base": False, "hypernetwork": True}


def test_attention_builds_no_plan_for_every_new_shape() -> None:
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@every_family
@every_encoder
def test_gradient_checkpointing_changes_no_gradient(family: str, encoder_type: EncoderType) -> None:
    model, batch = tiny_model(run_config(ctx_encoder_type=encoder_type), family), random_batch()
    expected_loss = loss_of(model, batch)
    expected_loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model, batch)
    loss.backward()
    exact(loss, expected_loss)
    assert_same(gradients(model), expected)


def test_gradient_checkpointing_of_two_forwards_before_one_backward() -> None:
    model, batches = tiny_model(run_config()), [random_batch(seed=1), random_batch(seed=2)]
    torch.stack([loss_of(model, batch) for batch in batches]).sum().backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({})
    torch.stack([loss_of(model, batch) for batch in batches]).sum().backward()
    assert_same(gradients(model), expected)


def test_gradient_checkpointing_recomputes_the_layers() -> None:
    model, batch, runs = tiny_model(run_config()), random_batch(), []
    model.base.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    model.gradient_checkpointing_enable({})
    loss_of(model, batch).backward()
    assert runs == [False, True, True]  # documents; questions; questions again in the backward pass


def test_gradient_checkpointing_wakes_no_dropout() -> None:
    model, batch = tiny_model(run_config(), "llama", attention_dropout=0.5), random_batch()
    expected = loss_of(model, batch)
    model.gradient_checkpointing_enable({})
    exact(loss_of(model, batch), expected)


def test_packed_experts_give_the_gradients_of_dense_ones() -> None:
    found = []
    for experts in ("packed", "dequantize"):
        model, batch = tiny_model(run_config(expert_weights=experts)), random_batch()
        packed = [module for module in model.base.modules() if isinstance(module, PackedExperts)]
        assert len(packed) == (LAYERS if experts == "packed" else 0)
        loss_of(model, batch).backward()
        found.append(gradients(model))
    assert_same(*found)


def test_a_bfloat16_base_trains_a_float32_hypernetwork() -> None:
    model, batch = tiny_model(run_config(dtype="bfloat16")), random_batch()
    lora = model.lora(batch)
    assert (model.features(batch).dtype, lora.A["q_proj"].dtype) == (torch.bfloat16, torch.float32)
    assert model.logits(batch, lora).dtype == torch.bfloat16
    loss_of(model, batch).backward()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in gradients(model).values())
