"""A run that is saved, loaded and resumed goes on exactly as one that never stopped.

What it does
------------
Trains a twin for four steps of two micro-batches, through the three stages of a curriculum, a warm-up and a line to zero,
and saves it after the second: in the second stage, in the middle of an epoch, with half of what ends the stage. It is saved
at once, and again as a checkpoint is that is written while the run goes on. The folder is loaded into a twin with other
weights, and the last two steps are taken there. The schedule, the stages and the data are the probe's, whatever the run uses;
its optimizer is the run's.

Why it matters
--------------
A state dict with strings or dataclasses in it fails at the first save, hours into the run; saved through pickle it cannot
be loaded again (`Weights only load failed`). Moments that are lost restart the optimizer, a position in the data that is
lost repeats batches, a schedule or a curriculum that is lost starts over, and all look like an ordinary bump in the loss.

How it is detected
------------------
Saving and loading must succeed, and both folders hold the same files; loss and gradient norm of both steps must agree to
1e-5, and every weight after them.

How to fix
----------
Write tensors to safetensors and everything else to JSON; save and restore optimizer, schedule, curriculum, data position
and RNG.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from checks.faults import Override, override
from checks.implementation import Implementation
from checks.probes import difference
from checks.result import Fail, NotOffered, Pass, Result
from checks.rule import Fault, Rule
from checks.training.staged_run import Stage, staged_trainer
from checks.training.steps import hypernet_values
from d2l.errors import D2LError

if TYPE_CHECKING:
    from checks.implementation import Stepper
    from checks.subject import Subject

EXACT = 1e-5
REMEDY = (
    "keep tensors in safetensors, the rest in JSON, and restore optimizer, schedule, curriculum, data position and RNG"
)
BEFORE, AFTER = 2, 2  # steps
MUON_RATE = 1e-2  # ten times the other parameters' rate
# A step whose questions are all answered raises the moving average of exact match to 0.1, a second one to 0.19: the first
# stage ends with the first step, the second with the third.
STAGES = (Stage(0.05), Stage(0.15), Stage(0.9))


def check(subject: "Subject") -> Result:
    """Compare two steps of a resumed run with those of the run that went on."""
    straight = _trainer(subject, seed=0)
    for _ in range(BEFORE):
        straight.step()
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        path = Path(folder) / f"step-{BEFORE:06d}"
        try:
            straight.save(path)
            resumed = _trainer(subject, seed=1)
            resumed.resume(path)
        except (D2LError, OSError, RuntimeError, TypeError, ValueError) as error:
            expectation = "a folder that is written and read back"
            return Fail(
                message="a checkpoint cannot be saved and loaded",
                expected=expectation,
                actual=str(error),
                remedy=REMEDY,
            )
        expected, changed = _go_on(straight, path)
    actual = [resumed.step() for _ in range(AFTER)]
    if changed:
        return Fail(
            message="a checkpoint changes while the run goes on",
            expected=f"the files of step {BEFORE}, though they are written after the next steps",
            actual=f"another {' and '.join(changed)}",
            remedy="copy weights, moments and state before the next step, and write the copies",
        )
    errors = {
        f"{name} of step {BEFORE + 1 + index}": abs(getattr(after, name) / getattr(before, name) - 1)
        for index, (before, after) in enumerate(zip(expected, actual, strict=True))
        for name in ("task_loss", "grad_norm", "step")
        if hasattr(before, name)
    }
    weights = dict(straight.model.hypernet.named_parameters())
    errors["weights"] = max(
        difference(value.detach(), weights[name].detach()) for name, value in resumed.model.hypernet.named_parameters()
    )
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= EXACT:
        losses = [" and ".join(f"{step.task_loss:.6g}" for step in steps) for steps in (expected, actual)]
        return Fail(
            message="a resumed run goes on differently",
            expected=f"the steps of the run that went on: losses {losses[0]}, within {EXACT:g}",
            actual=f"losses {losses[1]}; largest error {errors[worst]:.2g} in {worst.replace('_', ' ')}",
            remedy=REMEDY,
            evidence=errors,
        )
    return Pass(f"{AFTER} steps equal those of a run that went on (largest error {errors[worst]:.1g})", errors)


def _go_on(run: Any, saved: Path) -> tuple[list[Any], list[str]]:
    """Return what the next steps give, and the files that differ from the saved ones where those steps come before writing."""
    steps: list[Any] = []

    def take() -> None:
        steps.extend(run.step() for _ in range(AFTER))

    if not hasattr(run, "save_while"):
        take()
        return steps, []
    late = saved.with_name("late")
    run.save_while(late, take)
    names = sorted(path.name for folder in (saved, late) for path in folder.iterdir())
    return steps, [name for name in dict.fromkeys(names) if _contents(saved / name) != _contents(late / name)]


def _contents(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _trainer(subject: "Subject", seed: int) -> "Stepper":
    """Make a trainer with a curriculum, or without one where the implementation has none."""
    muon = None if subject.config.muon_learning_rate is None else MUON_RATE
    try:
        return staged_trainer(subject, STAGES, seed, muon_learning_rate=muon)
    except NotOffered:
        return staged_trainer(subject, (), seed, muon_learning_rate=muon)


def _stepper(member: str, change: Callable[[Any], None]) -> Override:
    """Make a fault of a run of which a member is changed right after it was made."""

    def trainer(healthy: Implementation, model: Any, rows: Any, config: Any) -> "Stepper":
        run = healthy.trainer(model, rows, config)
        change(run)
        return run

    return override(trainer=trainer).in_trainer(member)


def _truncate(run: Any) -> None:
    """Save a folder whose largest file lacks its end, as a full disk or a state that cannot be read back leaves it."""
    save = run.save

    def truncated(folder: Path) -> None:
        save(folder)
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-16])

    run.save = truncated


def _save_late(run: Any) -> None:
    """Write a checkpoint as it is when it is written."""

    def save_while(folder: Path, work: Callable[[], object]) -> None:
        work()
        run.save(folder)

    run.save_while = save_while


def _lose_moments(run: Any) -> None:
    """Resume with an optimizer that has seen nothing: its state is emptied before its next step."""
    resume, step = run.resume, run.step

    def forgetful(folder: Path) -> None:
        resume(folder)
        run.step = first

    def first() -> Any:
        run.step = step
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: optimizer.state.clear())
        try:
            return step()
        finally:
            hook.remove()

    run.resume = forgetful


def _lose_weights(run: Any) -> None:
    """Resume with the weights that were there before."""
    resume = run.resume

    def forgetful(folder: Path) -> None:
        before = hypernet_values(run.model)
        resume(folder)
        for name, value in run.model.hypernet.named_parameters():
            value.data.copy_(before[name])

    run.resume = forgetful


def _at_one_rate(run: Any) -> None:
    """Take the first step after resuming with the last group's learning rate for all parameters."""
    resume, step = run.resume, run.step

    def levelled(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.param_groups[-1]["lr"]

    def first() -> Any:
        run.step = step
        hook = register_optimizer_step_pre_hook(levelled)
        try:
            return step()
        finally:
            hook.remove()

    def resumed(folder: Path) -> None:
        resume(folder)
        run.step = first

    run.resume = resumed


def _on_other_batches(healthy: Implementation, model: Any, rows: Any, config: Any) -> "Stepper":
    """Resume everything but the place in the data: what comes next is that of the row after it, in every stage."""
    run: Any = healthy.trainer(model, rows, config)
    following = [*rows[1:], rows[0]]
    moved = [replace(row, chunks=it.chunks, queries=it.queries) for row, it in zip(rows, following, strict=True)]

    def resume(folder: Path) -> None:
        elsewhere = healthy.trainer(model, moved, config)
        elsewhere.resume(folder)
        run.step = elsewhere.step

    run.resume = resume
    return run


RULE = Rule(
    code="SAV201",
    name="resume-differs",
    stage="twin",
    severity="error",
    sources=("fix 6", "failure mode F6", "failure mode 27", "failure mode 28"),
    requires=("STP202", "OPT201", "OPT202"),
    check=check,
    faults=(
        Fault("checkpoint-unreadable", "a saved checkpoint cannot be read back", _stepper("save", _truncate)),
        Fault("changed-meanwhile", "a checkpoint is written while it changes", _stepper("save_while", _save_late)),
        Fault("moments-lost", "the optimizer starts anew", _stepper("resume", _lose_moments)),
        Fault(
            "rates-mixed-up",
            "all parameters resume with one rate",
            _stepper("resume", _at_one_rate).under(muon_learning_rate=1e-2),
        ),
        Fault("position-lost", "other batches come next", override(trainer=_on_other_batches).in_trainer("resume")),
        Fault("weights-lost", "the weights are not restored", _stepper("resume", _lose_weights)),
    ),
)
