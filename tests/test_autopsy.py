"""Autopsies: for planted causes all over a step the first suspect is the planted one, and what is written and said."""

import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from support.tiny_model import random_rows, run_config, tiny_model
from torch import Tensor, nn
from typer.testing import CliRunner

import cli
from checks.catalogue import read_catalogue
from checks.lookalikes import lookalikes
from d2l.checkpoint import Checkpoint, save_checkpoint
from d2l.data.packing import PackedBatch, collate
from d2l.data.tokenize import IGNORE_INDEX, Row
from d2l.errors import NonFiniteError
from d2l.hypernet.lora import Lora
from d2l.io.run_folder import step_folder
from d2l.train.autopsy import Autopsy, Values, newest_autopsy, read_autopsy
from d2l.train.diagnosis import newest_sound_checkpoint
from d2l.train.loop import Trainer, batch_loss, train_steps
from d2l.train.losses import Normalizer
from d2l.train.random_state import random_state
from d2l.train.replay import (
    BACKWARD,
    DOCUMENT,
    HYPERNETWORK,
    LOSS,
    QUESTION,
    StepInputs,
    measure,
    replay,
    split_contexts,
)
from d2l.train.suspects import DATA, NORM, START, UPDATE

SHALLOW: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
ONE_PACK: dict[str, Any] = {"max_packed_inp_len": 500, "max_packed_ctx_len": 500, "gradient_accumulation_steps": 1}
VICTIM, RARE = 3, 7  # the record, and the token, that only this record's document holds
PERCEIVER = "hypernet.aggregator.perceiver"


@dataclass(frozen=True)
class Cause:
    """A planted cause and its place.

    Attributes:
        plant: spoils a trainer before its next step.
        place: phase, module, tensor and layer of the first suspect, and its records.
        config: changes of the configuration.
        after: steps that are taken before.
        guard: the one that fires.
    """

    plant: Callable[[Trainer], object]
    place: tuple[str, str, str, int | None, tuple[int, ...]]
    guard: str = "loss"
    config: dict[str, Any] | None = None
    after: int = 0


