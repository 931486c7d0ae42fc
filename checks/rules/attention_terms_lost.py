"""The planned attention computes what the model's own eager attention computes, all of its terms included.

What it does
------------
Gives one question to the twin under the run's planned attention, and to a copy of its base under transformers' eager attention,
and compares the logits. The queries are made eight times as large before, so that scores are large.

Why it matters
--------------
Implementations of attention leave out what they do not know, without an error: SDPA the sinks of GPT-OSS and the soft caps of
Gemma 2, a kernel from the hub the window. The loss is a little higher than it should be, and the LoRA is trained for another
model than the one that is served. Releases of transformers differ in what they refuse: 5.13 offers SDPA for Gemma 2.

How it is detected
------------------
In float32 equal computations agree to 2e-4 of the largest logit, as large scores round; the bound is 1e-3. Lost soft caps were
0.07 apart. On a GPU, where other kernels run, ATT401 compares the same.

How to fix
----------
Set `attn_implementation: auto`, or `per_document`, which computes with the model's own eager attention.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.probes import alone, difference, probe_rows
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

TOLERANCE = 1e-3  # of the largest logit
SHARPER = 8.0  # times; scores of a twin are about 1, and a cap of 50 changes those of 10 by more than 1%


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare the logits of one question."""
    base = subject.twin_base()
    for name, parameter in base.named_parameters():
        if "q_proj" in name:
            parameter.mul_(SHARPER)
    eager = deepcopy(base)
    eager.set_attn_implementation("eager")
    batch = alone(probe_rows(subject))[0]
    found = subject.twin(base=base).logits(batch, None)
    apart = difference(found, eager(input_ids=batch.input_ids, use_cache=False).logits[0])
    attention = subject.twin_plan.attention.value
    if apart > TOLERANCE:
        return Fail(
            message=f"{attention} computes something else than the model's own attention",
            expected=f"logits within {TOLERANCE:g} of the largest, of eager attention",
            actual=f"{apart:.2g}",
            remedy="set attn_implementation: auto, or per_document",
            evidence={"apart": apart, "attention": attention},
        )
    return Pass(f"{attention}: logits are those of eager attention to {apart:.1g}", {"apart": apart})


def _with_larger_scores(healthy: Implementation, base: Any, config: Any) -> Model:
    """Scale the scores of every layer by another tenth."""
    for module in base.modules():
        if isinstance(getattr(module, "scaling", None), float):
            module.scaling *= 1.1
    return healthy.build(base, config)


RULE = Rule(
    code="ATT205",
    name="attention-terms-lost",
    stage="twin",
    severity="error",
    sources=("fix 2", "failure mode 10"),
    requires=("ATT101", "ATT202", "ATT201", "HYP201"),
    check=check,
    faults=(Fault("larger-scores", "scores a tenth larger", override(build=_with_larger_scores)),),
)
