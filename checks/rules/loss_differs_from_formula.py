"""The loss of a real step, and the gradient that it applies, are those of the written formulas.

What it does
------------
Lets the run's own trainer take one step on a twin, over documents of unequal numbers of chunks with one to three questions
and answers of one to five tokens: once with each loss (cross-entropy, KL to a teacher) and each mean (over tokens, over
contexts), whatever the run uses. The same losses are computed from the formulas, question by question alone, with the
LoRA written into the base's weights.

Why it matters
--------------
Logits that are not shifted, labels that are shifted twice, an end token that is never trained, a sum instead of a mean, a
teacher whose top-k are renormalised: each has a loss that falls, and a model that learns something else.

How it is detected
------------------
The reported task loss must agree to 1e-4; the gradient that the optimizer gets must agree, parameter by parameter, to 1e-4
of the parameter's largest entry.

How to fix
----------
The logits at place t - 1 predict the token at place t of the same question. Divide the sum by the label tokens of the whole
step, or take means over tokens, then questions, then contexts. KL is -sum over k of exp(t_k) log q_k, as stored.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles import edited_weights, loss
from checks.probes import gradients
from checks.result import Fail, NotOffered, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.observed import Observed
from checks.training.steps import TOLERANCE, loss_rows, loss_step, still_model, worst_parameter
from d2l.data.packing import collate

if TYPE_CHECKING:
    from checks.subject import Subject

LOSSES = {"ce": "cross-entropy", "kl": "KL"}
MEANS: dict[bool, tuple[str, Callable[[loss.Losses], Tensor]]] = {
    False: ("mean over tokens", loss.token_mean),
    True: ("mean over contexts", loss.context_mean),
}
REMEDY = "shift logits against labels by one within each question, and divide by counts of the whole step"


def check(subject: "Subject") -> Result:
    """Compare one step's loss and gradient with the formulas, for every loss and mean."""
    model: Any = still_model(subject)
    expected = _formulas(subject, model)
    steps: dict[tuple[str, bool], Observed] = {}
    weights = dict(zip(expected, (1.0, 0.7, -0.4, 0.9), strict=True))  # one backward pass for all four
    right_gradients = gradients(model, sum(weights[key] * value for key, value in expected.items()))  # type: ignore[arg-type]
    evidence: dict[str, Any] = {}
    for key, value in expected.items():
        right, label = value.item(), f"{LOSSES[key[0]]}, {MEANS[key[1]][0]}"
        try:
            steps[key] = loss_step(subject, loss=key[0], use_per_ctx_average_loss=key[1])
            actual = f"{steps[key].metrics.task_loss:.6g}, {steps[key].metrics.task_loss / right:.3g} times as much"
            evidence[label] = abs(steps[key].metrics.task_loss / right - 1)
        except NotOffered:
            raise
        except Exception as error:  # a loss that refuses sound rows
            actual = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            evidence[label] = math.inf
        if not evidence[label] <= TOLERANCE:
            return Fail(
                message=f"the loss of a step is not that of the formula: {label}",
                expected=f"{right:.6g}, of every question alone with edited weights, within {TOLERANCE:g}",
                actual=actual,
                remedy=REMEDY,
                evidence=evidence,
            )
    step_names = next(iter(steps.values())).updates.keys()
    applied = {
        name: sum(weights[key] * step.gradients[name] for key, step in steps.items() if name in step.gradients)
        for name in right_gradients
    }
    held = {name: value for name, value in right_gradients.items() if name in step_names}  # OPT201 names the others
    worst, name = worst_parameter(applied, held)  # type: ignore[arg-type]
    if not worst <= TOLERANCE:
        return Fail(
            message="the loss of a step is that of the formula, but the gradient that it applies is another",
            expected=f"entries within {TOLERANCE:g} of the largest of each parameter",
            actual=f"{worst:.2g} in {name}",
            remedy="take the gradient of the loss that is reported, undivided and once",
            evidence=evidence,
        )
    return Pass(
        "cross-entropy and KL, by token and by context: losses agree with the formulas to "
        f"{max(evidence.values()):.1g}, gradients to {worst:.1g} of each parameter's largest",
        evidence,
    )


