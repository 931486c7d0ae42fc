"""What a run is watched for beside the guards that stop it; nothing here changes the run by a bit.

Held-out documents are evaluated every `eval_steps`. A spike, a first loss that is not the base's own and a hypernetwork
that does not read its documents are named in a warning each, and among the run's events.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from warnings import warn

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from d2l.config.schema import RunConfig
from d2l.data.tokenize import Row
from d2l.hypernet.model import DocToLora
from d2l.io.run_folder import EVALUATIONS, METRICS
from d2l.train.curriculum import Curriculum
from d2l.train.events import note_event
from d2l.train.first_step import FIRST_STEP, UNKNOWN, Prediction, describe_first_step
from d2l.train.heldout import Heldout
from d2l.train.history import TAIL, read_metrics
from d2l.train.losses import compute_loss
from d2l.train.metrics import EVALUATED, LOSS_SUFFIX, StepMetrics
from d2l.train.processes import OneProcess
from d2l.train.random_state import random_state, restore_random_state
from d2l.train.reading import ReadingGuard
from d2l.train.replay import StepInputs
from d2l.train.spikes import SpikeGuard

# A new LoRA is zero, so that the first step's loss is the base's own: on CPUs to the last bit, in float32 and bfloat16. Sums
# of several processes may differ in their last bits. Random B of 0.3 in a tiny model made it differ by 0.25% to 7%.
FIRST_LOSS_BOUND = 1e-3  # of the base's loss
SHOWN_RECORDS = 8


class WatchedRun(Protocol):
    """What is looked at of a trainer."""

    model: DocToLora
    config: RunConfig
    processes: PartialState | OneProcess
    curriculum: Curriculum
    inputs: StepInputs | None

    def require_sound_state(self) -> None:
        """Refuse weights that the last update has spoilt."""


class Watch:
    """Looks at every step of a run; in several processes all of them do the same, and the main one writes and warns.

    Args:
        folder: the run's.
        heldout: rows of the held-out documents, for each stage of the run, or for all; empty: there is no evaluation.
        sources: where each record stands, by its index; empty: records are named by their index alone.
        prediction: of the run's steps, by its preflight.
        first_step: its figures as a checkpoint kept them, of a run that goes on; None: there are none.
    """

    def __init__(
        self,
        trainer: WatchedRun,
        folder: Path,
        heldout: Sequence[Sequence[Row]] = (),
        sources: Sequence[str] = (),
        prediction: Prediction = UNKNOWN,
        first_step: Mapping[str, Any] | None = None,
    ) -> None:
        self._trainer, self._folder, self._sources = trainer, folder, sources
        self._prediction, self._first_step = prediction, first_step
        assert not heldout or trainer.config.eval_steps is not None, "held-out rows without eval_steps"
        self._heldout = [Heldout(trainer.model, rows, trainer.config) for rows in heldout]
        self._spikes, self._reading = SpikeGuard(), ReadingGuard()
        loss = f"{trainer.config.loss}{LOSS_SUFFIX}"
        steps, _ = read_metrics(folder / METRICS, TAIL)  # of a run that goes on: what its next steps are compared with
        for record in steps:
            if {loss, "grad_norm", "stage"} <= record.keys():
                self._spikes.observe(record[loss], record["grad_norm"], int(record["stage"]))
        evaluations, _ = read_metrics(folder / EVALUATIONS)
        self._reading.recall(evaluations, trainer.config.loss, trainer.config.warmup_steps)
        self.evaluation: dict[str, float] = {}  # of the last step, under `eval/`; empty where that was not evaluated

    def observe(self, metrics: StepMetrics) -> None:
        """Look at the step that was taken last; `evaluation` holds its scores where it is evaluated.

        Raises:
            NonFiniteError: at an evaluation, where the step has spoilt the weights.
            OSError: the folder cannot be written.
        """
        if spikes := self._spikes.observe(metrics.task_loss, metrics.grad_norm, metrics.stage):
            found = "; ".join(map(str, spikes))
            self._name(f"step {metrics.step:,} is far from those before it: {found}; {self._records()}")
        if metrics.step == 1:
            self._look_at_first_step(metrics)
        self.evaluation = self.evaluate(metrics.step) if self._is_due(metrics.step) else {}

    def evidence(self) -> dict[str, Any]:
        """Return what every checkpoint keeps of what was seen, as JSON values: the first step's figures, once it is taken."""
        return {} if self._first_step is None else {FIRST_STEP: self._first_step}

    def _is_due(self, step: int) -> bool:
        config = self._trainer.config
        return bool(self._heldout) and (step % (config.eval_steps or 1) == 0 or step == config.max_steps)

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate, write a line, and judge whether documents are read; return the scores under `eval/`.

        Raises:
            NonFiniteError: the step has spoilt the weights.
            OSError: the folder cannot be written.
        """
        trainer = self._trainer
        trainer.require_sound_state()
        started, drawn = time.perf_counter(), random_state()
        stage = min(trainer.curriculum.stage, len(self._heldout) - 1)
        scores = self._heldout[stage].evaluate()
        restore_random_state(drawn)
        seconds = time.perf_counter() - started
        values = {"step": step, "stage": stage + 1, **scores.to_json(), "seconds": seconds}
        if trainer.processes.is_main_process:
            with (self._folder / EVALUATIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
                file.flush()
                os.fsync(file.fileno())  # the step's checkpoint comes after it
        if found := self._reading.observe(scores, step, trainer.config.warmup_steps):
            self._name(f"step {step:,}: {found}")
        return {f"{EVALUATED}{key}": value for key, value in values.items() if key not in ("step", "stage")}

    def _look_at_first_step(self, metrics: StepMetrics) -> None:
        """Keep its figures, and compare its loss with that of the base without a LoRA, on the same rows."""
        base, inputs = self._base_loss(), self._trainer.inputs
        assert inputs is not None, "no step was taken"
        self._first_step = describe_first_step(metrics, inputs, base, self._prediction)
        if abs(metrics.task_loss - base) <= FIRST_LOSS_BOUND * max(abs(base), 1.0):
            return
        self._name(
            f"the first step's loss is {metrics.task_loss:.4g}, and without a LoRA the base's own is {base:.4g} on the same "
            "rows: expected them equal, because a new LoRA is zero; is another LoRA merged into the base, or the "
            "initialisation of scaler_B or bias_B changed?"
        )

    @torch.no_grad()
    def _base_loss(self) -> float:
        """Return the task's loss of the last step's rows without a LoRA, over all processes."""
        trainer, inputs = self._trainer, self._trainer.inputs
        assert inputs is not None, "no step was taken"
        processes, config = trainer.processes, trainer.config
        total = torch.zeros(1, device=processes.device)
        for batch in inputs.batches[processes.process_index :: processes.num_processes]:
            moved = batch.to(processes.device)
            logits = trainer.model.logits(moved, None, positions=moved.prediction_positions)
            total += compute_loss(
                logits,
                moved,
                None,
                inputs.normalizer,
                loss=config.loss,
                use_per_ctx_average_loss=config.use_per_ctx_average_loss,
            ).task
        return float(reduce(total, reduction="sum") if processes.num_processes > 1 else total)

    def _records(self) -> str:
        """Name the records of the last step's rows."""
        inputs = self._trainer.inputs
        assert inputs is not None, "no step was taken"
        records = sorted({record for batch in inputs.batches for record in batch.record_ids})
        named = [f"{it} ({self._sources[it]})" if it < len(self._sources) else str(it) for it in records]
        more = f" and {len(named) - SHOWN_RECORDS:,} more" if len(named) > SHOWN_RECORDS else ""
        return f"its records: {', '.join(named[:SHOWN_RECORDS])}{more}"

    def _name(self, text: str) -> None:
        """Warn once, and note it among the events."""
        if self._trainer.processes.is_main_process:
            note_event(self._folder, text)
            warn(text, stacklevel=3)
