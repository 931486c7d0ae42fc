"""Benchmark of saving: `python -m benchmarks.saving [CONFIG …]`, on CUDA where there is one.

What a save costs the thread that trains, as a share of a step: the copy of the state alone, as `d2l.train.saving` has it,
and the whole save, as it would be without a thread of its own. The steps after a save share the processor with its writer:
their time over that of steps beside which nothing is written. Medians of interleaved rounds.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.timing import seconds
from d2l.build import Components
from d2l.config.load import load_config
from d2l.io.run_folder import METRICS
from d2l.train.loop import Trainer
from d2l.train.saving import saver

CONFIGS = ("configs/tiny_gpt_oss.yaml", "configs/needle_tiny.yaml")
ROUNDS, KEPT = 5, 2


@dataclass(frozen=True)
class Saving:
    """Medians in seconds: a step by itself, the copy, the whole save, and a step beside the writer; bytes of a checkpoint."""

    step: float
    copy: float
    whole: float
    beside: float
    size: int


def measure(trainer: Trainer, folder: Path, rounds: int) -> Saving:
    """Take steps and save them, each by itself, and both beside each other, by turns."""
    (folder / METRICS).touch()
    rows = []
    with saver(folder, KEPT) as saving:

        def save() -> None:
            saving.save(trainer.step_number, trainer.checkpoint())

        for _ in range(rounds + 1):
            step = seconds(trainer.step)
            whole = seconds(save) + seconds(lambda: saving.settle(wait=True))
            trainer.step()
            copy = seconds(save)
            beside = seconds(trainer.step)
            saving.settle(wait=True)
            rows.append((step, copy, whole, beside))
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) // KEPT
    return Saving(*(statistics.median(column) for column in zip(*rows[1:], strict=True)), size)


def main(configs: Sequence[str], rounds: int = ROUNDS) -> None:
    """Print a table with a line for each configuration."""
    table = Table("config", "checkpoint", "save / step", "before: save / step", "step beside the writer / step")
    for name in configs:
        config = load_config(Path(name), {"warmup_steps": "0"})
        components = Components(config)
        trainer = Trainer(components.model, components.rows, config)
        with tempfile.TemporaryDirectory(dir=".", prefix=".saving-") as folder:
            it = measure(trainer, Path(folder), rounds)
        ratios = (it.copy / it.step, it.whole / it.step, it.beside / it.step)
        table.add_row(Path(name).name, f"{it.size / 1e6:.1f} MB", *(f"{ratio:.3f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:] or CONFIGS)
