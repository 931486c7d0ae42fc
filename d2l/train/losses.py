"""The training losses: cross-entropy or KL to a teacher, per token or per context, and L1 on the generated LoRA.

Every sum is divided by a count of the whole optimizer step (`Normalizer`), never of one micro-batch, so that one batch
of four contexts and four batches of one give the same gradient.

Shape legend: N = label tokens of a micro-batch, V = vocabulary, K = teacher's top entries.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2l.config.schema import TEACHER_LOSSES, LossName
from d2l.data.packing import PackedBatch
from d2l.errors import DataError
from d2l.hypernet.lora import Lora

TokenLoss = Callable[[Tensor, PackedBatch, slice], Tensor]

# Logits in float32 that a loss works on at a time: beside the logits [N, V] of all label tokens and their gradient, in the
# base's dtype, it has about three such slices. 410 label tokens of GPT-OSS are 0.16 GB in bfloat16; all of them in float32
# at once, with their softmax and its gradient, were 1 GB.
SLICE_BYTES = 2**23  # what a processor keeps near
SLICE_BYTES_OF_GPU = 2**27  # fewer kernels: a slice costs about twenty, and their launches
_FLOAT32 = 4


def slice_bytes(device: str) -> int:
    """Return the bytes of a slice of logits in float32 on a kind of device."""
    return SLICE_BYTES_OF_GPU if device == "cuda" else SLICE_BYTES


@dataclass(frozen=True)
class Normalizer:
    """Counts of one optimizer step over all its micro-batches and ranks.

    Attributes:
        label_tokens: supervised tokens that can be predicted (the first token of a query cannot).
        queries: those that have such tokens.
        contexts: contexts, whether or not one of their tokens is supervised.
        rank: the rank of the step's largest merged LoRA; the others count as padded to it with zeros.
    """

    label_tokens: int
    queries: int
    contexts: int
    rank: int

    @classmethod
    def of(cls, batches: Iterable[PackedBatch], lora_r: int) -> "Normalizer":
        """Count over the micro-batches of one step, for LoRAs of rank `lora_r` per chunk and for the bias."""
        batches = list(batches)
        chunks = max(max(batch.n_ctx_chunks) for batch in batches)
        return cls(
            label_tokens=sum(len(batch.label_positions) for batch in batches),
            queries=sum(len(batch.label_queries.unique()) for batch in batches),
            contexts=sum(len(batch.n_ctx_chunks) for batch in batches),
            rank=lora_r * (chunks + 1),
        )


@dataclass(frozen=True)
class Loss:
    """The terms of a micro-batch's loss; `total` is what gradients are taken of.

    Attributes:
        task: cross-entropy or KL, normalised; scalar.
        l1: L1 norm of the generated LoRA, normalised and not yet weighted; scalar.
        total: `task + coefficient * l1`.
        exact_match: share of the step's queries whose label tokens are all the likeliest ones, without gradient; scalar.
    """

    task: Tensor
    l1: Tensor
    total: Tensor
    exact_match: Tensor


def compute_loss(
    logits: Tensor,
    batch: PackedBatch,
    lora: Lora | None,
    normalizer: Normalizer,
    *,
    loss: LossName = "ce",
    use_per_ctx_average_loss: bool = False,
    l1_coefficient: float = 0.0,
) -> Loss:
    """Compute the loss of one micro-batch.

    Args:
        logits: `[N, V]`, at the batch's `prediction_positions`.
        batch: the packed row.
        lora: the merged LoRAs of the row's contexts; None for the base alone, whose L1 term is 0.
        normalizer: the counts of the whole step.
        loss: the name of the loss of a label token, a key of `TOKEN_LOSSES`.
        use_per_ctx_average_loss: mean over tokens, then queries, then contexts, instead of over all tokens.
        l1_coefficient: weight of the L1 term.

    Raises:
        DataError: KL without teacher logprobs, with another number of rows than label tokens, or with unknown ids.
    """
    if loss in TEACHER_LOSSES:
        _require_teacher(batch, *logits.shape)
    per_token = _token_losses(logits, batch, TOKEN_LOSSES[loss])
    if use_per_ctx_average_loss:
        task = (per_token * batch.label_weights).sum() / normalizer.contexts
    else:
        task = per_token.sum() / max(normalizer.label_tokens, 1)
    l1 = task.new_zeros(()) if lora is None else lora_l1(lora, normalizer)
    recalled = _recalled_queries(logits, batch) / max(normalizer.queries, 1)
    return Loss(task=task, l1=l1, total=task + l1_coefficient * l1, exact_match=recalled)


def context_losses(logits: Tensor, batch: PackedBatch, loss: LossName) -> Tensor:
    """Return the mean loss of each context's label tokens, float32 `[contexts]`; 0 where a context has none.

    Args:
        logits, batch, loss: as for `compute_loss`.

    Raises:
        DataError: as by `compute_loss`.
    """
    if loss in TEACHER_LOSSES:
        _require_teacher(batch, *logits.shape)
    per_token = _token_losses(logits, batch, TOKEN_LOSSES[loss])
    queries = torch.tensor(batch.n_queries)
    context = torch.repeat_interleave(queries).to(logits.device)[batch.label_queries]
    sums = torch.zeros(len(queries), device=logits.device).index_add(0, context, per_token)
    return sums / torch.bincount(context, minlength=len(queries)).clamp(min=1)


def lora_l1(lora: Lora, normalizer: Normalizer) -> Tensor:
    """Return the mean over modules of mean |A| + mean |B|, per context of the step; scalar.

    The mean runs over the rank that the step's longest document needs, zero rows of shorter ones included, as in the
    reference; which micro-batch that document is in makes no difference.
    """
    return lora.l1() * (lora.n_contexts * lora.rank) / (normalizer.contexts * normalizer.rank)


def _token_losses(logits: Tensor, batch: PackedBatch, loss: TokenLoss) -> Tensor:
    """Compute the loss of every label token, float32 `[N]`, of a few tokens at a time where there are many."""
    if logits.numel() * _FLOAT32 <= slice_bytes(logits.device.type):
        return loss(logits, batch, slice(None))
    losses: Tensor = _InSlices.apply(logits, batch, loss)
    return losses


class _InSlices(torch.autograd.Function):
    """Losses of slices of logits, computed again in the backward pass: nothing is kept but the logits as they are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, batch: PackedBatch, loss: TokenLoss) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.batch, ctx.loss = batch, loss
        return torch.cat([loss(logits[rows], batch, rows) for rows in _slices(logits)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _slices(logits):
            part = logits[rows].detach().requires_grad_()
            with torch.enable_grad():
                losses = ctx.loss(part, ctx.batch, rows)
            (result[rows],) = torch.autograd.grad(losses, part, gradient[rows])
        return result, None, None


def _slices(logits: Tensor) -> list[slice]:
    """Cut the rows of logits `[N, V]` so that a slice of them in float32 has at most `slice_bytes`, or is one row."""
    step = max(1, slice_bytes(logits.device.type) // (_FLOAT32 * logits.shape[-1]))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _cross_entropy(logits: Tensor, batch: PackedBatch, rows: slice) -> Tensor:
    """Compute the cross-entropy of label tokens in nats, float32."""
    labels = batch.labels[0, batch.label_positions[rows]]
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def _teacher_divergence(logits: Tensor, batch: PackedBatch, rows: slice) -> Tensor:
    """Compute -Σ_k p_k log q_k over the teacher's stored top-K, not renormalised, float32 (the reference's KL)."""
    assert batch.logprobs_vals is not None, "_require_teacher was not called"
    assert batch.logprobs_indices is not None, "_require_teacher was not called"
    log_p, ids = batch.logprobs_vals[rows], batch.logprobs_indices[rows]
    log_q = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids)
    return -(log_p.exp() * log_q).sum(-1)


def _require_teacher(batch: PackedBatch, n_tokens: int, vocabulary: int) -> None:
    """Refuse a batch without a teacher's logprobs, with others than of its label tokens, or with unknown ids.

    On a GPU a gather with an id beyond the vocabulary would end the process.
    """
    if batch.logprobs_vals is None or batch.logprobs_indices is None:
        raise DataError(
            f"loss: kl needs teacher logprobs, but records {list(batch.record_ids)} have none; "
            "add logprobs_vals and logprobs_indices to the data, or set loss: ce"
        )
    if len(batch.logprobs_vals) != n_tokens:
        raise DataError(
            f"teacher logprobs of records {list(batch.record_ids)}: expected one row for each of {n_tokens} "
            f"label tokens, found {len(batch.logprobs_vals)}; generate them with the run's own template and supervision"
        )
    if batch.largest_teacher_id < vocabulary:
        return
    beyond = (batch.logprobs_indices >= vocabulary).any(-1)
    context_of_query = [i for i, count in enumerate(batch.n_queries) for _ in range(count)]
    contexts = {context_of_query[query] for query in batch.label_queries[beyond].tolist()}
    raise DataError(
        f"teacher logprobs of records {[batch.record_ids[i] for i in sorted(contexts)]}: expected token ids below "
        f"{vocabulary:,}, found {batch.largest_teacher_id:,}; make them with the base model's own tokenizer"
    )


def _recalled_queries(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Count the queries that have every label token right by argmax; scalar float32."""
    query = batch.label_queries
    wrong = logits.detach().argmax(-1) != batch.labels[0, batch.label_positions]
    none = torch.zeros(sum(batch.n_queries), device=logits.device)
    labelled, misses = none.index_fill(0, query, 1.0), none.index_add(0, query, wrong.float())
    return (labelled * (misses == 0)).sum()


# The loss of some label tokens, float32, from their logits, the packed row and which of its label tokens they are. A new
# one needs its name in `d2l.config.schema.LossName` and a line here.
TOKEN_LOSSES: dict[LossName, TokenLoss] = {
    "ce": _cross_entropy,
    "kl": _teacher_divergence,
}
