"""The scores of held-out documents during a run are those of the written formulas.

What it does
------------
Lets the run's own evaluation score three documents of unequal numbers of chunks and questions, which do not fit into one packed
row, before and after the weights change. Losses, exact match, gaps and distances are computed from the formulas, with
each document's LoRA, another one's and none written into the base's weights.

Why it matters
--------------
These numbers decide which checkpoint is kept, and whether a hypernetwork reads its documents at all. Another document's LoRA that
is the own one, a loss of the last batch alone, or distances of the bias that all documents share make a hypernetwork that has
learnt nothing look as good as any, or stop a good one.

How it is detected
------------------
Every score that the evaluation has under a name of evaluation.jsonl must agree to 1e-4, with either way to give each of three
documents another one's LoRA. Cross-entropy by token and KL by context are looked at. Skipped where an evaluation returns
no scores.

How to fix
----------
Divide by the label tokens, contexts and questions of all documents together, and give every document the LoRA of another one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles import edited_weights, heldout, loss
from checks.oracles.heldout import Answered
from checks.result import Fail, NotOffered, Pass, Result
from checks.rule import Fault, Rule
from checks.training.answered import answered_rows
from checks.training.saved_twin import other_weights
from checks.training.steps import TOLERANCE, TWO_BATCHES, light_config, loss_rows, shared, still_model
from d2l.data.packing import collate

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.tokenize import Query, Row
    from d2l.hypernet.lora import Lora

# Loss, whether its mean is over contexts, and a seed: with 0 d2l packs two documents first and one last, with 2 the reverse.
SETTINGS: tuple[tuple[str, bool, int], ...] = (("ce", False, 0), ("kl", True, 2))
OTHERS = ((1, 2, 0), (2, 0, 1))  # of three documents: each has another one's, and each is another one's once


def check(subject: "Subject") -> Result:
    """Compare the scores of an evaluation with the formulas, for both losses."""
    model: Any = still_model(subject)
    rows = shared(subject, "answered_rows", lambda: answered_rows(model, loss_rows(subject)))
    evidence: dict[str, float] = {}
    for name, per_context, seed in SETTINGS:
        values = {"loss": name, "use_per_ctx_average_loss": per_context, "seed": seed}
        found = _scored(subject, rows, values)
        expected = min(
            _formulas(subject, model, rows, name, per_context), key=lambda it: max(_errors(found, it).values())
        )
        errors = _errors(found, expected)
        worst = max(errors, key=lambda key: errors[key])
        if not errors[worst] <= TOLERANCE:
            return Fail(
                message=f"a score of held-out documents is not that of the formula: {worst}",
                expected=f"{expected[worst]:.6g}, of each document alone with edited weights, within {TOLERANCE:g}",
                actual=f"{found[worst]:.6g}",
                remedy="take means over all held-out documents, each also under the LoRA of another one",
                evidence=errors,
            )
        evidence |= errors
    return Pass(
        f"{len(evidence)} scores of held-out documents agree with the formulas to {max(evidence.values()):.1g}",
        evidence,
    )


def _scored(subject: "Subject", rows: Sequence["Row"], values: Mapping[str, Any]) -> Mapping[str, float]:
    """Evaluate with other weights, then with the model's own, and return the scores of these.

    Raises:
        NotOffered: there are no scores.
    """
    model = still_model(subject)
    config = light_config(subject, eval_steps=1000, **values, **TWO_BATCHES)
    trainer = subject.implementation.trainer(model, rows, config)
    with other_weights(model.hypernet):
        subject.implementation.evaluate(trainer, rows)
    found = subject.implementation.evaluate(trainer, rows)
    if not found:
        raise NotOffered("scores of its evaluate")
    return found


def _errors(found: Mapping[str, float], expected: Mapping[str, float]) -> dict[str, float]:
    """Return how far each score is off, over what is expected, or over a tenth where that is less: losses are float32."""
    return {
        name: abs(found[name] - value) / max(abs(value), 0.1) if found[name] == found[name] else float("inf")
        for name, value in expected.items()
        if name in found
    }


def _formulas(
    subject: "Subject", model: Any, rows: Sequence["Row"], name: str, per_context: bool
) -> list[dict[str, float]]:
    """Return what the scores are by the formulas, for each way to give documents another one's LoRA."""
    pairs = shared(subject, "heldout_answers", lambda: _answers(model, rows))[name]
    updates = shared(subject, "heldout_updates", lambda: _updates(subject, model, rows))
    documents = range(len(rows))
    found = []
    for others in OTHERS:
        answers = {
            "document": _put_together([pairs[it, it] for it in documents]),
            "other": _put_together([pairs[it, other] for it, other in zip(documents, others, strict=True)]),
            "none": _put_together([pairs[it, None] for it in documents]),
        }
        distances = heldout.distances(updates, others) if updates else {}
        found.append(heldout.scores(answers, name, per_context) | distances)
    return found


