"""What watches a run: held-out documents, spikes, the first loss, documents that are not read; and that it changes nothing."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny_model import random_rows, run_config, tiny_model
from support.tiny_run import SHALLOW, needle_config
from torch.nn import functional

from d2l.build import Components, load_records
from d2l.checkpoint import load_checkpoint
from d2l.config.schema import CurriculumStage, RunConfig
from d2l.data.heldout import SHARE, choose_heldout, without_records
from d2l.data.packing import collate
from d2l.data.records import Record
from d2l.data.shards import row_sizes
from d2l.errors import DataError, NonFiniteError
from d2l.hypernet.distance import UpdateProducts, compare_updates, mean_distance
from d2l.hypernet.lora import Lora
from d2l.io.run_folder import EVALUATIONS, METRICS, step_folder
from d2l.train.curriculum import Curriculum
from d2l.train.events import read_events
from d2l.train.heldout import Answers, Heldout, HeldoutScores
from d2l.train.loop import Trainer, train_steps
from d2l.train.metrics import EVALUATED, MEASURED
from d2l.train.reading import LEAST_STEP, PATIENCE, SAME, ReadingGuard
from d2l.train.run import train
from d2l.train.spikes import LEAST, LIMIT, SpikeGuard
from d2l.train.start import start_new, start_resumed
from d2l.train.watch import Watch

PREFLIGHT = {"fingerprint": "abc", "summary": {}, "findings": []}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Four steps over needles of two stages, with held-out documents."""
    stage = {"digits": 1, "passing": 0.0001, "documents": 4}
    return needle_config(
        tmp_path,
        curriculum=tuple(CurriculumStage(pairs=pairs, **stage) for pairs in (1, 2)),
        max_packed_inp_len=160,
        max_packed_ctx_len=100,
        gradient_checkpointing=True,
        save_total_limit=9,
        eval_documents=3,
        max_steps=4,
    )


def go(config: RunConfig, place: Path | None = None) -> list[Mapping[str, float]]:
    records: list[Mapping[str, float]] = []
    with start_new(config, numbered=False) if place is None else start_resumed(config, place) as start:
        train(config, start, preflight=PREFLIGHT, on_step=records.append)
    return records


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def watched(tmp_path: Path, *, nonzero: bool = True, **changes: Any) -> tuple[Trainer, Watch]:
    """A trainer on random rows, and its watch over other rows."""
    config = run_config(**changes)
    trainer = Trainer(tiny_model(config, nonzero=nonzero, **SHALLOW), random_rows(), config)
    heldout = [random_rows(5, seed=9)] if config.eval_steps else []
    return trainer, Watch(trainer, tmp_path, heldout, [f"data.jsonl:{line}" for line in range(1, 7)])


# It changes nothing


