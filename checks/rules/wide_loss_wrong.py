"""The loss of a vocabulary as wide as a real one is the formula's, however many labels a row has.

What it does
------------
Gives the light twin a head of 65,536 tokens, so wide that an implementation which computes the loss in slices does so, and
takes the task loss and the hypernetwork's gradient over rows of one label, of many, of one with a row that has none, and
with logits in the hundreds. Cross-entropy by token, and KL by context over many labels, are compared with the formulas.

Why it matters
--------------
A loss that is computed in slices, or together with the last projection, goes wrong at the edges of slices, above a number
of labels, or where a slice has no label: NaN, a label that counts twice, a gradient that stops. A twin's own vocabulary
fits into one slice, so nothing else sees it. Unshifted or large logits overflow where the softmax is not taken in float32.

How it is detected
------------------
In float32 losses and gradients must agree to 1e-2 of the largest value; a label that is lost, doubled or without a gradient
changes them by 0.1 and more. `-100` is not a token: it adds nothing.

How to fix
----------
Leave out places without a label before slicing, let slices be disjoint and complete, and take log-softmax in float32.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles import loss
from checks.probes import difference, flat, gradients
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.training.steps import TEACHER, light_config, light_model
from d2l.data.packing import collate
from d2l.data.tokenize import Query, Row

if TYPE_CHECKING:
    from checks.subject import Subject

WIDE = 2**16
TOLERANCE = 1e-2  # float32, for the sake of time: it rounds by 1e-5, and GraniteMoe's gradient of one label by 2e-3
SLICE = 32  # rows of logits of this width, which are 8 MiB in float32
LABELS = 33  # of the longest question: more than a slice
WEIGHTS = (1.0, 0.7)  # of the losses' gradients in their sum
LOSSES = ("ce", "kl")  # KL with many labels only: the rest is the same code
BY_CONTEXT = "kl"  # whose mean is over contexts: its labels do not all weigh the same
# Supervised tokens of each context's question, and what the logits are multiplied by then.
PROBES: dict[str, tuple[tuple[int, ...], float]] = {
    "many labels": ((LABELS, 1), 1.0),
    "one label, and a question without any": ((1, 0), 1.0),
    "large logits": ((3, 2), 200.0),
}
CLAMP = 50.0  # of a planted fault: a twin's logits are of order one, those of `large logits` in the hundreds
REMEDY = "slice rows of logits that have a label, each once, and take their log-softmax in float32"


def check(subject: "Subject") -> Result:
    """Compare loss and gradient by the hypernetwork with the formulas."""
    evidence: dict[str, float] = {}
    model = _widened(subject)
    for name, (labels, scale) in PROBES.items():
        if scale != 1:
            model.base.get_output_embeddings().weight.data.mul_(scale)
        kinds = LOSSES if labels[0] == LABELS else LOSSES[:1]
        errors = _errors(subject, model, _rows(subject, labels), kinds)
        evidence |= {f"{name}, {kind}": error for kind, error in zip(kinds, errors, strict=True)}
    worst = max(evidence, key=lambda key: evidence[key])
    if not evidence[worst] <= TOLERANCE:
        return Fail(
            message="the loss over a wide vocabulary is not that of the formula",
            expected=f"loss and gradient within {TOLERANCE:g}, with {WIDE:,} tokens in the vocabulary",
            actual=f"{worst}: {evidence[worst]:.2g} off",
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(
        f"{WIDE:,} tokens wide, losses and gradients agree with the formulas to {evidence[worst]:.1g}, for 1 to {LABELS} labels",
        evidence,
    )


def _widened(subject: "Subject") -> Any:
    """Return the light twin in float32 with a wide head, each row of which is the one before, moved on by one value."""
    model: Any = light_model(subject, dtype=torch.float32)
    hidden = model.base.config.hidden_size
    values = torch.randn(WIDE + hidden - 1, generator=torch.Generator().manual_seed(0))
    head = nn.Linear(hidden, WIDE, bias=False, device="meta")
    head.weight = nn.Parameter((values / hidden**0.5).unfold(0, hidden, 1).contiguous(), requires_grad=False)
    model.base.set_output_embeddings(head)
    return model


def _rows(subject: "Subject", labels: Sequence[int]) -> list[Row]:
    """Make a context for each number of labels, of one question, whose labels and teacher come from the wide vocabulary."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int, below: int) -> tuple[int, ...]:
        return tuple(torch.randint(below, (length,), generator=generator).tolist())

    def query(labelled: int) -> Query:
        likely = torch.rand(labelled, TEACHER, generator=generator) * 0.3 + 0.01
        return Query(
            input_ids=ids(labelled + 2, subject.twin_base_config.vocab_size),
            labels=(-100, -100, *ids(labelled, WIDE)),
            logprobs_vals=tuple(map(tuple, likely.log().tolist())),
            logprobs_indices=tuple(ids(TEACHER, WIDE) for _ in range(labelled)),
        )

    vocabulary = subject.twin_base_config.vocab_size
    return [Row(record=index, chunks=(ids(3, vocabulary),), queries=(query(it),)) for index, it in enumerate(labels)]


