"""Adapters have a rank that our servers load.

What it does
------------
Compares `lora_r` with the `--max-lora-rank` of our servers.

Why it matters
--------------
They refuse adapters of a higher rank, after the training.

How it is detected
------------------
By the number alone: our documents are one chunk long, and the bias has the rank once more.

How to fix
----------
Lower `lora_r`.
"""

from checks.faults import configure
from checks.result import Fail, Pass
from checks.rule import Fault, Rule

SERVED = 64


def check(subject):
    config = subject.config
    rank = config.lora_r * (1 + config.use_bias)
    evidence = {"rank": rank, "served": SERVED}
    if rank <= SERVED:
        return Pass(f"rank {rank}, and our servers load {SERVED}", evidence)
    lower = SERVED // (1 + config.use_bias)
    return Fail(
        message=f"adapters have rank {rank}",
        expected=f"at most {SERVED}",
        actual=f"lora_r {config.lora_r}, bias {config.use_bias}",
        remedy=f"set lora_r to {lower} or less",
        evidence=evidence,
        settings={"lora_r": lower},
    )


RULE = Rule(
    code="TEM101",
    name="rank-above-ours",
    stage="static",
    severity="error",
    sources=("https://docs.vllm.ai/en/stable/features/lora/",),
    check=check,
    faults=(Fault("rank-128", "a rank of 128", configure(lora_r=128)),),
)