def test_an_evaluated_run_is_equal_to_one_that_is_not(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_after_two_steps(self: Curriculum, exact_match: float) -> bool:
        self.average, before = self.average + 1, self.stage
        self.stage = int(self.average >= 2)
        return self.stage > before

    monkeypatch.setattr(Curriculum, "observe", ends_after_two_steps)
    go(config)
    other = config.model_copy(update={"output_dir": str(tmp_path / "evaluated"), "eval_steps": 1})
    records = go(other)
    plain, evaluated = tmp_path / "run", tmp_path / "evaluated"
    assert without_time(lines(plain / METRICS)) == without_time(lines(evaluated / METRICS))
    assert not (plain / EVALUATIONS).exists()
    for step in range(5):
        one, two = (load_checkpoint(step_folder(folder, step)) for folder in (plain, evaluated))
        for ours, theirs in (
            (one.hypernet, two.hypernet),
            (one.trainer, two.trainer),
        ):  # weights; moments and generators
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        for key in ("step", "epoch", "position", "curriculum"):
            assert one.state[key] == two.state[key]
    found = lines(evaluated / EVALUATIONS)
    assert [it["step"] for it in found] == [1, 2, 3, 4]
    assert [it["stage"] for it in found] == [1, 2, 2, 2]
    assert found[0]["none_ce_loss"] != found[1]["none_ce_loss"] == found[2]["none_ce_loss"], "each stage has its own"
    shown = [{f"{EVALUATED}{key}": it[key] for key in it if key not in ("step", "stage")} for it in found]
    assert [{key: value for key, value in it.items() if key.startswith(EVALUATED)} for it in records] == shown
    assert {key for key in shown[0] if "ce_loss" in key} == {
        f"eval/{it}_ce_loss" for it in ("document", "other", "none")
    }


def test_a_step_that_is_not_evaluated_reports_no_scores(config: RunConfig) -> None:
    records = go(config.model_copy(update={"eval_steps": 2, "max_steps": 4}))
    assert [any(key.startswith(EVALUATED) for key in record) for record in records] == [False, True, False, True]


def test_a_resumed_run_evaluates_as_one_left_alone(config: RunConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"eval_steps": 2, "max_steps": 3})
    go(config)
    whole = lines(tmp_path / "run" / EVALUATIONS)
    assert [it["step"] for it in whole] == [2, 3], "every two steps, and the last"
    with (tmp_path / "run" / EVALUATIONS).open("a") as file:
        file.write('{"step": 2, "torn')
    go(config, tmp_path / "run" / "checkpoints" / "step-000001")
    again = lines(tmp_path / "run" / EVALUATIONS)
    assert without_time(again) == without_time(whole)


def test_generators_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, watch = watched(tmp_path, nonzero=False, eval_steps=1)
    evaluate = Heldout.evaluate
    monkeypatch.setattr(Heldout, "evaluate", lambda self: (torch.rand(3), evaluate(self))[1])
    metrics, before = trainer.step(), torch.get_rng_state()
    watch.observe(metrics)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_a_step_has_spoilt_are_not_evaluated(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, nonzero=False, eval_steps=1)
    metrics = trainer.step()
    trainer.model.hypernet.head.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError):
        watch.observe(metrics)
    assert not (tmp_path / EVALUATIONS).exists()


# Scores


@pytest.mark.parametrize(("loss", "average"), [("ce", False), ("ce", True), ("kl", False)])
def test_scores_are_those_of_documents_one_at_a_time(loss: Any, average: bool) -> None:
    config = run_config(loss=loss, use_per_ctx_average_loss=average, max_packed_inp_len=30, max_packed_ctx_len=30)
    model, rows = tiny_model(config, **SHALLOW), random_rows(5, seed=3, top_k=2 if loss == "kl" else None)
    heldout = Heldout(model, rows, config)
    scores = heldout.evaluate()
    order = [record for batch in heldout._batches for record in batch.record_ids]
    assert len(heldout._batches) > 1
    assert sorted(order) == [0, 1, 2, 3, 4]
    by_record = {row.record: row for row in rows}
    ring = dict(zip(order, [order[-1], *order[:-1]], strict=True))

    def naive(record: int, under: int | None) -> tuple[float, int, float]:
        """The sum of a document's token losses, their number, and its questions that are answered exactly."""
        row, total, tokens, exact = by_record[record], 0.0, 0, 0.0
        lora = None if under is None else model.lora(collate([by_record[under]]))
        for query in row.queries:
            batch = collate([replace(row, queries=(query,))])
            logits = model.logits(batch, lora, positions=batch.prediction_positions).double()
            labels, found = batch.labels[0, batch.label_positions], functional.log_softmax(logits, -1)
            if loss == "kl":
                assert batch.logprobs_vals is not None
                assert batch.logprobs_indices is not None
                total -= float((batch.logprobs_vals.exp() * found.gather(-1, batch.logprobs_indices)).sum())
            else:
                total += float(functional.nll_loss(found, labels, reduction="sum"))
            tokens, exact = tokens + len(labels), exact + float((logits.argmax(-1) == labels).all())
        return total, tokens, exact

    questions = sum(len(row.queries) for row in rows)
    with torch.no_grad():
        for control, under in (("document", lambda it: it), ("other", ring.__getitem__), ("none", lambda it: None)):
            sums = [naive(record, under(record)) for record in order]
            found = scores.answers[control]  # type: ignore[index]
            means = [total / tokens for total, tokens, _ in sums]
            whole = sum(total for total, *_ in sums) / sum(tokens for _, tokens, _ in sums)
            assert found.loss == pytest.approx(sum(means) / 5 if average else whole, rel=1e-5)
            assert found.by_document == pytest.approx(means, rel=1e-5)
            assert found.exact_match == pytest.approx(sum(exact for *_, exact in sums) / questions)
    assert scores.gap == pytest.approx(
        sum(scores.answers["other"].by_document) / 5 - sum(scores.answers["document"].by_document) / 5
    )
    own, other = (scores.answers[control].by_document for control in ("document", "other"))
    gaps = np.array(other) - np.array(own)
    assert scores.gap_error == pytest.approx(gaps.std(ddof=1) / np.sqrt(len(gaps)))
    assert heldout.evaluate() == scores, "the base's own answers are kept"


