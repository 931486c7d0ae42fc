"""The aggregator gives one latent for each rank, and the ranks differ.

What it does
------------
Runs the aggregator of the tiny twin on packed documents and looks at the shape and content of its output.

Why it matters
--------------
With `per_rank_gen: false`, the default of the reference's code, the aggregator drops the rank dimension. The head then
fails with `einsum(): the number of subscripts in the equation (5) does not match the number of dimensions (4)`. Worse,
an output with a rank dimension of one passes the head and is broadcast: every rank of the adapter is the same, a LoRA of
rank 8 has the strength of rank 1, and nothing is reported.

How it is detected
------------------
The output must have five dimensions (chunks, layers, modules, rank, latent) of the configured sizes, and no rank may
equal the first one.

How to fix
----------
Set `per_rank_gen: true` (and `per_layer_processing: true`, as published).
"""

from typing import TYPE_CHECKING, Any

import torch

from checks.faults import configure, override
from checks.probes import probe_batch
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import Implementation, Model

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "set per_rank_gen: true"


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Look at the shape of the latents, then at the smallest distance of a rank from the first."""
    config = subject.twin_config
    latents = subject.twin().latents(probe_batch(subject))
    expected = f"[chunks, layers, {len(config.target_modules)}, {config.lora_r}, latent]"
    if latents.ndim != 5 or latents.shape[2:4] != (len(config.target_modules), config.lora_r):
        return Fail(
            message="the aggregator's output has lost its ranks",
            expected=expected,
            actual=str(list(latents.shape)),
            remedy=REMEDY,
            evidence={"rank": latents.ndim},
        )
    if config.lora_r == 1:
        return Pass(f"latents have the shape {expected}; there is one rank")
    distances = (latents[..., 1:, :] - latents[..., :1, :]).norm(dim=-1) / latents[..., :1, :].norm(dim=-1)
    smallest = float(distances.min())
    evidence = {"smallest_distance_of_ranks": smallest, "shape": list(latents.shape)}
    if not smallest > 1e-3:
        return Fail(
            message="the ranks of a generated adapter are copies of each other",
            expected="every rank further than 1e-3 from the first (relative)",
            actual=f"{smallest:.2g}",
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(f"latents have the shape {expected}; ranks differ by {smallest:.2g} or more", evidence)


def _broadcast_rank(healthy: Implementation, base: Any, config: Any) -> Model:
    """Let the aggregator generate one rank, and stretch it to all."""
    model: Any = healthy.build(base, config)

    def stretch(module: Any, inputs: Any, latents: Any) -> Any:
        return latents[..., :1, :].expand_as(latents)

    model.hypernet.aggregator.register_forward_hook(stretch)
    return model


def _one_rank(subject: "Subject") -> str:
    return "there is one rank" if subject.twin_config.lora_r == 1 else ""


RULE = Rule(
    code="HYP201",
    name="aggregator-without-ranks",
    stage="twin",
    severity="error",
    sources=("fix 5", "failure mode F5"),
    requires=("QNT101", "ATT101", "TGT101"),
    check=check,
    faults=(
        Fault("per-rank-gen-off", "per_rank_gen: false, the default of the reference", configure(per_rank_gen=False)),
        Fault(
            "rank-broadcast",
            "one rank is generated and stretched to all",
            override(build=_broadcast_rank, unless=_one_rank),
        ),
    ),
)
