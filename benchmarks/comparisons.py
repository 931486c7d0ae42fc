"""The pieces of work that `make bench` times, each beside a rule in plain torch or transformers.

Shapes are those of gpt-oss-20b where a CPU can take them, else of a small GPT-OSS; the same on a GPU, in bfloat16 there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GptOssConfig, PreTrainedModel

from benchmarks.timing import Work
from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.base.segments import Segments
from d2l.build import Components, build_model
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.packing import PackedBatch, collate
from d2l.data.tokenize import IGNORE_INDEX, Query, Row
from d2l.hypernet.lora import Lora, bind
from d2l.hypernet.model import DocToLora
from d2l.train.guards import is_spoilt
from d2l.train.loop import Trainer, batch_loss
from d2l.train.losses import Normalizer
from d2l.train.random_state import random_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(frozen=True)
class Comparison:
    """Two pieces of work: ours, and the rule's. `bound` is the ratio ours / rule that is wanted, where one is."""

    what: str
    case: str
    rule: str
    ours: Work
    other: Work
    bound: float | None = None


def comparisons() -> Iterator[Callable[[], Comparison]]:
    """Yield what makes each comparison, so that no two are in memory at once."""
    for lengths in ((4096,), (512,) * 8, _unequal(8), (128,) * 32, _unequal(32)):
        yield partial(_bound_lora, lengths)
    yield _loss
    yield partial(_hypernetwork, "per_layer_activations")
    yield partial(_hypernetwork, "concat_layers")
    for tokens in (256, 1024):
        yield partial(_experts, tokens)
    yield _step
    yield _guards
    for doubled in ("tokens", "contexts", "layers"):
        yield partial(_growth, doubled)


def _unequal(contexts: int, total: int = 4096) -> tuple[int, ...]:
    """Divide tokens among contexts at borders drawn at random."""
    generator = torch.Generator().manual_seed(contexts)
    borders = (torch.randperm(total - 1, generator=generator)[: contexts - 1] + 1).sort().values.tolist()
    return tuple(end - start for start, end in zip([0, *borders], [*borders, total], strict=True))