@torch.no_grad()
def _answers(model: Any, rows: Sequence["Row"]) -> dict[str, dict[tuple[int, int | None], Answered]]:
    """Let each document's questions be answered under each document's LoRA, and under none; by the loss of the scores."""
    lora: Lora = model.lora(collate(rows))
    found: dict[str, dict[tuple[int, int | None], Answered]] = {name: {} for name, *_ in SETTINGS}
    for mine, row in enumerate(rows):
        for theirs in (*range(len(rows)), None):
            a, b = (
                {key: x[theirs] for key, x in side.items()} if theirs is not None else {} for side in (lora.A, lora.B)
            )
            logits = [edited_weights.logits(model.base, query.input_ids, a, b, lora.scale) for query in row.queries]
            answered = list(zip(logits, row.queries, strict=True))
            right = [_is_right(x, query) for x, query in answered]
            for name, pairs in found.items():
                pairs[mine, theirs] = Answered([[_loss(name, x, query) for x, query in answered]], [right])
    return found


def _loss(name: str, logits: Tensor, query: "Query") -> Tensor:
    if name == "ce":
        return loss.cross_entropy(logits, query.labels)
    return loss.divergence(logits, query.labels, query.logprobs_vals or (), query.logprobs_indices or ())


def _is_right(logits: Tensor, query: "Query") -> bool:
    labelled = [(place, label) for place, label in enumerate(query.labels) if label != loss.IGNORED]
    return all(int(logits[place - 1].argmax()) == label for place, label in labelled)


def _put_together(documents: Sequence[Answered]) -> Answered:
    return Answered([it.losses[0] for it in documents], [it.right[0] for it in documents])


@torch.no_grad()
def _updates(subject: "Subject", model: Any, rows: Sequence["Row"]) -> list[dict[str, Tensor]]:
    """Form each document's update of every module, [L, d_out, d_in], without the bias; none where the bias is not found."""
    lora: Lora = model.lora(collate(rows))
    named = dict(model.hypernet.named_parameters())
    shared_part = {}
    if subject.config.use_bias:
        if not all(f"bias_{side}.{name}" in named for side in "AB" for name in lora.A):
            return []
        shared_part = {name: named[f"bias_B.{name}"].mT @ named[f"bias_A.{name}"] for name in lora.A}
    updates = {name: lora.B[name].mT @ lora.A[name] for name in lora.A}  # [documents, L, d_out, d_in]
    return [
        {name: update[it] - shared_part.get(name, 0) for name, update in updates.items()} for it in range(len(rows))
    ]


def _scoring(change: Callable[[dict[str, float]], Mapping[str, float]]) -> Any:
    """Make a fault of an evaluation that has other scores."""

    def evaluate(healthy: Implementation, run: Any, rows: Any) -> Mapping[str, float]:
        found = dict(healthy.evaluate(run, rows))
        return {**found, **change(found)}

    return override(evaluate=evaluate)


def _of(found: Mapping[str, float], control: str) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.startswith(f"{control}_")}


def _own_as_other(found: dict[str, float]) -> dict[str, float]:
    """Answer under the own LoRA where another one's belongs."""
    return {f"other_{name.removeprefix('document_')}": value for name, value in _of(found, "document").items()}


def _summed(found: dict[str, float]) -> dict[str, float]:
    """Add losses up over two batches instead of taking the mean of all."""
    return {name: 2 * value for name, value in found.items() if name.endswith("_loss")}


def _questions_swapped(healthy: Implementation, run: Any, rows: Any) -> Mapping[str, float]:
    """Ask every document another one's questions."""
    queries = [row.queries for row in rows]
    mixed = [replace(row, queries=other) for row, other in zip(rows, [*queries[1:], queries[0]], strict=True)]
    return healthy.evaluate(run, mixed)


def _kept_scores(healthy: Implementation, run: Any, rows: Any) -> Mapping[str, float]:
    """Return the scores of the run's first evaluation again."""
    found = healthy.evaluate(run, rows)
    if not hasattr(run, "first_scores"):
        run.first_scores = found
    scores: Mapping[str, float] = run.first_scores
    return scores


def _last_left_out(healthy: Implementation, run: Any, rows: Any) -> Mapping[str, float]:
    """Evaluate only the documents of the first batch."""
    return healthy.evaluate(run, rows[:2])


RULE = Rule(
    code="EVL203",
    name="heldout-scores-wrong",
    stage="twin",
    severity="error",
    sources=("sanity run",),
    requires=("EVL201", "LSS201", "LSS203"),
    check=check,
    faults=(
        Fault("own-as-other", "another document's LoRA is the document's own", _scoring(_own_as_other)),
        Fault("losses-summed", "losses are added up over batches", _scoring(_summed)),
        Fault("questions-swapped", "documents are asked each other's questions", override(evaluate=_questions_swapped)),
        Fault("scores-kept", "an evaluation repeats the first one's scores", override(evaluate=_kept_scores)),
        Fault("last-left-out", "documents of the last batch are left out", override(evaluate=_last_left_out)),
        Fault("always-right", "every answer counts as right", _scoring(lambda found: {"document_exact_match": 1.0})),
        Fault(
            "gap-of-sums",
            "the gap is not divided by the documents",
            _scoring(lambda found: {"swap_gap": found["swap_gap"] * found["documents"]}),
        ),
        Fault(
            "spread-as-error",
            "the error of the gap is the spread of the documents",
            _scoring(lambda found: {"swap_gap_error": found["swap_gap_error"] * found["documents"] ** 0.5}),
        ),
        Fault(
            "distance-squared",
            "the distance of updates is its square",
            _scoring(lambda found: {"lora_distance": found["lora_distance"] ** 2}),
        ),
    ),
)