def fill(parameter: str, value: float, *index: int) -> Callable[[Trainer], None]:
    """Put a value into a weight, at an index."""

    def plant(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.model.get_parameter(parameter)[index] = value

    return plant


def change_output(module: str, change: Callable[[Tensor], Tensor]) -> Callable[[Trainer], object]:
    """Change what a module returns."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return lambda trainer: trainer.model.get_submodule(module).register_forward_hook(hook)


def change_gradient(parameter: str, factor: float) -> Callable[[Trainer], object]:
    return lambda trainer: trainer.model.get_parameter(parameter).register_hook(lambda gradient: gradient * factor)


def spoil_expert(trainer: Trainer) -> None:
    """Give the rare token, and no other, the way to expert 0 of layer 0, and that expert a bias that is infinite."""
    layer: Any = trainer.model.base.get_submodule("model.layers.0")
    with torch.no_grad():
        embeddings = trainer.model.base.get_input_embeddings().weight
        embeddings[:, 0] = 0
        embeddings[RARE] = 0
        embeddings[RARE, 0] = 9
        layer.self_attn.o_proj.weight[0] = 0
        layer.self_attn.o_proj.bias[0] = 0
        layer.mlp.router.weight[0] = 0
        layer.mlp.router.weight[0, 0] = 1000
        layer.mlp.router.bias[0] = -1000
        layer.mlp.experts.down_proj_bias[0] = math.inf


def stretch_lora(trainer: Trainer) -> None:
    make = trainer.model.lora

    def stretched(batch: PackedBatch) -> Lora:
        lora = make(batch)
        return replace(lora, A={name: 1e6 * x for name, x in lora.A.items()}, scale=3e38)

    trainer.model.lora = stretched  # type: ignore[method-assign]


def spoil_backward_of_lora(trainer: Trainer) -> None:
    make = trainer.model.lora

    def divided(batch: PackedBatch) -> Lora:
        lora = make(batch)
        return replace(lora, A={name: divide_by_zero(x) for name, x in lora.A.items()})

    trainer.model.lora = divided  # type: ignore[method-assign]


def spoil_teacher(trainer: Trainer) -> None:
    def spoilt(row: Row) -> Row:
        query = row.queries[0]
        assert query.logprobs_vals is not None
        vals = ((math.nan, *query.logprobs_vals[0][1:]), *query.logprobs_vals[1:])
        return replace(row, queries=(replace(query, logprobs_vals=vals), *row.queries[1:]))

    trainer.rows = [spoilt(row) if row.record == VICTIM else row for row in trainer.rows]


def mute(trainer: Trainer) -> None:
    trainer.rows = [
        replace(row, queries=tuple(replace(it, labels=(IGNORE_INDEX,) * len(it.labels)) for it in row.queries))
        for row in trainer.rows
    ]


def spoil_moment(trainer: Trainer) -> None:
    trainer.optimizer.state[trainer.model.hypernet.get_parameter("head.weight")]["exp_avg_sq"].view(-1)[5] = math.inf


def raise_rate(trainer: Trainer) -> None:
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e30
    trainer.scheduler._last_lr = [1e30, 1e30]


def exclude_label(trainer: Trainer) -> None:
    """Give the victim a label that nobody else has, and every logit of it the value -inf."""
    trainer.rows = [_with_label(row) if row.record == VICTIM else row for row in trainer.rows]
    change_output("base.lm_head", lambda x: x.index_fill(-1, torch.tensor([RARE]), -math.inf))(trainer)


def _with_label(row: Row) -> Row:
    query = row.queries[0]
    ids, labels = (*query.input_ids[:-1], RARE), (*query.labels[:-1], RARE)
    return replace(row, queries=(replace(query, input_ids=ids, labels=labels), *row.queries[1:]))


def divide_by_zero(x: Tensor) -> Tensor:
    return x + (0 * x).sqrt()  # the derivative of sqrt at 0 is infinite, and 0 times that is NaN


O_PROJ = f"{PERCEIVER}.decoder.layers.0.self_attn.o_proj"
CAUSES = {
    "an embedding of one document": Cause(
        fill("base.model.embed_tokens.weight", math.inf, RARE, 2),
        ("document pass", "base.model.embed_tokens", "weight", None, (VICTIM,)),
    ),
    "one expert that one document is routed to": Cause(
        spoil_expert,
        ("document pass", "base.model.layers.0.mlp.experts", "down_proj_bias", 0, (VICTIM,)),
        config={"target_modules": ("q_proj",)},  # a LoRA on o_proj would give other tokens the way
    ),
    "output of a layer overflows": Cause(
        change_output("base.model.layers.0.mlp", lambda x: x * 1e30 * 1e30),
        ("document pass", "base.model.layers.0.mlp", "output", 0, ()),
    ),
    "a weight that only questions pass": Cause(
        fill("base.model.layers.1.self_attn.o_proj.weight", math.nan, 0, 3),
        ("question pass", "base.model.layers.1.self_attn.o_proj", "weight", 1, ()),
    ),
    "perceiver": Cause(
        change_output(f"{PERCEIVER}.encoder.layers.0.mlp.down_proj", lambda x: x * 1e30 * 1e30),
        ("hypernetwork", f"{PERCEIVER}.encoder.layers.0.mlp.down_proj", "output", None, ()),
    ),
    "head of one layer": Cause(
        change_output("hypernet.head", lambda x: x.index_fill(1, torch.tensor([1]), math.inf)),
        ("hypernetwork", "hypernet.head", "output", 1, ()),
    ),
    "delta of the LoRA overflows": Cause(
        stretch_lora, ("question pass", "base.model.layers.0.self_attn.q_proj", "output with its LoRA", 0, ())
    ),
    "log of 0": Cause(exclude_label, ("loss", "", "task", None, (VICTIM,))),
    "L1 term overflows": Cause(  # in float32; the guard adds on the host
        lambda trainer: None,
        ("loss", "", "total", None, ()),
        guard="gradient norm",
        config={"gen_lora_l1_reg_coef": 1e300},
    ),
    "teacher without a number": Cause(
        spoil_teacher, ("data", "", "logprobs_vals", None, (VICTIM,)), config={"loss": "kl"}
    ),
    "no labels": Cause(mute, ("data", "", "labels", None, (0, 1, 2, 3, 4, 5)), guard="labels"),
    "square root at 0": Cause(
        change_output(O_PROJ, divide_by_zero),
        ("backward pass", O_PROJ, "gradient of weight", None, ()),
        guard="gradient norm",
    ),
    "square root at 0 behind a frozen weight": Cause(  # the input of v_proj is that of q_proj and k_proj too
        change_output("base.model.layers.1.self_attn.v_proj", divide_by_zero),
        ("backward pass", "base.model.layers.1.self_attn.v_proj", "gradient of input 0", 1, ()),
        guard="gradient norm",
    ),
    "square root at 0 between modules": Cause(
        spoil_backward_of_lora,
        ("backward pass", "hypernet", "gradient of output A.q_proj", 0, ()),
        guard="gradient norm",
        config={"use_bias": False},
    ),
    "gradient of one parameter": Cause(
        change_gradient("hypernet.scaler_A.q_proj", math.nan),
        ("backward pass", "hypernet.scaler_A", "gradient of q_proj", None, ()),
        guard="gradient norm",
    ),
    "norm of finite gradients overflows": Cause(
        change_gradient("hypernet.head.weight", 1e22),
        ("gradient norm", "hypernet.head", "gradient of weight", None, ()),
        guard="gradient norm",
    ),
    "learning rate": Cause(raise_rate, ("update", "", "learning rate", None, ()), guard="state"),
    "moment": Cause(
        spoil_moment, ("update", "hypernet.head", "exp_avg_sq of weight", None, ()), guard="state", after=1
    ),
    "weight of the hypernetwork": Cause(
        fill("hypernet.head.weight", math.nan, 0, 0, 0),
        ("update", "hypernet.head", "weight", None, ()),
        "state",
        after=1,
    ),
    "weight at the start": Cause(
        fill("hypernet.head.weight", 1e30, 0, 0, 0), ("start", "hypernet.head", "weight", None, ()), "state"
    ),
}
SLOW = (
    *("norm of finite gradients overflows", "weight of the hypernetwork", "perceiver", "gradient of one parameter"),
    *("one expert that one document is routed to", "a weight that only questions pass", "head of one layer"),
    *("teacher without a number", "square root at 0 behind a frozen weight", "moment"),
)


def rows_with_a_rare_token(top_k: int | None = None) -> list[Row]:
    """Six records; the victim's document alone holds the rare token."""

    def without(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(token + (token == RARE) for token in ids)

    rows = [
        replace(
            row,
            chunks=tuple(map(without, row.chunks)),
            queries=tuple(
                replace(it, input_ids=without(it.input_ids), labels=without(it.labels)) for it in row.queries
            ),
        )
        for row in random_rows(top_k=top_k)
    ]
    victim = rows[VICTIM]
    rows[VICTIM] = replace(victim, chunks=((victim.chunks[0][0], RARE, *victim.chunks[0][2:]), *victim.chunks[1:]))
    return rows


def make_trainer(**changes: Any) -> Trainer:
    config = run_config(**ONE_PACK | changes)
    return Trainer(
        tiny_model(config, **SHALLOW), rows_with_a_rare_token(3 if changes.get("loss") == "kl" else None), config
    )


def stop(trainer: Trainer, folder: Path, cause: Cause) -> tuple[NonFiniteError, Autopsy]:
    """Take steps, plant the cause, go on until the run is stopped, and return the error and the autopsy."""
    steps = train_steps(trainer, folder)
    for _ in range(cause.after):
        next(steps)
    cause.plant(trainer)
    with pytest.raises(NonFiniteError) as raised:
        list(steps)
    newest = newest_autopsy(folder)
    assert newest is not None
    return raised.value, read_autopsy(newest)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(it, marks=[pytest.mark.slow] if it in SLOW else [], id=it.replace(" ", "-")) for it in CAUSES]
)
def test_the_first_suspect_is_the_planted_cause(tmp_path: Path, name: str, checkpointing: bool) -> None:
    cause = CAUSES[name]
    trainer = make_trainer(**{"gradient_checkpointing": checkpointing} | (cause.config or {}))
    error, autopsy = stop(trainer, tmp_path, cause)
    suspect = autopsy.suspects[0]
    assert (suspect.phase, suspect.module, suspect.tensor, suspect.layer, suspect.records) == cause.place
    assert error.guard == autopsy.guard == cause.guard
    assert str(suspect) in str(error)
    assert suspect.phase != "start" or not (tmp_path / "checkpoints").exists()


