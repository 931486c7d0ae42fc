"""The first step's figures beside their predictions: what they are, that checkpoints keep them, and where they are told."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.run_folders import make_folder
from support.tiny_model import random_rows, run_config, tiny_model
from support.tiny_run import SHALLOW, needle_config
from torch.nn import functional
from typer.testing import CliRunner

import cli
from checks.predictions import predicted_by
from checks.production import make_subject
from checks.result import Report
from checks.rules import RULES
from checks.runner import run_checks
from d2l.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.tokenize import IGNORE_INDEX
from d2l.io.atomic import remove_folder
from d2l.io.run_folder import METRICS, step_folder
from d2l.plan.inputs import plan_inputs
from d2l.plan.plan import make_plan
from d2l.train.first_step import UNKNOWN, Prediction
from d2l.train.loop import Trainer
from d2l.train.metrics import GIB, PeakMemory, forget_peak_memory
from d2l.train.run import train
from d2l.train.start import start_new, start_resumed
from d2l.train.watch import Watch

PREFLIGHT = {"fingerprint": "abc", "summary": {}}
PREDICTION = Prediction(context_tokens_per_row=61.5, cuda_peak_gib=27.25)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Three steps of two packed rows."""
    return needle_config(tmp_path, save_total_limit=9)


def go(config: RunConfig, place: Path | None = None, prediction: Prediction = PREDICTION) -> None:
    with start_new(config, numbered=False) if place is None else start_resumed(config, place) as start:
        train(config, start, preflight=PREFLIGHT, prediction=prediction, on_step=lambda record: None)


def kept(config: RunConfig, step: int) -> Any:
    return load_checkpoint(step_folder(Path(config.output_dir), step)).state.get("first_step")


# What they are