def _errors(subject: "Subject", model: Any, rows: Sequence[Row], kinds: Sequence[str]) -> list[float]:
    """Return for each loss the larger error of its value and of the gradient by the hypernetwork, over the largest value.

    One backward pass takes the gradient of all losses, each by a weight of its own.
    """
    batch = collate(rows)
    logits = model.logits(batch, model.lora(batch)).split(list(batch.contexts.lengths))
    values, found, wanted = [], [], []
    for kind, weight in zip(kinds, WEIGHTS, strict=False):
        config = light_config(subject, loss=kind, use_per_ctx_average_loss=kind == BY_CONTEXT)
        task, _ = subject.implementation.loss(model, [batch], config)
        losses = [[_formula(kind, own.unbind(), row.queries[0])] for own, row in zip(logits, rows, strict=True)]
        expected = (loss.context_mean if kind == BY_CONTEXT else loss.token_mean)(losses)
        values.append(difference(task.detach(), expected.detach()))
        found.append(weight * task)
        wanted.append(weight * expected)
    own, true = (flat(gradients(model, torch.stack(parts).sum())) for parts in (found, wanted))
    by_hypernetwork = difference(own, true)
    return [max(value, by_hypernetwork) for value in values]


def _formula(kind: str, logits: Sequence[Tensor], query: Query) -> Tensor:
    """Return the loss of every label, from logits row by row; cross-entropy is the KL to a teacher that is sure of it."""
    labels = [label for label in query.labels if label >= 0]
    if not labels:
        return torch.zeros(0, dtype=torch.float64)
    if kind == "ce":
        return loss.divergence(logits, query.labels, [[0.0]] * len(labels), [[label] for label in labels])
    return loss.divergence(logits, query.labels, query.logprobs_vals or (), query.logprobs_indices or ())


def _with_logits(change: Callable[[Tensor], Tensor], unless: Callable[["Subject"], str] = lambda subject: "") -> Any:
    """Make a fault of a loss that works on other logits than the model's."""

    def spoilt(healthy: Implementation, model: Any, batches: Any, config: Any) -> Any:
        logits = model.logits
        model.logits = lambda *args, **kwargs: change(logits(*args, **kwargs))
        try:
            return healthy.loss(model, batches, config)
        finally:
            model.logits = logits

    return override(unless, loss=spoilt)


def _capped(subject: "Subject") -> str:
    cap = getattr(subject.twin_base_config, "final_logit_softcapping", None)
    return f"the base caps its logits at {cap:g} itself" if cap and cap <= CLAMP else ""


def _edge_doubled(logits: Tensor) -> Tensor:
    """Take the first row of the second slice for the last one of the first."""
    return logits if len(logits) <= SLICE else torch.cat([logits[:SLICE], logits[SLICE - 1 : -1]])


def _clamped(logits: Tensor) -> Tensor:
    return logits.clamp(-CLAMP, CLAMP)


def _later_detached(logits: Tensor) -> Tensor:
    """Cut all slices but the first off from the graph."""
    return torch.cat([logits[:SLICE], logits[SLICE:].detach()])


RULE = Rule(
    code="LSS204",
    name="wide-loss-wrong",
    stage="twin",
    severity="error",
    sources=("failure mode C40", "failure mode C41", "pytorch/pytorch#187053", "Goekdeniz-Guelmez/mlx-lm-lora#84"),
    requires=("LSS201",),
    check=check,
    faults=(
        Fault(
            "edge-doubled", "a label at the edge of slices meets its neighbour's logits", _with_logits(_edge_doubled)
        ),
        Fault("later-detached", "only the first slice has a gradient", _with_logits(_later_detached)),
        Fault("logits-clamped", "logits are clamped, so that none overflows", _with_logits(_clamped, _capped)),
    ),
)