# What a refused step leaves


def test_the_folder_holds_the_batch_and_the_random_state_and_nothing_is_written_over(tmp_path: Path) -> None:
    trainer = make_trainer()
    state = torch.get_rng_state()
    stop(trainer, tmp_path, CAUSES["log of 0"])
    folder, inputs = tmp_path / "autopsy", trainer.inputs
    assert inputs is not None
    assert torch.equal(load_file(folder / "random.safetensors")["rng.torch"], state)
    tensors = load_file(folder / "batch.safetensors")
    for name in ("ctx_ids", "ctx_position_ids", "input_ids", "position_ids", "labels"):
        assert torch.equal(tensors[f"0.{name}"], getattr(inputs.batches[0], name))
    (facts,) = json.loads((folder / "batch.json").read_text())
    assert tuple(facts["record_ids"]) == inputs.batches[0].record_ids
    assert tuple(facts["n_queries"]) == inputs.batches[0].n_queries
    files = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "checkpoints").rename(tmp_path / "earlier")
    with pytest.raises(NonFiniteError, match="autopsy-2 "):
        list(train_steps(trainer, tmp_path))
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    assert newest_autopsy(tmp_path) == tmp_path / "autopsy-2"


@pytest.mark.parametrize("tensor", ["", "exp_avg", "exp_avg_sq"])
def test_a_checkpoint_that_no_step_can_start_from_is_passed_over(tmp_path: Path, tensor: str) -> None:
    """A moment is measured by another rule than a weight, which may not be large either."""
    trainer = make_trainer()
    trainer.step()
    save_checkpoint(step_folder(tmp_path, 1), trainer.checkpoint())
    trainer.step()
    checkpoint = trainer.checkpoint()
    kept = checkpoint.trainer if tensor else checkpoint.hypernet
    name = next(it for it in kept if it.startswith(f"optimizer.{tensor}.")) if tensor else next(iter(kept))
    large = torch.inf if tensor == "exp_avg_sq" else 1e10  # of weights alone this is too large
    save_checkpoint(step_folder(tmp_path, 2), with_value(checkpoint, name, large))
    found, rejected = newest_sound_checkpoint(tmp_path)
    sound = 2 if tensor == "exp_avg" else 1
    assert found == step_folder(tmp_path, sound)
    assert [f"holds {name} (largest value" in it for it in rejected] == [True] * (2 - sound)