def random_lora(contexts: int, rank: int, seed: int) -> Lora:
    draw = torch.Generator().manual_seed(seed)
    A, B = ({name: torch.randn(contexts, 2, rank, size, generator=draw) for name in "uv"} for size in (5, 7))
    return Lora(A, B, 3.0)


@pytest.mark.parametrize("biased", [False, True])
def test_the_distance_is_that_of_the_updates_themselves(biased: bool) -> None:
    one, other = random_lora(3, 2, seed=0), random_lora(3, 4, seed=1)
    shared = random_lora(1, 2, seed=2) if biased else None

    def updates(lora: Lora, names: str) -> torch.Tensor:
        made = [torch.einsum("nlri,nlro->nlio", lora.A[name].double(), lora.B[name].double()) for name in names]
        return torch.cat(made, dim=1).flatten(1)

    found = compare_updates(one, other, shared)
    for names in ("u", "v", "uv"):
        less = updates(shared, names) if shared is not None else 0
        mine, theirs = (functional.normalize(updates(it, names) - less, dim=-1) for it in (one, other))
        assert mean_distance(found, *names) == pytest.approx(float((mine - theirs).norm(dim=-1).mean()))
    assert mean_distance(found) == mean_distance(found, "u", "v")


def test_equal_updates_are_told_from_near_ones() -> None:
    one, other = random_lora(2, 2, seed=0), random_lora(2, 2, seed=1)
    rotation, _ = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    turned = Lora(*({k: rotation @ x.double() for k, x in side.items()} for side in (one.A, one.B)), one.scale)
    assert mean_distance(compare_updates(one, turned)) < 1e-6, "the same update by another A and B"
    longer = Lora(one.A, {k: 3 * x for k, x in one.B.items()}, one.scale)
    assert mean_distance(compare_updates(one, longer)) < 1e-6, "as of a document of three equal chunks"
    near = Lora(one.A, {k: x.double() + 1e-4 * other.B[k] for k, x in one.B.items()}, one.scale)
    assert 1e-5 < mean_distance(compare_updates(one, near)) < 1e-3
    assert mean_distance(compare_updates(one.zeroed(), one)) == 0.0


# Whether documents are read


def scores(
    distance: float = 0.5, gaps: Sequence[float] = (0.5, 0.6, 0.7), own: float = 1.0, size: float = 1.0
) -> HeldoutScores:
    answers: dict[Any, Answers] = {
        "document": Answers(own, 0.0, tuple(own for _ in gaps)),
        "other": Answers(own, 0.0, tuple(own + gap for gap in gaps)),
        "none": Answers(3.0, 0.0, tuple(3.0 for _ in gaps)),
    }
    pairs = [UpdateProducts({"v": size}, {"v": size}, {"v": size * (1 - distance**2 / 2)})]
    return HeldoutScores("ce", answers, pairs)


NO_GAP = (0.1, -0.1, 0.05, -0.02)


