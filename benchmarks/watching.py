"""What watching a run costs: `python -m benchmarks.watching [CONFIG …] [--repeats N]`, on CUDA where there is one.

Steps with guards, metrics, an evaluation or a save, over steps of the same run on the same rows without, by turns: the median
of the ratios with the smallest and largest, by wall time, and by processor time (the writer of checkpoints included), which
other work on the machine bends less. A save is beside the step after it, so it is measured over two.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Ratio, Work, seconds
from d2l.build import Components
from d2l.config.load import load_config
from d2l.io.run_folder import METRICS
from d2l.train.loop import Trainer
from d2l.train.metrics import StepMetrics
from d2l.train.saving import Saver, saver
from d2l.train.watch import Watch

CONFIGS = ("configs/tiny_gpt_oss.yaml", "configs/needle_tiny.yaml")
REPEATS, EVERY = 15, 100  # EVERY: steps between evaluations where the config has none


@dataclass(frozen=True)
class Cost:
    """Steps with what is measured, the same steps without, and every how many steps a run does it."""

    what: str
    watched: Work
    plain: Work
    every: int


class Run:
    """A run in progress in a folder, and its parts that cost something."""

    def __init__(self, name: str, folder: Path, metrics: TextIO, saving: Saver) -> None:
        self._config = load_config(Path(name), {"warmup_steps": "0", "max_steps": "1000000"})
        if self._config.eval_steps is None:
            self._config = self._config.model_copy(update={"eval_steps": EVERY})
        components = Components(self._config)
        self._trainer = Trainer(components.model, components.rows, self._config)
        self._watch = Watch(self._trainer, folder, components.heldout)
        self._metrics, self._saving = metrics, saving
        self._step()  # without it there are no moments

    def costs(self) -> Iterator[Cost]:
        """Yield what is measured."""
        step, config = self._step, self._config
        yield Cost("guards", step, self._unguarded, 1)
        yield Cost("metrics", self._written, step, 1)
        yield Cost("evaluation", self._evaluated, step, config.eval_steps or EVERY)
        yield Cost("save", self._saved, lambda: (step(), step()), config.save_steps)

    def _step(self) -> StepMetrics:
        """Take a step on the first rows of the first epoch, as every other one."""
        self._trainer.epoch, self._trainer.position = 0, 0
        return self._trainer.step()

    def _unguarded(self) -> None:
        none: Mapping[str, Any] = {
            "is_spoilt": lambda *_: torch.zeros(()),
            "require_sound_state": lambda **_: None,
            "require_finite_step": lambda **_: None,
            "random_state": dict,  # what an autopsy needs
        }
        with patch.multiple("d2l.train.loop", **none):
            self._step()

    def _written(self) -> None:
        metrics = self._step()
        self._metrics.write(json.dumps(metrics.to_json()) + "\n")
        self._metrics.flush()
        with patch.object(self._watch, "_is_due", lambda step: False):
            self._watch.observe(metrics)

    def _evaluated(self) -> None:
        self._watch.evaluate(self._step().step)

    def _saved(self) -> None:
        self._step()
        self._trainer.require_sound_state()
        self._saving.save(self._trainer.step_number, self._trainer.checkpoint())
        self._step()
        self._saving.settle(wait=True)


@contextmanager
def started(name: str) -> Iterator[Run]:
    """Start the run of a configuration in a folder that is removed."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".watching-") as place:
        folder = Path(place)
        with (folder / METRICS).open("a", encoding="utf-8") as metrics, saver(folder, 2) as saving:
            yield Run(name, folder, metrics, saving)


def measure(cost: Cost, repeats: int) -> tuple[Ratio, Ratio]:
    """Time both by turns, each first in every other one; return the ratios of wall and of processor time."""
    wall, processor = [], []
    for turn in range(repeats + 1):
        order = ("watched", "plain") if turn % 2 else ("plain", "watched")
        took = {name: _times(getattr(cost, name)) for name in order}
        wall.append(took["watched"][0] / took["plain"][0])
        processor.append(took["watched"][1] / took["plain"][1])
    return Ratio(tuple(wall[1:])), Ratio(tuple(processor[1:]))


def _times(work: Work) -> tuple[float, float]:
    """Return wall and processor time of one call."""
    before = time.process_time()
    return seconds(work), time.process_time() - before


def main(arguments: list[str] | None = None) -> None:
    """Print a table with a line for each part of each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns of each comparison")
    options = parser.parse_args(arguments)
    table = Table("config", "what", "every", "wall", "", "processor", "")
    for name in options.configs:
        with started(name) as run:
            for cost in run.costs():
                wall, processor = measure(cost, options.repeats)
                values = (value for it in (wall, processor) for value in (f"{it.median:.3f}", it.spread))
                table.add_row(Path(name).stem, cost.what, f"{cost.every:,}", *values)
    Console().print(table)


if __name__ == "__main__":
    main()
