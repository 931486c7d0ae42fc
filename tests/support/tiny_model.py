"""A model small enough to take a step in milliseconds, on a GPT-OSS or Llama of four narrow layers, and random rows."""

import random
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.config.schema import RunConfig
from d2l.data.packing import PackedBatch, collate
from d2l.data.tokenize import IGNORE_INDEX, Query, Row
from d2l.hypernet.model import DocToLora
from support.families import BASES
from support.sizes import HYPERNETWORK, MXFP4, VOCABULARY


def run_config(**changes: Any) -> RunConfig:
    """A learning rate of 0.01 without warmup, and two micro-batches of `random_rows` to a step."""
    values: dict[str, Any] = {
        **HYPERNETWORK,
        "target_modules": ("q_proj", "o_proj"),
        "ctx_encoder_type": "per_layer_activations",
        "max_packed_inp_len": 30,
        "max_packed_ctx_len": 40,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "gradient_accumulation_steps": 2,
        "gen_lora_l1_reg_coef": 0.1,
        "max_steps": 4,
        "save_steps": 2,
        "seed": 0,
    }
    return RunConfig(**values | changes)


def base_config(family: str = "gpt_oss", **changes: Any) -> PreTrainedConfig:
    """A config of `support.families.BASES`; GPT-OSS holds its experts in MXFP4."""
    return BASES[family].tiny(**(MXFP4 if family == "gpt_oss" else {}) | changes)


def tiny_base(config: RunConfig | None = None, family: str = "gpt_oss", **changes: Any) -> PreTrainedModel:
    """A random base of `base_config`, loaded by the run's plan on the CPU."""
    settings = base_config(family, **changes)
    return random_base(settings, plan_load(config or run_config(), settings, device="cpu"), seed=0)


def tiny_model(config: RunConfig, family: str = "gpt_oss", *, nonzero: bool = True, **changes: Any) -> DocToLora:
    """The whole model.

    Args:
        nonzero: with `scaler_B` and the bias's B off their zeros, so that LoRAs are not zero and every gradient counts.
        changes: of the base's config.
    """
    return around_base(tiny_base(config, family, **changes), config, nonzero=nonzero)


def around_base(base: PreTrainedModel, config: RunConfig, *, nonzero: bool = True) -> DocToLora:
    """The whole model around a base, as `tiny_model` makes it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(config.seed)
        model = DocToLora(base, config)
        for name, parameter in model.hypernet.named_parameters():
            if nonzero and name.startswith(("scaler_B", "bias_B")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_rows(count: int = 6, seed: int = 0, top_k: int | None = None) -> list[Row]:
    """Rows of 1 to 3 chunks and 1 or 2 queries, each with two supervised tokens, and a teacher's `top_k` if wanted."""
    generator = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(VOCABULARY) for _ in range(length))

    def query() -> Query:
        tokens = ids(generator.randint(5, 9))
        supervised = {generator.randrange(1, len(tokens) - 2), len(tokens) - 1}
        labels = tuple(token if place in supervised else IGNORE_INDEX for place, token in enumerate(tokens))
        if top_k is None:
            return Query(tokens, labels)
        logprobs = tuple(tuple(-generator.uniform(2, 4) for _ in range(top_k)) for _ in supervised)
        return Query(
            tokens, labels, logprobs, tuple(tuple(generator.sample(range(VOCABULARY), top_k)) for _ in supervised)
        )

    return [
        Row(
            record=index,
            chunks=tuple(ids(generator.randint(4, 8)) for _ in range(1 + index % 3)),
            queries=tuple(query() for _ in range(generator.randint(1, 2))),
        )
        for index in range(count)
    ]


def random_batch(count: int = 3, seed: int = 0) -> PackedBatch:
    """`random_rows` in one packed row, on the CPU."""
    return collate(random_rows(count, seed))
