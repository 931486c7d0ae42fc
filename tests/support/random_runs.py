"""Random runs for the fuzz: a base of any family and shape, and settings over all that a check can react to.

A seed is a run. Left out are only settings that a check refuses by design: `per_rank_gen: false`, `use_reentrant: true`,
`quantize_ctx_encoder`, `expert_weights: native`, attention that cannot train the model, and an exit outside the base.
"""

from dataclasses import replace
from functools import cache, lru_cache
from math import log
from random import Random
from typing import Any

from transformers import PreTrainedConfig

from checks.faults import override
from checks.production import make_subject
from checks.subject import Subject, changed
from d2l.config.load import load_config
from d2l.data.records import Record
from d2l.data.tokenize import Query
from support.families import BASES
from support.sizes import MXFP4, NO_SPECIAL_TOKENS

# Bytes enough, so that the checks of stage `device` run whatever this machine has.
CLEAN = override(gpu=lambda healthy: "cpu", free_memory=lambda healthy: 2**60, free_disk=lambda healthy, config: 2**60)(
    make_subject(load_config())
)
OTHERS = sorted(BASES.keys() - {"gpt_oss"})
SCHEDULES = ("cosine_with_min_lr", "constant_with_warmup", "linear", "warmup_stable_decay")
ENCODERS = ("embed_only", "per_layer_activations", "early_exit", "concat_layers")
NO_SDPA = ("gpt_oss", "gemma2")  # sinks, soft caps
CHECKPOINTING = ({}, {"use_reentrant": False}, {"use_reentrant": False, "preserve_rng_state": False})


@lru_cache(maxsize=32)  # each keeps the twins that checks made of it, 30 MB
def random_subject(seed: int) -> Subject:
    """The run of a seed: every second one on GPT-OSS, the others on the other families."""
    draw = Random(seed)
    family = draw.choice(["gpt_oss", draw.choice(OTHERS)])
    base_config = random_base_config(draw, family)
    values = _hypernetwork(draw, family, base_config.num_hidden_layers) | _optimization(draw) | _loading(draw, family)
    values |= {"chunking": draw.choice(["equal", "sentences"]), "chunk_overlap": draw.choice([0, draw.randint(1, 64)])}
    config = changed(CLEAN.config, **values)
    records = taught_records(config.supervision) if config.needs_teacher else CLEAN.records
    return replace(CLEAN, name=f"seed {seed}", config=config, base_config=base_config, records=records)


def described(drawn: Subject) -> str:
    """What is random about it."""
    config = {name: value for name, value in drawn.config if value != getattr(CLEAN.config, name)}
    return f"{drawn.name}: {config} on {drawn.base_config.to_diff_dict()}"


@cache
def taught_records(supervision: str) -> tuple[Record, ...]:
    """The records of the embedded run with a teacher that names two tokens for every label, as the KL loss needs them."""
    subject = replace(CLEAN, config=changed(CLEAN.config, supervision=supervision))
    assert subject.records is not None
    queries: dict[int, list[Query]] = {}
    for row in subject.rows.rows:
        queries.setdefault(row.record, []).extend(row.queries)
    taught = []
    for index, record in enumerate(subject.records):
        labels = [[label for label in query.labels if label != -100] for query in queries[index]]
        taught.append(
            replace(
                record,
                logprobs_vals=tuple(tuple((-0.7, -1.2) for _ in answer) for answer in labels),
                logprobs_indices=tuple(tuple((label, 0) for label in answer) for answer in labels),
            )
        )
    return tuple(taught)


def random_base_config(draw: Random, family: str) -> PreTrainedConfig:
    """A base of any shape: depth, order of layer types, heads and any divisor of them, head size, experts, window."""
    base = BASES[family]
    layers, heads = draw.randint(2, 6), draw.randint(1, 64)
    share = 32 * draw.randint(1, 4)  # of the hidden size, for each head
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": heads * share,
        "intermediate_size": 32 * draw.randint(2, 90),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([count for count in range(1, heads + 1) if heads % count == 0]),
        "head_dim": draw.choice([share, 16, 64, 128, 256]),
        "vocab_size": draw.randint(300, 5000),
        "attention_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if "layer_types" in base.settings:
        types = draw.choices(["sliding_attention", "full_attention"], k=layers)
        sizes |= {"layer_types": types, "sliding_window": draw.randint(4, 512)}
    if "num_local_experts" in base.settings:
        top_k = draw.randint(1, 4)
        sizes |= {"num_experts_per_tok": top_k, "num_local_experts": top_k + draw.randint(1, 28)}
        sizes |= {"moe_intermediate_size": 32 * draw.randint(2, 90)} if "moe_intermediate_size" in base.settings else {}
        sizes |= MXFP4 if family == "gpt_oss" and draw.random() < 0.5 else {}
    return base.config(**base.settings | NO_SPECIAL_TOKENS | sizes)


