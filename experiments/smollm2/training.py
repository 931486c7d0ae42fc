"""Training stage after stage by `d2l train`, each going on from the last one's checkpoint; stopped anywhere, it goes on.

Where the run stands is read from its own metrics, so that nothing has to be kept beside them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from commands.stopped import STOPPED
from d2l.checkpoint import find_checkpoint
from d2l.io.run_folder import CONFIG, METRICS, is_run, step_of
from experiments.prove import d2l
from experiments.smollm2.recipe import TRAINING, Stage

START_MINUTES = 1.5  # of every stage: libraries, preflight, tokenization
TOLERANCE = 0.5  # minutes by which a stage may end early
DECIDED = "the next stage of the recipe"
RATES = ("learning_rate", "muon_learning_rate")


@dataclass(frozen=True)
class Plan:
    """The stages with their data files, and the minutes of training that they share."""

    stages: Sequence[Stage]
    files: Sequence[Path]
    minutes: float

    def ends(self) -> list[float]:
        """Return the minutes of training at which each stage ends."""
        shares = [stage.share for stage in self.stages]
        return [self.minutes * sum(shares[: place + 1]) / sum(shares) for place in range(len(shares))]


def train(config: Path, run: Path, plan: Plan, threads: int, report: Callable[[str], None]) -> None:
    """Train what the plan still lacks.

    Args:
        config: configuration of the first stage.
        run: the run's folder; where it exists, it is gone on from.
    """
    for place, (stage, file, end) in enumerate(zip(plan.stages, plan.files, plan.ends(), strict=True)):
        taken, spent = progress_of(run)
        is_over = spent >= end - TOLERANCE or (stage.decays and taken == planned_steps(run))
        if is_run(run) and (place < stage_of(run, plan) or is_over):
            continue
        report(f"stage {stage.name}: {taken} steps taken, {end - spent:.0f} minutes of training to go")
        minutes = ("--max-minutes", f"{end - spent + START_MINUTES:.2f}")
        log = run.with_name(f"train-{place + 1}-from-{taken}.log")
        if not is_run(run):
            d2l("train", config, *minutes, log=log, accepted=(0, STOPPED), threads=threads)
            continue
        changes = next_stage(run, stage, taken, spent, end)
        settings = [it for key, value in changes.items() for it in ("--set", f"{key}={json.dumps(value)}")]
        allowed = [it for key in ("data", "train_ds_names", *changes) for it in ("--allow-change", f"{key}={DECIDED}")]
        arguments = ("--resume", run, "--data", file, *minutes, *settings, *allowed)
        d2l("train", *arguments, log=log, accepted=(0, STOPPED), threads=threads)


def stage_of(run: Path, plan: Plan) -> int:
    """Return the place of the stage whose documents the run was last started with; it may have been stopped early."""
    return [str(file) for file in plan.files].index(saved_config(run)["train_ds_names"][0])


def next_stage(run: Path, stage: Stage, taken: int, spent: float, end: float) -> dict[str, Any]:
    """Return what a stage changes in the run's configuration."""
    changes: dict[str, Any] = {name: TRAINING[name] / stage.slower for name in RATES}
    if stage.taught:
        changes["loss"] = "kl"
    if not stage.decays:
        return changes
    if planned_steps(run) > taken and saved_config(run)["decay_steps"] > 0:
        return changes  # this stage was stopped in its middle: its length is decided
    steps = max(1, round((end - spent) * 60 / seconds_per_step(run)))
    return changes | {"max_steps": taken + steps, "decay_steps": steps}


def progress_of(run: Path) -> tuple[int, float]:
    """Return the steps of the newest checkpoint, and the minutes that they took."""
    if not is_run(run):
        return 0, 0.0
    taken = step_of(find_checkpoint(run).folder) or 0
    return taken, sum(step["seconds"] for step in metrics(run) if step["step"] <= taken) / 60


def seconds_per_step(run: Path) -> float:
    """Return what the last hundred steps took on average."""
    last = [step["seconds"] for step in metrics(run)][-100:]
    return float(sum(last) / len(last))


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics; a resumed run repeats none."""
    file = run / METRICS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    by_step = {step["step"]: step for step in map(json.loads, lines)}
    return list(by_step.values())


def saved_config(run: Path) -> dict[str, Any]:
    """Return the configuration that the run was last started with."""
    values: dict[str, Any] = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    return values


def planned_steps(run: Path) -> int:
    """Return the steps that the run's configuration asks for."""
    return int(saved_config(run)["max_steps"])
