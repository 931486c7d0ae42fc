"""The losses against loops over plain numbers, and against themselves however a step is cut into micro-batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2l.config.schema import LOSSES, TEACHER_LOSSES, LossName
from d2l.data.packing import PackedBatch
from d2l.data.tokenize import IGNORE_INDEX
from d2l.errors import DataError
from d2l.hypernet.lora import Lora
from d2l.train.losses import TOKEN_LOSSES, Normalizer, compute_loss

VOCABULARY, RANK, LAYERS, TOP_K, L1_COEFFICIENT = 7, 2, 2, 3, 0.25
MODULES = {"down_proj": (3, 5), "q_proj": (4, 2)}  # name → (d_in, d_out)

Shape = tuple[int, list[list[bool]]]  # chunks of a context; [query][token] whether the token has a label

few = settings(derandomize=True, deadline=None, max_examples=30)
every_mode = pytest.mark.parametrize(
    ("loss", "per_context"), [(loss, per_context) for loss in get_args(LossName) for per_context in (False, True)]
)
shapes = st.lists(
    st.tuples(st.integers(1, 3), st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)
# several spans in a query, a query without labels, one with a label at its first token only, contexts of several
# queries and one without any label, and one to three chunks
HARD: list[Shape] = [
    (1, [[False, True, True, False, True], [False, False]]),
    (3, [[True, False]]),
    (2, [[False, True], [False, True, False, True, True], [True, True]]),
]


@dataclass(frozen=True)
class Context:
    """One context with all that its loss depends on.

    Attributes:
        chunks, supervised: its `Shape`.
        labels: ids of all tokens.
        logits: [predicted, V]: of the supervised tokens, without those that are first in their query.
        teacher_logprobs, teacher_ids: [predicted, K].
        A, B: the merged rows [layers, R, d] of each module, R as this context alone needs it.
    """

    chunks: int
    supervised: list[list[bool]]
    labels: list[list[int]]
    logits: Tensor
    teacher_logprobs: Tensor
    teacher_ids: Tensor
    A: dict[str, Tensor]
    B: dict[str, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.logits, *self.A.values(), *self.B.values()]


def draw(shapes: Sequence[Shape], seed: int = 0) -> list[Context]:
    generator = torch.Generator().manual_seed(seed)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).requires_grad_()

    contexts = []
    for chunks, supervised in shapes:
        predicted, rank = sum(sum(query[1:]) for query in supervised), RANK * (chunks + 1)
        contexts.append(
            Context(
                chunks=chunks,
                supervised=supervised,
                labels=[torch.randint(VOCABULARY, (len(q),), generator=generator).tolist() for q in supervised],
                logits=leaf(predicted, VOCABULARY),
                teacher_logprobs=-1.2 - torch.rand(predicted, TOP_K, generator=generator),  # add up to less than 1
                teacher_ids=torch.rand(predicted, VOCABULARY, generator=generator).argsort(-1)[:, :TOP_K],
                A={name: leaf(LAYERS, rank, d_in) for name, (d_in, _) in MODULES.items()},
                B={name: leaf(LAYERS, rank, d_out) for name, (_, d_out) in MODULES.items()},
            )
        )
    return contexts


def packed(contexts: Sequence[Context]) -> tuple[Tensor, PackedBatch, Lora]:
    """The contexts as one micro-batch: logits at its label positions, the packed row, the merged LoRAs."""
    queries = [(ids, on) for c in contexts for ids, on in zip(c.labels, c.supervised, strict=True)]
    labels = [[token if flag else IGNORE_INDEX for token, flag in zip(*query, strict=True)] for query in queries]
    chunks = sum(context.chunks for context in contexts)
    longest = max(context.chunks for context in contexts)

    def padded(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, 0, 0, RANK * (longest + 1) - rows.shape[1]))

    batch = PackedBatch(
        ctx_ids=torch.zeros(1, 2 * chunks, dtype=torch.int64),
        ctx_position_ids=torch.tensor([[0, 1] * chunks]),
        input_ids=torch.tensor([[token for ids, _ in queries for token in ids]]),
        position_ids=torch.tensor([[place for ids, _ in queries for place in range(len(ids))]]),
        labels=torch.tensor([[label for query in labels for label in query]]),
        n_ctx_chunks=tuple(context.chunks for context in contexts),
        n_queries=tuple(len(context.supervised) for context in contexts),
        logprobs_vals=torch.cat([context.teacher_logprobs for context in contexts]),
        logprobs_indices=torch.cat([context.teacher_ids for context in contexts]),
        record_ids=tuple(range(40, 40 + len(contexts))),
    )
    A = {name: torch.stack([padded(context.A[name]) for context in contexts]) for name in MODULES}
    B = {name: torch.stack([padded(context.B[name]) for context in contexts]) for name in MODULES}
    return torch.cat([context.logits for context in contexts]), batch, Lora(A, B, scale=1.0)


def step_loss(
    micro_batches: Sequence[Sequence[Context]], loss: LossName, per_context: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Task loss, L1 and total of a step, as sums over its micro-batches."""
    parts = [packed(contexts) for contexts in micro_batches]
    normalizer = Normalizer.of([batch for _, batch, _ in parts], RANK)
    losses = [
        compute_loss(
            *part,
            normalizer,
            loss=loss,
            use_per_ctx_average_loss=per_context,
            l1_coefficient=L1_COEFFICIENT,
        )
        for part in parts
    ]
    task, l1, total = (
        torch.stack(terms).sum() for terms in zip(*((x.task, x.l1, x.total) for x in losses), strict=True)
    )
    return task, l1, total


