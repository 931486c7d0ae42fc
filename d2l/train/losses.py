"""The training losses: cross-entropy or KL to a teacher, per token or per context, and L1 on the generated LoRA.

Every sum is divided by a count of the whole optimizer step (`Normalizer`), never of one micro-batch, so that one batch
of four contexts and four batches of one give the same gradient.

Shape legend: N = label tokens of a micro-batch, V = vocabulary, K = teacher's top entries.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2l.config.schema import LossName
from d2l.data.packing import PackedBatch
from d2l.errors import DataError
from d2l.hypernet.lora import Lora


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
    lora: Lora,
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
        lora: the merged LoRAs of the row's contexts.
        normalizer: the counts of the whole step.
        loss: the name of the loss of a label token, a key of `TOKEN_LOSSES`.
        use_per_ctx_average_loss: mean over tokens, then queries, then contexts, instead of over all tokens.
        l1_coefficient: weight of the L1 term.

    Raises:
        DataError: KL without teacher logprobs, with another number of rows than label tokens, or with unknown ids.
    """
    per_token = TOKEN_LOSSES[loss](logits, batch)
    if use_per_ctx_average_loss:
        task = _sum_of_context_means(per_token, batch) / normalizer.contexts
    else:
        task = per_token.sum() / max(normalizer.label_tokens, 1)
    l1 = lora_l1(lora, normalizer)
    recalled = _recalled_queries(logits, batch) / max(normalizer.queries, 1)
    return Loss(task=task, l1=l1, total=task + l1_coefficient * l1, exact_match=recalled)


def lora_l1(lora: Lora, normalizer: Normalizer) -> Tensor:
    """Return the mean over modules of mean |A| + mean |B|, per context of the step; scalar.

    The mean runs over the rank that the step's longest document needs, zero rows of shorter ones included, as in the
    reference; which micro-batch that document is in makes no difference.
    """
    return lora.l1() * (lora.n_contexts * lora.rank) / (normalizer.contexts * normalizer.rank)


def _cross_entropy(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Compute the cross-entropy of every label token in nats, float32 `[N]`."""
    labels = batch.labels[0, batch.label_positions]
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def _teacher_divergence(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Compute -Σ_k p_k log q_k over the teacher's stored top-K, not renormalised, float32 `[N]` (the reference's KL)."""
    if batch.logprobs_vals is None or batch.logprobs_indices is None:
        raise DataError(
            f"loss: kl needs teacher logprobs, but records {list(batch.record_ids)} have none; "
            "add logprobs_vals and logprobs_indices to the data, or set loss: ce"
        )
    if len(batch.logprobs_vals) != len(logits):
        raise DataError(
            f"teacher logprobs of records {list(batch.record_ids)}: expected one row for each of {len(logits)} "
            f"label tokens, found {len(batch.logprobs_vals)}; generate them with the run's own template and supervision"
        )
    _require_known_ids(batch.logprobs_indices, batch, vocabulary=logits.shape[-1])
    log_q = torch.log_softmax(logits.float(), dim=-1).gather(-1, batch.logprobs_indices)
    return -(batch.logprobs_vals.exp() * log_q).sum(-1)


def _require_known_ids(indices: Tensor, batch: PackedBatch, vocabulary: int) -> None:
    """Refuse a teacher's ids [N, K] beyond the vocabulary: on a GPU a gather with one would end the process."""
    beyond = (indices >= vocabulary).any(-1)
    if not beyond.any():
        return
    context_of_query = [i for i, count in enumerate(batch.n_queries) for _ in range(count)]
    contexts = {context_of_query[query] for query in batch.label_queries[beyond].tolist()}
    raise DataError(
        f"teacher logprobs of records {[batch.record_ids[i] for i in sorted(contexts)]}: expected token ids below "
        f"{vocabulary:,}, found {int(indices.max()):,}; make them with the base model's own tokenizer"
    )


def _recalled_queries(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Count the queries that have every label token right by argmax; scalar float32."""
    query = batch.label_queries
    wrong = logits.detach().argmax(-1) != batch.labels[0, batch.label_positions]
    return torch.tensor(float(len(query.unique()) - len(query[wrong].unique())), device=logits.device)


def _sum_of_context_means(per_token: Tensor, batch: PackedBatch) -> Tensor:
    """Sum, over contexts, the mean over their queries of the mean over their label tokens; scalar.

    A query without a label token has no mean and is left out.
    """
    query = batch.label_queries
    n_queries = sum(batch.n_queries)
    sums = per_token.new_zeros(n_queries).index_add(0, query, per_token)
    tokens = torch.bincount(query, minlength=n_queries)
    means = sums / tokens.clamp(min=1)
    context = torch.repeat_interleave(torch.tensor(batch.n_queries, device=per_token.device))  # [queries]
    labelled = torch.zeros(len(batch.n_queries), dtype=means.dtype, device=means.device)
    labelled = labelled.index_add(0, context, (tokens > 0).to(means.dtype))
    totals = torch.zeros_like(labelled).index_add(0, context, means)
    return (totals / labelled.clamp(min=1)).sum()


# The loss of every label token, float32 [N], from logits [N, V] and the packed row. A new one needs its name in
# `d2l.config.schema.LossName` and a line here.
TOKEN_LOSSES: dict[LossName, Callable[[Tensor, PackedBatch], Tensor]] = {
    "ce": _cross_entropy,
    "kl": _teacher_divergence,
}