def _hypernetwork(draw: Random, family: str, layers: int) -> dict[str, Any]:
    """The encoder, the Perceiver, the heads and their targets: any of the family's Linears, and the MLP block."""
    names = [*BASES[family].linears, "mlp"]
    encoder = draw.choice(ENCODERS)
    return {
        "ctx_encoder_type": encoder,
        "layer_idx": draw.choice([None, draw.randrange(layers)]) if encoder == "early_exit" else None,
        "target_modules": tuple(draw.sample(names, draw.randint(1, len(names)))),
        "lora_r": draw.randint(1, 64),
        "latent_size": draw.choice([8, 64, 512]),
        "n_latent_queries": draw.randint(1, 208),
        "perceiver_heads": draw.choice([4, 8, 16]),
        "perceiver_head_dim": draw.choice([8, 16, 64, 128]),
        "perceiver_query_scale": _between(draw, 0.1, 10),
        "num_blocks": draw.randint(1, 3),
        "num_self_attn_per_block": draw.randint(0, 2),
        "shared_weights": draw.random() < 0.5,
        "num_pre_head_layers": draw.randint(0, 2),
        "per_layer_processing": draw.random() < 0.5,
        "use_bias": draw.random() < 0.5,
    }


def _optimization(draw: Random) -> dict[str, Any]:
    """The loss, the optimizer and a schedule whose warm-up and decay lie within the run."""
    steps = round(_between(draw, 1, 80_000))
    warmup = draw.choice([0, draw.randint(0, steps)])
    learning_rate = _between(draw, 1e-6, 1e-2)
    return {
        "loss": draw.choice(["ce", "kl"]),
        "use_per_ctx_average_loss": draw.random() < 0.5,
        "gen_lora_l1_reg_coef": draw.choice([0.0, _between(draw, 1e-4, 10)]),
        "learning_rate": learning_rate,
        "muon_learning_rate": draw.choice([None, _between(draw, 1e-6, 1e-2)]),
        "min_lr": draw.choice([0.0, learning_rate / 10]),
        "weight_decay": draw.choice([0.0, draw.uniform(0, 0.3)]),
        "adam_beta1": draw.choice([0.0, 0.8, 0.9, 0.95]),
        "adam_beta2": draw.choice([0.9, 0.95, 0.99, 0.999]),
        "adam_epsilon": draw.choice([1e-10, 1e-8, 1e-6]),
        "max_grad_norm": _between(draw, 0.01, 100),
        "lr_scheduler_type": draw.choice(SCHEDULES),
        "max_steps": steps,
        "warmup_steps": warmup,
        "decay_steps": draw.randint(0, steps - warmup),
        "gradient_accumulation_steps": draw.randint(1, 4),
        "seed": draw.randrange(2**32),
    }


def _loading(draw: Random, family: str) -> dict[str, Any]:
    """How the base is held, and how long packed rows are."""
    return {
        "attn_implementation": draw.choice(
            ["auto", "eager", "per_document", "packed_flex", *(["sdpa"] if family not in NO_SDPA else [])]
        ),
        "dtype": draw.choice(["auto", "float32", "bfloat16"]),
        "expert_weights": draw.choice(["auto", "packed", "dequantize"]),
        "gradient_checkpointing": draw.random() < 0.5,
        "gradient_checkpointing_kwargs": draw.choice(CHECKPOINTING),
        "supervision": draw.choice(["content", "sampled"]),
        "max_packed_inp_len": max(80, draw.randint(64, 16384)),  # questions of the embedded run have up to 72 tokens
        "max_packed_ctx_len": max(110, draw.randint(64, 32768)),  # and documents up to 100
    }


def _between(draw: Random, low: float, high: float) -> float:
    """A number whose logarithm is uniform."""
    return min(high, max(low, 2 ** draw.uniform(log(low, 2), log(high, 2))))
