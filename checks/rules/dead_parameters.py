"""Every parameter of the hypernetwork gets a gradient from the task loss.

What it does
------------
Takes the gradient of the task loss alone on the tiny twin and lists the parameters where none arrives. Parameters that
start at zero (the scalers of B) are given random values first: at the published initialisation only they and the bias of
B have a gradient in the first step.

Why it matters
--------------
A detached tensor, or a module that is built and not used, leaves part of the hypernetwork as it was initialised. With an
L1 term `grad_norm` stays above zero, and `find_unused_parameters=True` hides the fault for good.

How it is detected
------------------
The norm of each parameter's gradient must be above zero.

How to fix
----------
Follow the named parameters to the forward pass; look for `.detach()`, `.data`, `no_grad` and unused modules.
"""

from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.probes import gradients, norm, probe_batch
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import Implementation, Model

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """List the parameters without a gradient."""
    model = subject.twin()
    task, _ = subject.implementation.loss(model, [probe_batch(subject)], subject.twin_config)
    found = gradients(model, task)
    dead = [name for name, value in found.items() if not value.any()]
    if dead:
        return Fail(
            message="part of the hypernetwork gets no gradient from the task loss",
            expected=f"a gradient for each of {len(found)} parameters",
            actual=f"none for {len(dead)}, {dead[0]} among them",
            remedy="look for a detached tensor or an unused module on the way from these parameters to the loss",
            evidence={"dead": dead},
        )
    return Pass(f"all {len(found)} parameters get a gradient (norm {norm(found):.3g})", {"parameters": len(found)})


def _detached_aggregator(healthy: Implementation, base: Any, config: Any) -> Model:
    """Cut the aggregator's output off from the graph."""
    model: Any = healthy.build(base, config)
    model.hypernet.aggregator.register_forward_hook(lambda module, inputs, latents: latents.detach())
    return model


RULE = Rule(
    code="GRD204",
    name="dead-parameters",
    stage="twin",
    severity="error",
    sources=("sanity run", "failure mode 13", "failure mode 31"),
    requires=("LOR203", "HYP202"),
    check=check,
    faults=(Fault("detached-latents", "the aggregator's output is detached", override(build=_detached_aggregator)),),
)
