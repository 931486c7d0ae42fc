"""The training loop: packed batches in, one guarded optimizer step after another, checkpoints and metrics out.

`Trainer` holds what a run consists of; `run` is the loop. Several processes (`accelerate launch`, `torchrun`) share
each optimizer step: its micro-batches are dealt out by rank, and every loss is divided by counts of the whole step.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from d2l.checkpoint import Checkpoint, load_hypernet, save_checkpoint
from d2l.config.schema import RunConfig
from d2l.data.epochs import epoch_batches, stage_rows
from d2l.data.packing import PackedBatch
from d2l.data.tokenize import Row
from d2l.errors import CheckpointError
from d2l.fingerprint import base_facts
from d2l.hypernet.model import DocToLora
from d2l.io.run_folder import METRICS, step_folder
from d2l.train.curriculum import Curriculum
from d2l.train.diagnosis import autopsy_on_refusal
from d2l.train.gradients import SummedGradients
from d2l.train.guards import is_spoilt, require_finite_step, require_sound_state
from d2l.train.losses import Loss, Normalizer, compute_loss
from d2l.train.metrics import StepMetrics, packing_fill, peak_memory
from d2l.train.optimizer import make_optimizer, make_schedule, set_schedule, state_names
from d2l.train.processes import OneProcess, processes
from d2l.train.random_state import random_state, restore_random_state
from d2l.train.replay import StepInputs
from d2l.train.saving import saver
from d2l.train.stopping import StopRequest
from d2l.train.watch import Watch


def batch_loss(model: DocToLora, batch: PackedBatch, normalizer: Normalizer, config: RunConfig) -> Loss:
    """Generate the LoRAs of a packed row's documents and take the loss of its questions under them."""
    lora = model.lora(batch)
    logits = model.logits(batch, lora, positions=batch.prediction_positions)
    return compute_loss(
        logits,
        batch,
        lora,
        normalizer,
        loss=config.loss,
        use_per_ctx_average_loss=config.use_per_ctx_average_loss,
        l1_coefficient=config.gen_lora_l1_reg_coef,
    )


