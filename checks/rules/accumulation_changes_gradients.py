"""One batch of four contexts and batches of one and of three give the same gradient.

What it does
------------
Takes the gradient of a step's whole loss on the tiny twin, with rows of unequal length and documents of unequal numbers
of chunks: packed into one row, and as micro-batches of one context and of three. A mean over contexts is spoilt by
micro-batches of unequal numbers of contexts only.

Why it matters
--------------
A loss that every micro-batch divides by its own number of tokens weighs short rows more, and the size of the gradient
depends on `gradient_accumulation_steps`: settings found with one value are wrong with another.

How it is detected
------------------
The two gradients, computed in float64, must agree to 1e-4 of the largest entry.

How to fix
----------
Divide sums by counts of the whole optimizer step: label tokens, contexts, ranks.
"""

from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.probes import TOLERANCE, difference, flat, gradients, in_double, norm, probe_rows
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.data.packing import collate

if TYPE_CHECKING:
    from checks.subject import Implementation, Subject


def check(subject: "Subject") -> Result:
    """Compare the gradients of a whole step, packed and accumulated."""
    rows = probe_rows(subject, documents=(9, 6, 5, 7), questions=(12, 6, 16, 8), chunks=(1, 3, 1, 2))
    config = changed(subject.twin_config, gen_lora_l1_reg_coef=max(subject.config.gen_lora_l1_reg_coef, 0.1))
    model = in_double(subject.twin())  # in float32 a sharp softmax (perceiver_query_scale: 10) rounds by too much
    whole, accumulated = (
        gradients(model, sum(subject.implementation.loss(model, batches, config)))  # type: ignore[arg-type]
        for batches in ([collate(rows)], [collate(rows[:1]), collate(rows[1:])])
    )
    error = difference(flat(accumulated), flat(whole))
    evidence = {"relative_error": error, "norm_whole": norm(whole), "norm_accumulated": norm(accumulated)}
    if error > TOLERANCE:
        return Fail(
            message="gradients depend on how a step is cut into micro-batches",
            expected=f"entries within {TOLERANCE:g} of the largest",
            actual=f"{error:.2g} (norm {norm(whole):.4g} in one batch, {norm(accumulated):.4g} in two)",
            remedy="divide losses by counts of the whole optimizer step, not of one micro-batch",
            evidence=evidence,
        )
    return Pass(
        f"{len(rows)} contexts in one batch and in batches of 1 and {len(rows) - 1} agree to {error:.1g} of the largest entry",
        evidence,
    )


def _mean_of_means(healthy: "Implementation", model: Any, batches: Any, config: Any) -> Any:
    """Divide every micro-batch by its own counts, and take the mean."""
    losses = [healthy.loss(model, [batch], config) for batch in batches]
    return tuple(sum(terms) / len(losses) for terms in zip(*losses, strict=True))


RULE = Rule(
    code="GRD203",
    name="accumulation-changes-gradients",
    stage="twin",
    severity="error",
    sources=("failure mode 11", "huggingface/transformers#34191"),
    requires=("HYP202",),
    check=check,
    faults=(Fault("mean-of-means", "each micro-batch is divided by its own counts", override(loss=_mean_of_means)),),
)