@pytest.mark.parametrize(
    ("found", "step", "warmup", "times", "expected"),
    [
        (scores(), 500, 100, 9, ""),
        (scores(distance=SAME * 2), 10, 100, 1, ""),
        (scores(distance=SAME / 2), 10, 100, 1, "does not read its documents"),  # also while it warms up
        (scores(distance=0, size=0.0), 10, 100, 1, ""),  # zero until the learning rate is not
        (scores(distance=0, size=0.0), 101, 100, 1, "does not read its documents"),
        (scores(gaps=NO_GAP), 500, 100, PATIENCE - 1, ""),
        (scores(gaps=NO_GAP), 500, 100, PATIENCE, "does not use its documents"),
        (scores(gaps=NO_GAP), LEAST_STEP, 0, 9, ""),
        (scores(gaps=NO_GAP), 500, 500, 9, ""),
        (scores(gaps=NO_GAP, own=3.5), 500, 100, 9, ""),  # it has learnt nothing at all so far
        (scores(gaps=(0.001, 0.001001, 0.001002)), 500, 100, 9, ""),  # a small gap, but a sure one
    ],
)
def test_documents_that_are_not_read_are_named(
    found: HeldoutScores, step: int, warmup: int, times: int, expected: str
) -> None:
    guard = ReadingGuard()
    said = [guard.observe(found, step, warmup) for _ in range(times)]
    assert not any(said[:-1])
    assert expected in said[-1]
    assert bool(said[-1]) == bool(expected)
    assert not expected or guard.observe(found, step, warmup) == "", "once"


def test_an_evaluation_with_a_gap_starts_the_count_anew() -> None:
    guard = ReadingGuard()
    for found in [*[scores(gaps=NO_GAP)] * (PATIENCE - 1), scores()] * 2:
        assert guard.observe(found, 500, 0) == ""


@given(
    found=st.lists(
        st.sampled_from([scores(), scores(gaps=NO_GAP), scores(gaps=NO_GAP, own=3.5), scores(distance=SAME / 2)]),
        min_size=1,
        max_size=8,
    ),
    stopped=st.integers(0, 8),
)
@example(
    found=[*[scores(gaps=NO_GAP, own=3.5)] * 5, *[scores(gaps=NO_GAP)] * 3], stopped=5
)  # nothing learnt, then no gap
def test_a_run_that_goes_on_is_judged_as_one_that_never_stopped(found: list[HeldoutScores], stopped: int) -> None:
    evaluated = [(50 * (number + 1), it) for number, it in enumerate(found)]
    whole, before, after = ReadingGuard(), ReadingGuard(), ReadingGuard()
    expected = [whole.observe(it, step, 40) for step, it in evaluated]
    said = [before.observe(it, step, 40) for step, it in evaluated[:stopped]]
    after.recall([{"step": step, **it.to_json()} for step, it in evaluated[:stopped]], "ce", 40)
    assert [*said, *(after.observe(it, step, 40) for step, it in evaluated[stopped:])] == expected


@pytest.mark.parametrize("cut", [False, True])
def test_a_hypernetwork_without_features_is_named_once(tmp_path: Path, cut: bool) -> None:
    trainer, watch = watched(tmp_path, nonzero=False, eval_steps=2, max_steps=6)
    if cut:
        features = trainer.model.features
        trainer.model.features = lambda batch: torch.zeros_like(features(batch))  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(train_steps(trainer, tmp_path, watch))
    told = [str(it.message) for it in caught if "documents" in str(it.message)]
    events = [event.text for event in read_events(tmp_path)]
    assert told == events
    assert [text.partition(":")[0] for text in told] == (["step 2"] if cut else [])
    distances = [it["lora_distance"] for it in lines(tmp_path / EVALUATIONS)]
    assert all(it < SAME / 10 for it in distances) if cut else all(it > 10 * SAME for it in distances)


def test_what_was_said_before_a_stop_is_not_said_again(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, nonzero=False, eval_steps=2, max_steps=6, warmup_steps=0)
    trainer.model.features = lambda batch, features=trainer.model.features: torch.zeros_like(features(batch))  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="does not read its documents"):
        list(train_steps(trainer, tmp_path, watch))
    Watch(trainer, tmp_path, [random_rows(5, seed=9)]).evaluate(8)
    assert len(read_events(tmp_path)) == 1


