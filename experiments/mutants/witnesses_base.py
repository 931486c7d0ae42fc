"""Witnesses of the frozen base: MXFP4, experts, loading, masks, attention, segments, memory."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import GptOssConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from d2l.base.config import read_base_config, skeleton
from d2l.base.experts import PackedExperts
from d2l.base.files import save_mxfp4
from d2l.base.load import load_base, random_base
from d2l.base.load_plan import plan_load
from d2l.base.masks import attention_layout, packed_masks
from d2l.base.mxfp4 import dequantize, quantize
from d2l.base.segments import Segments
from d2l.base.twin import twin_config
from d2l.config.schema import RunConfig
from d2l.errors import D2LError
from d2l.hypernet.targets import find_targets, target_sizes
from d2l.plan.memory import memory_plan
from d2l.plan.rows import AssumedRows
from d2l.plan.sizes import HOPPER, Model
from experiments.mutants.values import Values
from experiments.mutants.workbench import configurations, llama_config

POSITIONS = torch.tensor([[*range(9), *range(3), *range(14), *range(14)]])


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (D2LError, ValueError, RuntimeError, OSError) as error:
        return type(error).__name__


def mxfp4(values: Values) -> None:
    """Decode every byte under several scales, and encode random, tied, large and tiny weights."""
    every = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.tensor(
        [0, 1, 100, 120, 126, 127, 128, 130, 140, 200, 250, 252, 127, 127, 127, 127], dtype=torch.uint8
    )
    generator = torch.Generator().manual_seed(0)
    weights = torch.cat([torch.randn(6, 64, generator=generator) * 10.0**power for power in (-3, 0, 2)])
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, -0.25, -5.0, 0.0] + [4.0] * 20).view(1, 32)
    blocks, codes = quantize(torch.cat([weights.view(-1, 32), ties, torch.zeros(1, 32)]))
    values |= {"blocks": blocks, "scales": codes}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values[f"decoded {dtype}"] = torch.log2(dequantize(every, scales, dtype).double().abs() + 1e-40)
        values[f"signs {dtype}"] = dequantize(every, scales, dtype).sign()
        values[f"round trip {dtype}"] = dequantize(blocks, codes, dtype)


def gpt_oss(expert_weights: str = "packed", **changes: Any) -> tuple[PreTrainedConfig, Any]:
    """Return the tiny GPT-OSS's config and a plan for it on the CPU."""
    base_config = read_base_config("configs/models/tiny_gpt_oss")
    config = RunConfig(expert_weights=expert_weights, **changes)
    return base_config, plan_load(config, base_config, device="cpu")


def experts(values: Values) -> None:
    """Run packed experts on large inputs, so that the clamp acts, and take their gradients."""
    base_config, plan = gpt_oss()
    base = random_base(base_config, plan, seed=0)
    module = next(it for it in base.modules() if isinstance(it, PackedExperts))
    generator = torch.Generator().manual_seed(1)
    for size in (0.3, 20.0):
        hidden = (size * torch.randn(7, 64, generator=generator)).requires_grad_()
        routed = torch.rand(7, 4, generator=generator).requires_grad_()
        index = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(7)])
        output = module(hidden, index, routed)
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        values |= {f"{size} output": output.detach(), f"{size} hidden": hidden.grad, f"{size} routed": routed.grad}
    values["frozen"] = [p.requires_grad for p in module.parameters()]


def grouped(values: Values) -> None:
    """Run the same experts a layer at once, in one slice and in several, and one token or two, as answers have them."""
    base_config, plan = gpt_oss()
    for transient in (2**17, 2**30):
        at_once = replace(plan.expert_products, value="grouped")
        base = random_base(
            base_config, replace(plan, expert_products=at_once, expert_transient_bytes=transient), seed=0
        )
        module = next(it for it in base.modules() if isinstance(it, PackedExperts))
        generator = torch.Generator().manual_seed(1)
        hidden = (20 * torch.randn(7, 64, generator=generator)).requires_grad_()
        routed = torch.rand(7, 4, generator=generator).requires_grad_()
        index = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(7)])
        output = module(hidden, index, routed)
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        found = {"output": output.detach(), "hidden": hidden.grad, "routed": routed.grad}
        with torch.no_grad():
            found["alone"] = module(hidden[:1], index[:1], routed[:1])
            found["two"] = module(hidden[:2], index[:2, :3], routed[:2, :3])
        values |= {f"{transient} {name}": value for name, value in found.items()}


