"""A few steps of the run with its real weights, on the device that it would use: losses, gradients and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from checks.oracles.loss import context_mean, token_mean
from checks.result import Inapplicable, Result, Skip
from checks.subject import changed
from checks.trained_values import reckoned_sizes
from checks.training.observed import observed_step
from checks.training.steps import shared
from d2l.base.files import has_weights_here, is_config_only
from d2l.plan.memory import memory_plan
from d2l.plan.operations import count_operations
from d2l.plan.rows import SAMPLE, DataRows

if TYPE_CHECKING:
    from checks.implementation import Model
    from checks.subject import Subject
    from d2l.config.schema import RunConfig
    from d2l.data.packing import PackedBatch
    from d2l.data.tokenize import Row
    from d2l.plan.rows import RowShape
    from d2l.plan.sizes import Sizes

STEPS = 3  # the first moves what starts at zero, the second what that kept from moving; in the third all have gradients
ON_CPU = 2e12  # operations of a step that two cores do in some ten seconds


@dataclass(frozen=True)
class DeviceSteps:
    """What the steps showed.

    Attributes:
        losses: task loss of every step but the last.
        expected: the base's own loss on the first step's rows; None where the new LoRA is not zero.
        unreached: parameters of the hypernetwork without a gradient in the last step.
        peak, reckoned: most bytes of the GPU that tensors took in a step, and what the plan says; no peak without a GPU.
        tokens: of the packed row, documents and questions.
    """

    losses: tuple[float, ...]
    expected: float | None
    unreached: tuple[str, ...]
    peak: int | None
    reckoned: int
    tokens: int


def nothing_to_load(subject: "Subject") -> Result | None:
    """Return why there are no real weights to load as a whole, or None where there are."""
    name = subject.config.model_name_or_path
    if is_config_only(name):
        return Inapplicable("the base is random, of a config file")
    if not has_weights_here(name):
        return Skip(f"the weights of {name} are not on this machine")
    if subject.config.base_sharding == "full":
        return Skip("the base is sharded over the run's processes")
    return None


def nothing_to_train(subject: "Subject") -> str:
    """Say why the real weights cannot be asked about the run's data; empty where they can."""
    if nothing_to_load(subject) is not None:
        return "there are no weights to load"
    return "" if subject.records is not None and subject.tokenizer is not None else "there is no data"


def device_steps(subject: "Subject") -> DeviceSteps | Result:
    """Take the steps once for all checks, or return why none can be taken."""
    return shared(subject, "device_steps", lambda: _steps(subject))


def _steps(subject: "Subject") -> DeviceSteps | Result:
    if reason := nothing_to_load(subject):
        return reason
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    config = changed(
        subject.config, gradient_accumulation_steps=1, curriculum=(), max_steps=max(STEPS, subject.config.max_steps)
    )
    rows = _rows_of_the_largest(subject, config)
    if not rows:
        return Skip("no record of the data fits a packed row")
    shapes, sizes = DataRows.of(rows, "").shapes(config), reckoned_sizes(subject, subject.plan)
    operations = max(sum(count_operations(sizes, shape).values()) for shape in shapes)
    if subject.plan.device.value == "cpu" and operations > ON_CPU:
        return Skip(f"a step of {operations:.0e} operations takes minutes on a CPU")
    return _taken(subject, config, rows, sizes, shapes)


def _rows_of_the_largest(subject: "Subject", config: "RunConfig") -> "list[Row]":
    """Return the rows that share the largest packed row, of a sample of the run's data."""
    rows = subject.rows.rows
    sample = [rows[place] for place in range(0, len(rows), max(1, len(rows) // SAMPLE))]
    batches = subject.implementation.batches(config, sample)
    largest = max(batches, key=_tokens, default=None)
    wanted = set(largest.record_ids) if largest else set[int]()
    return [row for row in sample if row.record in wanted]


def _tokens(batch: "PackedBatch") -> int:
    return batch.ctx_ids.shape[1] + batch.input_ids.shape[1]


def _taken(
    subject: "Subject", config: "RunConfig", rows: "Sequence[Row]", sizes: "Sizes", shapes: "Sequence[RowShape]"
) -> DeviceSteps:
    """Load the base as the run does, and take its steps on these rows."""
    implementation = subject.implementation
    base = implementation.load_base(Path(config.model_name_or_path), subject.plan)
    model = implementation.build(base, config)
    batch = implementation.batches(config, rows)[0].to(base.device)
    model.hypernet.to(base.device)
    expected = own_loss(model, batch, config) if _starts_at_zero(model, batch) else None
    trainer = implementation.trainer(model, rows, config)
    losses: list[float] = []

    def take() -> None:
        losses.extend(trainer.step().task_loss for _ in range(STEPS - 1))

    peak = implementation.peak_memory(take)
    gradients = observed_step(trainer).gradients
    unreached = [
        name for name, _ in model.hypernet.named_parameters() if name not in gradients or not gradients[name].any()
    ]
    return DeviceSteps(
        losses=tuple(losses),
        expected=expected,
        unreached=tuple(unreached),
        peak=peak,
        reckoned=memory_plan(sizes, shapes).peak,
        tokens=_tokens(batch),
    )


@torch.no_grad()
def _starts_at_zero(model: "Model", batch: "PackedBatch") -> bool:
    """Tell whether the LoRA of a new hypernetwork changes nothing."""
    return not any(bool(side.any()) for side in model.lora(batch).B.values())


@torch.no_grad()
def own_loss(model: "Model", batch: "PackedBatch", config: "RunConfig") -> float:
    """Return the task loss of the base alone on a packed row that is a whole step, in nats."""
    logits = model.logits(batch, None, positions=batch.prediction_positions).cpu().double()
    tokens = _of_labels(logits, batch, config)
    of_queries = tokens.split(torch.bincount(batch.label_queries.cpu(), minlength=sum(batch.n_queries)).tolist())
    queries = iter(of_queries)
    losses = [[next(queries) for _ in range(count)] for count in batch.n_queries]
    return float(context_mean(losses) if config.use_per_ctx_average_loss else token_mean(losses))


def _of_labels(logits: Tensor, batch: "PackedBatch", config: "RunConfig") -> Tensor:
    """Return the loss of every label token, float64 [N], from the logits [N, V] that predict them."""
    if config.loss == "ce":
        labels = batch.labels[0][batch.label_positions].cpu()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert batch.logprobs_vals is not None
    assert batch.logprobs_indices is not None
    likely, ids = batch.logprobs_vals.double().cpu().exp(), batch.logprobs_indices.cpu()
    return -(likely * torch.log_softmax(logits, dim=-1).gather(1, ids)).sum(dim=-1)