# The oracle: loops over plain numbers


def token_loss(context: Context, place: int, label: int, loss: LossName) -> float:
    logits = context.logits[place].tolist()
    log_sum = math.log(sum(math.exp(value) for value in logits))
    if loss == "ce":
        return log_sum - logits[label]
    assert loss == "kl", f"the oracle does not know the loss {loss}"
    entries = zip(context.teacher_logprobs[place].tolist(), context.teacher_ids[place].tolist(), strict=True)
    return sum(-math.exp(logprob) * (logits[token] - log_sum) for logprob, token in entries)


def query_losses(context: Context, loss: LossName) -> list[list[float]]:
    """[query][predicted token]"""
    losses: list[list[float]] = []
    place = 0
    for ids, supervised in zip(context.labels, context.supervised, strict=True):
        losses.append([])
        for position, (label, flag) in enumerate(zip(ids, supervised, strict=True)):
            if flag and position > 0:
                losses[-1].append(token_loss(context, place, label, loss))
                place += 1
    return losses


def expected_task(contexts: Sequence[Context], loss: LossName, per_context: bool) -> float:
    losses = [query_losses(context, loss) for context in contexts]
    if not per_context:
        tokens = [token for context in losses for query in context for token in query]
        return sum(tokens) / max(len(tokens), 1)
    total = 0.0
    for context in losses:
        means = [sum(query) / len(query) for query in context if query]
        total += sum(means) / len(means) if means else 0.0
    return total / len(contexts)


def test_every_loss_is_computed_and_described() -> None:
    assert set(get_args(LossName)) == TOKEN_LOSSES.keys() == LOSSES.keys()
    assert set(get_args(LossName)) >= TEACHER_LOSSES


def expected_l1(contexts: Sequence[Context]) -> float:
    rank = RANK * (max(context.chunks for context in contexts) + 1)
    total = 0.0
    for context in contexts:
        for name, (d_in, d_out) in MODULES.items():
            a, b = (sum(abs(x) for x in side[name].flatten().tolist()) for side in (context.A, context.B))
            total += a / (LAYERS * rank * d_in) + b / (LAYERS * rank * d_out)
    return total / len(MODULES) / len(contexts)


@every_mode
@few
@example(shapes=HARD, seed=0)
@given(shapes=shapes, seed=st.integers(0, 99))
def test_equals_a_loop(loss: LossName, per_context: bool, shapes: list[Shape], seed: int) -> None:
    contexts = draw(shapes, seed)
    task, l1, total = (value.item() for value in step_loss([contexts], loss, per_context))
    assert task == pytest.approx(expected_task(contexts, loss, per_context), rel=1e-5, abs=1e-7)
    assert l1 == pytest.approx(expected_l1(contexts), rel=1e-5)
    assert total == pytest.approx(task + L1_COEFFICIENT * l1, rel=1e-6)


@every_mode
@few
@example(shapes=HARD, seed=0)
@given(shapes=shapes, seed=st.integers(0, 99))
def test_one_micro_batch_or_many_give_the_same_losses_and_gradients(
    loss: LossName, per_context: bool, shapes: list[Shape], seed: int
) -> None:
    contexts = draw(shapes, seed)
    leaves = [leaf for context in contexts for leaf in context.leaves]
    whole = step_loss([contexts], loss, per_context)
    cut = step_loss([[context] for context in contexts], loss, per_context)
    for one, many in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(total, leaves) for _, _, total in (whole, cut))
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-7)


