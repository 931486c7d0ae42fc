"""Packed batches: exact tensors, and every row in exactly one batch or reported."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import ACCOUNT, data_cases

from d2l.data import packing
from d2l.data.packing import Oversized, PackedBatch, collate, pack
from d2l.data.tokenize import IGNORE_INDEX, Query, Row

REFERENCE_FIELDS = ("ctx_ids", "ctx_position_ids", "input_ids", "position_ids", "labels", "n_queries", "n_ctx_chunks")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """`benchmarks/packing.py`, which holds the reference's greedy rule as its baseline."""
    path = Path(__file__).parents[1] / "benchmarks" / "packing.py"
    if not path.exists():
        pytest.skip("needs a checkout: benchmarks/ is not in the sdist")
    spec = importlib.util.spec_from_file_location("packing_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(batch: dict[str, list]) -> list[Row]:
    """Rows from the golden layout, [row][query][token]."""
    keys = [key for key in ("input_ids", "labels", "logprobs_vals", "logprobs_indices") if key in batch]
    return [
        Row(
            record=index,
            chunks=tuple(map(tuple, batch["ctx_ids"][index])),
            queries=tuple(
                Query(**{key: tuple(value) for key, value in zip(keys, values, strict=True)})
                for values in zip(*(batch[key][index] for key in keys), strict=True)
            ),
        )
        for index in range(len(batch["ctx_ids"]))
    ]


def as_lists(batch: PackedBatch) -> dict[str, Any]:
    plain = {key: value[0].tolist() for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return plain | {key: list(value) for key, value in vars(batch).items() if isinstance(value, tuple)}


# One batch


@pytest.mark.golden
def test_batches_are_those_of_the_reference(shared: Path, benchmark: ModuleType) -> None:
    compared = 0
    for case in data_cases(shared, "pack_batch"):
        rows = rows_of(case["batch"])
        sizes = [row.size for row in rows]
        budgets = case["max_packed_inp_len"], case["max_packed_ctx_len"]
        groups = benchmark.next_fit(sizes, *budgets, case["max_packed_size"])
        if case["error"]:  # one row: a bare index there, or nothing left
            assert len(rows) == 1
            packing = pack(sizes, *budgets, seed=0)
            assert list(packing.groups) == groups == ([(0,)] if "TypeError" in case["error"] else [])
            ACCOUNT.compare("data_pack_batch", case["error"])
            assert len(packing.oversized) == 1 - len(groups)
            continue
        for number, group in enumerate(groups):
            batch = collate([rows[index] for index in group])
            ours = as_lists(batch)
            assert {key: ours[key] for key in REFERENCE_FIELDS} == {
                key: case["result"][key][number] for key in REFERENCE_FIELDS
            }
            assert batch.record_ids == group
            if "logprobs_vals" in case["result"]:
                assert batch.logprobs_vals is not None
                assert batch.logprobs_indices is not None
                assert batch.logprobs_vals.tolist() == case["result"]["logprobs_vals"][number]
                assert batch.logprobs_indices.tolist() == case["result"]["logprobs_indices"][number]
                assert len(batch.logprobs_vals) == batch.n_labels
            compared += 1
        assert len(groups) == len(case["result"]["ctx_ids"])
        ACCOUNT.compare("data_pack_batch", case["result"])
    assert compared == 17


@pytest.mark.golden
def test_evaluation_batches_are_those_of_the_reference(shared: Path) -> None:
    (case,) = data_cases(shared, "flatten_eval")
    rows = [
        Row(i, tuple(map(tuple, item["ctx_ids"])), (Query(tuple(item["input_ids"]), tuple(item["labels"])),))
        for i, item in enumerate(case["inputs"])
    ]
    ours = as_lists(collate(rows))
    expected = {key: value[0] if isinstance(value[0], list) else value for key, value in case["result"].items()}
    assert {key: ours[key] for key in expected} == expected
    ACCOUNT.compare("data_flatten_eval", expected)


def test_a_first_token_is_never_supervised_by_the_query_before_it() -> None:
    with pytest.raises(AssertionError):
        Query((5, 6), (5, 6))


def queries(top_k: int) -> st.SearchStrategy[Query]:
    def query(marks: list[tuple[int, bool]]) -> Query:
        labels = (IGNORE_INDEX, *(token if on else IGNORE_INDEX for token, on in marks[1:]))
        n_labels = len(labels) - labels.count(IGNORE_INDEX)
        vals = tuple(tuple(-1.0 - k - i for k in range(top_k)) for i in range(n_labels))
        indices = tuple(tuple(range(i, i + top_k)) for i in range(n_labels))
        teacher = (vals, indices) if top_k else (None, None)
        return Query(tuple(token for token, _ in marks), labels, *teacher)

    return st.lists(st.tuples(st.integers(0, 300_000), st.booleans()), min_size=1, max_size=7).map(query)


def rows(top_k: int) -> st.SearchStrategy[list[Row]]:
    chunk = st.lists(st.integers(0, 300_000), min_size=1, max_size=6).map(tuple)
    row = st.builds(
        Row,
        record=st.integers(0, 99),
        chunks=st.lists(chunk, min_size=1, max_size=4).map(tuple),
        queries=st.lists(queries(top_k), min_size=1, max_size=4).map(tuple),
    )
    return st.lists(row, min_size=1, max_size=4)


def split_back(batch: PackedBatch) -> list[Row]:
    """The rows of a batch, token by token: the slow opposite of `collate`."""

    def pieces(ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> list[list[tuple[int, int]]]:
        found: list[list[tuple[int, int]]] = []
        for token, position, label in zip(ids[0].tolist(), position_ids[0].tolist(), labels[0].tolist(), strict=True):
            if position == 0:
                found.append([])
            assert position == len(found[-1])
            found[-1].append((token, label))
        return found

    chunks = pieces(batch.ctx_ids, batch.ctx_position_ids, batch.ctx_ids)
    asked = pieces(batch.input_ids, batch.position_ids, batch.labels)
    vals = None if batch.logprobs_vals is None else batch.logprobs_vals.tolist()
    indices = None if batch.logprobs_indices is None else batch.logprobs_indices.tolist()
    result = []
    for record, n_chunks, n_queries in zip(batch.record_ids, batch.n_ctx_chunks, batch.n_queries, strict=True):
        row_queries = []
        for piece in [asked.pop(0) for _ in range(n_queries)]:
            teacher: tuple = (None, None)
            if vals is not None and indices is not None:
                n = sum(label != IGNORE_INDEX for _, label in piece)
                teacher = tuple(map(tuple, vals[:n])), tuple(map(tuple, indices[:n]))
                vals, indices = vals[n:], indices[n:]
            row_queries.append(Query(*zip(*piece, strict=True), *teacher))
        row_chunks = tuple(tuple(token for token, _ in chunks.pop(0)) for _ in range(n_chunks))
        result.append(Row(record, row_chunks, tuple(row_queries)))
    assert not chunks
    assert not asked
    assert not vals
    return result


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.sampled_from([0, 3]).flatmap(rows))
def test_a_batch_splits_back_into_its_rows(some: list[Row]) -> None:
    batch = collate(some)
    assert split_back(batch) == some
    for name in ("ctx_ids", "ctx_position_ids", "input_ids", "position_ids", "labels"):
        tensor = getattr(batch, name)
        assert (tensor.dtype, tensor.shape[0], tensor.dim()) == (torch.int64, 1, 2)
    lengths = [len(query.input_ids) for row in some for query in row.queries]
    assert batch.queries.lengths == tuple(lengths)
    assert batch.contexts.lengths == tuple(row.size[0] for row in some)
    assert batch.chunks.lengths == tuple(len(chunk) for row in some for chunk in row.chunks)
    assert batch.n_tokens == sum(lengths)
    starts = [sum(lengths[:query]) for query in range(len(lengths))]
    expected = [  # the queries are numbered over the batch; a first token has no label, see `Query`
        (query, start + place)
        for query, (start, it) in enumerate(zip(starts, (it for row in some for it in row.queries), strict=True))
        for place, label in enumerate(it.labels)
        if label != IGNORE_INDEX
    ]
    assert list(zip(batch.label_queries.tolist(), batch.label_positions.tolist(), strict=True)) == expected
    assert batch.prediction_positions.tolist() == [place - 1 for _, place in expected]
    assert (batch.label_positions.dtype, batch.label_queries.dtype) == (torch.int64, torch.int64)
    assert batch.n_labels == sum(query.n_labels for row in some for query in row.queries)


def test_teacher_logprobs_keep_their_dtypes_and_come_for_all_queries_or_none() -> None:
    taught = Row(0, ((1,),), (Query((1, 2), (IGNORE_INDEX, 2), ((-0.5,),), ((7,),)),))
    batch = collate([taught, taught])
    assert batch.logprobs_vals is not None
    assert batch.logprobs_indices is not None
    assert (batch.logprobs_vals.dtype, batch.logprobs_indices.dtype) == (torch.float32, torch.int64)
    with pytest.raises(AssertionError, match="for every query or for none"):
        collate([taught, Row(1, ((1,),), (Query((1, 2), (IGNORE_INDEX, 2)),))])


def test_a_label_on_the_first_token_of_a_query_is_left_out() -> None:
    """No `Row` has one, but the reference's batches do: the logits that would predict it are the query before's."""
    batch = collate([Row(0, ((1,),), (Query((5, 6), (IGNORE_INDEX, 6)), Query((7, 8, 9), (IGNORE_INDEX, 8, 9))))])
    batch = replace(batch, labels=batch.input_ids)
    assert batch.label_positions.tolist() == [1, 3, 4]
    assert batch.prediction_positions.tolist() == [0, 2, 3]
    assert batch.label_queries.tolist() == [0, 1, 1]


def test_a_batch_without_queries_has_no_labels() -> None:
    """As `internalize` makes it."""
    batch = collate([Row(0, ((1, 2), (3,)), ())])
    assert (batch.chunks.lengths, batch.queries.lengths, batch.contexts.lengths) == ((2, 1), (), (0,))
    assert batch.label_positions.shape == batch.label_queries.shape == (0,)


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate([Row(4, ((1, 2),), (Query((1, 2), (IGNORE_INDEX, 2), ((-0.5,),), ((7,),)),))])
    assert (batch.label_positions.tolist(), batch.contexts.lengths) == ([1], (2,))  # cached, and not moved along
    moved = batch.to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert (moved.record_ids, moved.n_ctx_chunks, moved.n_queries) == ((4,), (1,), (1,))


def test_what_is_cached_is_not_carried_into_a_changed_batch() -> None:
    batch = collate([Row(0, ((1,),), (Query((5, 6, 7), (IGNORE_INDEX, 6, IGNORE_INDEX)),))])
    assert batch.label_positions.tolist() == [1]
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7]])
    assert replace(batch, labels=labels).label_positions.tolist() == [2]