@pytest.mark.parametrize("nonzero", [False, True], ids=["a new LoRA", "a LoRA that is not zero"])
def test_the_predicted_loss_is_that_of_the_plain_base(tmp_path: Path, nonzero: bool) -> None:
    """Questions one at a time through the library's own model: no packing, no document, no LoRA."""
    config, rows = run_config(), random_rows()
    trainer = Trainer(tiny_model(config, nonzero=nonzero, **SHALLOW), rows, config)
    watch = Watch(trainer, tmp_path)
    assert watch.evidence() == {}
    metrics = trainer.step()
    with pytest.warns(UserWarning, match="the first step's loss is") if nonzero else nullcontext():
        watch.observe(metrics)
    assert trainer.inputs is not None
    taken = [rows[record] for batch in trainer.inputs.batches for record in batch.record_ids]
    assert 1 < len(taken) < len(rows)
    losses = torch.zeros(0)
    for query in [query for row in taken for query in row.queries]:
        with torch.no_grad():
            logits = trainer.model.base(torch.tensor([query.input_ids])).logits[0, :-1]
        labels = torch.tensor(query.labels[1:])
        found = functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        losses = torch.cat([losses, found[labels != IGNORE_INDEX]])
    figures = watch.evidence()["first_step"]
    assert figures["predicted"] == {"ce_loss": pytest.approx(float(losses.mean()), rel=1e-5)}
    assert figures["measured"]["context_tokens"] == sum(len(chunk) for row in taken for chunk in row.chunks)
    assert (figures["measured"]["ce_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)) is not nonzero
    first = watch.evidence()
    watch.observe(trainer.step())
    assert watch.evidence() == first


def test_a_peak_on_the_gpu_has_the_name_of_its_prediction(tmp_path: Path) -> None:
    config = run_config(loss="kl")
    trainer = Trainer(tiny_model(config, nonzero=False, **SHALLOW), random_rows(top_k=2), config)
    watch = Watch(trainer, tmp_path, prediction=PREDICTION)
    watch.observe(replace(trainer.step(), memory=PeakMemory("cuda", 26.5)))
    figures = watch.evidence()["first_step"]
    assert (figures["predicted"]["cuda_peak_gib"], figures["measured"]["cuda_peak_gib"]) == (27.25, 26.5)
    assert figures["predicted"]["kl_loss"] == figures["measured"]["kl_loss"]


def test_a_base_without_a_finite_loss_is_no_obstacle_to_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config()
    trainer = Trainer(tiny_model(config, **SHALLOW), random_rows(), config)
    watch = Watch(trainer, tmp_path)
    monkeypatch.setattr(watch, "_base_loss", lambda: float("nan"))
    with pytest.warns(UserWarning, match="the base's own is nan"):
        watch.observe(trainer.step())
    assert watch.evidence()["first_step"]["predicted"] == {"ce_loss": None}
    save_checkpoint(tmp_path / "step-000001", trainer.checkpoint(**watch.evidence()))


# What checkpoints keep


def test_every_checkpoint_after_it_keeps_them_and_a_resumed_run_too(config: RunConfig) -> None:
    go(config)
    folder = Path(config.output_dir)
    line = json.loads((folder / METRICS).read_text().splitlines()[0])
    first = kept(config, 1)
    assert first["measured"] == {
        **{key: line[key] for key in ("ce_loss", "grad_norm", "seconds", "resident_peak_gib")},
        "context_tokens": round(line["ctx_fill"] * 2 * 80),
    }
    assert first["predicted"] == {"ce_loss": line["ce_loss"], "context_tokens": 2 * 61.5, "cuda_peak_gib": 27.25}
    assert (kept(config, 0), kept(config, 2), kept(config, 3)) == (None, first, first)
    whole = load_checkpoint(step_folder(folder, 3))
    go(config, step_folder(folder, 1), prediction=UNKNOWN)
    again = load_checkpoint(step_folder(folder, 3))
    assert again.state["first_step"] == first
    assert again.hypernet.keys() == whole.hypernet.keys()
    assert all(torch.equal(value, whole.hypernet[name]) for name, value in again.hypernet.items())


def test_a_run_that_goes_on_before_its_first_step_measures_it(config: RunConfig) -> None:
    go(config.model_copy(update={"max_steps": 1}))
    go(config, step_folder(Path(config.output_dir), 0), prediction=UNKNOWN)
    assert kept(config, 3)["predicted"].keys() == {"ce_loss"}


def test_a_checkpoint_of_an_earlier_version_goes_on_without_them(config: RunConfig) -> None:
    go(config.model_copy(update={"max_steps": 2}))
    place = step_folder(Path(config.output_dir), 2)
    found = load_checkpoint(place)
    state = {key: value for key, value in found.state.items() if key != "first_step"}
    remove_folder(place)
    save_checkpoint(place, Checkpoint(found.hypernet, found.trainer, state))
    go(config, place)
    assert load_checkpoint(step_folder(Path(config.output_dir), 3)).state.keys() == state.keys()


# What a preflight predicts


def report_on(config: RunConfig, *codes: str) -> Report:
    return run_checks(make_subject(config), RULES, select=codes)


def test_predictions_are_those_of_the_plan() -> None:
    config = load_config(None, {"device_memory": "80GiB", "cache": "false", "gradient_accumulation_steps": "3"})
    inputs = plan_inputs(config)
    plan = make_plan(inputs.model, config, inputs.rows, inputs.card)
    found = predicted_by(report_on(config, "DAT305", "MEM401"))
    assert found.context_tokens_per_row is not None
    assert round(3 * found.context_tokens_per_row) == plan.context_tokens_per_step
    assert found.cuda_peak_gib == pytest.approx(plan.memory.needed / GIB)


def test_a_gpu_forgets_what_the_checks_took_and_a_host_has_nothing_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    forgot: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgot.append)
    for name in ("cpu", "cuda:1"):
        forget_peak_memory(torch.device(name))
    assert forgot == [torch.device("cuda:1")]


def test_the_peak_begins_anew_before_the_base_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr("d2l.train.run.forget_peak_memory", lambda device: order.append("forgot"))
    monkeypatch.setattr("d2l.build.load_base", lambda *arguments: order.append("loaded") or _stop())
    config = needle_config(tmp_path)
    with start_new(config, numbered=False) as start, pytest.raises(KeyboardInterrupt):
        train(config, start, preflight=PREFLIGHT, on_step=lambda record: None)
    assert order == ["forgot", "loaded"]


def _stop() -> None:
    raise KeyboardInterrupt


def test_what_no_check_has_looked_at_is_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert predicted_by(report_on(load_config(), "CTX101", "MEM401")) == UNKNOWN


# Where they are told


FIGURES = {
    "predicted": {"ce_loss": 6.9375, "context_tokens": 123.0, "cuda_peak_gib": 27.25},
    "measured": {"ce_loss": 7.5, "grad_norm": 0.25, "context_tokens": 118, "seconds": 0.5, "resident_peak_gib": 0.625},
}


def status_of(folder: Path) -> Any:
    result = CliRunner().invoke(cli.app, ["status", str(folder), "--format", "json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)[0]["first_step"]


def with_state(folder: Path, text: str) -> Path:
    """A run whose newest checkpoint has that state."""
    (make_folder(folder) / "checkpoints" / "step-000004" / "state.json").write_text(text)
    return folder


def test_status_tells_them(tmp_path: Path) -> None:
    assert status_of(with_state(tmp_path / "run", json.dumps({"step": 4, "first_step": FIGURES}))) == FIGURES


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"first_step": 3}', '{"first_step": {"measured": [1]}}'])
def test_a_state_without_them_is_no_obstacle(tmp_path: Path, text: str) -> None:
    assert status_of(with_state(tmp_path / "run", text)) is None


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    values = {"predicted": {"ce_loss": None, "cuda_peak_gib": "<b>"}, "measured": {"ce_loss": 7.5}}
    folder = with_state(tmp_path / "run", json.dumps({"first_step": values}))
    assert status_of(folder) == {"predicted": {}, "measured": {"ce_loss": 7.5}}
