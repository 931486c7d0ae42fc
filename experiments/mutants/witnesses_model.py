"""Witnesses of the model and its training: functions of d2l run on small inputs, and the numbers that come out.

Each returns values by name: tensors, or anything that JSON holds. A mutant is one only if it changes them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from d2l.base.config import read_base_config
from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.build import Components
from d2l.config.schema import RunConfig
from d2l.data.chunks import Ids
from d2l.data.packing import PackedBatch, collate
from d2l.data.tokenize import Row
from d2l.errors import D2LError
from d2l.hypernet.lora import bind, merge_chunks
from d2l.hypernet.model import DocToLora
from experiments.mutants.values import Values
from experiments.mutants.workbench import configurations, llama_config

SMALL = {"latent_size": 8, "n_latent_queries": 4, "perceiver_heads": 8, "perceiver_head_dim": 4}


def build(config: RunConfig, *, nonzero: bool = True) -> DocToLora:
    """Make a model whose LoRA is not zero."""
    base_config = read_base_config(config.model_name_or_path)
    base = random_base(base_config, plan_load(config, base_config, device="cpu"), seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = DocToLora(base, config)
        for name, parameter in model.hypernet.named_parameters():
            if nonzero and name.startswith(("scaler_B", "bias_B")):
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def kinds() -> dict[str, RunConfig]:
    """Return one configuration for each way of making a LoRA."""
    gpt_oss = configurations()["tiny_gpt_oss"].model_dump() | SMALL | {"lora_r": 2, "needle_documents": 4}
    gpt_oss["target_modules"] = ["q_proj", "o_proj"]
    llama = {**SMALL, "num_blocks": 3}
    return {
        "per_layer_activations": RunConfig(**gpt_oss),
        "early_exit": llama_config(**llama),
        "concat_layers": llama_config(**llama, ctx_encoder_type="concat_layers", layer_idx=None, shared_weights=True),
        "embed_only": llama_config(
            **llama, ctx_encoder_type="embed_only", layer_idx=None, use_bias=False, perceiver_query_scale=4.0
        ),
    }


def one_batch(config: RunConfig, rows: int = 3) -> PackedBatch:
    """Return the first rows of a configuration's data in one batch, cut into three chunks, one and two of other lengths."""
    cuts = itertools.cycle(((0, 20, 33), (5,), (0, 41)))
    return collate([replace(row, chunks=_cut(row, next(cuts))) for row in Components(config).rows[:rows]])


def _cut(row: Row, starts: Sequence[int]) -> tuple[Ids, ...]:
    """Cut a document's tokens at some places."""
    whole = tuple(itertools.chain.from_iterable(row.chunks))[:90]
    return tuple(whole[start:end] for start, end in itertools.pairwise([*starts, len(whole)]))


def lora(values: Values) -> None:
    """Make LoRAs in every way, initial values included, and bind them."""
    for name, config in kinds().items():
        fresh = build(config, nonzero=False)
        values |= {f"{name} initial {key}": value for key, value in fresh.hypernet.state_dict().items()}
        values[f"{name} no rank"] = refusal(lambda config=config: _latents_without_ranks(config))
        model, batch = build(config), one_batch(config)
        features, latents, made = model.features(batch), model.latents(batch), model.lora(batch)
        logits = model.logits(batch, made, batch.prediction_positions)
        logits[:, :50].float().sum().backward()
        values |= {f"{name} features": features, f"{name} latents": latents.detach(), f"{name} scale": made.scale}
        values |= {f"{name} A {key}": value.detach() for key, value in made.A.items()}
        values |= {f"{name} B {key}": value.detach() for key, value in made.B.items()}
        values |= {f"{name} logits": logits.detach(), f"{name} l1": made.l1().detach()}
        values |= {f"{name} gradient {key}": p.grad for key, p in model.hypernet.named_parameters()}
        values |= {f"{name} base gradients": sum(p.requires_grad for p in model.base.parameters())}
        with torch.no_grad():
            values[f"{name} again"] = model.logits(batch, made)
            values[f"{name} unbound"] = model.logits(batch, None)
            values[f"{name} one context"] = made[1].A[model.hypernet.shape.names[0]].detach()
        seeded = Components(RunConfig(**config.model_dump() | {"seed": 3})).model.hypernet
        values |= {f"{name} seeded {key}": value for key, value in seeded.state_dict().items()}
        values[f"{name} hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.base.modules())


def _latents_without_ranks(config: RunConfig) -> None:
    model = build(RunConfig(**config.model_dump() | {"per_rank_gen": False}))
    model.lora(one_batch(config))


def refusal(call: Any) -> str:
    """Return what a call is refused with, or that it is not."""
    try:
        call()
    except (D2LError, ValueError, RuntimeError) as error:
        return type(error).__name__ + str(error)[:40]
    return "accepted"


def binding(values: Values) -> None:
    """Bind LoRAs nested, by rows and by tokens, under checkpointing, with two contexts before one backward."""
    config = kinds()["early_exit"]
    model, batch = build(config), one_batch(config)
    made = model.lora(batch)
    names = sorted(made.A)
    with torch.no_grad():
        ids = batch.input_ids[:, :12].reshape(3, 4)
        with bind(model.targets, made, rows=[1, 1, 1]):
            values["rows"] = model.base(ids, use_cache=False).logits
            with bind(model.targets, made.zeroed(), rows=[1, 1, 1]):
                values["nested"] = model.base(ids, use_cache=False).logits
            values["again"] = model.base(ids, use_cache=False).logits
        values["after"] = model.base(ids, use_cache=False).logits
        with bind(model.targets, made[:2], rows=[1, 2]):
            values["uneven rows"] = model.base(ids, use_cache=False).logits
    for rows in ([1, 1], [2, 2, 2]):
        with bind(model.targets, made[: len(rows)], rows=rows):
            values[f"refused {rows}"] = refusal(lambda: model.base(ids[:, :3], use_cache=False))
    values["other contexts"] = refusal(lambda: bind(model.targets, made[:1], batch.contexts))
    values["chunks"] = refusal(lambda: merge_chunks(made, [1, 1], None))
    model.gradient_checkpointing_enable({})
    first = model.logits(batch, made, batch.prediction_positions)
    second = model.logits(batch, made.zeroed(), batch.prediction_positions)
    (first[:, :50].sum() + second[:, 50:].sum()).backward()
    values |= {f"checkpointed {key}": p.grad for key, p in model.hypernet.named_parameters() if p.grad is not None}
    values["layers run"] = _layer_runs(model, batch)
    values["shapes"] = [list(made.A[name].shape) for name in names]


def _layer_runs(model: DocToLora, batch: PackedBatch) -> int:
    """Count the runs of the last layer's MLP in a step: two with checkpointing, one without."""
    count = [0]
    layer = model.encoder.layers[-1].mlp
    hook = layer.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    model.logits(batch, model.lora(batch), batch.prediction_positions)[:, :9].sum().backward()
    hook.remove()
    return count[0]
