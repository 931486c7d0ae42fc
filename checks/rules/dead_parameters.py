"""Every part of every parameter of the hypernetwork gets the gradient that the task loss has.

What it does
------------
Takes the gradient of a cross-entropy by every parameter on a twin of two layers, with a LoRA that is not zero, and
lists the parameters, and their parts for one layer or module of the base, where none arrives. Then it moves all
parameters together a little way up or down, each part by as much as its gradient is small, so that every part changes the
loss alike, and compares the change of the loss with what the gradient predicts, for three choices of ups and downs.

Why it matters
--------------
A detached tensor, or a module that is built and not used, leaves part of the hypernetwork as it was initialised: one
layer of a stacked weight, or everything that only one layer's latents would have brought to the shared parts. With an
L1 term `grad_norm` stays above zero, and `find_unused_parameters=True` hides the fault for good.

How it is detected
------------------
No part's gradient may be zero. The change of the loss, a central difference, must be the predicted one to less than a
quarter of what one part contributes; where it is not, halving the parameters again and again finds the part.

How to fix
----------
Follow the named parameters to the forward pass; look for `.detach()`, `.data`, `no_grad` and unused modules.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.oracles.loss import cross_entropy
from checks.probes import gradients, norm
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.steps import loss_rows, still_model
from d2l.data.packing import collate

if TYPE_CHECKING:
    from checks.subject import Subject

# Steps along the direction. The loss is rounded in float32 inside the model library and curved: smaller ones suffer from
# rounding, larger ones from curvature, each by about a tenth of a part's contribution, and where gradients are weak by more.
STEPS = (3e-6, 1e-5, 1e-6)
WEAKEST = 1e-5  # of the whole gradient's norm: a part below is moved, and counts, as if it were that strong
QUARTER = 0.25
DIRECTIONS = 3
REMEDY = "look for a detached tensor or an unused module on the way from these parameters to the loss"

Parts = dict[str, Tensor]  # "head.weight, layer 1" -> a view


def check(subject: "Subject") -> Result:
    """List the parts without a gradient, then compare the loss's change with the gradient's prediction."""
    slope = _Slope(subject)
    dead = [name for name, part in slope.gradient.items() if not part.any()]
    if dead:
        return Fail(
            message="part of the hypernetwork gets no gradient from the task loss",
            expected=f"a gradient for each of {len(slope.gradient)} parts of the parameters",
            actual=f"none for {len(dead)}, {dead[0]} among them",
            remedy=REMEDY,
            evidence={"dead": dead},
        )
    names = list(slope.gradient)
    error, signs = max((slope.error(names, signs), signs) for signs in range(DIRECTIONS))
    evidence: dict[str, Any] = {"parts": len(names), "error_in_parts": error, "norm": slope.norm}
    if not error < QUARTER:
        culprit = slope.worst(names, signs)
        evidence["culprit"] = culprit
        return Fail(
            message="the gradient is not that of the task loss: part of the way to the loss is cut or counted twice",
            expected=f"a change of the loss that {len(names)} parts of the parameters predict, to {QUARTER:g} parts",
            actual=f"off by {error:.2g} parts, most of all in {culprit}",
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(
        f"all {len(names)} parts of the parameters get a gradient (norm {slope.norm:.3g}), and the loss changes as they "
        f"predict, to {error:.1g} parts",
        evidence,
    )


class _Slope:
    """The gradient of a loss on the still twin, and finite differences of that loss."""

    def __init__(self, subject: "Subject") -> None:
        self._model = still_model(subject)
        self._batch = collate(loss_rows(subject))
        layers = len(
            next(iter(subject.implementation.targets(self._model.base, subject.config.target_modules).values()))
        )
        shape = (layers, len(subject.config.target_modules))
        found = gradients(self._model, self._loss())
        self.norm = norm(found)
        self.gradient = _parts(found, *shape)
        self._values = _parts({n: p.data for n, p in self._model.hypernet.named_parameters()}, *shape)
        generator = torch.Generator().manual_seed(0)
        self._direction = {name: self._along(part, generator) for name, part in self.gradient.items()}
        signs = torch.randint(2, (DIRECTIONS, len(self.gradient)), generator=generator) * 2 - 1
        self._signs = [dict(zip(self.gradient, row, strict=True)) for row in signs.tolist()]

    def _along(self, gradient: Tensor, generator: torch.Generator) -> Tensor:
        """Return a direction in which this part changes the loss by 1 per step: half its own gradient's, half random."""
        random = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        strength = gradient.norm().clamp(min=WEAKEST * self.norm)
        return (gradient / strength + random / random.norm()) / strength

    def _loss(self) -> Tensor:
        """Return the mean cross-entropy of the label tokens; scalar, with gradient."""
        logits = self._model.logits(self._batch, self._model.lora(self._batch))
        return cross_entropy(logits, self._batch.labels[0].tolist()).mean()  # no question's first token has a label

    def error(self, names: list[str], signs: int) -> float:
        """Return how far the change of the loss is from the predicted one, in contributions of one part.

        Args:
            names: the parts that are moved.
            signs: which of the random choices of signs: errors of several parts must not cancel in all of them.
        """
        moves = {name: self._signs[signs][name] * self._direction[name] for name in names}
        expected = sum(float((self.gradient[name] * move).sum()) for name, move in moves.items())
        errors = []
        for step in STEPS:
            errors.append(abs(self._difference(moves, step) - expected))
            if errors[-1] < QUARTER:
                break
        return min(errors)

    def worst(self, names: list[str], signs: int) -> str:
        """Find a part whose gradient is wrong: follow the half with the larger error."""
        while len(names) > 1:
            halves = names[: len(names) // 2], names[len(names) // 2 :]
            names = max(halves, key=lambda half: self.error(half, signs))
        return names[0]

    @torch.no_grad()
    def _difference(self, moves: Parts, step: float) -> float:
        """Return the central difference of the loss along these moves; the parameters are restored."""
        kept = {name: self._values[name].clone() for name in moves}
        losses = []
        for sign in (1, -1):
            for name, move in moves.items():
                self._values[name].copy_(kept[name] + sign * step * move)
            losses.append(float(self._loss()))
        for name, value in kept.items():
            self._values[name].copy_(value)
        return (losses[0] - losses[1]) / (2 * step)


def _parts(values: dict[str, Tensor], layers: int, modules: int) -> Parts:
    """Cut tensors that hold something for each layer, or for each layer and module, into views of one of these each."""
    parts: Parts = {}
    for name, value in values.items():
        axis = next((axis for axis in (0, 1) if value.ndim > 1 and value.shape[axis] == layers), None)
        if axis is None or (axis == 1 and value.shape[0] != 1):
            parts[name] = value
            continue
        for layer, part in enumerate(value.unbind(axis)):
            if axis == 0 and modules > 1 and part.ndim > 1 and part.shape[0] == modules:
                parts |= {f"{name}, layer {layer}, module {i}": piece for i, piece in enumerate(part.unbind(0))}
            else:
                parts[f"{name}, layer {layer}"] = part
    return parts


def _one_layer_detached(lora: Any, name: str, side: str) -> Any:
    """Cut the first layer off from the graph."""
    value = getattr(lora, side)[name]
    return torch.cat([value[:, :1].detach(), value[:, 1:]], dim=1)


def _side_detached(lora: Any, name: str, side: str) -> Any:
    """Cut A off from the graph."""
    value = getattr(lora, side)[name]
    return value.detach() if side == "A" else value


def _half_detached(lora: Any, name: str, side: str) -> Any:
    """Let half of the gradient through."""
    value = getattr(lora, side)[name]
    return (value + value.detach()) / 2


def _with(change: Callable[[Any, str, str], Any]) -> Callable[..., Model]:
    """Make a fault that builds a model whose LoRA passes through `change`, module by module and side by side."""

    def build(healthy: Implementation, base: Any, config: Any) -> Model:
        model: Any = healthy.build(base, config)
        generate = model.lora

        def lora(batch: Any) -> Any:
            made = generate(batch)
            return replace(made, **{side: {name: change(made, name, side) for name in made.A} for side in ("A", "B")})

        model.lora = lora
        return model

    return build


RULE = Rule(
    code="GRD204",
    name="dead-parameters",
    stage="twin",
    severity="error",
    sources=("sanity run", "failure mode 13", "failure mode 31", "failure mode C21", "failure mode C43"),
    requires=("LOR203", "HYP202", "QNT202"),
    check=check,
    faults=(
        Fault("one-layer-detached", "the first layer's LoRA is detached", override(build=_with(_one_layer_detached))),
        Fault("a-detached", "A of every module is detached", override(build=_with(_side_detached))),
        Fault("half-detached", "half of the LoRA's gradient is lost", override(build=_with(_half_detached))),
    ),
)