def _bound_lora(lengths: tuple[int, ...]) -> Comparison:
    linear = nn.Linear(2880, 4096, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    x = torch.randn(1, sum(lengths), 2880, device=DEVICE, dtype=DTYPE, requires_grad=True)
    A = torch.randn(len(lengths), 1, 16, 2880, device=DEVICE, dtype=DTYPE, requires_grad=True)
    B = torch.randn(len(lengths), 1, 16, 4096, device=DEVICE, dtype=DTYPE, requires_grad=True)
    gradient = torch.randn(
        1, sum(lengths), 4096, device=DEVICE, dtype=DTYPE
    )  # a sum's has no strides: grouped products refuse it

    def ours() -> None:
        with bind({"q_proj": [linear]}, Lora({"q_proj": A}, {"q_proj": B}, 1.0), Segments(lengths)):
            torch.autograd.grad(linear(x), [x, A, B], gradient)

    def plain() -> None:
        torch.autograd.grad(linear(x), [x], gradient)

    kind = "one" if len(lengths) == 1 else "equal" if len(set(lengths)) == 1 else "unequal"
    return Comparison("bound LoRA, R 16", f"{len(lengths)} contexts, {kind}", "the Linear alone", ours, plain, 1.15)


def _loss() -> Comparison:
    """Compare the loss at labels with that of all tokens: 1,024 tokens, 5% labels, the vocabulary of GPT-OSS."""
    hidden = torch.randn(1024, 256, device=DEVICE, dtype=DTYPE, requires_grad=True)
    head = nn.Linear(256, 201_088, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    targets = torch.full((1024,), IGNORE_INDEX, device=DEVICE)
    labelled = torch.arange(20, 1024, 20, device=DEVICE)
    targets[labelled] = labelled

    def at_labels() -> None:
        logits = head(hidden[labelled]).float()
        torch.autograd.grad(F.cross_entropy(logits, targets[labelled]), [hidden])

    def everywhere() -> None:
        torch.autograd.grad(F.cross_entropy(head(hidden).float(), targets), [hidden])

    return Comparison(
        "loss", "1,024 tokens, 51 labels, 201,088 ids", "logits of all tokens", at_labels, everywhere, 1 / 7
    )


def small_base(layers: int = 2, experts: str = "packed", **settings: object) -> PreTrainedModel:
    """Make a random GPT-OSS that a CPU steps in half a second: hidden 256, 8 experts in MXFP4."""
    base_config = GptOssConfig(
        num_hidden_layers=layers,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=4096,
        pad_token_id=None,
    )
    base_config.quantization_config = {"quant_method": "mxfp4"}
    return random_base(base_config, plan_load(_config(expert_weights=experts, **settings), base_config), 0)


def _config(**values: object) -> RunConfig:
    return RunConfig.model_validate(
        {"model_name_or_path": "small", "lora_r": 8, "target_modules": ["q_proj"], **values}
    )


def random_batch(contexts: int, tokens: int, vocabulary: int = 4096) -> PackedBatch:
    """Pack documents and one question for each, of about equal and together `tokens` tokens a side; an eighth is labelled."""
    lengths = [tokens // contexts - (index % 3) for index in range(contexts)]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, length in enumerate(lengths):
        ids = tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())
        labels = (*[IGNORE_INDEX] * (length - length // 8), *ids[-(length // 8) :])
        rows.append(Row(record=index, chunks=(ids,), queries=(Query(input_ids=ids, labels=labels),)))
    return collate(rows).to(DEVICE)


def _hypernetwork(encoder: str) -> Comparison:
    """Compare features → LoRA, forward and backward, with the matrix products of its Linears alone."""
    model = build_model(_config(ctx_encoder_type=encoder), small_base()).to(DEVICE)
    batch = random_batch(4, 1024)
    features = model.features(batch)
    sizes: list[tuple[nn.Linear, Tensor]] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            sizes.append((module, inputs[0].detach()))

    hooks = [module.register_forward_hook(watch) for module in model.hypernet.modules()]
    model.chunk_loras(batch)
    for hook in hooks:
        hook.remove()

    def as_in_a_run() -> torch.autocast:
        return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")

    def ours() -> None:
        with as_in_a_run():
            lora = model.hypernet(features, batch.chunks)
        torch.autograd.grad(sum(x.sum() for x in (*lora.A.values(), *lora.B.values())), parameters, allow_unused=True)

    def products() -> None:
        for module, inputs in sizes:
            with as_in_a_run():
                product = F.linear(inputs, module.weight)
            torch.autograd.grad(product.sum(), [module.weight])

    parameters = list(model.hypernet.parameters())
    return Comparison("hypernetwork", f"{encoder}, 4 × 256 tokens", "its Linears' products alone", ours, products)


def _experts(tokens: int) -> Comparison:
    """Compare packed experts with the same dense ones of transformers."""
    packed, dense = (small_base(1, kind).get_decoder().layers[0].mlp.experts for kind in ("packed", "dequantize"))
    x = torch.randn(tokens, 256, device=DEVICE, dtype=DTYPE, requires_grad=True)
    scores, indices = torch.randn(tokens, 8, device=DEVICE, dtype=DTYPE).softmax(-1).topk(2)

    def of(experts: nn.Module) -> Work:
        return lambda: torch.autograd.grad(experts(x, indices, scores).sum(), [x])

    return Comparison("packed experts", f"8 × 256, {tokens:,} tokens", "the same, dequantized", of(packed), of(dense))


def _step(contexts: int = 4, tokens: int = 1024, layers: int = 2) -> Comparison:
    """Compare loss and gradients of a packed row with what the base alone costs on the same tokens."""
    model, batch, ours = _training(contexts, tokens, layers)

    def at(position_ids: Tensor) -> dict[str, Any]:
        return {
            "position_ids": position_ids,
            "attention_mask": model.attention_mask(position_ids),
            "use_cache": False,
        }

    def plain() -> None:
        with torch.no_grad():
            model.base(batch.ctx_ids, **at(batch.ctx_position_ids), logits_to_keep=1)
        embedded = model.base.get_input_embeddings()(batch.input_ids).requires_grad_()
        logits = model.base(inputs_embeds=embedded, **at(batch.position_ids)).logits
        torch.autograd.grad(logits.sum(), [embedded])

    return Comparison(
        "whole step", f"{contexts} documents, {tokens:,} + {tokens:,} tokens", "the base alone", ours, plain
    )


def _guards() -> Comparison:
    """Compare what a sound step spends on looking at its weights and moments, and on an autopsy's needs, with the step."""
    config = load_config(Path("configs/tiny_gpt_oss.yaml"))
    components = Components(config)
    trainer = Trainer(components.model, components.rows, config)
    parameters = [*trainer.model.hypernet.parameters()]

    def guards() -> None:
        random_state()
        is_spoilt(parameters, trainer.optimizer)

    trainer.step()  # without it there are no moments
    return Comparison("guards of a step", "configs/tiny_gpt_oss.yaml", "the step", guards, trainer.step, 0.01)


def _training(contexts: int, tokens: int, layers: int) -> tuple[DocToLora, PackedBatch, Work]:
    config = _config(gradient_checkpointing=False)
    model, batch = build_model(config, small_base(layers)).to(DEVICE), random_batch(contexts, tokens)
    normalizer = Normalizer.of([batch], config.lora_r)

    def step() -> None:
        batch_loss(model, batch, normalizer, config).total.backward()

    return model, batch, step


def _growth(doubled: str) -> Comparison:
    """Compare a step with one of half the tokens, contexts or layers: 2 is linear."""
    small, large = {"tokens": ((4, 512, 2), (8, 1024, 2)), "contexts": ((4, 1024, 2), (8, 1024, 2))}.get(
        doubled, ((4, 512, 2), (4, 512, 4))
    )
    ours, half = (_training(*shape)[2] for shape in (large, small))
    return Comparison("growth", f"twice the {doubled}", "half of it", ours, half)
