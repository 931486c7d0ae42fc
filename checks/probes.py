"""Probes and measures that the checks share: synthetic rows, differences, gradients by parameter."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2l.data.packing import PackedBatch, collate
from d2l.data.tokenize import Query, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from checks.implementation import Model
    from checks.subject import Subject

# Equal computations in float32 differ by about 1e-6 of the largest value; a leak or a lost term by 1e-2 and more.
TOLERANCE = 1e-4

# Two of three documents and questions are longer than a twin's sliding window, which is at most 8 tokens.
DOCUMENTS = (13, 11, 5)
QUESTIONS = (12, 14, 10)


def probe_rows(
    subject: "Subject",
    *,
    documents: Sequence[int] = DOCUMENTS,
    questions: Sequence[int] = QUESTIONS,
    chunks: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Make rows of random ids of a twin's vocabulary: one document and one question each, the last half supervised.

    With a loss that needs a teacher, every supervised token has a teacher.

    Args:
        documents: tokens of each document's chunks.
        questions: tokens of each question.
        chunks: chunks of each document; default 1.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = subject.twin_base_config.vocab_size

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())

    rows = []
    for index, (document, question) in enumerate(zip(documents, questions, strict=True)):
        tokens = ids(question)
        labels = tuple(token if place >= question // 2 else -100 for place, token in enumerate(tokens))
        pieces = tuple(ids(document) for _ in range(chunks[index] if chunks else 1))
        query = Query(input_ids=tokens, labels=labels)
        if subject.config.needs_teacher:
            query = _with_teacher(query, vocabulary)
        rows.append(Row(record=index, chunks=pieces, queries=(query,)))
    return rows


def packed_rows(subject: "Subject") -> list[Row]:
    """Make three contexts as a run packs them: unequal lengths and numbers of chunks, the first with two questions."""
    rows = probe_rows(subject, documents=(9, 5, 7), questions=(12, 7, 10), chunks=(1, 1, 2))
    more = probe_rows(subject, documents=(4, 5, 6), questions=(6, 5, 9), seed=1)
    first = replace(rows[0], chunks=rows[0].chunks + more[0].chunks, queries=rows[0].queries + more[0].queries)
    return [first, rows[1], replace(rows[2], chunks=rows[2].chunks + more[2].chunks)]


def in_double(model: "Model") -> "Model":
    """Turn a twin into float64, in place, and return it: where rounding could decide, it must not."""
    base_in_double(model.base)
    model.hypernet.double()
    return model


def base_in_double(base: "PreTrainedModel") -> "PreTrainedModel":
    """Turn a twin's base into float64, in place, and return it; its experts one by one, as grouped products are float32's."""
    base.set_experts_implementation("eager")
    return base.double()


def large_inputs(hidden: int, seed: int = 0) -> Tensor:
    """Draw inputs [10, hidden] of a twin's MLP, float64, so large that its projections go several times past a clamp at 7."""
    return 8 * torch.randn(10, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states [T, H] of a block's output for one row; a router's scores may come with them."""
    return (output[0] if isinstance(output, tuple) else output)[0]


def _with_teacher(query: Query, vocabulary: int) -> Query:
    """Add a teacher to a query, which names two tokens for every label, as a run with the KL loss has it."""
    labels = [label for label in query.labels if label != -100]
    likeliest = tuple((label, (label + 1) % vocabulary) for label in labels)
    return replace(query, logprobs_vals=tuple((-0.7, -1.2) for _ in labels), logprobs_indices=likeliest)


def probe_batch(subject: "Subject", **shape: Sequence[int]) -> PackedBatch:
    """Pack the probe rows into one row by the run's own collator."""
    return collate(probe_rows(subject, **shape))  # type: ignore[arg-type]


def alone(rows: Sequence[Row]) -> list[PackedBatch]:
    """Pack each row by itself."""
    return [collate([row]) for row in rows]


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest expected value; infinite where either is not finite."""
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def gradients(model: "Model", loss: Tensor, keep_graph: bool = False) -> dict[str, Tensor]:
    """Compute the gradient of a scalar by each hypernetwork parameter; zeros where none arrives.

    Args:
        keep_graph: whether another scalar of the same forward pass follows.
    """
    named = dict(model.hypernet.named_parameters())
    if not loss.requires_grad:
        return {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    values = torch.autograd.grad(loss, list(named.values()), retain_graph=keep_graph, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if value is None else value
        for (name, parameter), value in zip(named.items(), values, strict=True)
    }


def norm(values: dict[str, Tensor]) -> float:
    """Return the norm of all tensors together."""
    return float(torch.stack([value.norm() for value in values.values()]).norm())


def flat(values: dict[str, Tensor]) -> Tensor:
    """Concatenate all tensors to one vector, in the order of their names."""
    return torch.cat([values[name].flatten() for name in sorted(values)])
