"""The whole model against the reference, number for number: features, merged LoRAs, logits, losses and gradients."""

from pathlib import Path

import pytest
import torch
from support import golden
from support.golden import Case, assert_close, assert_gradients, load_case, stored_gradients
from transformers import GptOssConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.config.schema import RunConfig
from d2l.data.packing import PackedBatch
from d2l.hypernet.model import DocToLora
from d2l.train.losses import Normalizer, compute_loss

pytestmark = pytest.mark.golden

CASES = ("e2e_01_llama_q", "e2e_02_llama_down_3chunks", "e2e_03_qwen3_q_o_exit", "e2e_04_gptoss_q", "checkpoint_llama")
FAMILIES: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gpt_oss": GptOssConfig}
WHOLE = [name for name in CASES if name.startswith("e2e")]  # with outputs, losses and gradients
LOSSES = (
    "ce_token",
    "ce_perctx",
    "ce_token_l1",
    "ce_perctx_l1",
    "kl_token",
    "kl_perctx",
    "kl_token_l1",
    "kl_perctx_l1",
)
EVALUATION_LOSSES = ("ce_token_eval", "ce_perctx_eval", "kl_token_eval", "kl_perctx_eval")
WITH_GRADIENTS = (
    "ce_token_l1",
    "ce_perctx_l1",
    "kl_perctx_l1",
)  # in the files; the task's term and the L1 term together
L1_COEFFICIENT = 0.1  # of the cases' `*_l1` losses


def run_config(case: Case) -> RunConfig:
    values = {key: value for key, value in case.config.items() if key != "lora_alpha"}
    if values["ctx_encoder_type"] != "early_exit":
        values.pop("layer_idx")
    return RunConfig(**values, attn_implementation="eager")


def build(case: Case) -> DocToLora:
    """The case's model: a base and a hypernetwork filled by the rule."""
    config = run_config(case)
    settings = dict(case.meta["base_config"])
    base_config = FAMILIES[case.meta["base_family"]](**settings)
    base = random_base(base_config, plan_load(config, base_config, device="cpu"), seed=0)
    golden.fill_parameters(base, case.meta["base_weights_fill"], case.seed, case.meta["base_key_prefix"])
    model = DocToLora(base, config)
    if "hyper_weights_fill" in case.meta:
        golden.fill_parameters(model.hypernet, case.meta["hyper_weights_fill"], case.seed)
    return model


def batch_of(case: Case) -> PackedBatch:
    return PackedBatch(
        ctx_ids=case["in.ctx_ids"],
        ctx_position_ids=case["in.ctx_position_ids"],
        input_ids=case["in.input_ids"],
        position_ids=case["in.position_ids"],
        labels=case["in.labels"],
        n_ctx_chunks=tuple(case["in.n_ctx_chunks"].tolist()),
        n_queries=tuple(case["in.n_queries"].tolist()),
        logprobs_vals=case.tensors.get("in.logprobs_vals"),
        logprobs_indices=case.tensors.get("in.logprobs_indices"),
        record_ids=tuple(range(len(case["in.n_queries"]))),
    )


def test_the_table_is_complete(shared: Path) -> None:
    names = golden.case_names(shared, "e2e_") | golden.case_names(shared, "checkpoint_")
    assert names == set(CASES)


@pytest.mark.parametrize("name", WHOLE)
def test_features_loras_and_logits(shared: Path, name: str) -> None:
    case = load_case(shared, name)
    model, batch = build(case), batch_of(case)
    with torch.no_grad():
        features = model.features(batch)
        lora = model.lora(batch)
        assert_close(features, case["out.ctx_features"], golden.OUTPUTS, "features")
        for module in case.config["target_modules"]:
            assert_close(lora.A[module], case[f"out.combined.{module}.A"], golden.OUTPUTS, f"A of {module}")
            assert_close(lora.B[module], case[f"out.combined.{module}.B"], golden.OUTPUTS, f"B of {module}")
        assert lora.scale == pytest.approx(case.config["lora_alpha"], rel=1e-6)
        assert_close(model.logits(batch, lora)[None], case["out.logits"], golden.OUTPUTS, "logits")
        assert_close(model.logits(batch, None)[None], case["out.base_logits"], golden.OUTPUTS, "base logits")
        positions = torch.tensor([3, 0, 7])
        torch.testing.assert_close(model.logits(batch, lora, positions), model.logits(batch, lora)[positions])


def losses_of(case: Case, model: DocToLora, batch: PackedBatch, name: str) -> torch.Tensor:
    """The case's loss of that name, by the production path."""
    lora = model.lora(batch)
    logits = model.logits(batch, lora, batch.prediction_positions)
    loss = compute_loss(
        logits,
        batch,
        lora,
        Normalizer.of([batch], model.hypernet.shape.config.lora_r),
        loss="kl" if name.startswith("kl") else "ce",
        use_per_ctx_average_loss="perctx" in name,
        l1_coefficient=L1_COEFFICIENT if name.endswith("l1") else 0.0,
    )
    return loss.total


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", WHOLE)
def test_losses(shared: Path, name: str, loss: str) -> None:
    case = load_case(shared, name)
    with torch.no_grad():
        value = losses_of(case, build(case), batch_of(case), loss)
    assert float(value) == pytest.approx(case.meta["losses"][loss], rel=golden.OUTPUTS)
    golden.ACCOUNT.compare(case.name, case.meta["losses"][loss])


@pytest.mark.parametrize("loss", WITH_GRADIENTS)
@pytest.mark.parametrize("name", WHOLE)
def test_gradients_of_losses(shared: Path, name: str, loss: str) -> None:
    """Of the losses whose gradients the files hold, and of every parameter there; the next test counts the losses."""
    case = load_case(shared, name)
    model = build(case)
    losses_of(case, model, batch_of(case), loss).backward()
    compared = assert_gradients(model.hypernet, case, loss)
    assert compared == stored_gradients(case, loss) > 0


@pytest.mark.parametrize("name", WHOLE)
def test_the_losses_with_gradients_are_all_that_a_file_has(shared: Path, name: str) -> None:
    case = load_case(shared, name)
    assert case.meta["losses"].keys() == {*LOSSES, *EVALUATION_LOSSES}
    held = {key.split(".")[1] for key in case.tensors if key.startswith("grad.")}
    assert held == set(WITH_GRADIENTS)
    golden.ACCOUNT.compare(name, sorted(held))


def test_evaluation_losses_of_the_reference_divide_by_all_positions_and_ours_do_not(shared: Path) -> None:
    """`ce_token_eval` is Σ CE / T there, with T every position of the row; a mean over label tokens is the CE."""
    for name in WHOLE:
        losses: dict[str, float] = load_case(shared, name).meta["losses"]
        assert losses["ce_token_eval"] < losses["ce_token"]
        golden.ACCOUNT.compare(name, losses["ce_token_eval"])