def with_value(checkpoint: Checkpoint, name: str, value: float) -> Checkpoint:
    """Return a checkpoint with one value of a tensor exchanged."""
    parts = {field: dict(getattr(checkpoint, field)) for field in ("hypernet", "trainer")}
    for tensors in parts.values():
        if name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name].flatten()[0] = value
    return replace(checkpoint, **parts)


def test_a_replay_changes_nothing_that_a_run_would_see(tmp_path: Path) -> None:
    trainer = make_trainer()
    CAUSES["square root at 0"].plant(trainer)
    change_output("hypernet.head", lambda x: x + 0 * torch.rand(x.shape))(trainer)  # a step that draws
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    hooks = count_hooks(trainer)
    torch.manual_seed(0)
    with pytest.raises(NonFiniteError):
        trainer.step()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    trainer.epoch = trainer.position = 0
    with pytest.raises(NonFiniteError):
        list(train_steps(trainer, tmp_path))
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert count_hooks(trainer) == hooks
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def count_hooks(trainer: Trainer) -> int:
    modules = sum(len(it._forward_hooks) + len(it._forward_pre_hooks) for it in trainer.model.modules())
    return modules + sum(len(it._backward_hooks or ()) for it in trainer.model.parameters())


def test_a_watched_replay_computes_what_the_step_computed() -> None:
    trainer = make_trainer(gradient_checkpointing=True)
    (batch,) = trainer._next_batches()
    inputs = StepInputs(1, [batch], Normalizer.of([batch], trainer.config.lora_r), 0.0, random_state())
    loss = partial(batch_loss, trainer.model, config=trainer.config)
    total = loss(batch, inputs.normalizer).total
    total.backward()
    expected = {name: it.grad for name, it in trainer.model.hypernet.named_parameters()}
    trainer.model.hypernet.zero_grad(set_to_none=True)
    seen = replay(trainer.model, batch, inputs, loss)
    assert not seen.failed
    assert all(it.values.finite for it in seen.seen)
    assert seen.seen[[it.tensor for it in seen.seen].index("total")].values == Values(total.item(), total.item())
    for name, parameter in trainer.model.hypernet.named_parameters():
        # not to the last bit: gradients of an input that several modules share are added in another order
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    phases = list(dict.fromkeys(it.phase for it in seen.seen))
    assert phases == ["document pass", "hypernetwork", "question pass", "loss", "backward pass"]


