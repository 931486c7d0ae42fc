"""Files of version 0.1.0 (tests/fixtures/version_0_1_0, made by its own code) load and give the same results."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.golden import assert_close
from typer.testing import CliRunner

import cli
from d2l.build import Components
from d2l.config.load import load_config, saved_config
from d2l.config.renamed import with_current_names
from d2l.data.packing import collate
from d2l.data.tokenize import IGNORE_INDEX, Query, Row
from d2l.errors import ConfigError
from d2l.inference.generate import encode_prompt, internalize
from d2l.inference.load import load_model
from d2l.train.loop import Trainer
from d2l.train.optimizer import learning_rates
from d2l.train.start import start_resumed

OLD = Path(__file__).parent / "fixtures" / "version_0_1_0"


def test_the_yaml_is_read_with_a_note_for_each_name_that_changed() -> None:
    config = load_config(OLD / "run.yaml")
    assert config.loss == "ce"
    assert config.needle_filler_words == 16
    assert [stage.filler_words for stage in config.curriculum] == [8, 16]
    assert config.curriculum[0].min_filler_words == 0
    (note,) = config.remarks
    assert note.startswith("4 keys have another name now: ")
    assert "use_kl_loss → loss: ce" in note
    assert "needle_filler_tokens → needle_filler_words: 16" in note
    assert load_config(OLD / "run" / "config.yaml").model_dump(
        exclude={"max_steps", "output_dir"}
    ) == config.model_dump(exclude={"max_steps", "output_dir"})


def test_the_checkpoint_gives_the_same_lora_and_logits() -> None:
    trained = load_model(OLD / "run")
    with safe_open(OLD / "expected.safetensors", "pt") as file:
        metadata = file.metadata()
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    lora = internalize(trained, metadata["document"])
    ids = tuple(encode_prompt(trained.chat, metadata["question"]))
    query = Query(ids, (IGNORE_INDEX,) * len(ids))
    batch = collate([Row(record=0, chunks=((0,),), queries=(query,))])
    with torch.no_grad():
        logits = trained.model.logits(batch, lora, positions=torch.tensor([len(ids) - 2, len(ids) - 1]))
    found = {"logits": logits} | {f"A.{k}": v for k, v in lora.A.items()} | {f"B.{k}": v for k, v in lora.B.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, 1e-5, name)  # processors add in different orders: 1.9e-6 was seen


def test_the_run_goes_on_with_the_step_that_0_1_0_took(tmp_path: Path) -> None:
    shutil.copytree(OLD / "run", tmp_path / "run")
    config = load_config(OLD / "run.yaml")
    reasons = {"max_steps": "it was made for this test"}
    with start_resumed(config, tmp_path / "run", reasons) as start:
        assert start.folder == tmp_path / "run"
    components = Components(config)
    trainer = Trainer(components.model, components.rows, config)
    assert start.checkpoint is not None
    trainer.restore(start.checkpoint)
    taken, expected = trainer.step().to_json(), json.loads((OLD / "third_step.json").read_text())
    assert taken.keys() >= expected.keys()
    for key in ("step", "ce_loss", "grad_norm", "gen_lora_l1_norm", "tokens", "label_tokens", "stage"):
        assert taken[key] == pytest.approx(expected[key], rel=1e-5), key
    # 0.1.0 took the third step with the rate at the end of a schedule of two
    assert (expected["lr"], taken["lr"]) == (1e-7, pytest.approx(learning_rates(config, [2])[0]))


@pytest.mark.parametrize(
    "values",
    [
        {"use_kl_loss": True, "loss": "ce"},  # both names at once: the old one stays, and is refused as unknown
        {"use_kl_loss": "yes"},
    ],
)
def test_what_is_not_clear_keeps_its_old_name(values: dict[str, object]) -> None:
    assert with_current_names(values) == (values, {})


def test_a_command_notes_the_names_that_changed_in_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "document.md").write_text("The value of amber is 42.", encoding="utf-8")
    options = ["ask", str(OLD / "run"), str(tmp_path / "document.md"), "What is the value of amber?"]
    result = CliRunner().invoke(cli.app, [*options, "--max-new-tokens", "1"], prog_name="d2l")
    assert result.exit_code == 0, result.stderr
    assert "Note: 4 keys have another name now: " in result.stderr
    assert "needle_filler_tokens → needle_filler_words: 16" in result.stderr


def test_a_saved_configuration_that_mixes_two_versions_is_refused() -> None:
    values = json.loads((OLD / "run" / "checkpoints" / "step-000002" / "state.json").read_text())["config"]
    assert saved_config(values).remarks
    with pytest.raises(ConfigError, match="use_kl_loss is the old name of loss, which is set too; remove use_kl_loss"):
        saved_config(values | {"loss": "kl"})
