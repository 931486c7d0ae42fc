"""A bound LoRA is the base with edited weights, for each context's own tokens.

What it does
------------
Packs contexts of unequal lengths, with several chunks and questions each, into a row of the tiny twin, and contexts of
equal length into another. The logits of every question under the bound LoRA are compared with those of an untouched model
whose weights are W + scale · BᵀA, one question at a time; so are the gradients with respect to A and B.

Why it matters
--------------
A delta with the wrong scale, from the neighbour's document or in one layer less still trains: the loss falls, and what
is learned cannot be exported or served. A LoRA that is cut off from the graph in one layer never learns there.

How it is detected
------------------
In float64, logits of every question and gradients of every module and layer must agree to 1e-4 of the largest value, also
where the products of all contexts are grouped, as newer GPUs take them.

How to fix
----------
Add `scale · (x Aᵀ) B` to the output of every target, with the A and B of the context that each token belongs to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.oracles import edited_weights
from checks.probes import TOLERANCE, base_in_double, difference, in_double, packed_rows, probe_rows
from checks.result import Fail, NotOffered, Pass, Result, Skip
from checks.rule import Fault, Rule
from d2l.data.packing import collate

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.tokenize import Row
    from d2l.hypernet.lora import Lora


@dataclass(frozen=True)
class _Distances:
    """Largest differences of one packed row: of logits by question, of gradients by module and layer."""

    logits: dict[str, float]
    gradients: dict[str, float]


def check(subject: "Subject") -> Result:
    """Compare two packed rows, one of unequal and one of equal contexts, with edited weights."""
    unequal, equal = packed_rows(subject)[:2], probe_rows(subject, documents=(5, 6), questions=(6, 6), seed=2)
    model, untouched = in_double(subject.twin()), base_in_double(subject.twin_base())
    found = [_distances(model, untouched, rows) for rows in (unequal, equal)]
    with suppress(NotOffered), subject.implementation.as_on_gpu():
        found.append(_distances(model, untouched, unequal))
    logits, gradients = _largest(it.logits for it in found), _largest(it.gradients for it in found)
    for what, distances in (("logits", logits), ("gradients", gradients)):
        wrong = {place: distance for place, distance in distances.items() if not distance <= TOLERANCE}
        if wrong and any(_differs_unbound(model, untouched, rows) for rows in (unequal, equal)):
            return Skip(
                "packed questions differ from the same alone without any LoRA, which ATT201, ATT202 and ATT205 report"
            )
        if wrong:
            place = max(wrong, key=lambda key: wrong[key])
            return Fail(
                message=f"{what} under the bound LoRA are not those of edited weights",
                expected=f"W + scale · BᵀA in an untouched model, within {TOLERANCE:g} of the largest value",
                actual=f"{place}: {wrong[place]:.2g} off; {len(wrong)} of {len(distances)} places",
                remedy="add scale · (x Aᵀ) B to every target's output, with A and B of the token's own context",
                evidence={what: distances},
            )
    evidence = {"logits": max(logits.values()), "gradients": max(gradients.values())}
    return Pass(
        f"logits are those of edited weights to {evidence['logits']:.1g}, gradients to {evidence['gradients']:.1g}",
        evidence,
    )


def _largest(tables: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the largest distance of each place."""
    largest: dict[str, float] = {}
    for table in tables:
        for place, distance in table.items():
            largest[place] = max(distance, largest.get(place, 0.0))
    return largest


def _distances(model: Model, untouched: Any, rows: "Sequence[Row]") -> _Distances:
    """Compare a packed row with its questions alone."""
    batch = collate(rows)
    lora = _as_leaves(model.lora(batch))  # how it was generated plays no part here
    bound = model.logits(batch, lora)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(bound.shape, generator=generator, dtype=bound.dtype)
    sides = {"A": lora.A, "B": lora.B}
    values = [x for side in sides.values() for x in side.values()]
    own = _gradients((bound * probe).sum(), values)
    logits, start = {}, 0
    true: list[list[Tensor]] = []
    for context, row in enumerate(rows):
        leaves = [x[context].detach().requires_grad_() for x in values]
        A, B = dict(zip(lora.A, leaves, strict=False)), dict(zip(lora.B, leaves[len(lora.A) :], strict=True))
        loss = torch.zeros((), dtype=bound.dtype)
        for number, query in enumerate(row.queries):
            tokens = slice(start, start := start + len(query.input_ids))
            edited = edited_weights.logits(untouched, query.input_ids, A, B, lora.scale)
            logits[f"question {number} of context {context}"] = difference(bound[tokens].detach(), edited.detach())
            loss = loss + (edited * probe[tokens]).sum()
        true.append(_gradients(loss, leaves))
    expected = [torch.stack(parts) for parts in zip(*true, strict=True)]
    names = [f"{side} of {name}" for side, its in sides.items() for name in its]
    gradients = {
        f"gradient of {name} in layer {layer}": difference(ours[:, layer], theirs[:, layer])
        for name, ours, theirs in zip(names, own, expected, strict=True)
        for layer in range(theirs.shape[1])
    }
    return _Distances(logits, gradients)