@every_mode
@pytest.mark.parametrize("slice_bytes", [1, 2 * 4 * VOCABULARY, 3 * 4 * VOCABULARY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_label_tokens_give_the_same_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch, loss: LossName, per_context: bool, slice_bytes: int, dtype: torch.dtype
) -> None:
    logits, batch, lora = packed(draw(HARD))
    normalizer = Normalizer.of([batch], RANK)

    def run() -> tuple[Tensor, Tensor]:
        leaf = logits.detach().to(dtype).requires_grad_()
        task = compute_loss(leaf, batch, lora, normalizer, loss=loss, use_per_ctx_average_loss=per_context).task
        return task, torch.autograd.grad(task, leaf)[0]

    whole = run()
    monkeypatch.setattr("d2l.train.losses.SLICE_BYTES", slice_bytes)
    for actual, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_many_label_tokens_never_have_float32_logits_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2l.train.losses.SLICE_BYTES", 2 * 4 * VOCABULARY)
    logits, batch, lora = packed(draw(HARD))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.dtype == torch.float32 and made.shape[-1:] == (VOCABULARY,):
                largest = max(largest, len(made))
            return made

    leaf = logits.detach().bfloat16().requires_grad_()
    with Watch():
        compute_loss(leaf, batch, lora, Normalizer.of([batch], RANK)).total.backward()
    assert largest == 2 < len(logits)


@every_mode
def test_a_step_without_labels_has_a_loss_of_zero_and_a_graph(loss: LossName, per_context: bool) -> None:
    contexts = draw([(1, [[False, False], [True]]), (2, [[False]])])
    task, l1, total = step_loss([contexts], loss, per_context)
    assert task.item() == 0
    total.backward()
    assert not l1.isnan()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for context in contexts for leaf in context.leaves)


def test_a_micro_batch_without_labels_takes_no_part_in_the_token_mean() -> None:
    labelled, mute = draw([(1, [[False, True]]), (1, [[False, False]])])
    task, _, _ = step_loss([[labelled], [mute]], loss="ce", per_context=False)
    torch.testing.assert_close(task, step_loss([[labelled]], loss="ce", per_context=False)[0])


def test_the_counts_of_a_step() -> None:
    contexts = draw(HARD)
    batches = [packed(part)[1] for part in (contexts[:1], contexts[1:])]
    assert Normalizer.of(iter(batches), RANK) == Normalizer(label_tokens=8, queries=4, contexts=3, rank=RANK * 4)


def test_half_precision_logits_are_summed_in_float32() -> None:
    contexts = draw(HARD)
    logits, batch, lora = packed(contexts)
    normalizer = Normalizer.of([batch], RANK)
    for loss in get_args(LossName):
        half = compute_loss(logits.bfloat16(), batch, lora, normalizer, loss=loss).task
        assert half.dtype == torch.float32
        same = compute_loss(logits.bfloat16().float(), batch, lora, normalizer, loss=loss).task
        torch.testing.assert_close(half, same, rtol=0, atol=0)


def test_kl_without_a_teacher_names_the_records() -> None:
    logits, batch, lora = packed(draw(HARD))
    batch = replace(batch, logprobs_vals=None, logprobs_indices=None)
    with pytest.raises(DataError, match=r"records \[40, 41, 42\] have none.*loss: ce"):
        compute_loss(logits, batch, lora, Normalizer.of([batch], RANK), loss="kl")


def test_a_teacher_of_other_tokens_names_the_records() -> None:
    logits, batch, lora = packed(draw(HARD))
    assert batch.logprobs_vals is not None
    batch = replace(batch, logprobs_vals=batch.logprobs_vals[1:])
    with pytest.raises(
        DataError, match=r"records \[40, 41, 42\]: expected one row for each of 8 label tokens, found 7"
    ):
        compute_loss(logits, batch, lora, Normalizer.of([batch], RANK), loss="kl")


def test_teacher_ids_beyond_the_vocabulary_name_the_records_that_hold_them() -> None:
    logits, batch, lora = packed(draw(HARD))
    assert batch.logprobs_indices is not None
    for places, records in (([4], r"\[42\]"), ([0, 7], r"\[40, 42\]")):  # labels 0 to 2 are of 40, 3 to 7 of 42
        indices = batch.logprobs_indices.clone()
        indices[places, 1] = VOCABULARY
        spoilt = replace(batch, logprobs_indices=indices)
        with pytest.raises(DataError, match=rf"records {records}: expected token ids below 7, found 7"):
            compute_loss(logits, spoilt, lora, Normalizer.of([batch], RANK), loss="kl")
        compute_loss(logits, spoilt, lora, Normalizer.of([batch], RANK))


@few
@given(shapes, st.integers(0, 3))
@example(HARD, 0)
def test_exact_match_is_the_share_of_queries_without_a_wrong_token(shapes: list[Shape], seed: int) -> None:
    contexts = draw(shapes, seed)
    logits, batch, lora = packed(contexts)
    answered = []
    for context in contexts:
        rows = iter(context.logits)
        for labels, supervised in zip(context.labels, context.supervised, strict=True):
            wanted = [label for label, mark in list(zip(labels, supervised, strict=True))[1:] if mark]
            if wanted:
                hits = [int(next(rows).argmax()) == label for label in wanted]  # all of its rows, right or wrong
                answered.append(all(hits))
    loss = compute_loss(logits, batch, lora, Normalizer.of([batch], RANK))
    expected = sum(answered) / max(len(answered), 1)
    assert float(loss.exact_match) == pytest.approx(expected)