# Which rows share a batch


def check_packing(sizes: Sequence[tuple[int, int]], budgets: tuple[int, int], seed: int) -> None:
    packed = pack(sizes, *budgets, seed=seed)
    groups = [sum((Counter(inp=sizes[i][0], ctx=sizes[i][1]) for i in group), Counter()) for group in packed.groups]
    assert all(total["inp"] <= budgets[0] and total["ctx"] <= budgets[1] for total in groups)
    oversized = [item.row for item in packed.oversized]
    assert sorted([*(i for group in packed.groups for i in group), *oversized]) == list(range(len(sizes)))
    assert oversized == [i for i, (inp, ctx) in enumerate(sizes) if inp > budgets[0] or ctx > budgets[1]]
    assert all(packed.groups)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 50)), max_size=60),
    st.tuples(st.integers(1, 40), st.integers(1, 80)),
    st.integers(0, 5),
    st.sampled_from([1, 3, 256]),
)
def test_every_row_is_in_one_group_or_reported_and_no_budget_is_exceeded(
    sizes: list[tuple[int, int]], budgets: tuple[int, int], seed: int, bins: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BINS_PER_WINDOW", bins)  # few, so that small cases have several windows
        check_packing(sizes, budgets, seed)


def test_many_windows(benchmark: ModuleType) -> None:
    check_packing(benchmark.draw_sizes(8000, 2048, 4096), (2048, 4096), seed=3)


def first_fit_decreasing(sizes: Sequence[tuple[int, int]], budgets: tuple[int, int]) -> int:
    """How many bins the textbook rule needs: for each row, the first bin with room, found by a loop."""
    bins: list[list[int]] = []
    for inp, ctx in sorted(sizes, key=lambda size: -(size[0] / budgets[0] + size[1] / budgets[1])):
        room = (used for used in bins if used[0] + inp <= budgets[0] and used[1] + ctx <= budgets[1])
        used = next(room, None)
        if used is None:
            bins.append(used := [0, 0])
        used[0] += inp
        used[1] += ctx
    return len(bins)


def test_a_window_is_packed_by_first_fit_decreasing(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_JITTER", 0.0)
    for seed in range(4):
        sizes = [(inp, ctx + 7 * i) for i, (inp, ctx) in enumerate(benchmark.draw_sizes(120, 900, 1500, seed))]
        assert len(pack(sizes, 1000, 3000, seed=0).groups) == first_fit_decreasing(sizes, (1000, 3000))


def test_long_tailed_lengths_fill_batches_better_than_the_greedy_rule(benchmark: ModuleType) -> None:
    sizes = benchmark.draw_sizes(6000, 4096, 8192)
    greedy, ours = len(benchmark.next_fit(sizes, 4096, 8192)), len(pack(sizes, 4096, 8192, seed=0).groups)
    assert ours < 0.85 * greedy


@pytest.mark.golden
def test_the_greedy_baseline_is_the_rule_of_the_reference(shared: Path, benchmark: ModuleType) -> None:
    for case in data_cases(shared, "pack_indices"):
        sizes = [(sum(inp), sum(ctx)) for inp, ctx in zip(case["lens"], case["ctx_lens"], strict=True)]
        groups = benchmark.next_fit(sizes, case["max_inp"], case["max_ctx"], case["max_size"])
        assert groups == [tuple(range(start, end)) for start, end in case["result"]]
        ACCOUNT.compare("data_pack_indices", case["result"])


def test_the_seed_decides_groups_and_order(benchmark: ModuleType) -> None:
    sizes = benchmark.draw_sizes(500, 2048, 4096)
    assert pack(sizes, 2048, 4096, seed=1) == pack(sizes, 2048, 4096, seed=1)
    one, other = (set(map(frozenset, pack(sizes, 2048, 4096, seed=seed).groups)) for seed in (1, 2))
    assert not {group for group in one & other if len(group) > 2}  # even where all rows fit a window
    groups = pack(sizes, 2048, 4096, seed=1).groups
    largest = [max(sizes[i][0] / 2048 + sizes[i][1] / 4096 for i in group) for group in groups]
    assert abs(np.corrcoef(range(len(groups)), largest)[0, 1]) < 0.3  # not from the longest to the shortest


def test_an_oversized_row_is_reported_with_what_to_change() -> None:
    packed = pack([(10, 10), (11, 10), (1_100, 2_000), (1, 1)], 10, 100, seed=0)
    assert packed.oversized == (
        Oversized(1, "11 tokens of questions > max_packed_inp_len 10; raise max_packed_inp_len to at least 11"),
        Oversized(
            2,
            "1,100 tokens of questions > max_packed_inp_len 10; raise max_packed_inp_len to at least 1,100; "
            "2,000 tokens of document > max_packed_ctx_len 100; raise max_packed_ctx_len to at least 2,000",
        ),
    )
    assert sorted(packed.groups) == [(0,), (3,)]


def test_nothing_to_pack() -> None:
    assert pack([], 10, 10, seed=0).groups == ()
    assert pack([(11, 1)], 10, 10, seed=0).groups == ()


def test_the_benchmark_runs(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main([200])
    assert "greedy" in capsys.readouterr().out
