"""The L1 term on the generated LoRA is the written formula, with its coefficient, once for the whole step.

What it does
------------
Takes the same step on a twin twice, with `gen_lora_l1_reg_coef` 0 and 0.1, as two micro-batches whose documents have unequal
numbers of chunks, and again with another seed, which packs them in another order. The difference of the gradients that the
optimizer gets is the term's own gradient, whatever the size of the task's, and is compared with that of the formula: the
mean over contexts and modules of mean |A| + mean |B|.

Why it matters
--------------
The term is a thousandth of the task's gradient. One that is missing, that is summed instead of averaged, or that counts every
micro-batch's longest document apart, is not seen in any sum, and the LoRA grows, or shrinks to nothing, over the run.

How it is detected
------------------
The two gradients must agree, parameter by parameter, to 1e-4 of the parameter's largest entry, in float64.

How to fix
----------
Add `gen_lora_l1_reg_coef` times the mean over the contexts of the whole step, each padded to the rank of the step's longest
document.
"""

from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles.loss import lora_l1
from checks.probes import gradients, norm
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.steps import TOLERANCE, TWO_BATCHES, loss_rows, loss_step, still_model, worst_parameter
from d2l.data.packing import collate

if TYPE_CHECKING:
    from torch import Tensor

    from checks.subject import Subject

COEFFICIENT = 0.1
SEEDS = (0, 2)  # d2l's order of the two micro-batches: that with the longest document first, and last


def check(subject: "Subject") -> Result:
    """Compare what the coefficient adds to a step's gradient with the gradient of the formula."""
    formula = _formula(subject)
    errors = {}
    for seed in SEEDS:
        step = {"loss": "ce", "use_per_ctx_average_loss": False, "seed": seed, **TWO_BATCHES}
        without = loss_step(subject, **step).gradients
        with_term = loss_step(subject, **step, gen_lora_l1_reg_coef=COEFFICIENT).gradients
        actual = {name: with_term[name] - without[name] for name in without}
        expected = {name: value for name, value in formula.items() if name in actual}  # OPT201 names the others
        error, name = worst_parameter(actual, expected)
        errors[f"seed {seed}"] = error
        if error <= TOLERANCE:
            continue
        evidence = {"relative_errors": errors, "norm": norm(actual), "norm_of_formula": norm(expected)}
        return Fail(
            message="the gradient of the L1 term is not that of the formula",
            expected=f"norm {norm(expected):.4g}, entries within {TOLERANCE:g} of the largest of each parameter",
            actual=f"norm {norm(actual):.4g}, off by {error:.2g} in {name}",
            remedy="add gen_lora_l1_reg_coef times the mean of |A| and |B| over all contexts of the step, at one rank",
            evidence=evidence,
        )
    said = f"what the coefficient adds to the gradient agrees with the formula to {max(errors.values()):.1g}"
    return Pass(said, {"relative_errors": errors})


def _formula(subject: "Subject") -> "dict[str, Tensor]":
    """Return the gradient of the weighted term over the loss rows, each document's LoRA made alone."""
    model: Any = still_model(subject)
    loras = [model.lora(collate([row])) for row in loss_rows(subject)]
    a, b = ([{name: x[0] for name, x in getattr(lora, side).items()} for lora in loras] for side in ("A", "B"))
    rank = max(x.shape[1] for matrices in a for x in matrices.values())
    return gradients(model, COEFFICIENT * lora_l1(a, b, rank))


def _ignored(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    return healthy.trainer(model, rows, changed(config, gen_lora_l1_reg_coef=0.0))


def _per_micro_batch(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Add the whole term for every micro-batch."""
    coefficient = config.gen_lora_l1_reg_coef * config.gradient_accumulation_steps
    return healthy.trainer(model, rows, changed(config, gen_lora_l1_reg_coef=coefficient))


def _by_the_first(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Divide the term by the rank of the first micro-batch, whatever documents the others have."""
    chunks = [max(batch.n_ctx_chunks) for batch in healthy.batches(config, rows)]
    coefficient = config.gen_lora_l1_reg_coef * max(chunks) / chunks[0]
    return healthy.trainer(model, rows, changed(config, gen_lora_l1_reg_coef=coefficient))


RULE = Rule(
    code="LSS202",
    name="l1-term-wrong",
    stage="twin",
    severity="error",
    sources=("failure mode 11",),
    requires=("GRD203",),
    check=check,
    faults=(
        Fault("ignored", "the coefficient is ignored", override(trainer=_ignored).in_trainer("step")),
        Fault(
            "for-every-micro-batch",
            "the term is added for every micro-batch",
            override(trainer=_per_micro_batch).in_trainer("step"),
        ),
        Fault(
            "rank-of-the-first",
            "the first micro-batch's rank divides the term",
            override(trainer=_by_the_first).in_trainer("step"),
        ),
    ),
)
