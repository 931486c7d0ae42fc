"""Gradient checkpointing reaches the base's layers: they are recomputed in the backward pass.

What it does
------------
Lets the run's own trainer take a step on a twin with the run's checkpointing on, and one without, and counts how often each
target runs.

Why it matters
--------------
A Doc-to-LoRA model is a plain module around a `PreTrainedModel`. Where the switch is not handed on, a trainer fails with
`AttributeError`, or nothing happens; and `eval()` on the frozen base switches checkpointing off without a word. The run
then needs several times the activation memory that was planned.

How it is detected
------------------
Every target must run once more in the step with checkpointing: in the recomputation.

How to fix
----------
Call `gradient_checkpointing_enable` where the trainer is made, hand it on to the base, and call `train()` on the base.
"""

from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from checks.training.short_run import PLAN, unique_rows
from checks.training.steps import light_config, light_model

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Count the runs of every target in a trainer's step, with checkpointing and without."""
    if not subject.config.gradient_checkpointing:
        return Inapplicable("gradient_checkpointing is off in the configuration")
    model = light_model(subject)
    without, runs = (_runs(subject, model, checkpointing=on) for on in (False, True))
    once = [place for place in without if runs[place] <= without[place]]
    if once:
        return Fail(
            message="gradient checkpointing does not reach the base's layers in a step of the trainer",
            expected="every target runs once more with it, in the recomputation",
            actual=f"{len(once)} of {len(without)} do not: {once[0]} ran {runs[once[0]]} time(s), {without[once[0]]} without",
            remedy="hand gradient_checkpointing_enable on to the base where the trainer is made, and call train() on the base",
            evidence={"runs": dict(runs), "runs_without": dict(without)},
        )
    return Pass(f"all {len(without)} targets are recomputed in the backward pass of a step", {"runs": dict(runs)})


def _runs(subject: "Subject", model: Model, *, checkpointing: bool) -> Counter[str]:
    """Count how often each target runs in one step of a trainer, encoder pass included."""
    config = light_config(
        subject,
        **{**PLAN, "gradient_accumulation_steps": 1},
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs=subject.config.gradient_checkpointing_kwargs,
    )
    trainer = subject.implementation.trainer(model, unique_rows(1), config)
    runs: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name, found in subject.implementation.targets(model.base, subject.config.target_modules).items():
            for layer, target in enumerate(found):
                place = f"{name} of layer {layer}"
                hook = target.register_forward_hook(lambda *_, place=place: runs.update([place]))
                hooks.callback(hook.remove)
        trainer.step()
    return runs


def _not_handed_on(healthy: Implementation, base: Any, config: Any) -> Model:
    """Let the wrapper take the call and do nothing."""
    model: Any = healthy.build(base, config)
    model.gradient_checkpointing_enable = lambda kwargs: None
    return model


def _base_in_eval(healthy: Implementation, base: Any, config: Any) -> Model:
    """Keep the frozen base in eval mode, where transformers does not checkpoint."""
    model: Any = healthy.build(base, config)
    base.eval()
    base.train = lambda mode=True: base
    return model


def _ignored(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
    """Make a trainer that does not look at the key."""
    return healthy.trainer(model, rows, changed(config, gradient_checkpointing=False))


RULE = Rule(
    code="GRD202",
    name="checkpointing-not-delegated",
    stage="twin",
    severity="error",
    sources=("fix 7", "failure mode F7"),
    requires=("GRD201", "STP202"),
    check=check,
    faults=(
        Fault("not-handed-on", "gradient_checkpointing_enable does nothing", override(build=_not_handed_on)),
        Fault("base-in-eval", "the frozen base is kept in eval mode", override(build=_base_in_eval)),
        Fault("ignored", "the trainer never switches checkpointing on", override(trainer=_ignored).in_trainer("step")),
    ),
)