def _logits(base: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        masks = packed_masks(base, POSITIONS)
        return base(input_ids=ids, position_ids=POSITIONS, attention_mask=masks, use_cache=False).logits[0]


def load(values: Values) -> None:
    """Write a GPT-OSS as an official checkpoint and load it packed and dequantized; plans, freezing, refusals."""
    ids = torch.randint(0, 1000, POSITIONS.shape, generator=torch.Generator().manual_seed(2))
    base_config, plan = gpt_oss()
    base = random_base(base_config, plan, seed=0)
    values["random"] = _logits(base, ids)
    values["same seed"] = torch.equal(_logits(random_base(base_config, plan, seed=0), ids), values["random"])
    values["noise"] = [float(p.std()) > 0 for p in base.parameters()]
    with tempfile.TemporaryDirectory() as name:
        save_mxfp4(base, Path(name))
        values["names"] = sorted(load_file(Path(name) / "model.safetensors"))
        for held in ("packed", "dequantize"):
            _, other = gpt_oss(held)
            read = load_base(name, read_base_config(name), other, seed=0)
            values |= {f"{held} logits": _logits(read, ids), f"{held} state": _state(read)}
        tensors = load_file(Path(name) / "model.safetensors")
        values["incomplete"] = [outcome(lambda held=held: _incomplete(tensors, name, held)) for held in ("packed",)]
    for held in ("dequantize", "native", "auto"):
        values[f"{held} random"] = _logits(random_base(base_config, gpt_oss(held)[1], seed=0), ids)
    values["plans"] = _plans()
    with torch.random.fork_rng():
        values["llama"] = _llama(ids)


def _incomplete(tensors: dict[str, Tensor], name: str, held: str) -> str:
    """Load a checkpoint that lacks a tensor."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        rest = {key: value for key, value in tensors.items() if not key.endswith("layers.1.self_attn.sinks")}
        save_file(rest, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text((Path(name) / "config.json").read_text())
        load_base(folder, read_base_config(folder), gpt_oss(held)[1], seed=0)
    return "accepted"


def _state(base: PreTrainedModel) -> list[Any]:
    dtypes = sorted({str(p.dtype) for p in base.parameters()})
    dropout = [value for key, value in sorted(vars(base.config).items()) if "dropout" in key]
    return [base.training, sum(p.requires_grad for p in base.parameters()), base.config.use_cache, dtypes, dropout]


def _plans() -> list[Any]:
    """Return the plans of every request."""
    base_config, _ = gpt_oss()
    llama = read_base_config(llama_config().model_name_or_path)
    plans = [
        plan_load(RunConfig(expert_weights=held, quantize_ctx_encoder=twice), each, device="cpu")
        for each in (base_config, llama)
        for held in ("auto", "packed", "dequantize", "native")
        for twice in (False, True)
    ]
    chosen = [[getattr(it, "value", it) for it in vars(plan).values()] for plan in plans]
    native = outcome(lambda: load_base("configs/models/tiny_gpt_oss", base_config, gpt_oss("native")[1], 0).training)
    twice = plan_load(RunConfig(quantize_ctx_encoder=True), base_config, device="cpu")
    return [chosen, native, outcome(lambda: load_base("configs/models/tiny_gpt_oss", base_config, twice, 0).training)]


def _llama(ids: Tensor) -> list[Any]:
    """Load a tied Llama from a folder of transformers."""
    base_config = read_base_config(llama_config().model_name_or_path)
    plan = plan_load(llama_config(), base_config, device="cpu")
    base = random_base(base_config, plan, seed=3)
    with tempfile.TemporaryDirectory() as name:
        base.save_pretrained(name)
        read = load_base(name, read_base_config(name), plan, seed=0)
        path = read.name_or_path == name
    return [_logits(base, ids).tolist(), _logits(read, ids).tolist(), _state(base), _state(read), path]


def masks(values: Values) -> None:
    """Make the masks of packed rows for all kinds of layers and attention, and run the models under them."""
    ids = torch.randint(0, 100, POSITIONS.shape, generator=torch.Generator().manual_seed(2))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "initializer_range": 0.2}
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    gpt = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    bases = {"gpt_oss": GptOssConfig(**sizes, **gpt), "llama": LlamaConfig(**sizes)}
    for name, base_config in bases.items():
        for attention in ("eager", "per_document", "packed_flex", *(["sdpa"] if name == "llama" else [])):
            plan = plan_load(RunConfig(attn_implementation=attention), base_config, device="cpu")
            base = random_base(base_config, plan, seed=0)
            values[f"{name} {attention} logits"] = _logits(base, ids)
            made = packed_masks(base, POSITIONS)
            for kind, mask in (made if isinstance(made, dict) else {"all": made}).items():
                shown = mask.to_dense() if isinstance(mask, BlockMask) else mask
                values[f"{name} {attention} {kind}"] = None if shown is None else shown.double().clamp(min=-9)
        values[f"{name} layout"] = [
            list(attention_layout(base_config).layer_types),
            attention_layout(base_config).window,
        ]
    segments = Segments.from_position_ids(POSITIONS)
    padded, keys = Segments((3, 0, 5)).pad(torch.arange(32.0).view(2, 8, 2))
    values |= {"lengths": list(segments.lengths), "grid": segments.grid(torch.device("cpu")), "padded": padded}
    values |= {"keys": keys, "joined": list(segments.joined([1, 3]).lengths)}
    for name, base_config in bases.items():
        values[f"{name} twin"] = str(sorted(twin_config(base_config).to_dict().items()))
    targets = find_targets(random_base(bases["llama"], plan, seed=0), ["q_proj", "down_proj", "mlp"])
    values["sizes"] = target_sizes(targets, 32)
    missing = (["experts"], ["q_proj", "no_proj"], ["gate_up_proj"])
    values["targets"] = [outcome(lambda n=n: len(find_targets(skeleton(bases["gpt_oss"]), n))) for n in missing]


def memory(values: Values) -> None:
    """Compute the bytes of every run."""
    for name, config in configurations().items():
        model = Model(read_base_config(config.model_name_or_path), "cuda", HOPPER)
        for checkpointing in (False, True):
            changed = RunConfig(**config.model_dump() | {"gradient_checkpointing": checkpointing})
            made = memory_plan(model.sizes(changed), AssumedRows().shapes(changed))
            values[f"{name} {checkpointing}"] = {it.name: [it.loading, it.peak, it.steady] for it in made.components}
