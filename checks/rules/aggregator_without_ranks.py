"""Every rank of a generated LoRA is generated, and the ranks differ.

What it does
------------
Generates the LoRAs of packed documents on the tiny twin and looks at their shapes and rows.

Why it matters
--------------
With `per_rank_gen: false`, the default of the reference's code, the aggregator drops the rank dimension. The head then
fails with `einsum(): the number of subscripts in the equation (5) does not match the number of dimensions (4)`. Worse,
an output with a rank dimension of one passes the head and is broadcast: every rank of the adapter is the same, a LoRA of
rank 8 has the strength of rank 1, and nothing is reported.

How it is detected
------------------
A LoRA must come out, with `lora_r` rows for every chunk in every layer and target, and no row of a chunk's A may equal
its first one.

How to fix
----------
Set `per_rank_gen: true` (and `per_layer_processing: true`, as published).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import configure, override
from checks.implementation import Implementation, Model
from checks.probes import probe_batch
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from d2l.errors import D2LError

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "set per_rank_gen: true"


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Look at the shapes of the LoRAs, then at the smallest distance of a row from the first."""
    config = subject.twin_config
    settings = {} if config.per_rank_gen else {"per_rank_gen": True}
    try:
        lora = subject.twin().lora(probe_batch(subject))
    except (D2LError, RuntimeError, ValueError) as error:
        if config.per_rank_gen and isinstance(error, D2LError):
            raise  # it is not about ranks: the runner says what the run would say
        return Fail(
            message="no LoRA comes out of the hypernetwork",
            expected=f"A and B for {', '.join(config.target_modules)}, {config.lora_r} rows for every chunk",
            actual=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            remedy=REMEDY,
            settings=settings,
        )
    expected = f"[contexts, {subject.twin_base_config.num_hidden_layers} layers, {config.lora_r} or more rows, inputs]"
    shapes = {name: list(a.shape) for name, a in lora.A.items()}
    rows = {name: a[:, :, : config.lora_r] for name, a in lora.A.items()}
    evidence: dict[str, Any] = {"shapes": shapes}
    if set(rows) != set(config.target_modules) or any(x.ndim != 4 or x.shape[2] < config.lora_r for x in rows.values()):
        return Fail(
            message="the generated LoRA has lost its ranks",
            expected=expected,
            actual=str(shapes),
            remedy=REMEDY,
            evidence=evidence,
            settings=settings,
        )
    if config.lora_r == 1:
        return Pass(f"A has the shape {expected}; there is one rank", evidence)
    distances = [((x[:, :, 1:] - x[:, :, :1]).norm(dim=-1) / x[:, :, :1].norm(dim=-1)).min() for x in rows.values()]
    evidence["smallest_distance_of_ranks"] = smallest = float(torch.stack(distances).min())
    if not smallest > 1e-3:
        return Fail(
            message="the ranks of a generated adapter are copies of each other",
            expected="every rank further than 1e-3 from the first (relative)",
            actual=f"{smallest:.2g}",
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(f"A has the shape {expected}; ranks differ by {smallest:.2g} or more", evidence)


def _broadcast_rank(healthy: Implementation, base: Any, config: Any) -> Model:
    """Generate one rank of every chunk, and stretch it to all."""
    model: Any = healthy.build(base, config)
    generate = model.lora

    def stretched(batch: Any) -> Any:
        lora = generate(batch)
        A, B = ({name: _first_row(x, config.lora_r) for name, x in side.items()} for side in (lora.A, lora.B))
        return replace(lora, A=A, B=B)

    model.lora = stretched
    return model


def _first_row(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Replace each row of [n, L, R, d] by the first of its block of `rank` rows."""
    return rows.unflatten(2, (-1, rank))[:, :, :, :1].expand(-1, -1, -1, rank, -1).flatten(2, 3)


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
