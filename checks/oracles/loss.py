"""The losses of one optimizer step, question by question.

Sources: cross-entropy and the per-context mean of the Doc-to-LoRA paper (arXiv:2602.15902) and of the trainer of
SakanaAI/doc-to-lora@baa85db; its KL is the cross-entropy with the teacher's stored top-k, which is not renormalised.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

IGNORED = -100
Losses = Sequence[Sequence[Tensor]]  # [context][question] of a loss for every label token, [n]


def cross_entropy(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """Return -log q(label) of every label token of one question, in nats, float64 [n].

    The logits at place t - 1 predict the token at place t, so a label at place 0 has no prediction and is left out.

    Args:
        logits: [T, V], of the question alone.
        labels: T token ids, -100 where a token is not supervised.
    """
    losses = [
        torch.logsumexp(logits[place - 1].double(), dim=0) - logits[place - 1, label].double()
        for place, label in enumerate(labels)
        if place > 0 and label != IGNORED
    ]
    return torch.stack(losses) if losses else logits.new_zeros(0, dtype=torch.float64)


def divergence(
    logits: Tensor | Sequence[Tensor],
    labels: Sequence[int],
    vals: Sequence[Sequence[float]],
    indices: Sequence[Sequence[int]],
) -> Tensor:
    """Return -sum over k of exp(t_k) log q(index_k) of every label token of one question, in nats, float64 [n].

    Args:
        logits: [T, V], of the question alone, as a tensor or its rows.
        labels: T token ids, -100 where a token is not supervised.
        vals: the teacher's log-probabilities t, k for each of the n label tokens; they need not sum to one.
        indices: the token ids that those belong to.
    """
    places = [place for place, label in enumerate(labels) if place > 0 and label != IGNORED]
    losses = []
    for place, ts, ids in zip(places, vals, indices, strict=True):
        row = logits[place - 1].double()
        normalizer = torch.logsumexp(row, dim=0)
        likely = torch.tensor(ts, dtype=torch.float64).exp()
        losses.append(-(likely * (row[list(ids)] - normalizer)).sum())
    return torch.stack(losses) if losses else torch.zeros(0, dtype=torch.float64)


def token_mean(losses: Losses) -> Tensor:
    """Return the mean over all label tokens of a step; 0 without any.

    Args:
        losses: [context][question] of the losses of its label tokens, of all micro-batches of the step.
    """
    tokens = [loss for context in losses for question in context for loss in question]
    return torch.stack(tokens).sum() / len(tokens) if tokens else torch.zeros((), dtype=torch.float64)


def context_mean(losses: Losses) -> Tensor:
    """Return the mean over contexts of the mean over questions of the mean over tokens.

    A question without a label token is left out; a context without a labelled question counts as 0.
    """
    total = torch.zeros((), dtype=torch.float64)
    for context in losses:
        means = [question.sum() / len(question) for question in context if len(question)]
        if means:
            total = total + torch.stack(means).sum() / len(means)
    return total / len(losses)


def lora_l1(A: Sequence[Mapping[str, Tensor]], B: Sequence[Mapping[str, Tensor]], rank: int) -> Tensor:
    """Return the mean over contexts and modules of mean |A| + mean |B|; scalar, not weighted.

    A context of fewer rows than `rank` counts as padded to it with rows of zeros, as in the reference.

    Args:
        A, B: of each context of the step, module name -> [L, R, d], R at most `rank`.
        rank: rows of the step's largest merged LoRA.
    """
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(A, B, strict=True):
        for side in (a, b):
            for x in side.values():
                layers, _, width = x.shape
                total = total + x.double().abs().sum() / (layers * rank * width) / len(side)
    return total / len(A)
