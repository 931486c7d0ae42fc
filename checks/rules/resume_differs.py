"""A run that is saved, loaded and resumed goes on exactly as one that never stopped.

What it does
------------
Trains the tiny twin for two steps; trains another for one, saves it, loads the folder into a twin with other weights,
and takes the second step there.

Why it matters
--------------
A state dict with strings or dataclasses in it fails at the first save, hours into the run; saved through pickle it cannot
be loaded again (`Weights only load failed`). Moments that are lost restart the optimizer, a position in the data that is
lost repeats batches, and both look like an ordinary bump in the loss.

How it is detected
------------------
Saving and loading must succeed; the second step's loss and gradient norm must agree to 1e-5, and every weight after it.

How to fix
----------
Write tensors to safetensors and everything else to JSON; save and restore optimizer, schedule, data position and RNG.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.probes import difference, probe_rows
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import Implementation, changed
from d2l.errors import CheckpointError

if TYPE_CHECKING:
    from checks.subject import Stepper, Subject

EXACT = 1e-5
REMEDY = "keep tensors in safetensors, the rest in JSON, and restore optimizer, schedule, data position and RNG"


def check(subject: "Subject") -> Result:
    """Compare two steps with one, a save, a load and one more."""
    straight = _trainer(subject, seed=0)
    _, expected = straight.step(), straight.step()
    stopped = _trainer(subject, seed=0)
    stopped.step()
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        path = Path(folder) / "step-000001"
        try:
            subject.implementation.save(stopped.checkpoint(), path)
            resumed = _trainer(subject, seed=1)
            resumed.restore(subject.implementation.load(path))
        except CheckpointError as error:
            expectation = "a folder that is written and read back"
            return Fail(
                message="a checkpoint cannot be saved and loaded",
                expected=expectation,
                actual=str(error),
                remedy=REMEDY,
            )
    actual = resumed.step()
    weights = dict(straight.model.hypernet.named_parameters())
    errors = {
        "task_loss": abs(actual.task_loss - expected.task_loss) / abs(expected.task_loss),
        "grad_norm": abs(actual.grad_norm - expected.grad_norm) / abs(expected.grad_norm),
        "weights": max(
            difference(value.detach(), weights[name].detach())
            for name, value in resumed.model.hypernet.named_parameters()
        ),
    }
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > EXACT:
        return Fail(
            message="a resumed run goes on differently",
            expected=f"the second step of an unbroken run: loss {expected.task_loss:.6g}, within {EXACT:g}",
            actual=f"loss {actual.task_loss:.6g}; largest error {errors[worst]:.2g} in {worst.replace('_', ' ')}",
            remedy=REMEDY,
            evidence=errors,
        )
    return Pass(f"the second step equals that of an unbroken run (largest error {errors[worst]:.1g})", errors)


def _trainer(subject: "Subject", seed: int) -> "Stepper":
    """Make a trainer whose epochs hold three packed rows, one a step, so that a lost position shows."""
    rows = probe_rows(subject)
    longest_input, longest_context = (max(row.size[i] for row in rows) for i in (0, 1))
    limits = {"max_packed_inp_len": longest_input, "max_packed_ctx_len": longest_context}
    config = changed(subject.twin_config, **limits, gradient_accumulation_steps=1)
    return subject.implementation.trainer(subject.twin(seed), rows, config)


def _with_config_object(healthy: Implementation, checkpoint: Any, folder: Path) -> None:
    """Put the configuration object among the tensors, as in the reference."""
    tensors: Any = {**checkpoint.hypernet, "hypernet_config": checkpoint.state["config"]}
    healthy.save(replace(checkpoint, hypernet=tensors), folder)


def _without_moments(healthy: Implementation, folder: Path) -> Any:
    """Return the optimizer's moments as zeros."""
    loaded = healthy.load(folder)
    trainer = {name: value * 0 if "exp_avg" in name else value for name, value in loaded.trainer.items()}
    return replace(loaded, trainer=trainer)


def _from_the_start(healthy: Implementation, folder: Path) -> Any:
    """Lose the position in the data."""
    loaded = healthy.load(folder)
    return replace(loaded, state={**loaded.state, "epoch": 0, "position": 0})


RULE = Rule(
    code="SAV201",
    name="resume-differs",
    stage="twin",
    severity="error",
    sources=("fix 6", "failure mode F6", "failure mode 27", "failure mode 28"),
    requires=("STP201",),
    check=check,
    faults=(
        Fault("config-in-state-dict", "a configuration object among the tensors", override(save=_with_config_object)),
        Fault("moments-lost", "the optimizer starts anew", override(load=_without_moments)),
        Fault("position-lost", "the data starts from the beginning", override(load=_from_the_start)),
    ),
)