class Trainer:
    """A run in progress: the model, its optimizer and schedule, and the position in the data.

    Args:
        model: on any device; moved to this process's.
        rows: tokenized rows; packed anew, in another order, for every epoch.
        config: the resolved configuration.
        among: the processes that share each step; default: those of this run.
        stop: read at the end of every step.
    """

    def __init__(
        self,
        model: DocToLora,
        rows: Sequence[Row],
        config: RunConfig,
        among: "PartialState | OneProcess | None" = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.rows = config, rows
        self.stop, self._agreed_to_stop = stop or StopRequest(), False
        self.processes = among or processes()
        self.model = model.to(self.processes.device)
        self.model.hypernet.train()
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        self.optimizer = make_optimizer(model.hypernet, config)
        self.scheduler = make_schedule(self.optimizer, config)
        self.step_number, self.epoch, self.position = 0, 0, 0
        self.curriculum, self._stage_rows = Curriculum(config.stages), stage_rows(config, rows)
        self._packed: tuple[int, Sequence[PackedBatch]] = (-1, [])
        self.inputs: StepInputs | None = None  # of the step that is refused, or whose update is

    def step(self) -> StepMetrics:
        """Take one optimizer step.

        Raises:
            NonFiniteError: before anything is changed, when the step would spoil the weights or teach nothing, or when
                the update before it has spoilt them.
        """
        started = time.perf_counter()
        batches = self._next_batches()
        normalizer = Normalizer.of(batches, self.config.lora_r)
        rates = self.scheduler.get_last_lr()
        inputs = StepInputs(self.step_number + 1, batches, normalizer, max(map(float, rates)), random_state())
        sums = self._accumulate(batches, normalizer, self._spoilt())
        parameters = list(self.model.hypernet.parameters())
        grad_norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        # the one time in a step that the host waits for the device; nothing has been changed yet
        task, l1, exact_match, stopping, *spoilt, norm = torch.cat([sums, grad_norm.detach().to(sums)[None]]).tolist()
        self._require_none(spoilt)
        self._agreed_to_stop = stopping > 0
        self.inputs = inputs
        coefficient = self.config.gen_lora_l1_reg_coef
        require_finite_step(
            step=self.step_number + 1,
            loss=task + coefficient * l1 if coefficient else task,
            grad_norm=norm,
            label_tokens=normalizer.label_tokens,
            records=[record for batch in batches for record in batch.record_ids],
            parameters=self.model.hypernet.named_parameters(),
        )
        # only now: clipping by a norm that is not finite would spoil all gradients, and the guard could name no culprit
        nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.step_number += 1
        stage = 1 + self.curriculum.stage
        if self.curriculum.observe(exact_match):
            self.epoch, self.position = self.epoch + 1, 0
        inp_fill, ctx_fill = packing_fill(batches, self.config)
        return StepMetrics(
            step=self.step_number,
            loss=self.config.loss,
            task_loss=task,
            grad_norm=norm,
            gen_lora_l1_norm=l1,
            exact_match=exact_match,
            stage=stage,
            lr=float(rates[-1]),
            tokens=sum(batch.n_tokens + batch.ctx_ids.shape[1] for batch in batches),
            label_tokens=normalizer.label_tokens,
            seconds=time.perf_counter() - started,
            inp_fill=inp_fill,
            ctx_fill=ctx_fill,
            memory=peak_memory(self.processes.device),
        )

    @property
    def should_stop(self) -> bool:
        """Whether the last step was to be the last: the same in all processes, so that a late request waits for the next."""
        return self._agreed_to_stop or (self.processes.num_processes == 1 and self.stop.is_made)

    def checkpoint(self, **evidence: Any) -> Checkpoint:
        """Collect everything needed to continue this run elsewhere; `evidence` is kept in its state as it is."""
        trainer = random_state()
        for name, parameter in self.model.hypernet.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            trainer |= {f"optimizer.{key}.{name}": value for key, value in moments.items()}
        state = {
            "step": self.step_number,
            "epoch": self.epoch,
            "position": self.position,
            "curriculum": self.curriculum.state(),
            "processes": self.processes.num_processes,
            "config": self.config.resolved(),
            "base": base_facts(self.model.base.config),
            **evidence,
        }
        return Checkpoint(hypernet=dict(self.model.hypernet.state_dict()), trainer=trainer, state=state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was taken: weights, moments, schedule, data position and random state.

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape.
        """
        load_hypernet(self.model.hypernet, checkpoint.hypernet)
        kept = state_names(self.optimizer)
        for name, parameter in self.model.hypernet.named_parameters():
            moments = {key: checkpoint.trainer.get(f"optimizer.{key}.{name}") for key in kept[parameter]}
            if checkpoint.state["step"] > 0 and any(value is None for value in moments.values()):
                raise CheckpointError(f"the checkpoint lacks optimizer moments of {name}; resume from another one")
            if checkpoint.state["step"] > 0:
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True)  # a fused optimizer counts its steps there too
                    for key, value in moments.items()
                    if value is not None
                }
        set_schedule(self.scheduler, checkpoint.state["step"])
        self.step_number, self.epoch, self.position = (checkpoint.state[name] for name in ("step", "epoch", "position"))
        self.curriculum.restore(checkpoint.state["curriculum"])
        restore_random_state(checkpoint.trainer)

    def require_sound_state(self) -> None:
        """Refuse weights or moments that the last update has spoilt, in any process; the host waits for the device.

        Raises:
            NonFiniteError: the message names their tensors.
        """
        flags = self._spoilt()
        self._require_none((reduce(flags, reduction="sum") if self.processes.num_processes > 1 else flags).tolist())

    def _spoilt(self) -> Tensor:
        """Return 1 at this process's place where an update has spoilt its weights or moments, float32 [processes]."""
        flags = torch.zeros(self.processes.num_processes, device=self.processes.device)
        flags[self.processes.process_index] = is_spoilt([*self.model.hypernet.parameters()], self.optimizer)
        return flags

    def _require_none(self, spoilt: Sequence[float]) -> None:
        """Raise where a process has spoilt weights or moments, from the flags of all."""
        require_sound_state(
            step=self.step_number,
            spoilt_ranks=[rank for rank, flag in enumerate(spoilt) if flag],
            named=self.model.hypernet.named_parameters(),
            optimizer=self.optimizer,
        )

    def _accumulate(self, batches: Sequence[PackedBatch], normalizer: Normalizer, spoilt: Tensor) -> Tensor:
        """Accumulate the step's gradients; return all processes' sums.

        Returns:
            task loss, L1 norm, exact match, requests to stop, and `spoilt`: float32 [4 + processes] on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        count, rank, device = self.processes.num_processes, self.processes.process_index, self.processes.device
        sums = torch.zeros(3, device=device)
        own = [batch.to(device) for batch in batches[rank::count]]  # every copy is queued before the first forward
        for number, batch in enumerate(own, start=1):
            loss = batch_loss(self.model, batch, normalizer, self.config)
            # losses are divided by counts of all processes, so gradients add up
            shared = SummedGradients([*self.model.hypernet.parameters()]) if count > 1 and number == len(own) else None
            with shared.during() if shared else nullcontext():
                loss.total.backward()
            sums += torch.stack([loss.task.detach(), loss.l1.detach(), loss.exact_match])
        sums = torch.cat([sums, torch.full((1,), float(self.stop.is_made), device=device), spoilt])
        return reduce(sums, reduction="sum") if count > 1 else sums

    def _next_batches(self) -> list[PackedBatch]:
        """Take the micro-batches of the next step, for all processes; an epoch's rest joins the next epoch."""
        wanted = self.config.gradient_accumulation_steps * self.processes.num_processes
        batches: list[PackedBatch] = []
        while len(batches) < wanted:
            packed = self._epoch_batches()
            taken = packed[self.position : self.position + wanted - len(batches)]
            batches += taken
            self.position += len(taken)
            if self.position >= len(packed):
                self.epoch, self.position = self.epoch + 1, 0
        return batches

    def _epoch_batches(self) -> Sequence[PackedBatch]:
        """Return all packed rows of the current epoch, in its order."""
        if self._packed[0] != self.epoch:
            among = self._stage_rows[self.curriculum.stage]
            self._packed = (self.epoch, epoch_batches(self.config, self.rows, self.epoch, among))
        return self._packed[1]


def train_steps(trainer: Trainer, folder: Path, watch: Watch | None = None, **evidence: Any) -> Iterator[StepMetrics]:
    """Train to `max_steps`, or to the step in which the trainer is asked to stop; yield every step's metrics.

    Metrics and checkpoints go into the run's folder. A checkpoint is written before the first step: a run that cannot
    save should fail now and not hours later. Others are written beside the steps after them; the last step waits for its.

    Args:
        trainer: new, or restored from a checkpoint of this folder.
        folder: the run's folder, which exists.
        watch: looks at every step before it is saved, and evaluates held-out documents; changes nothing of the run.
        evidence: JSON values to be kept in every checkpoint (fingerprint, preflight summary).

    Raises:
        NonFiniteError: before the step that would have spoilt the weights, or before weights that an update has spoilt
            are saved; an autopsy lies in the folder.
        CheckpointError: a checkpoint cannot be written; raised before a later step is yielded.
    """
    config, main = trainer.config, trainer.processes.is_main_process
    loss = partial(batch_loss, trainer.model, config=config)

    def checkpoint() -> Checkpoint:
        return trainer.checkpoint(**evidence, **({} if watch is None else watch.evidence()))

    with (
        (folder / METRICS).open("a", encoding="utf-8") as metrics_file,
        autopsy_on_refusal(trainer, folder, loss),
        saver(folder, config.save_total_limit) as saving,
    ):
        if trainer.step_number == 0:
            trainer.require_sound_state()
            if main and not step_folder(folder, 0).exists():  # a resumed run has it
                save_checkpoint(step_folder(folder, 0), checkpoint())
        while trainer.step_number < config.max_steps:
            metrics = trainer.step()
            trainer.stop.wait_for_step()
            stopping = trainer.should_stop
            last = stopping or metrics.step == config.max_steps
            if main:
                metrics_file.write(json.dumps(metrics.to_json()) + "\n")
                metrics_file.flush()
            if watch is not None:
                watch.observe(metrics)
            if last or metrics.step % config.save_steps == 0:
                trainer.require_sound_state()
                if main:
                    saving.save(metrics.step, checkpoint())
            saving.settle(wait=last)
            yield metrics
            if stopping:
                return
