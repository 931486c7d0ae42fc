"""A second implementation of Doc-to-LoRA, naive and of another design than d2l, to be examined by the same checks.

One question and one chunk at a time, forwards of Linears replaced for the length of a call, attention pooling with one
head instead of a Perceiver, whole questions recomputed under checkpointing. `bugs` plants what people met (docs/nine_fixes.md).
"""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, get_scheduler

from checks.foreign import Foreign, Lora, PackedBatch, contexts, stack
from checks.result import NotOffered
from d2l.config.schema import RunConfig
from d2l.data.packing import collate
from d2l.errors import ModelError

SCALE = 1.5


class Hypernet(nn.Module):
    """For every rank a query that pools the hidden states of a layer, and a map of each module from the pooled state."""

    def __init__(self, base: PreTrainedModel, config: RunConfig, sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        layers, hidden, width = base.config.num_hidden_layers, base.config.hidden_size, config.latent_size
        self.queries = nn.Parameter(torch.randn(layers, config.lora_r, width))
        self.key, self.value = nn.Linear(hidden, width), nn.Linear(hidden, width)
        self.to_A = nn.ModuleDict({name: nn.Linear(width, size[0]) for name, size in sizes.items()})
        self.to_B = nn.ModuleDict({name: nn.Linear(width, size[1]) for name, size in sizes.items()})

    def forward(self, hidden: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Map the hidden states [layers, S, hidden] of a chunk to A [layers, r, d_in] and B [layers, r, d_out]."""
        hidden = nn.functional.rms_norm(hidden, hidden.shape[-1:])
        scores = torch.einsum("lrd,lsd->lrs", self.queries, self.key(hidden)) / math.sqrt(self.queries.shape[-1])
        pooled = scores.softmax(-1) @ self.value(hidden)
        A = {name: linear(pooled) / math.sqrt(linear.out_features) for name, linear in self.to_A.items()}
        return A, {name: linear(pooled) for name, linear in self.to_B.items()}


class Model(nn.Module):
    """A base and a hypernetwork."""

    def __init__(self, base: PreTrainedModel, config: RunConfig, targets: Any, bugs: frozenset[str]) -> None:
        super().__init__()
        self.base, self.bugs, self.targets = base, bugs, targets
        sizes = {name: (linears[0].in_features, linears[0].out_features) for name, linears in targets.items()}
        self.hypernet = Hypernet(base, config, sizes)
        self.recompute: dict[str, Any] | None = None

    def lora(self, batch: PackedBatch) -> Lora:
        return stack([self._merged(context.chunks) for context in contexts(batch)], SCALE)

    def logits(self, batch: PackedBatch, lora: Lora | None, positions: Tensor | None = None) -> Tensor:
        if "leak" in self.bugs:  # the whole row at once: questions see each other
            pieces = [self._under(lora, 0, batch.input_ids[0])]
        else:
            pieces = [
                self._under(lora, index, question)
                for index, context in enumerate(contexts(batch))
                for question in context.questions
            ]
        logits = torch.cat(pieces)
        return logits if positions is None else logits[positions]

    def gradient_checkpointing_enable(self, kwargs: Mapping[str, Any]) -> None:
        self.recompute = {"use_reentrant": "reentrant" in self.bugs, **dict(kwargs)}
        if "reentrant" in self.bugs:
            self.recompute["use_reentrant"] = True

    def _merged(self, chunks: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Make the LoRA of a document: those of its chunks, one below another."""
        made = []
        for chunk in chunks:
            with torch.no_grad():
                states = self.base(input_ids=chunk[None], output_hidden_states=True, use_cache=False).hidden_states
            hidden = torch.cat(states[:-1])
            if "four dimensions" in self.bugs:
                torch.einsum("clmrd,lmdo->clmro", hidden[None], hidden)
            made.append(self.hypernet(hidden))
        A, B = ({name: torch.cat([pair[i][name] for pair in made], dim=1) for name in self.targets} for i in (0, 1))
        return A, B

    def _under(self, lora: Lora | None, index: int, ids: Tensor) -> Tensor:
        """Compute the logits of one question under the LoRA of its context."""
        if lora is None:
            return self.base(input_ids=ids[None], use_cache=False).logits[0]
        pairs = [(lora.A[name][index], lora.B[name][index]) for name in self.targets]
        names = list(self.targets)

        def run(*flat: Tensor) -> Tensor:
            matrices = dict(zip(names, zip(flat[::2], flat[1::2], strict=True), strict=True))
            with self._patched(matrices, lora.scale):
                return self.base(input_ids=ids[None], use_cache=False).logits[0]

        flat = [x for pair in pairs for x in pair]
        if self.recompute is None or not torch.is_grad_enabled():
            return run(*flat)
        if self.recompute.get("use_reentrant"):
            flat = [x.detach() for x in flat]  # what torch's reentrant kind amounts to for frozen layers
        return checkpoint(run, *flat, use_reentrant=False)

    @contextmanager
    def _patched(self, matrices: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Iterator[None]:
        """Replace the forward of every target, for the length of a call."""

        def patched(linear: nn.Linear, a: Tensor, b: Tensor) -> Any:
            def forward(x: Tensor) -> Tensor:
                kind = nn.Linear if "plain forward" in self.bugs else type(linear)
                return kind.forward(linear, x) + scale * (x @ a.T.to(x)) @ b.to(x)

            return forward

        for name, (a, b) in matrices.items():
            for layer, linear in enumerate(self.targets[name]):
                linear.forward = patched(linear, a[layer], b[layer])
        try:
            yield
        finally:
            for linears in self.targets.values():
                for linear in linears:
                    del linear.forward


def loss_terms(model: Model, batches: Sequence[PackedBatch], config: RunConfig) -> tuple[Tensor, Tensor]:
    """Compute the task loss and the weighted L1 term of one step, question by question."""
    by_context: list[list[Tensor]] = []
    pairs = []
    for batch in batches:
        lora = model.lora(batch)
        logits = model.logits(batch, lora)
        teacher = iter(
            [] if batch.logprobs_vals is None else zip(batch.logprobs_vals, batch.logprobs_indices, strict=True)
        )
        for index, context in enumerate(contexts(batch)):
            losses = [
                _question_loss(logits[place], labels, teacher if config.loss == "kl" else None)
                for place, labels in zip(context.places, context.labels, strict=True)
            ]
            by_context.append([loss for loss in losses if len(loss)])
            pairs.append({name: (lora.A[name][index], lora.B[name][index]) for name in lora.A})
    if config.use_per_ctx_average_loss:
        means = [torch.stack([loss.mean() for loss in losses]).mean() for losses in by_context if losses]
        task = torch.stack(means).sum() / len(by_context)
    else:
        task = torch.cat([loss for losses in by_context for loss in losses]).mean()
    chunks = max(max(batch.n_ctx_chunks) for batch in batches)
    rank = config.lora_r * chunks
    l1 = torch.stack(
        [sum(x.abs().sum() / (x.shape[0] * rank * x.shape[2]) for x in pair[name]) for pair in pairs for name in pair]
    ).mean()
    return task, config.gen_lora_l1_reg_coef * l1


def _question_loss(logits: Tensor, labels: Tensor, teacher: Any) -> Tensor:
    """Compute the losses of a question's labels, each from the logits before it."""
    losses = []
    for place, label in enumerate(labels.tolist()):
        if label == -100 or place == 0:
            continue
        logs = logits[place - 1].log_softmax(-1)
        if teacher is None:
            losses.append(-logs[label])
        else:
            values, indices = next(teacher)
            losses.append(-(values.exp() * logs[indices]).sum())
    return torch.stack(losses) if losses else logits.new_zeros(0)


@dataclass(frozen=True)
class Metrics:
    task_loss: float
    grad_norm: float


class Trainer:
    """A run: first-fit packing of a shuffled epoch, AdamW, one check before each step."""

    def __init__(self, model: Model, rows: Sequence[Any], config: RunConfig, bugs: frozenset[str]) -> None:
        if config.muon_learning_rate is not None:
            raise NotOffered("Muon")
        if config.curriculum:
            raise NotOffered("a curriculum")
        self.model, self.rows, self.config, self.bugs = model, list(rows), config, bugs
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        named = list(model.hypernet.named_parameters())
        decayed = [p for name, p in named if p.ndim > 1 and name.endswith("weight")]
        spared = [p for name, p in named if p.ndim < 2 or not name.endswith("weight")]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        self.schedule = schedule(self.optimizer, config)
        self.epoch, self.position = 0, 0

    def step(self) -> Metrics:
        batches = [self._next() for _ in range(self.config.gradient_accumulation_steps)]
        if not any(batch.n_labels for batch in batches):
            raise ValueError("no label in this step")
        self.optimizer.zero_grad()
        task, l1 = loss_terms(self.model, batches, self.config)
        (task + l1).backward()
        parameters = list(self.model.hypernet.parameters())
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        if not (torch.isfinite(task) and torch.isfinite(norm)):
            raise ValueError("not finite")
        torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return Metrics(float(task.detach()), float(norm))

    def save(self, folder: Path) -> None:
        folder.mkdir()
        tensors: dict[str, Any] = {name: x.contiguous() for name, x in self.model.hypernet.state_dict().items()}
        if "object in state" in self.bugs:
            tensors["config"] = self.config
        save_file(tensors, folder / "weights.safetensors")
        schedule_state = {name: x for name, x in self.schedule.state_dict().items() if name != "lr_lambdas"}
        rest = {"optimizer": self.optimizer.state_dict(), "schedule": schedule_state}
        torch.save({**rest, "epoch": self.epoch, "position": self.position}, folder / "rest.pt")

    def resume(self, folder: Path) -> None:
        self.model.hypernet.load_state_dict(load_file(folder / "weights.safetensors"))
        rest = torch.load(folder / "rest.pt", weights_only=True)
        self.optimizer.load_state_dict(rest["optimizer"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **rest["schedule"]})
        self.epoch, self.position = rest["epoch"], rest["position"]

    def _next(self) -> PackedBatch:
        groups = self._groups()
        batch = collate([self.rows[index] for index in groups[self.position]])
        self.position += 1
        if self.position == len(groups):
            self.epoch, self.position = self.epoch + 1, 0
        return batch

    def _groups(self) -> list[list[int]]:
        order = list(range(len(self.rows)))
        random.Random(f"{self.config.seed} {self.epoch}").shuffle(order)
        groups: list[list[int]] = []
        room: list[list[int]] = []
        for index in order:
            size = self.rows[index].size
            fits = (number for number, left in enumerate(room) if left[0] >= size[0] and left[1] >= size[1])
            if (number := next(fits, None)) is None:
                number = len(groups)
                groups.append([])
                room.append([self.config.max_packed_inp_len, self.config.max_packed_ctx_len])
            groups[number].append(index)
            room[number] = [left - used for left, used in zip(room[number], size, strict=True)]
        return groups


def schedule(optimizer: torch.optim.Optimizer, config: RunConfig) -> Any:
    options: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr": config.min_lr},
        "warmup_stable_decay": {"num_decay_steps": config.decay_steps, "decay_type": "linear"},
    }
    kind = config.lr_scheduler_type
    return get_scheduler(kind, optimizer, config.warmup_steps, config.max_steps, options.get(kind, {}))


class Naive(Foreign):
    """The implementation, with bugs or without."""

    def __init__(self, *bugs: str) -> None:
        self.bugs = frozenset(bugs)

    def build(self, base: PreTrainedModel, config: RunConfig) -> Model:
        return Model(base, config, self.targets(base, config.target_modules), self.bugs)

    def targets(self, base: PreTrainedModel, names: Sequence[str]) -> Mapping[str, Sequence[nn.Module]]:
        if "partial targets" not in self.bugs:
            return super().targets(base, names)
        found: dict[str, Sequence[nn.Module]] = {}
        for name in names:
            try:
                found |= super().targets(base, [name])
            except ModelError:
                continue
        return found

    def learning_rates(self, config: RunConfig, steps: Sequence[int]) -> list[float]:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
        (factor,) = schedule(optimizer, config).lr_lambdas
        return [config.learning_rate * factor(step) for step in steps]

    def loss(self, model: Model, batches: Sequence[PackedBatch], config: RunConfig) -> tuple[Tensor, Tensor]:
        return loss_terms(model, batches, config)

    def trainer(self, model: Model, rows: Sequence[Any], config: RunConfig) -> Trainer:
        return Trainer(model, rows, config, self.bugs)

    def export(self, lora: Lora, base: PreTrainedModel, folder: Path) -> None:
        folder.mkdir(parents=True)
        paths = {id(module): path for path, module in base.named_modules()}
        tensors = {}
        for name, linears in self.targets(base, list(lora.A)).items():
            for layer, linear in enumerate(linears):
                path = f"base_model.model.{paths[id(linear)]}"
                tensors[f"{path}.lora_A.weight"] = lora.A[name][0, layer].contiguous()
                tensors[f"{path}.lora_B.weight"] = lora.B[name][0, layer].T.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.scale * lora.rank}
        settings["target_modules"] = list(lora.A)
        (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
