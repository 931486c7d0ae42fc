"""A zero LoRA leaves the base as it is, bit for bit; a generated one changes it; unbound, nothing stays behind.

What it does
------------
Compares the logits of the tiny twin's base before and after a LoRA was bound, under a LoRA of zeros, and under the
generated one.

Why it matters
--------------
A patched forward that keeps the last document's LoRA answers the next question with the wrong document. A LoRA that
never reaches the forward trains nothing, while its L1 norm looks healthy. A delta that is not zero for a LoRA of zeros
means that the run does not start from the base model.

How it is detected
------------------
Bound to zeros and after unbinding, logits must be equal in every bit. Under the generated LoRA they must move by at
least 1e-4 of the largest value.

How to fix
----------
Bind the LoRA for a scope (`with bind(model, lora): ...`), add it through hooks on the target Linears, and restore always.
"""

from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.probes import TOLERANCE, difference, probe_batch
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "bind the LoRA for a scope, through hooks on the target Linears that are always removed"


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare four sets of logits."""
    model = subject.twin()
    batch = probe_batch(subject)
    lora = model.lora(batch)
    base = model.logits(batch, None)
    zeroed = model.logits(batch, lora.zeroed())
    bound = model.logits(batch, lora)
    after = model.logits(batch, None)
    effect = difference(bound, base)
    evidence = {
        "zeroed_equals_base": torch.equal(zeroed, base),
        "unbound_equals_base": torch.equal(after, base),
        "effect_of_the_lora": effect,
    }
    if not evidence["unbound_equals_base"]:
        actual = f"logits that differ by {difference(after, base):.2g}"
        return Fail(
            message="the base keeps a LoRA after it was unbound",
            expected="the base's logits, bit for bit",
            actual=actual,
            remedy=REMEDY,
            evidence=evidence,
        )
    if not evidence["zeroed_equals_base"]:
        actual = f"logits that differ by {difference(zeroed, base):.2g}"
        return Fail(
            message="a LoRA of zeros changes the base",
            expected="the base's logits, bit for bit",
            actual=actual,
            remedy=REMEDY,
            evidence=evidence,
        )
    if not effect > TOLERANCE:
        return Fail(
            message="the generated LoRA does not reach the base",
            expected=f"logits that move by more than {TOLERANCE:g} of the largest value",
            actual=f"{effect:.2g}",
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(f"zeroed and unbound equal the base bit for bit; bound, logits move by {effect:.2g}", evidence)


def _sticky(healthy: Implementation, base: Any, config: Any) -> Model:
    """Let a forward without a LoRA use the last one's."""
    model: Any = healthy.build(base, config)
    logits = model.logits
    last: list[Any] = []

    def remembering(batch: Any, lora: Any, positions: Any = None) -> Any:
        if lora is None:
            return logits(batch, last[-1] if last else None, positions)
        last.append(lora)
        return logits(batch, lora, positions)

    model.logits = remembering
    return model


def _never_bound(healthy: Implementation, base: Any, config: Any) -> Model:
    """Generate the LoRA and do not use it."""
    model: Any = healthy.build(base, config)
    logits = model.logits
    model.logits = lambda batch, lora, positions=None: logits(batch, None, positions)
    return model


def _frozen(healthy: Implementation, base: Any, config: Any) -> Model:
    """Use the values of the first LoRA of each shape ever after, as a compiled graph that took them for constants."""
    model: Any = healthy.build(base, config)
    logits, kept = model.logits, dict[tuple[int, ...], Any]()

    def captured(batch: Any, lora: Any, positions: Any = None) -> Any:
        if lora is None:
            return logits(batch, None, positions)
        return logits(batch, kept.setdefault((lora.n_contexts, lora.rank), lora), positions)

    model.logits = captured
    return model


RULE = Rule(
    code="LOR202",
    name="lora-without-effect",
    stage="twin",
    severity="error",
    sources=("sanity run", "failure mode 38", "failure mode 40", "failure mode C20"),
    requires=("HYP201",),
    check=check,
    faults=(
        Fault("stays-bound", "a forward without a document uses the last document's LoRA", override(build=_sticky)),
        Fault("never-bound", "the LoRA is generated but not bound", override(build=_never_bound)),
        Fault("lora-frozen", "the first LoRA is used ever after, as a compiler's constant", override(build=_frozen)),
    ),
)