@pytest.mark.parametrize("top_k", [None, 3])
def test_contexts_are_cut_out_of_a_row_as_if_each_were_packed_alone(top_k: int | None) -> None:
    rows = random_rows(top_k=top_k)
    for part, row in zip(split_contexts(collate(rows)), rows, strict=True):
        expected = collate([row])
        for field in fields(expected):
            ours, theirs = getattr(part, field.name), getattr(expected, field.name)
            assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs, field.name


@given(
    st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=12),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values_are_measured_as_numbers_one_by_one_say(numbers: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(numbers, dtype=dtype)
    kept = [value for value in x.tolist() if math.isfinite(value)]
    nan = sum(map(math.isnan, x.tolist()))
    first = next(((place,) for place, value in enumerate(x.tolist()) if not math.isfinite(value)), ())
    expected = Values(min(kept, default=None), max(kept, default=None), nan, len(numbers) - len(kept) - nan, first)
    assert measure(x) == expected


def test_a_failure_that_does_not_come_back_is_said(tmp_path: Path) -> None:
    trainer = make_trainer()
    left = [1]
    change_output("hypernet.head", lambda x: x * math.nan if left and left.pop() else x)(trainer)
    with pytest.raises(NonFiniteError, match="the replay in this process was finite"):
        list(train_steps(trainer, tmp_path))
    assert read_autopsy(tmp_path / "autopsy").suspects == ()


def test_a_replay_without_memory_leaves_the_batch_and_no_hook(tmp_path: Path) -> None:
    calls = []

    def spoil_then_fail(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * math.nan

    trainer = make_trainer()
    change_output("base.lm_head", spoil_then_fail)(trainer)
    hooks = count_hooks(trainer)
    _, autopsy = stop(trainer, tmp_path, Cause(lambda trainer: None, ("", "", "", None, ())))
    assert autopsy.replay == "the replay failed: OutOfMemoryError: CUDA out of memory"
    assert count_hooks(trainer) == hooks
    assert (tmp_path / "autopsy" / "batch.safetensors").is_file()


def test_a_disk_without_room_hides_no_diagnosis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = make_trainer()
    CAUSES["perceiver"].plant(trainer)
    monkeypatch.setattr("d2l.train.diagnosis.save_file", fail)
    with pytest.raises(NonFiniteError, match=r"first suspect: hypernetwork: (.|\n)*no autopsy: .*No space left"):
        list(train_steps(trainer, tmp_path))
    assert newest_autopsy(tmp_path) is None


def test_findings_that_the_run_let_pass_are_let_pass_again(tmp_path: Path) -> None:
    outcomes = [{"code": "OPT204", "ignored": True}, {"code": "MEM401", "ignored": False}]
    (tmp_path / "preflight.json").write_text(json.dumps({"outcomes": outcomes}))
    _, autopsy = stop(make_trainer(), tmp_path, CAUSES["learning rate"])
    again = tmp_path / "checkpoints" / "step-000000"
    assert shlex.split(autopsy.command) == [
        *("d2l", "train", str(tmp_path / "config.yaml"), "--resume", str(again)),
        *("--ignore", "OPT204=as in the run that stopped"),
    ]


# Showing it


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    stop(make_trainer(), folder, CAUSES["an embedding of one document"])
    return folder


def d2l(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_the_newest_autopsy_is_shown_first_suspect_first(stopped: Path) -> None:
    shown = d2l("autopsy", stopped)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == f"autopsy        {stopped / 'autopsy'}"
    suspects = lines[lines.index("suspects") + 2 :]
    assert suspects[0].split()[:5] == ["1", "document", "pass", "base.model.embed_tokens", "weight"]
    assert "looks like     QNT201 weights-changed-by-loading" in shown.stdout
    assert f"--resume {stopped / 'checkpoints' / 'step-000000'}" in shown.stdout
    assert re.search(rf"^{VICTIM} +document pass: base.model.embed_tokens, output: ", shown.stdout, re.MULTILINE)
    trail = lines[lines.index("on the way to the first suspect") + 2 :]
    end = trail[: trail.index("")] if "" in trail else trail
    assert end[-1].split()[:3] == ["document", "pass", "base.model.embed_tokens"]  # it ends there
    assert end[-1].endswith("1 inf")
    assert d2l("autopsy", stopped / "autopsy").stdout == shown.stdout


def test_the_autopsy_as_json(stopped: Path) -> None:
    document = json.loads(d2l("autopsy", stopped, "--format", "json").stdout)
    stored = json.loads((stopped / "autopsy" / "autopsy.json").read_text())
    assert {key: document[key] for key in stored} == stored
    assert document["checks"] == ["QNT201", "ENC201"]
    assert document["folder"] == str(stopped / "autopsy")


def test_a_terminal_gets_tables(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=StringIO(), force_terminal=True, width=100, markup=False)
    monkeypatch.setattr("commands.autopsy.console", lambda: screen)
    assert d2l("autopsy", stopped).exit_code == 0
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "base.model.embed_tokens" in text
    assert "suspects" in text
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines())) <= 100


def test_a_run_without_an_autopsy_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    shown = d2l("autopsy", tmp_path)
    assert (shown.exit_code, shown.stdout.count("\n")) == (0, 1)
    assert "holds no autopsy" in shown.stdout
    assert d2l("autopsy", tmp_path, "--format", "json").stdout == "null\n"


@pytest.mark.parametrize("place", ["absent", "empty", "file"])
def test_what_is_no_run_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    shown = d2l("autopsy", tmp_path / place)
    assert shown.exit_code == 2
    assert shown.stderr.startswith(f"Error: {tmp_path / place} ")
    assert shown.stderr.count("\n") == 1


@given(st.data())
@settings(derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_autopsy_gets_one_line(stopped: Path, data: st.DataObject) -> None:
    stored = json.loads((stopped / "autopsy" / "autopsy.json").read_text())
    paths = [(), *((key,) for key in stored), ("suspects", 0), ("suspects", 0, "module"), ("trail", 0, "values", "low")]
    path = data.draw(st.sampled_from(paths))
    other = data.draw(st.sampled_from(["text", "remove", [1], {"a": [1]}, {"a": 1, "values": 3}, -1, True]))
    holder: Any = {"whole": stored}
    for key in ("whole", *path[:-1]) if path else ():
        holder = holder[key]
    key = path[-1] if path else "whole"
    holder[key] = other
    text = json.dumps(holder["whole"] if not path else stored)
    if other == "remove":
        text = text[: data.draw(st.integers(0, len(text) - 1))]
    with TemporaryDirectory() as name:
        folder = Path(name) / "autopsy"
        folder.mkdir()
        (folder / "autopsy.json").write_text(text)
        shown = d2l("autopsy", name)
    assert (shown.exit_code, shown.stderr.count("\n")) in [(0, 0), (2, 1)], shown.output
    assert shown.exception is None or isinstance(shown.exception, SystemExit)


def test_a_folder_without_its_facts_and_deep_json_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "autopsy").mkdir()
    assert "holds no autopsy.json" in d2l("autopsy", tmp_path).stderr
    (tmp_path / "autopsy" / "autopsy.json").write_text("[" * 100_000)
    shown = d2l("autopsy", tmp_path)
    assert (shown.exit_code, shown.stderr.count("\n")) == (2, 1)


def test_autopsies_are_numbered_as_numbers(tmp_path: Path) -> None:
    for name in ("autopsy", "autopsy-2", "autopsy-10", "autopsy-9", "autopsy-old", "autopsy-"):
        (tmp_path / name).mkdir()
    assert newest_autopsy(tmp_path) == tmp_path / "autopsy-10"


def test_every_part_of_a_step_has_checks_that_exist() -> None:
    parts = (DOCUMENT, HYPERNETWORK, QUESTION, LOSS, BACKWARD, DATA, UPDATE, START, NORM)
    known = {facts.code for facts in read_catalogue()}
    for part in parts:
        codes = {*lookalikes(part, ""), *lookalikes(part, "base.model.layers.0.mlp.experts.self_attn")}
        assert codes
        assert codes <= known
    assert lookalikes("elsewhere", "") == ()
