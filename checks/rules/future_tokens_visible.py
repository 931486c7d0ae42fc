"""No token sees a later one.

What it does
------------
Changes the last token of a question on the tiny twin and looks at the logits before it.

Why it matters
--------------
A custom attention function registered without a mask function gets no mask at all, and every token then reads the
answer that it is to predict: the training loss falls to nearly nothing, and the model is useless when it has to write.

How it is detected
------------------
Logits before the changed token must not move, to 1e-4 of the largest value.

How to fix
----------
Use an attention implementation that honours masks (`attn_implementation: auto`), and pass masks in which j <= i.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.probes import TOLERANCE, alone, difference, probe_rows
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from d2l.base.segments import segment_starts

if TYPE_CHECKING:
    from checks.subject import Subject


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Measure the change of the logits before an edited last token."""
    model = subject.twin()
    batch = alone(probe_rows(subject))[0]
    lora = model.lora(batch)
    input_ids = batch.input_ids.clone()
    input_ids[0, -1] = (input_ids[0, -1] + 1) % subject.twin_base_config.vocab_size
    edited = model.logits(replace(batch, input_ids=input_ids), lora)
    change = difference(edited[:-1], model.logits(batch, lora)[:-1])
    if change > TOLERANCE:
        return Fail(
            message="earlier tokens see later ones",
            expected=f"logits before an edited token move by at most {TOLERANCE:g} of the largest value",
            actual=f"{change:.2g}",
            remedy="set attn_implementation: auto; a mask must allow j <= i only",
            evidence={"change": change},
        )
    return Pass(f"an edited token changes earlier logits by at most {change:.1g}", {"change": change})


def _both_ways(healthy: Implementation, base: Any, config: Any) -> Model:
    """Let masks keep documents apart but show every token its whole document."""
    model: Any = healthy.build(base, config)
    masks = model.attention_mask

    def symmetric(mask: Any, position_ids: Any) -> Any:
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            return mask | mask.transpose(-1, -2)
        if isinstance(mask, torch.Tensor) and mask.is_floating_point():
            return torch.maximum(mask, mask.transpose(-1, -2))
        # `per_document` has a grid of places, `packed_flex` a block mask, and SDPA none where it is causal by itself;
        # all take a mask as well
        document = segment_starts(position_ids).cumsum(0)
        apart = document[:, None] != document
        return torch.zeros(apart.shape, dtype=base.dtype).masked_fill(apart, torch.finfo(base.dtype).min)[None, None]

    def widened(position_ids: Any) -> Any:
        made = masks(position_ids)
        if isinstance(made, dict):
            return {kind: symmetric(mask, position_ids) for kind, mask in made.items()}
        return symmetric(made, position_ids)

    model.attention_mask = widened
    return model


RULE = Rule(
    code="ATT202",
    name="future-tokens-visible",
    stage="twin",
    severity="error",
    sources=("fix 2", "failure mode 33"),
    requires=("HYP201",),
    check=check,
    faults=(
        Fault("mask-both-ways", "tokens see their whole document, later tokens included", override(build=_both_ways)),
    ),
)
