"""What the device stage says of real weights: bases as others save them, loaded and trained as a run would, and spoilt."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from checks.faults import override
from checks.probes import probe_rows
from checks.production import make_subject
from checks.result import Outcome
from checks.rules import RULES, document_adds_nothing, loaded_base_differs, memory_unlike_planned
from checks.runner import run_checks
from checks.selftest import run_selftest
from checks.subject import Subject
from checks.training import on_device
from checks.training.on_device import own_loss
from d2l.base import load
from d2l.base.config import read_base_config
from d2l.base.files import save_mxfp4
from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.base.twin import twin_config
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.epochs import epoch_batches
from d2l.train.loop import Trainer
from d2l.train.processes import OneProcess

NEEDLES = {"needle_documents": "40", "curriculum": "[{pairs: 2, digits: 2}]", "cache": "false"}


def judged(subject: Subject, code: str) -> Outcome:
    (outcome,) = run_checks(subject, RULES, select=(code,)).outcomes
    return outcome


def of_folder(folder: Path, **values: Any) -> Subject:
    return make_subject(RunConfig(model_name_or_path=str(folder), **values), with_data=False)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-OSS whose experts are in MXFP4, as its checkpoints have them."""
    folder = tmp_path_factory.mktemp("base")
    config = read_base_config("configs/models/tiny_gpt_oss")
    plan = plan_load(RunConfig(model_name_or_path="configs/models/tiny_gpt_oss", expert_weights="packed"), config)
    save_mxfp4(random_base(config, plan, seed=0), folder)
    return folder


@pytest.fixture(scope="module")
def needles() -> Subject:
    return make_subject(load_config(Path("configs/needle_tiny.yaml"), NEEDLES))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("experts", ["packed", pytest.param("dequantize", marks=pytest.mark.slow)])
