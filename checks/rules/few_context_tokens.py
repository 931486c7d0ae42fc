"""A step reads about as many document tokens as it takes to learn from documents.

What it does
------------
Computes how many document tokens an optimizer step can read at most: `max_packed_ctx_len` times
`gradient_accumulation_steps` times the processes that were started.

Why it matters
--------------
The paper trained with more than 200,000 document tokens in each step. A fork on GPT-OSS had at most 34,000 (3,072 times 11)
and settled early, at a poor point. Nothing looks wrong then: the loss falls, and stays.

How it is detected
------------------
Below 40,000, a fifth of the paper's, this warns. Generated needles are not judged: their documents have some ten tokens each,
and tiny models learn them from a few hundred tokens a step. `d2l plan` counts what the run's own documents fill.

How to fix
----------
Raise `gradient_accumulation_steps`, which takes time and no memory; or `max_packed_ctx_len`, or the number of processes.
"""

import math
from typing import TYPE_CHECKING

from checks.faults import configure
from checks.machine import started_processes
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

PAPER = 200_000  # arXiv 2602.15902, appendix B
LEAST = PAPER // 5
NEEDLES = ("needle",)  # generated, not read


def check(subject: "Subject") -> Result:
    """Compare the most document tokens of a step with the paper's."""
    config = subject.config
    processes = started_processes()
    micro_batches = config.gradient_accumulation_steps * processes
    tokens = config.max_packed_ctx_len * micro_batches
    text = f"at most {tokens:,} document tokens a step; the paper had over {PAPER:,}"
    evidence = {"context_tokens_per_step": tokens, "paper": PAPER, "processes": processes}
    if config.train_ds_names == NEEDLES:
        return Pass(f"{text}, and generated needles are not judged", evidence)
    if tokens < LEAST:
        wanted = config.gradient_accumulation_steps * math.ceil(PAPER / tokens)
        return Fail(
            message=f"a step reads few document tokens: {tokens / PAPER:.1%} of the paper's",
            expected=f"{LEAST:,} or more; the paper had over {PAPER:,}",
            actual=f"max_packed_ctx_len {config.max_packed_ctx_len:,} x gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} x {processes} process{'es' if processes > 1 else ''} = {tokens:,}",
            remedy=f"set gradient_accumulation_steps up to {wanted}, or raise max_packed_ctx_len or the number of processes",
            evidence=evidence,
        )
    return Pass(text, evidence)


RULE = Rule(
    code="CTX101",
    name="few-context-tokens",
    stage="static",
    severity="warning",
    sources=("failure mode C17", "https://arxiv.org/abs/2602.15902"),
    check=check,
    faults=(
        Fault(
            "one-short-row",
            "a step of one row of 1,024 document tokens, of documents that are not all generated",
            configure(
                train_ds_names=(*NEEDLES, "documents.jsonl"),
                curriculum=(),
                max_packed_ctx_len=1024,
                gradient_accumulation_steps=1,
            ),
        ),
    ),
)