# Spikes


def steady(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """Loss and gradient norm that fall, with noise."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, 2, generator=draw).mul(0.15).exp().tolist()
    return [(4 * 0.99**step * a, 2 * b) for step, (a, b) in enumerate(noise)]


def test_a_spike_is_found_once_and_what_is_steady_is_none() -> None:
    guard = SpikeGuard()
    assert not any(guard.observe(*it, stage=1) for it in steady(300))
    loss, norm = steady(301)[-1]
    (found,) = guard.observe(loss, norm * 40, stage=1)
    assert (found.name, found.value) == ("gradient norm", norm * 40)
    assert found.deviations > LIMIT
    assert found.median == pytest.approx(2, rel=0.2)
    assert guard.observe(loss, norm * 40, stage=1) == [], "the same excursion"
    low = SpikeGuard()
    assert not any(low.observe(0.25, 1.0, stage=1) for _ in range(LEAST))
    (found,) = low.observe(20.0, 1.0, stage=1)
    assert found.median == pytest.approx(0.25)
    assert guard.observe(loss, norm, stage=1) == []
    both = guard.observe(loss * 50 + 5, norm * 40, stage=1)
    assert [it.name for it in both] == ["loss", "gradient norm"]


@pytest.mark.parametrize(
    ("history", "step", "stage"),
    [
        ([(1.0, 1.0)] * (LEAST - 1), (50.0, 50.0), 1),  # too few steps to compare with
        ([(1.0, 1.0)] * 50, (50.0, 50.0), 2),  # another stage, with documents of its own
        ([(1.0, 1.0)] * 50, (2.0, 2.0), 1),  # a steady run has no deviation at all
        ([(0.001, 1.0)] * 50, (0.05, 1.0), 1),  # 50 times as much of nothing
        ([(1.0, 1.0)] * 50, (0.0, 0.001), 1),  # a fall
    ],
)
def test_these_are_no_spikes(history: list[tuple[float, float]], step: tuple[float, float], stage: int) -> None:
    guard = SpikeGuard()
    assert not any(guard.observe(*it, stage=1) for it in history)
    assert guard.observe(*step, stage=stage) == []


def test_a_spike_names_the_records_of_its_step(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, nonzero=False)
    metrics = trainer.step()
    for step in range(2, LEAST + 2):
        watch.observe(replace(metrics, step=step))
    metrics = trainer.step()
    assert trainer.inputs is not None
    records = sorted(record for batch in trainer.inputs.batches for record in batch.record_ids)
    named = ", ".join(f"{record} (data.jsonl:{record + 1})" for record in records)
    with pytest.warns(UserWarning, match="step 40 is far from those before it: loss 50, after a median of") as caught:
        watch.observe(replace(metrics, step=40, task_loss=50.0))
    assert len(caught) == 1
    assert str(caught[0].message).endswith(f"; its records: {named}")
    assert [event.text for event in read_events(tmp_path)] == [str(caught[0].message)]


def test_a_run_that_goes_on_is_compared_with_the_steps_before(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path, nonzero=False)
    metrics = trainer.step()
    lines = [json.dumps(replace(metrics, step=step).to_json()) for step in range(1, LEAST + 1)]
    (tmp_path / METRICS).write_text("\n".join([json.dumps({"step": 0, "ce_loss": 1.0}), *lines]) + "\n")
    _, watch = watched(tmp_path, nonzero=False)
    watch._trainer.inputs = trainer.inputs
    with pytest.warns(UserWarning, match=f"step {LEAST + 1} is far from those before it"):
        watch.observe(replace(metrics, step=LEAST + 1, task_loss=50.0))


# The first loss


@pytest.mark.parametrize("changes", [{}, {"loss": "ce", "use_per_ctx_average_loss": True}, {"dtype": "bfloat16"}])
def test_the_first_loss_of_a_new_lora_is_the_base_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer, watch = watched(tmp_path, nonzero=False, **changes)
    metrics = trainer.step()
    watch.observe(metrics)  # warnings are errors
    assert watch._base_loss() == metrics.task_loss


def test_another_first_loss_is_named(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path, nonzero=True)
    with pytest.warns(UserWarning, match="the first step's loss is .* the base's own is .* on the same rows"):
        watch.observe(trainer.step())
    assert len(read_events(tmp_path)) == 1
    watch.observe(trainer.step())


# Which documents are held out


def record(text: str, source: str = "x") -> Record:
    return Record(context=text, prompts=("q",), responses=("a",), source=source)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.text(max_size=3), min_size=40, max_size=80, unique=True), st.integers(2, 9), st.randoms())
def test_the_choice_is_of_documents_and_not_of_their_order(texts: list[str], count: int, draw: Any) -> None:
    records = [record(text) for text in [*texts, *texts[:10]]]  # ten documents have two records
    chosen = choose_heldout(records, count)
    documents = {records[index].context for index in chosen}
    assert len(documents) == min(count, len(texts) // SHARE)
    assert {index for index, it in enumerate(records) if it.context in documents} == chosen
    shuffled = draw.sample(records, len(records))
    assert {shuffled[index].context for index in choose_heldout(shuffled, count)} == documents


def test_a_few_documents_are_too_few() -> None:
    with pytest.raises(DataError, match=r"expected at least 20 different documents, found 19.*val_ds_names"):
        choose_heldout([record(str(number)) for number in range(19)] * 2, 4)


def file_of(path: Path, texts: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"context": it, "prompts": ["q"], "responses": ["a"]}) + "\n" for it in texts))
    return str(path)


def test_documents_that_are_kept_out_are_not_trained_on(config: RunConfig, tmp_path: Path) -> None:
    data = file_of(tmp_path / "data.jsonl", [f"text {number}" for number in range(30)])
    values = {**config.model_dump(), "curriculum": (), "train_ds_names": (data,)}
    every, some = (Components(RunConfig(**values | {"eval_steps": steps})) for steps in (None, 2))
    assert (every.heldout, len(every.rows), every.rows) == ((), 30, every.tokenized.rows)
    assert len(some.kept_out) == 3
    assert len(some.rows) == 27
    assert {row.record for row in some.rows} | some.kept_out == set(range(30))
    assert {row.record for row in some.heldout[0]} == some.kept_out
    assert row_sizes(some.rows).tolist() == [list(row.size) for row in some.rows[:]]
    uneven = random_rows()
    left = without_records(uneven, {uneven[0].record, uneven[2].record})
    assert row_sizes(left).tolist() == [list(row.size) for row in left[:]]
    assert load_records(some.config) == some.records, "the preflight looks at all of them"


def test_documents_of_another_file_are_held_out(config: RunConfig, tmp_path: Path) -> None:
    data = file_of(tmp_path / "data.jsonl", ["one", "two"])
    other = file_of(tmp_path / "other.jsonl", ["three", "four", "four", "five", "six"])
    values = {**config.model_dump(), "curriculum": (), "train_ds_names": (data,), "eval_steps": 1}
    components = Components(RunConfig(**values | {"val_ds_names": other}))
    assert len(components.rows) == 2
    (rows,) = components.heldout
    assert [row.record for row in rows] == [0, 1, 3], "three documents that differ"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["two", "three"], r"found 1 of 2 in train_ds_names too:\n  .*other.jsonl:1 is .*data.jsonl:2"),
        (["three", "three"], "two different held-out documents with a row each, found 1"),
        (None, "val_ds_names: .*does not exist"),
    ],
)
def test_held_out_documents_that_cannot_be_used_are_named(
    config: RunConfig, tmp_path: Path, texts: list[str] | None, message: str
) -> None:
    data, other = file_of(tmp_path / "data.jsonl", ["one", "two"]), tmp_path / "other.jsonl"
    if texts is not None:
        file_of(other, texts)
    values = {**config.model_dump(), "curriculum": (), "train_ds_names": (data,), "eval_steps": 1}
    with pytest.raises(DataError, match=message):
        _ = Components(RunConfig(**values | {"val_ds_names": (str(other),)})).heldout
