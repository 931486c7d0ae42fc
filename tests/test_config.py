"""The configuration: every mistake at once with its line, the reference's keys, and a resolved config that reads back."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from d2l.config.load import find_config, load_config
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.schema import RunConfig
from d2l.errors import ConfigError
from d2l.io.resources import resource

FIVE_MISTAKES = """\
lora_rr: 8
lora_r: -1
learning_rate: banana
ctx_encoder_type: per_layer_activation
target_modules: [q_proj, q_proj]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_five_mistakes_are_five_problems_with_lines_and_suggestions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, FIVE_MISTAKES))
    problems = caught.value.problems
    assert len(problems) == 5
    assert [problem.split(":")[0] for problem in problems] == [f"line {line}" for line in range(1, 6)]
    assert "did you mean lora_r?" in problems[0]
    assert "did you mean per_layer_activations?" in problems[3]
    assert str(caught.value).startswith("5 problems in ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_r: [", "not valid YAML"),
        ("- a\n- b\n", "expected `key: value` lines"),
        ("lora_r: 4\nlora_r: 8\n", "set a second time (first on line 1)"),
        ("num_chunk_probs: {1: 0.5}\nmax_ctx_chunk_len: 64\n", "must sum to 1"),
        ("num_chunk_probs: {1: 1.0}\n", "needs max_ctx_chunk_len"),
        ("min_ctx_chunk_len: 65\nmax_ctx_chunk_len: 64\n", "must not be above max_ctx_chunk_len (64)"),
        ("layer_idx: 2\nctx_encoder_type: embed_only\n", "only used with ctx_encoder_type: early_exit"),
        ("lora_dropout: 0.1\n", "not supported"),
        ("target_modules: []\n", "at least 1 item"),
        ("current_date: tomorrow\n", "should match pattern"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        load_config(write(tmp_path, text))
    assert expected in str(caught.value)


def test_command_line_values_win_and_are_named_in_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "lora_r: 4\nmax_steps: 7\n")
    config = load_config(path, {"lora_r": "16", "target_modules": "[v_proj, q_proj]"}, max_steps=3, data="x.jsonl")
    assert (config.lora_r, config.max_steps, config.train_ds_names) == (16, 3, ("x.jsonl",))
    assert config.target_modules == ("q_proj", "v_proj")  # sorted, as the reference orders its modules
    with pytest.raises(ConfigError, match="--set: lora_r") as caught:
        load_config(path, {"lora_r": "none"}, max_steps=0)
    assert "--max-steps: max_steps" in str(caught.value)


def test_harmless_keys_of_the_reference_are_remarks_and_others_problems(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "streaming: false\nlogging_steps: 10\nnotes: mine\n"))
    assert len(config.remarks) == 3
    for key, (neutral, _) in UNSUPPORTED.items():
        assert load_config(write(tmp_path, yaml.safe_dump({key: neutral[0]}))).remarks
        with pytest.raises(ConfigError, match=f"line 1: {key}: "):
            load_config(write(tmp_path, yaml.safe_dump({key: "something else"})))
    assert not (UNSUPPORTED.keys() | HAS_NO_EFFECT.keys()) & RunConfig.model_fields.keys()


@pytest.mark.parametrize("name", sorted(path.name for path in resource("configs").glob("*.yaml")))
def test_shipped_configs_load_and_read_back(tmp_path: Path, name: str) -> None:
    config = load_config(Path("configs") / name)
    assert not config.remarks
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_the_published_summary_stands_in_the_20b_config() -> None:
    config = load_config(Path("configs/gpt_oss_20b.yaml"))
    published = {
        "lora_r": 8,
        "target_modules": ("q_proj",),
        "ctx_encoder_type": "per_layer_activations",
        "per_rank_gen": True,
        "per_layer_processing": True,
        "loss": "ce",
        "gradient_checkpointing": True,
        "max_packed_inp_len": 1024,
        "max_packed_ctx_len": 1024,
    }
    assert {key: getattr(config, key) for key in published} == published


def test_a_config_is_frozen_and_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("configs/tiny_gpt_oss.yaml"))
    with pytest.raises(ValidationError, match="frozen"):
        config.lora_r = 1  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist; shipped configs are configs/"):
        find_config(Path("nowhere.yaml"))
