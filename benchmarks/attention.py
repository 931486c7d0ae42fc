"""Benchmark of attention per document against eager attention over the packed row: forward and backward of one layer.

python benchmarks/attention.py
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from d2l.base.attention import PER_DOCUMENT
from d2l.base.masks import packed_masks

CASES = ((1024, 1024), (1024, 128), (1024, 16), (4096, 1024), (4096, 128))  # tokens of a row and of each document
REPEATS = 5


def make_layer(implementation: str) -> GptOssForCausalLM:
    """Make one full-attention layer with heads as in GPT-OSS and two small experts."""
    config = GptOssConfig(
        num_hidden_layers=1,
        layer_types=["full_attention"],
        hidden_size=512,
        intermediate_size=64,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        vocab_size=64,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM._from_config(config, attn_implementation=implementation)
    model.set_experts_implementation("eager")
    return model


def make_step(model: GptOssForCausalLM, ids: Tensor, positions: Tensor) -> Callable[[], None]:
    """Make a function that runs forward and backward over a packed row [1, T]."""

    def run() -> None:
        masks = packed_masks(model, positions)
        model(input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False).logits.mean().backward()

    return run


def measure(run: Callable[[], None]) -> float:
    """Return the median CPU time of some calls, in seconds."""
    run()
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return statistics.median(times)


def main() -> None:
    """Print both times and their ratio for every case."""
    torch.set_num_threads(1)
    models = {name: make_layer(name) for name in ("eager", PER_DOCUMENT)}
    sys.stdout.write(f"{'row':>6}{'document':>10}{'eager':>10}{PER_DOCUMENT:>14}{'ratio':>8}\n")
    for tokens, document in CASES:
        ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(0))
        positions = (torch.arange(tokens) % document)[None]
        eager, own = (measure(make_step(model, ids, positions)) for model in models.values())
        sys.stdout.write(f"{tokens:>6}{document:>10}{eager:>9.3f}s{own:>13.3f}s{eager / own:>8.2f}\n")


if __name__ == "__main__":
    main()
