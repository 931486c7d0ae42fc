"""The loop: what a run writes, that it goes on as if it had never stopped, its schedule, and the step it refuses."""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_model import random_rows, run_config, tiny_model
from torch import Tensor

from d2l.build import Components
from d2l.checkpoint import Checkpoint, load_checkpoint, load_hypernet, save_checkpoint
from d2l.config.schema import RunConfig
from d2l.data.epochs import epoch_batches
from d2l.data.packing import collate
from d2l.data.tokenize import IGNORE_INDEX, Row
from d2l.errors import CheckpointError, NonFiniteError
from d2l.fingerprint import base_facts
from d2l.io.run_folder import METRICS, step_folder
from d2l.train.loop import Trainer, train_steps
from d2l.train.metrics import MEASURED, StepMetrics

SHALLOW: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def trainer(config: RunConfig, rows: Sequence[Row] | None = None) -> Trainer:
    return Trainer(tiny_model(config, **SHALLOW), random_rows() if rows is None else rows, config)


def weights(trained: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained.model.hypernet.state_dict().items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def without_time(metrics: Sequence[StepMetrics]) -> list[dict[str, float]]:
    return [{key: value for key, value in step.to_json().items() if key not in MEASURED} for step in metrics]


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every step wait for its save, so that the folder between steps is always the same."""

    class AtOnce(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **named: Any) -> Any:
            submitted = super().submit(*arguments, **named)
            wait([submitted])
            return submitted

    monkeypatch.setattr("d2l.train.saving.ThreadPoolExecutor", AtOnce)


# What a run writes


@pytest.mark.parametrize(("kl", "task"), [(False, "ce_loss"), (True, "kl_loss")])
def test_one_line_of_metrics_for_every_step(tmp_path: Path, kl: bool, task: str) -> None:
    config = run_config(loss="kl" if kl else "ce", max_steps=3)
    taken = list(train_steps(trainer(config, random_rows(top_k=3 if kl else None)), tmp_path))
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == [step.to_json() for step in taken]
    keys = (
        "step",
        task,
        "grad_norm",
        "gen_lora_l1_norm",
        "exact_match",
        "stage",
        "lr",
        "tokens",
        "label_tokens",
        "seconds",
        "inp_fill",
        "ctx_fill",
        "tokens_per_second",
        "resident_peak_gib",
    )
    assert all(tuple(line) == keys for line in lines)
    assert len(keys) == len(fields(StepMetrics))  # the loss's name is part of a key, and a speed is added
    assert MEASURED & set(keys) == {"seconds", "tokens_per_second", "resident_peak_gib"}
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["seconds"] > 0 and line[task] > 0 and line["gen_lora_l1_norm"] > 0 for line in lines)


def test_tokens_are_those_of_questions_and_documents() -> None:
    rows = random_rows(2)
    batch = collate(rows)
    taken = trainer(
        run_config(max_packed_inp_len=500, max_packed_ctx_len=500, gradient_accumulation_steps=1), rows
    ).step()
    questions = sum(len(query.input_ids) for row in rows for query in row.queries)
    assert taken.tokens == questions + sum(len(chunk) for row in rows for chunk in row.chunks)
    assert taken.inp_fill == pytest.approx(questions / 500)
    assert taken.ctx_fill == pytest.approx((taken.tokens - questions) / 500)
    assert taken.to_json()["tokens_per_second"] == pytest.approx(taken.tokens / taken.seconds)
    assert taken.label_tokens == batch.n_labels == sum(query.n_labels for row in rows for query in row.queries)


def test_a_checkpoint_is_written_before_the_first_step(tmp_path: Path) -> None:
    new = trainer(run_config())
    before = weights(new)
    next(train_steps(new, tmp_path, fingerprint="abc"))
    assert steps_in(tmp_path) == ["step-000000"]
    checkpoint = load_checkpoint(step_folder(tmp_path, 0))
    assert_equal(dict(checkpoint.hypernet), before)
    assert checkpoint.state["fingerprint"] == "abc"
    assert checkpoint.state["config"] == new.config.resolved()
    assert checkpoint.state["base"] == base_facts(new.model.base.config)


def test_a_run_that_cannot_save_fails_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    new = trainer(run_config())
    with pytest.raises(CheckpointError):
        next(train_steps(new, tmp_path))
    assert new.step_number == 0
    assert (tmp_path / METRICS).read_text() == ""


@pytest.mark.usefixtures("saved_at_once")
def test_checkpoints_are_saved_at_their_steps_and_the_last_and_pruned(tmp_path: Path) -> None:
    seen = [steps_in(tmp_path) for _ in train_steps(trainer(run_config(max_steps=5, save_steps=2)), tmp_path)]
    zero, two, four, five = (f"step-{step:06d}" for step in (0, 2, 4, 5))
    assert seen == [[zero], [zero, two], [zero, two], [two, four], [four, five]]  # save_total_limit: 2


def test_a_run_at_its_end_takes_no_step(tmp_path: Path) -> None:
    done = trainer(run_config(max_steps=1))
    assert len(list(train_steps(done, tmp_path))) == 1
    assert list(train_steps(done, tmp_path)) == []


# Resuming


@pytest.mark.parametrize(
    ("accumulation", "stop", "checkpointing", "muon_lr"),
    [
        pytest.param(1, 2, False, None, marks=pytest.mark.slow),  # within the first epoch, which has three batches
        (1, 3, False, None),  # at its end
        (2, 1, False, None),  # before a step that takes batches of two epochs
        pytest.param(2, 2, False, None, marks=pytest.mark.slow),  # after it
        (2, 2, True, None),
        (1, 2, False, 1e-3),
    ],
)
def test_a_resumed_run_goes_on_exactly_as_one_that_never_stopped(
    tmp_path: Path, accumulation: int, stop: int, checkpointing: bool, muon_lr: float | None
) -> None:
    config = run_config(
        max_steps=4,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        muon_learning_rate=muon_lr,
    )
    assert len(epoch_batches(config, random_rows(), 0)) == 3
    whole = trainer(config)
    expected = [whole.step() for _ in range(4)]
    assert whole.epoch > 0

    first = trainer(config)
    metrics = [first.step() for _ in range(stop)]
    save_checkpoint(tmp_path / "step", first.checkpoint())
    second = trainer(config)
    second.step()  # in other states than new, all of which have to be replaced
    second.restore(load_checkpoint(tmp_path / "step"))
    torch.manual_seed(123)
    metrics += [second.step() for _ in range(4 - stop)]

    assert without_time(metrics) == without_time(expected)
    assert_equal(weights(second), weights(whole))
    ours, theirs = second.checkpoint(), whole.checkpoint()
    assert_equal(*({k: v for k, v in c.trainer.items() if "rng" not in k} for c in (ours, theirs)))
    assert ours.state == theirs.state


def test_the_random_state_is_restored(tmp_path: Path) -> None:
    first = trainer(run_config())
    save_checkpoint(tmp_path / "step", first.checkpoint())
    expected = torch.rand(3)
    first.restore(load_checkpoint(tmp_path / "step"))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_several_trainers_in_one_process_do_not_disturb_each_other() -> None:
    config = run_config()
    alone = trainer(config)
    expected = [alone.step() for _ in range(2)]
    one, other = trainer(config), trainer(config)
    taken = [(one.step(), other.step()) for _ in range(2)]
    assert without_time([a for a, _ in taken]) == without_time([b for _, b in taken]) == without_time(expected)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    ours = trainer(run_config())
    tensors = dict(ours.checkpoint().hypernet)
    name = "scaler_A.q_proj"
    with pytest.raises(CheckpointError, match=rf"1 of another shape; {name}: expected \[1, 2, 2, 1\], found \[3\]"):
        load_hypernet(ours.model.hypernet, tensors | {name: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=rf"1 parameters missing, 1 left over, .*{name}: expected .*found none"):
        load_hypernet(ours.model.hypernet, {("x" if key == name else key): value for key, value in tensors.items()})


@pytest.mark.parametrize(("muon_lr", "kept"), [(None, "exp_avg_sq"), (1e-3, "momentum")])
def test_a_checkpoint_without_moments_is_refused(muon_lr: float | None, kept: str) -> None:
    config = run_config(muon_learning_rate=muon_lr)
    ours = trainer(config)
    ours.step()
    whole = ours.checkpoint()
    name = "head.weight"
    lacking = {key: value for key, value in whole.trainer.items() if key != f"optimizer.{kept}.{name}"}
    with pytest.raises(CheckpointError, match=f"lacks optimizer moments of {name}"):
        trainer(config).restore(Checkpoint(whole.hypernet, lacking, whole.state))


# Data


def test_every_row_is_used_once_an_epoch_and_orders_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(12)
    new = trainer(run_config(gradient_accumulation_steps=1, max_packed_inp_len=20, max_packed_ctx_len=24), rows)
    epochs: list[list[int]] = [[], [], []]
    for _ in range(100):  # enough for three epochs, and an end where epochs do not advance
        if (epoch := new.epoch) == 3:
            break
        epochs[epoch] += [record for batch in new._next_batches() for record in batch.record_ids]
    assert [sorted(records) for records in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


# Optimizer


def expected_lr(kind: str, step: int, *, peak: float, warmup: int, total: int, floor: float) -> float:
    """Of the step after `step` steps."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    if kind == "linear":
        return peak * (1 - progress)
    if kind == "constant_with_warmup":
        return peak
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize(
    ("kind", "warmup"),
    [("cosine_with_min_lr", 0), ("cosine_with_min_lr", 2), ("constant_with_warmup", 2), ("linear", 2)],
)
def test_the_learning_rate_follows_its_schedule(kind: str, warmup: int) -> None:
    config = run_config(lr_scheduler_type=kind, learning_rate=0.01, min_lr=0.002, warmup_steps=warmup, max_steps=5)
    new = trainer(config, random_rows(1))
    taken = [new.step().lr for _ in range(5)]
    curve = {"peak": 0.01, "warmup": warmup, "total": 5, "floor": 0.002}
    assert taken == pytest.approx([expected_lr(kind, step, **curve) for step in range(5)], rel=1e-6)  # type: ignore[arg-type]
    assert new.scheduler.get_last_lr()[0] == pytest.approx(expected_lr(kind, 5, **curve), abs=1e-9)  # type: ignore[arg-type]


def test_gradients_are_clipped_after_their_norm_is_measured() -> None:
    config = run_config(max_grad_norm=1e-3)
    clipped = trainer(config)
    expected = trainer(run_config(max_grad_norm=1e6)).step().grad_norm
    assert clipped.step().grad_norm == pytest.approx(expected)
    assert expected > 1e-2
    left = [parameter.grad for parameter in clipped.model.hypernet.parameters() if parameter.grad is not None]
    torch.testing.assert_close(torch.nn.utils.get_total_norm(left), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_loss_and_norm_do_not_depend_on_micro_batches() -> None:
    rows, roomy = random_rows(), {"max_packed_inp_len": 10_000, "max_packed_ctx_len": 10_000, "max_grad_norm": 1e6}
    narrow = {"max_packed_inp_len": max(int(row.size[0]) for row in rows), "max_packed_ctx_len": 10_000}
    batches = len(epoch_batches(run_config(**narrow), rows, epoch=0))
    whole = trainer(run_config(**roomy), rows).step()
    parts = trainer(run_config(**{**roomy, **narrow}, gradient_accumulation_steps=batches), rows).step()
    assert batches > 1
    assert parts.task_loss == pytest.approx(whole.task_loss, rel=1e-5)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


def test_the_norm_is_that_of_every_gradient() -> None:
    new = trainer(run_config(max_grad_norm=1e6))
    for parameter in new.model.hypernet.parameters():
        if parameter.ndim == 1:
            parameter.register_hook(lambda gradient: 1e4 * gradient)  # else one of vectors would hardly count
    found = new.step().grad_norm
    every = torch.cat([it.grad.flatten() for it in new.model.hypernet.parameters() if it.grad is not None])
    assert found == pytest.approx(float(every.norm()), rel=1e-5)


# The step that is refused


@pytest.mark.usefixtures("saved_at_once")
@pytest.mark.parametrize("place", ["head.weight", "scaler_B.q_proj"])
def test_a_value_that_is_not_finite_stops_the_run_before_the_step(tmp_path: Path, place: str) -> None:
    new = trainer(run_config(max_steps=4, save_steps=1))
    steps = train_steps(new, tmp_path)
    next(steps)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        new.model.hypernet.get_parameter(place).view(-1)[0] = math.nan
    before, moments = weights(new), new.checkpoint().trainer
    with pytest.raises(
        NonFiniteError, match=rf"^after the update of step 1 .*: {re.escape(place)} \(largest value nan\)"
    ):
        next(steps)
    now = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: text for path, text in now.items() if path.parent.name != "autopsy"} == files
    for name, value in weights(new).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert_equal(dict(new.checkpoint().trainer), dict(moments))
    assert new.step_number == 1


def spoil_a_weight(new: Trainer) -> None:
    with torch.no_grad():
        new.model.hypernet.get_parameter("head.weight").view(-1)[3] = math.nan


def enlarge_a_weight(new: Trainer) -> None:
    with torch.no_grad():
        new.model.hypernet.get_parameter("head.weight").view(-1)[3] = -1e30


def spoil_a_moment(new: Trainer) -> None:
    new.optimizer.state[new.model.hypernet.get_parameter("head.weight")]["exp_avg_sq"].view(-1)[3] = math.inf


@pytest.mark.usefixtures("saved_at_once")
@pytest.mark.parametrize("save_steps", [1, 3])
@pytest.mark.parametrize(
    ("spoil", "tensor"),
    [
        (spoil_a_weight, "head.weight (largest value nan)"),
        (enlarge_a_weight, "head.weight (largest value 1e+30)"),
        (spoil_a_moment, "exp_avg_sq of head.weight (largest value inf)"),
    ],
)
def test_what_an_update_has_spoilt_is_not_saved(
    tmp_path: Path, spoil: Callable[[Trainer], None], tensor: str, save_steps: int
) -> None:
    new = trainer(run_config(max_steps=4, save_steps=save_steps))
    steps = train_steps(new, tmp_path)
    if save_steps == 1:
        next(steps)
    before, step = steps_in(tmp_path) if save_steps == 1 else ["step-000000"], new.step_number + 1
    new.optimizer.register_step_post_hook(lambda *arguments: spoil(new))
    with pytest.raises(NonFiniteError) as raised:
        list(steps)
    text = str(raised.value)
    assert text.startswith(f"after the update of step {step} (records ")
    assert tensor in text
    assert steps_in(tmp_path) == before
    assert f"sound, by its hashes and by its values: {tmp_path / 'checkpoints' / before[-1]};" in text


@pytest.mark.usefixtures("saved_at_once")
def test_a_checkpoint_that_an_older_version_saved_unsound_is_not_advised(tmp_path: Path) -> None:
    new = trainer(run_config(max_steps=4, save_steps=1))
    steps = train_steps(new, tmp_path)
    next(steps)
    newest, checkpoint = step_folder(tmp_path, 1), new.checkpoint()
    shutil.rmtree(newest)
    weights = {name: value.clone() for name, value in checkpoint.hypernet.items()}
    weights["head.weight"].view(-1)[0] = 1e30
    save_checkpoint(newest, Checkpoint(weights, checkpoint.trainer, checkpoint.state))
    spoil_a_weight(new)
    with pytest.raises(NonFiniteError) as raised:
        list(steps)
    assert f"not to be used: {newest} holds head.weight (largest value 1e+30)" in str(raised.value)
    assert f"--resume {step_folder(tmp_path, 0)}" in str(raised.value)


def test_the_parameter_whose_gradient_is_not_finite_is_named_and_no_other(tmp_path: Path) -> None:
    new = trainer(run_config())
    new.model.hypernet.get_parameter("scaler_A.q_proj").register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        NonFiniteError, match=r"gradient norm is nan.*not finite in the gradients of scaler_A\.q_proj\n"
    ):
        next(train_steps(new, tmp_path))


