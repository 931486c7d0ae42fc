"""Training changes the hypernetwork and nothing of the base.

What it does
------------
Compares all parameters and buffers of the base before and after a short run of the run's own trainer on a twin, and lists
which parameters require a gradient.

Why it matters
--------------
A base that trains along needs its gradients' memory, and the adapters that come out belong to a base that nobody has. A
hypernetwork parameter that requires no gradient stays as it was drawn.

How it is detected
------------------
Every value of the base must be bit-identical, none of its parameters may require a gradient, and every parameter of the
hypernetwork must.

How to fix
----------
`base.requires_grad_(False)` before the optimizer is made, and hand the optimizer the hypernetwork's parameters only.
"""

from typing import TYPE_CHECKING, Any

import torch

from checks.faults import override, override_step
from checks.implementation import Implementation, Model
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.short_run import short_run

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = (
    "freeze the base (requires_grad_(False)) before the optimizer is made, and train the hypernetwork's parameters only"
)


def check(subject: "Subject") -> Result:
    """Compare the base before and after, and list what requires a gradient."""
    run = short_run(subject)
    model: Any = run.trainer.model
    after = model.base.state_dict()
    moved = [name for name, value in run.base_before.items() if not torch.equal(after[name], value)]
    trains = [name for name, parameter in model.base.named_parameters() if parameter.requires_grad]
    still = [name for name, parameter in model.hypernet.named_parameters() if not parameter.requires_grad]
    wrong = (
        (moved, f"{len(moved)} values of the base changed", "bit-identical after the run"),
        (trains, f"{len(trains)} parameters of the base require a gradient", "none"),
        (still, f"{len(still)} parameters of the hypernetwork require no gradient", "all of them do"),
    )
    for names, message, expected in wrong:
        if names:
            return Fail(
                message=message,
                expected=expected,
                actual=f"{names[0]} among them",
                remedy=REMEDY,
                evidence={"parameters": names},
            )
    return Pass(f"{len(run.base_before)} tensors of the base are bit-identical after {len(run.steps)} steps")


def _base_trains(healthy: Implementation, base: Any, config: Any) -> Model:
    """Leave the last norm of the base trainable."""
    model = healthy.build(base, config)
    list(base.parameters())[-1].requires_grad_(True)
    return model


def _base_moves(step: Any, trainer: Any) -> Any:
    """Let the base's last parameter shrink a little in every step."""
    list(trainer.model.base.parameters())[-1].data.mul_(1 - 1e-6)
    return step()


RULE = Rule(
    code="BAS201",
    name="base-not-frozen",
    stage="twin",
    severity="error",
    sources=("sanity run", "failure mode C12"),
    requires=("STP202",),
    check=check,
    faults=(
        Fault("base-trains", "a parameter of the base requires a gradient", override(build=_base_trains)),
        Fault("base-moves", "a parameter of the base changes with every step", override_step(_base_moves)),
    ),
)