def test_mxfp4_is_loaded_as_transformers_loads_it(mxfp4: Path, dtype: str, experts: str) -> None:
    outcome = judged(of_folder(mxfp4, dtype=dtype, expert_weights=experts), "BAS402")
    assert outcome.outcome == "pass", outcome
    assert outcome.evidence["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_what_transformers_saves_is_loaded_as_it_loads_it(tmp_path: Path, family: str, dtype: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(twin_config(AutoConfig.for_model(family))).save_pretrained(tmp_path)
    outcome = judged(of_folder(tmp_path, dtype=dtype), "BAS402")
    assert outcome.outcome == "pass", outcome


def spoilt_tensors(spoil: Any) -> Any:
    """Return a reader of files that spoils what it reads."""
    read = load.read_tensors

    def reader(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read(*arguments):
            yield name, spoil(name, tensor)

    return reader


def nibbles_exchanged(name: str, tensor: Tensor) -> Tensor:
    return (tensor << 4) | (tensor >> 4) if name.endswith("_blocks") else tensor


def scales_one_larger(name: str, tensor: Tensor) -> Tensor:
    return tensor + 1 if name.endswith("down_proj_scales") else tensor


def sinks_lost(name: str, tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, -1e4) if name.endswith(".sinks") else tensor


@pytest.mark.parametrize("spoil", [nibbles_exchanged, scales_one_larger, sinks_lost])
def test_a_reader_that_reads_otherwise_is_red(mxfp4: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "read_tensors", spoilt_tensors(spoil))
    outcome = judged(of_folder(mxfp4, dtype="float32"), "BAS402")
    assert outcome.found_fault
    assert outcome.message.startswith("the loaded base computes other logits")


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [nibbles_exchanged, scales_one_larger, sinks_lost])
def test_it_is_red_in_bfloat16_too(mxfp4: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "read_tensors", spoilt_tensors(spoil))
    assert judged(of_folder(mxfp4, dtype="bfloat16"), "BAS402").found_fault


def test_the_faults_of_packed_experts_are_caught(mxfp4: Path) -> None:
    selftest = run_selftest(of_folder(mxfp4, expert_weights="packed"), RULES, stages=("device",), select=("BAS402",))
    results = {trial.fault: trial.result for trial in selftest.trials}
    assert results.pop("eager-attention") == "inapplicable"
    assert set(results.values()) == {"caught"}, results


def test_a_copy_that_does_not_fit_is_not_compared(mxfp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_base_differs, "ON_CPU", 1000)
    unloaded = override(load_base=lambda healthy, folder, plan: pytest.fail("a laptop may not hold it"))
    outcome = judged(unloaded(of_folder(mxfp4)), "BAS402")
    assert outcome.outcome == "skip"
    assert "GiB are to be had" in outcome.message


@pytest.mark.parametrize("code", ["BAS402", "DAT401", "STP401", "MEM402"])
def test_what_is_not_here_is_not_judged(code: str, tmp_path: Path) -> None:
    random = judged(of_folder(Path("configs/models/tiny_gpt_oss")), code)
    assert (random.outcome, random.message) == ("inapplicable", "the base is random, of a config file")
    sharded = replace(of_folder(Path("configs/models/needle_tiny"), base_sharding="full"))
    assert judged(sharded, code).message == "the base is sharded over the run's processes"


def test_the_first_loss_is_the_bases_own(needles: Subject) -> None:
    outcome = judged(needles, "STP401")
    assert outcome.outcome == "pass", outcome
    assert outcome.evidence["losses"][0] == pytest.approx(outcome.evidence["expected"], rel=1e-6)
    assert judged(needles, "MEM402").message == "no GPU here: a CPU's memory is not measured"


def test_a_step_that_takes_minutes_on_a_cpu_is_not_taken(needles: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "ON_CPU", 1.0)
    outcome = judged(replace(needles), "STP401")
    assert outcome.outcome == "skip"
    assert "takes minutes on a CPU" in outcome.message


@pytest.mark.parametrize("code", ["DAT401", "STP401"])
def test_weights_without_data_are_not_trained_on(code: str) -> None:
    outcome = judged(of_folder(Path("configs/models/needle_tiny")), code)
    assert (outcome.outcome, outcome.message) == ("skip", "no data: pass --data FILE, or set train_ds_names")


def test_documents_that_answer_nothing_are_a_warning(needles: Subject) -> None:
    sound = judged(needles, "DAT401")
    assert (sound.outcome, sound.evidence["records"]) == ("pass", 40), sound
    assert needles.records is not None
    contexts = [record.context for record in needles.records]
    others = tuple(
        replace(record, context=other)
        for record, other in zip(needles.records, [*contexts[1:], contexts[0]], strict=True)
    )
    outcome = judged(replace(needles, records=others), "DAT401")
    assert outcome.outcome == "warn", "any document tells the form of the answer, and its own tells the answer"
    assert outcome.evidence["none"] == pytest.approx(sound.evidence["none"], rel=1e-3)


@pytest.mark.parametrize(
    ("none", "other", "own", "found"), [(1.0, 3.0, 0.85, "warn"), (3.0, 1.0, 0.85, "warn"), (1.0, 1.0, 0.75, "pass")]
)
def test_its_own_document_has_to_be_better_than_both(
    none: float, other: float, own: float, found: str, needles: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([none, other, own])
    monkeypatch.setattr(document_adds_nothing, "_loss", lambda *arguments: next(losses))
    assert judged(needles, "DAT401").outcome == found


def test_few_records_are_too_few_to_say_so(needles: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_adds_nothing, "ON_CPU", 2e9)
    outcome = judged(needles, "DAT401")
    assert 4 <= outcome.evidence["records"] < 30, "as many as a CPU can ask in its time"
    assert needles.records is not None
    outcome = judged(replace(needles, records=needles.records[:3]), "DAT401")
    assert (outcome.outcome, outcome.message[:9]) == ("skip", "only 3 re"), outcome


def test_the_exact_logits_of_a_half_precision_base_leave_its_rotation_as_it_is(mxfp4: Path) -> None:
    """Frequencies rounded to bfloat16 would bend what both errors are measured against."""
    subject = of_folder(mxfp4, dtype="bfloat16")
    base = loaded_base_differs._as_transformers_loads(subject)
    before = {name: buffer.clone() for name, buffer in base.named_buffers()}
    assert {buffer.dtype for name, buffer in before.items() if "inv_freq" in name} == {torch.float32}
    loaded_base_differs._Probe.of(subject).alone_in_float32(base)
    assert all(torch.equal(buffer, before[name]) for name, buffer in base.named_buffers())
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("more", "found"), [(-1, "pass"), (2**27, "pass"), (2**29, "warn")])
def test_more_memory_than_reckoned_is_a_warning(needles: Subject, more: int, found: str) -> None:
    reckoned = judged(on_gpu(needles, lambda healthy, work: (work(), 1)[1]), "MEM402").evidence["reckoned"]
    outcome = judged(on_gpu(needles, lambda healthy, work: (work(), reckoned + more)[1]), "MEM402")
    assert outcome.outcome == found, outcome


def test_a_tenth_more_memory_than_reckoned_is_not_much(needles: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_unlike_planned, "LEAST", 0)
    reckoned = judged(on_gpu(needles, lambda healthy, work: (work(), 1)[1]), "MEM402").evidence["reckoned"]
    for factor, found in ((1.09, "pass"), (1.11, "warn")):
        outcome = judged(on_gpu(needles, lambda healthy, work, it=factor: (work(), int(it * reckoned))[1]), "MEM402")
        assert outcome.outcome == found, outcome


def on_gpu(subject: Subject, peak: Any) -> Subject:
    """Return the subject with a GPU that is this CPU, of which `peak` tells the memory."""
    return override(gpu=lambda healthy: "cpu", peak_memory=peak)(subject)


@pytest.mark.gpu
@pytest.mark.parametrize("code", ["BAS402", "DAT401", "STP401", "MEM402"])
def test_on_a_gpu(code: str) -> None:
    outcome = judged(make_subject(load_config(Path("configs/needle_tiny.yaml"), NEEDLES)), code)
    assert outcome.outcome == "pass", outcome


@pytest.mark.gpu
def test_mxfp4_on_a_gpu(mxfp4: Path) -> None:
    assert judged(of_folder(mxfp4), "BAS402").outcome == "pass"


@pytest.mark.parametrize("by_context", [False, True])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_bases_own_loss_is_that_of_a_step_without_a_lora(loss: str, by_context: bool) -> None:
    config = load_config(overrides={"loss": loss, "use_per_ctx_average_loss": str(by_context).lower()})
    subject = make_subject(config, with_data=False)
    rows = probe_rows(subject, chunks=(1, 2, 1))
    rows = [replace(rows[0], queries=rows[0].queries + rows[2].queries), *rows[1:]]
    settings = subject.twin_config
    (batch,) = epoch_batches(settings, rows, epoch=0)
    model = subject.implementation.build(subject.twin_base(), settings)
    expected = own_loss(model, batch, settings)
    trainer = Trainer(model, rows, settings, OneProcess(torch.device("cpu")))  # type: ignore[arg-type]
    assert trainer.step().task_loss == pytest.approx(expected, rel=1e-5)