def test_a_step_without_a_label_is_refused(tmp_path: Path) -> None:
    def mute(row: Row) -> Row:
        queries = tuple(type(q)(q.input_ids, (IGNORE_INDEX,) * len(q.input_ids)) for q in row.queries)
        return Row(row.record, row.chunks, queries)

    with pytest.raises(NonFiniteError, match="expected at least one supervised token, found 0"):
        next(train_steps(trainer(run_config(), [mute(row) for row in random_rows()]), tmp_path))


# Learning


def test_the_loss_of_needles_falls() -> None:
    config = run_config(
        tokenizer_name_or_path="configs/models/tiny_gpt_oss",
        train_ds_names="needle",
        needle_documents=2,
        needle_pairs=1,
        needle_filler_words=0,
        max_packed_inp_len=150,
        max_packed_ctx_len=150,
        gradient_accumulation_steps=1,
        gen_lora_l1_reg_coef=0.0,
        learning_rate=0.02,
        lr_scheduler_type="constant_with_warmup",
    )
    components = Components(config)
    model = tiny_model(config, nonzero=False, vocab_size=len(components.tokenizer), **SHALLOW)
    new = Trainer(model, components.rows, config)
    losses = [new.step().task_loss for _ in range(24)]
    assert losses[-1] < 0.6 * losses[0]  # 0.3, measured
