"""Folders of runs as they lie on the disk, written by hand: no model is trained."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2l.config.schema import RunConfig
from support.tiny_run import tiny_config

Lines = Sequence[Mapping[str, Any]]


def step_line(step: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: the loss falls, a step takes a second for 1,000 tokens."""
    line = {"step": step, "ce_loss": 8 / step, "grad_norm": 1.0 + step % 3, "lr": 0.01, "tokens": 1000, "seconds": 1.0}
    return line | {"tokens_per_second": 1000.0, "resident_peak_gib": 0.5 + step / 100} | values


def make_folder(
    folder: Path, steps: int = 6, checkpoints: Sequence[int] = (0, 4), lines: Lines | None = None, **values: Any
) -> Path:
    """A run's folder with configuration, preflight report, metrics and checkpoints (without tensors)."""
    config: RunConfig = tiny_config(**{"max_steps": 10, "save_steps": 4, **values})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    lines = [step_line(step) for step in range(1, steps + 1)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for step in checkpoints:
        place = folder / "checkpoints" / f"step-{step:06d}"
        place.mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
    return folder