def _formulas(subject: "Subject", model: Any) -> dict[tuple[str, bool], Tensor]:
    """Compute all losses of the loss rows from logits of each question alone; scalars in float64, with gradient."""
    rows = loss_rows(subject)
    lora = model.lora(collate(rows))
    found: dict[str, list[list[Tensor]]] = {"ce": [], "kl": []}
    for context, row in enumerate(rows):
        a, b = ({name: x[context] for name, x in side.items()} for side in (lora.A, lora.B))
        logits = [edited_weights.logits(model.base, query.input_ids, a, b, lora.scale) for query in row.queries]
        pairs = list(zip(logits, row.queries, strict=True))
        found["ce"].append([loss.cross_entropy(x, query.labels) for x, query in pairs])
        found["kl"].append(
            [
                loss.divergence(x, query.labels, query.logprobs_vals or (), query.logprobs_indices or ())
                for x, query in pairs
            ]
        )
    return {(kind, per_context): MEANS[per_context][1](found[kind]) for kind in LOSSES for per_context in MEANS}


def _with_queries(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Make a fault that trains on changed questions."""

    def trainer(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
        changed_rows = [replace(row, queries=tuple(map(change, row.queries))) for row in rows]
        return healthy.trainer(model, changed_rows, config)

    return trainer


def _not_shifted(query: Any) -> Any:
    """Let the logits at a token predict that same token."""
    supervised = [place for place, label in enumerate(query.labels) if label != -100]
    labels = list(query.labels)
    for place in supervised:
        labels[place] = query.input_ids[place - 1]
    return replace(query, labels=tuple(labels))


def _shifted_twice(query: Any) -> Any:
    """Let the logits predict the token after the next one."""
    labels = [*query.labels[1:], query.labels[-1]]
    first = next(place for place, label in enumerate(labels) if label != -100)
    labels[first] = -100
    return replace(query, labels=tuple(labels)) if any(x != -100 for x in labels) else query


def _last_label_lost(query: Any) -> Any:
    """Train without the end token, where the answer has more than that."""
    if sum(label != -100 for label in query.labels) < 2:
        return query
    vals, indices = query.logprobs_vals, query.logprobs_indices
    teacher = {} if vals is None else {"logprobs_vals": vals[:-1], "logprobs_indices": indices[:-1]}
    return replace(query, labels=(*query.labels[:-1], -100), **teacher)


def _renormalised(query: Any) -> Any:
    """Let the teacher's top-k sum to one."""
    if query.logprobs_vals is None:
        return query
    vals = torch.tensor(query.logprobs_vals).log_softmax(-1)
    return replace(query, logprobs_vals=tuple(map(tuple, vals.tolist())))


def _always_by_token(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Ignore the mean over contexts."""
    return healthy.trainer(model, rows, changed(config, use_per_ctx_average_loss=False))


def _summed_gradient(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Report the mean, and take the gradient of a sum."""

    def scale(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(15)

    for parameter in model.hypernet.parameters():
        if not parameter._post_accumulate_grad_hooks:  # a model may have several trainers
            parameter.register_post_accumulate_grad_hook(scale)
    return healthy.trainer(model, rows, config)


RULE = Rule(
    code="LSS201",
    name="loss-differs-from-formula",
    stage="twin",
    severity="error",
    sources=("failure mode 4", "failure mode C22"),
    requires=("ATT201", "LOR202", "STP202", "OPT202"),
    check=check,
    faults=(
        Fault(
            "not-shifted",
            "logits predict their own token",
            override(trainer=_with_queries(_not_shifted)).in_trainer("step"),
        ),
        Fault(
            "shifted-twice",
            "labels are shifted twice",
            override(trainer=_with_queries(_shifted_twice)).in_trainer("step"),
        ),
        Fault(
            "last-label-lost",
            "the end token is not trained",
            override(trainer=_with_queries(_last_label_lost)).in_trainer("step"),
        ),
        Fault(
            "renormalised",
            "the teacher's top-k are renormalised",
            override(trainer=_with_queries(_renormalised)).in_trainer("step"),
        ),
        Fault("always-by-token", "the mean over contexts is ignored", override(trainer=_always_by_token)),
        Fault(
            "summed-gradient", "the gradient is that of a sum", override(trainer=_summed_gradient).in_trainer("step")
        ),
    ),
)
