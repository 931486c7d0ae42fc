"""Adapters have a rank that servers load.

What it does
------------
Computes the rank of the adapter that the run's longest document would get: `lora_r` for each chunk, and once more for the
bias.

Why it matters
--------------
Chunks stand side by side along the rank, so that a document of many chunks has an adapter of a high rank. vLLM takes ranks
of 1, 8, 16, 32, 64, 128, 256, 320 and 512 as its `--max-lora-rank`, and nothing above. A hypernetwork that was trained for
weeks then makes adapters that have to be compressed, with an error, before anybody can serve them.

How it is detected
------------------
The most chunks are `max_ctx_chunk_num`, or as many as `max_ctx_len` fills. Without either the report says how many chunks can
be served. A warning: PEFT loads any rank.

How to fix
----------
Fewer, longer chunks (`max_ctx_chunk_len`), or a lower `lora_r`.
"""

import math
from typing import TYPE_CHECKING

from checks.faults import configure
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.config.schema import RunConfig

SERVED = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm, config/lora.py: MaxLoRARanks


def check(subject: "Subject") -> Result:
    """Compare the rank of the longest document with the highest that is served."""
    config = subject.config
    chunks = _most_chunks(config)
    bias = int(config.use_bias)
    most = SERVED[-1] // config.lora_r - bias
    evidence = {"lora_r": config.lora_r, "most chunks": chunks, "chunks that can be served": max(0, most)}
    wanted = chunks or 1
    rank = config.lora_r * (wanted + bias)
    if rank > SERVED[-1]:
        return Fail(
            message=f"an adapter of {wanted} chunk{'s' if wanted > 1 else ''} has rank {rank:,}, which no server loads",
            expected=f"at most {SERVED[-1]}",
            actual=f"lora_r {config.lora_r} x ({wanted} chunks{' + the bias' if bias else ''})",
            remedy=f"allow at most {most} chunks (longer ones: max_ctx_chunk_len), or lower lora_r"
            if most > 0
            else f"set lora_r to {SERVED[-1] // (1 + bias)} or less",
            evidence=evidence,
        )
    if chunks is None:
        return Pass(f"adapters of up to {most} chunks have a rank that is served, {SERVED[-1]} at most", evidence)
    served = next(it for it in SERVED if it >= rank)
    return Pass(f"rank {rank} at most, to be served with --max-lora-rank {served}", evidence)


def _most_chunks(config: "RunConfig") -> int | None:
    """Return the most chunks that a document may have; None where nothing limits them."""
    if config.max_ctx_chunk_len <= 0:
        return 1
    if config.max_ctx_chunk_num is not None:
        return config.max_ctx_chunk_num
    return math.ceil(config.max_ctx_len / config.max_ctx_chunk_len) if config.max_ctx_len > 0 else None


RULE = Rule(
    code="EXP202",
    name="rank-not-servable",
    stage="static",
    severity="warning",
    sources=(
        "failure mode C36",
        "https://github.com/vllm-project/vllm/blob/a78dc92f43ae2471dd40675a47079aa1a9a157c1/vllm/config/lora.py",
    ),
    check=check,
    faults=(
        Fault(
            "many-chunks",
            "documents of up to 600 chunks",
            configure(max_ctx_chunk_len=4096, max_ctx_chunk_num=600, max_ctx_len=-1),
        ),
    ),
)