def _as_leaves(lora: "Lora") -> "Lora":
    """Return the same values, each the start of a graph."""
    A, B = ({name: x.detach().requires_grad_() for name, x in side.items()} for side in (lora.A, lora.B))
    return replace(lora, A=A, B=B)


@torch.no_grad()
def _differs_unbound(model: Model, untouched: Any, rows: "Sequence[Row]") -> bool:
    """Return whether packing itself changes the base's logits: then nothing follows about the LoRA."""
    questions = [query.input_ids for row in rows for query in row.queries]
    alone = torch.cat([edited_weights.logits(untouched, ids, {}, {}, 1.0) for ids in questions])
    return difference(model.logits(collate(rows), None), alone) > TOLERANCE


def _gradients(loss: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient by each tensor; zeros where none arrives."""
    reached = [x for x in values if x.requires_grad]
    found = torch.autograd.grad(loss, reached, allow_unused=True) if loss.requires_grad else [None] * len(reached)
    by_tensor = {id(x): gradient for x, gradient in zip(reached, found, strict=True) if gradient is not None}
    return [by_tensor.get(id(x), torch.zeros_like(x)) for x in values]


def _binding(change: Callable[[Any], Any], unless: Callable[["Subject"], str] = lambda subject: "") -> Any:
    """Make a fault of a model that binds a changed LoRA."""

    def build(healthy: Implementation, base: Any, config: Any) -> Model:
        model: Any = healthy.build(base, config)
        logits = model.logits
        model.logits = lambda batch, lora, positions=None: logits(
            batch, None if lora is None else change(lora), positions
        )
        return model

    return override(build=build, unless=unless)


def _one_layer(subject: "Subject") -> str:
    return "the base has one layer" if subject.twin_base_config.num_hidden_layers == 1 else ""


def _each(lora: Any, change: Callable[[Tensor], Tensor]) -> Any:
    A, B = ({name: change(x) for name, x in side.items()} for side in (lora.A, lora.B))
    return replace(lora, A=A, B=B)


def _without_last_layer(x: Tensor) -> Tensor:
    """Cut the last layer off from the graph."""
    return torch.cat([x[:, :-1], x[:, -1:].detach()], dim=1)


@contextmanager
def _grouped_products_doubled(healthy: Implementation) -> Iterator[None]:
    with healthy.as_on_gpu():
        multiply = functional.grouped_mm
        functional.grouped_mm = lambda rows, matrices, **rest: 2 * multiply(rows, matrices, **rest)
        try:
            yield
        finally:
            functional.grouped_mm = multiply


def _first_question_only(healthy: Implementation, base: Any, config: Any) -> Model:
    """Leave the LoRA out for all questions of a context but the first."""
    model: Any = healthy.build(base, config)
    logits = model.logits

    def partly(batch: Any, lora: Any, positions: Any = None) -> Any:
        if lora is None:
            return logits(batch, None, positions)
        lengths, number, first = batch.queries.lengths, 0, []
        for count in batch.n_queries:
            first += [
                torch.full((length,), place == 0) for place, length in enumerate(lengths[number : number + count])
            ]
            number += count
        bound = torch.cat(first)[slice(None) if positions is None else positions]
        return torch.where(bound[:, None], logits(batch, lora, positions), logits(batch, None, positions))

    model.logits = partly
    return model


RULE = Rule(
    code="LOR204",
    name="bound-lora-wrong",
    stage="twin",
    severity="error",
    sources=("sanity run", "failure mode 22", "failure mode 38", "https://arxiv.org/abs/2106.09685"),
    requires=("LOR202",),
    check=check,
    faults=(
        Fault(
            "scale-over-r",
            "the scale is divided by the rank",
            _binding(lambda it: replace(it, scale=it.scale / it.rank)),
        ),
        Fault(
            "neighbour",
            "every context gets the LoRA of the one before",
            _binding(lambda it: _each(it, lambda x: x.roll(1, 0))),
        ),
        Fault(
            "layers-shifted",
            "every layer gets the LoRA of the layer below",
            _binding(lambda it: _each(it, lambda x: x.roll(1, 1)), unless=_one_layer),
        ),
        Fault(
            "first-question", "only the first question of a context has the LoRA", override(build=_first_question_only)
        ),
        Fault(
            "layer-detached",
            "the LoRA of the last layer gets no gradient",
            _binding(lambda it: _each(it, _without_last_layer)),
        ),
        Fault(
            "grouped-doubled",
            "grouped products, as newer GPUs take them, are twice as large",
            override(as_on_gpu=_grouped_products_doubled),
        ),
    ),
)
