"""A step leaves no hook and no replaced forward on the base, even when it is interrupted.

What it does
------------
Counts hooks and replaced `forward` methods on the modules of the base after each step of a short run on a twin, and after a
step that is interrupted in the middle of the question pass.

Why it matters
--------------
A LoRA that stays bound is added to the next document's, and to the base's own answers; with every step one more. After an
interrupted step (a bad batch, out of memory, Ctrl-C in a notebook) the model that remains is not the base.

How it is detected
------------------
After the second step there must be as many as after the first, and as many after the interrupted one.

How to fix
----------
Remove hooks in a `finally` or by a context manager.
"""

from typing import TYPE_CHECKING, Any

from checks.faults import override_step
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.short_run import count_hooks, short_run

if TYPE_CHECKING:
    from checks.implementation import Stepper
    from checks.subject import Subject

REMEDY = "remove what is added for a forward pass in a finally block or by a context manager"


class _Interrupted(Exception):
    """Raised in the middle of a forward pass."""


def check(subject: "Subject") -> Result:
    """Count hooks after a step, after several, and after an interrupted one."""
    run = short_run(subject)
    first, last = run.hooks[0], run.hooks[-1]
    if first != last:
        return Fail(
            message="every step leaves hooks on the base",
            expected=f"{first} hooks and replaced forwards, as after the first step",
            actual=f"{last} after {len(run.hooks)} steps",
            remedy=REMEDY,
            evidence={"hooks": run.hooks},
        )
    _interrupt(run.trainer)
    interrupted = count_hooks(run.trainer.model)
    if interrupted != last:
        return Fail(
            message="an interrupted step leaves hooks on the base",
            expected=f"{last} hooks and replaced forwards, as before",
            actual=f"{interrupted}",
            remedy=REMEDY,
            evidence={"hooks": interrupted},
        )
    return Pass(f"{last} hooks after {len(run.hooks)} steps and after an interrupted one, as after the first")


def _interrupt(trainer: "Stepper") -> None:
    """Take a step that an exception ends where the question pass computes its logits."""

    def stop(*_: Any) -> None:
        raise _Interrupted

    head: Any = trainer.model.base.get_output_embeddings()
    hook = head.register_forward_pre_hook(stop)
    try:
        trainer.step()
    except _Interrupted:
        pass
    finally:
        hook.remove()


def _one_more_each_step(step: Any, trainer: Any) -> Any:
    """Leave a hook that does nothing on the base."""
    trainer.model.base.register_forward_hook(lambda *_: None)
    return step()


def _left_by_interruption(step: Any, trainer: Any) -> Any:
    """Remove the hook only where the step succeeds."""
    hook = trainer.model.base.register_forward_hook(lambda *_: None)
    metrics = step()
    hook.remove()
    return metrics


RULE = Rule(
    code="BAS202",
    name="hooks-left-behind",
    stage="twin",
    severity="error",
    sources=("failure mode 38",),
    requires=("STP202", "LOR202"),
    check=check,
    faults=(
        Fault("one-more-each-step", "every step leaves a hook", override_step(_one_more_each_step)),
        Fault("left-by-interruption", "an interrupted step leaves its hook", override_step(_left_by_interruption)),
    ),
)
