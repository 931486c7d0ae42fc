"""The configuration explains itself: CONFIG.md, `d2l config`, `d2l init`, the JSON Schema, and what a word may mean."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import cli
from d2l.config import descriptions, docs
from d2l.config.explain import explain, facts
from d2l.config.json_schema import json_schema
from d2l.config.keys import all_keys, undescribed
from d2l.config.load import load_config
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.renamed import OLD_NAMES, OLD_STAGE_NAMES
from d2l.config.schema import CurriculumStage, RunConfig
from d2l.config.suggest import OTHER_WORDS, hint, known_names, nearest
from d2l.config.template import PRESETS
from d2l.data.chat.format import DEFAULT_DATE
from d2l.io.resources import resource

ROOT = Path(__file__).resolve().parents[1]


def d2l(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments, prog_name="d2l")


# Descriptions and CONFIG.md


def test_every_key_is_described_and_config_md_is_up_to_date() -> None:
    assert undescribed() == []
    assert (ROOT / "CONFIG.md").read_text(encoding="utf-8") == docs.render_markdown(), "run `make docs`"


def test_a_key_without_a_description_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    group = dict(descriptions.GROUPS["Loss"])
    del group["loss"]
    monkeypatch.setitem(descriptions.GROUPS, "Loss", group | {"losses": descriptions.Description(" ")})
    monkeypatch.delitem(descriptions.STAGE, "pairs")
    assert undescribed() == [
        "RunConfig.loss has no description",
        "RunConfig has no key losses, which is described",
        "CurriculumStage.pairs has no description",
        "losses has an empty description",
    ]
    with pytest.raises(SystemExit, match=r"RunConfig\.loss has no description"):
        docs.main()


def test_descriptions_in_another_order_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    group = descriptions.GROUPS["Loss"]
    monkeypatch.setitem(descriptions.GROUPS, "Loss", dict(reversed(group.items())))
    assert undescribed() == ["the descriptions of RunConfig stand in another order than its keys"]


def test_descriptions_read_without_the_key_and_name_no_key_that_does_not_exist() -> None:
    choices = {word for key in all_keys().values() if key.is_choice for word in key.range.split(", ")}
    names = {*known_names(), *CurriculumStage.model_fields, *choices, "per_document", "packed_flex"}
    for key in all_keys().values():
        assert key.text[0].isupper() or key.text[0] == "'", key.name
        assert not key.text.endswith("."), key.name
        assert "_" not in key.field or not re.search(rf"\b{key.field}\b", key.text), key.name
        for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", f"{key.text} {key.effect}"):
            assert word in names, (key.name, word)
    assert DEFAULT_DATE in all_keys()["current_date"].text
    assert all_keys()["max_steps"].range == "≥ 1"
    assert all_keys()["adam_beta1"].range == "≥ 0, < 1"


def test_config_md_names_everything() -> None:
    text = docs.render_markdown()
    stage = [f"curriculum.{name}" for name in (*CurriculumStage.model_fields, *OLD_STAGE_NAMES)]
    for name in (*known_names(), *stage):
        assert f"`{name}`" in text, name


# d2l config


def test_the_list_has_a_line_for_each_key_in_a_pipe_and_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = d2l("config").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(all_keys())
    assert "\x1b" not in "".join(lines)
    assert [key["name"] for key in json.loads(d2l("config", "--format", "json").stdout)] == list(all_keys())
    monkeypatch.setattr("commands.config.console", lambda: Console(force_terminal=True, width=100))
    table = d2l("config").stdout
    assert "\x1b[1mHypernetwork" in table
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", table).splitlines())) <= 100


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_r", ["Rank of the LoRA", "whole number", "≥ 1", "always", "the same"]),
        ("layer_idx", ["with ctx_encoder_type: early_exit"]),
        ("curriculum", ["Keys of an entry:", "curriculum.passing"]),
        ("pairs", ["curriculum.pairs", "required"]),
        ("streaming", ["does not have", "accepted   false", "refused: data is read whole"]),
        ("logging_dir", ["without an effect", "metrics.jsonl"]),
        ("report_to", ["list of text", "each of tensorboard, wandb"]),
        ("warmup_ratio", ["translated", "warmup_steps"]),
        ("use_kl_loss", ["An old name (the reference", "now loss (true → kl, false → ce)", "Loss of a label token"]),
        ("needle_filler_words", ["old name   needle_filler_tokens"]),
        ("filler_tokens", ["now filler_words", "curriculum.filler_words"]),
        ("curriculum.min_filler_words", ["old name   min_filler_tokens"]),
    ],
)
def test_a_name_is_explained(name: str, words: list[str]) -> None:
    result = d2l("config", name)
    assert result.exit_code == 0
    for word in words:
        assert word in result.stdout
    assert json.loads(d2l("config", name, "--format", "json").stdout) == facts(name)


def test_everything_that_a_file_may_hold_can_be_explained() -> None:
    for name in (*known_names(), *CurriculumStage.model_fields, *OLD_STAGE_NAMES):
        assert explain(name), name
        assert (facts(name) or {})["status"], name


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("batch_size", "per_device_train_batch_size, gradient_accumulation_steps or max_packed_inp_len"),
        ("lora_rr", "lora_r"),
        ("rank", "lora_r"),
        ("Learning-Rate", "learning_rate"),
        ("lr", "learning_rate"),
        ("loging_steps", "logging_steps"),
        ("warmup_ration", "warmup_ratio"),
        ("use_kl_los", "loss"),
        ("needle_filler_token", "needle_filler_words"),
        ("max_seq_lenght", "max_packed_inp_len, max_packed_ctx_len, max_qas_len or max_ctx_len"),
    ],
)
def test_an_unknown_key_exits_2_with_the_nearest_keys(asked: str, meant: str) -> None:
    result = d2l("config", asked)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"no key {asked}; did you mean {meant}?" in result.stderr
    assert hint("zzz") == "`d2l config` lists the keys"
    assert d2l("config", "lora_r", "--schema").exit_code == 2


def test_words_of_other_tools_lead_to_keys_and_are_none_themselves() -> None:
    assert not OTHER_WORDS.keys() & set(known_names())
    assert {name for names in OTHER_WORDS.values() for name in names} <= set(known_names())
    assert all(nearest(word) == names for word, names in OTHER_WORDS.items())


# The JSON Schema


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Judge a value by the words of JSON Schema that the schema uses, and no others."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    types = {
        "integer": is_number and value == int(value),
        "number": is_number,
        "boolean": isinstance(value, bool),
        "string": isinstance(value, str),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
        "null": value is None,
    }
    rules = {
        "type": lambda rule: types[rule],
        "enum": lambda rule: any(type(value) is type(it) and value == it for it in rule),
        "const": lambda rule: value == rule,
        "anyOf": lambda rule: any(accepts(part, value, root) for part in rule),
        "minimum": lambda rule: not is_number or value >= rule,
        "exclusiveMinimum": lambda rule: not is_number or value > rule,
        "maximum": lambda rule: not is_number or value <= rule,
        "exclusiveMaximum": lambda rule: not is_number or value < rule,
        "multipleOf": lambda rule: not is_number or value % rule == 0,
        "pattern": lambda rule: not isinstance(value, str) or re.search(rule, value) is not None,
        "minItems": lambda rule: not isinstance(value, list) or len(value) >= rule,
        "items": lambda rule: not isinstance(value, list) or all(accepts(rule, item, root) for item in value),
        "required": lambda rule: not isinstance(value, dict) or value.keys() >= set(rule),
        "properties": lambda rule: (
            not isinstance(value, dict)
            or all(accepts(rule[key], item, root) for key, item in value.items() if key in rule)
        ),
        "additionalProperties": lambda rule: (
            not isinstance(value, dict)
            or all(
                _is_extra_allowed(rule, item, root)
                for key, item in value.items()
                if key not in schema.get("properties", ())
            )
        ),
    }
    notes = {"$schema", "$defs", "$comment", "title", "description", "default", "deprecated"}
    assert schema.keys() <= rules.keys() | notes, schema.keys() - rules.keys() - notes
    return all(rule(schema[word]) for word, rule in rules.items() if word in schema)


def _is_extra_allowed(rule: Any, value: Any, root: dict[str, Any]) -> bool:
    return rule if isinstance(rule, bool) else accepts(rule, value, root)


SCHEMA = json_schema()


def test_the_schema_names_its_dialect_and_describes_every_property() -> None:
    assert json.loads(d2l("config", "--schema").stdout) == SCHEMA
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (
        list(SCHEMA["properties"])[: len(descriptions.GROUPS)]
        == list(RunConfig.model_fields)[: len(descriptions.GROUPS)]
    )
    assert set(SCHEMA["properties"]) == set(known_names())
    properties = [*SCHEMA["properties"].values(), *SCHEMA["$defs"]["CurriculumStage"]["properties"].values()]
    assert all(it["description"].endswith(".") for it in properties)


FILES = [
    *sorted(resource("configs").glob("*.yaml")),
    *sorted((ROOT / "tests" / "fixtures" / "version_0_1_0").glob("**/*.yaml")),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_schema_accepts_files_that_load(path: Path) -> None:
    load_config(path)
    assert accepts(SCHEMA, yaml.safe_load(path.read_text()), SCHEMA)


def test_the_schema_accepts_what_the_reference_writes_and_marks_it_deprecated() -> None:
    values = {key: neutral[0] for key, (neutral, _) in UNSUPPORTED.items()} | dict.fromkeys(HAS_NO_EFFECT, "anything")
    values |= {"use_kl_loss": True, "needle_filler_tokens": 8, "warmup_ratio": 0.1, "max_steps": -1}
    assert accepts(SCHEMA, values, SCHEMA)
    for key in {*UNSUPPORTED, *HAS_NO_EFFECT, *OLD_NAMES, "warmup_ratio"}:
        assert SCHEMA["properties"][key]["deprecated"] is True
    assert not any(SCHEMA["properties"][key].get("deprecated") for key in RunConfig.model_fields if key != "remarks")


@pytest.mark.parametrize(
    "values",
    [
        {"lora_rr": 8},
        {"lora_r": 0},
        {"lora_r": True},
        {"adam_beta1": 1},
        {"max_steps": -2},
        {"streaming": True},
        {"loss": "kll"},
        {"current_date": "tomorrow"},
        {"target_modules": []},
        {"perceiver_heads": 6},
        {"curriculum": [{"pairs": 1}]},
        {"curriculum": [{"pairs": 1, "digits": 5}]},
        {"remarks": []},
        {"num_chunk_probs": {"1": 2}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_does_not_load(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert d2l("preflight", str(tmp_path / "run.yaml")).exit_code == 2
    assert not accepts(SCHEMA, values, SCHEMA)


# d2l init


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_file_reads_to_the_preset_with_and_without_its_comments(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("new.yaml")
    result = d2l("init", str(path), "--preset", preset)
    assert (result.exit_code, result.stderr) == (0, "")
    assert load_config(path) == load_config(Path(PRESETS[preset]))
    text = path.read_text(encoding="utf-8")
    assert text == d2l("init", "-", "--preset", preset).stdout.replace("run.yaml", "new.yaml")
    assert ("--data FILE" in text) == (not load_config(path).train_ds_names)
    assert max(map(len, text.splitlines())) <= 120
    path.write_text(re.sub(r"(?m)^#(?=\w)", "", text), encoding="utf-8")
    assert list(yaml.safe_load(path.read_text())) == [name for name in RunConfig.model_fields if name != "remarks"]
    assert load_config(path) == load_config(Path(PRESETS[preset]))


def test_every_shipped_config_is_a_preset_and_the_command_offers_them() -> None:
    assert sorted(PRESETS.values()) == sorted(f"configs/{path.name}" for path in resource("configs").glob("*.yaml"))
    assert "'tiny', 'gpt-oss-20b', 'gpt-oss-20b-recommended', 'needle'" in d2l("init", "--preset", "x").stderr
    assert all(d2l("init", "-", "--preset", preset).exit_code == 0 for preset in PRESETS)


def test_options_of_init_take_the_place_of_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = d2l("init", "--model", "meta: llama", "--data", "train #1.jsonl")
    assert result.exit_code == 0
    config = load_config(Path("run.yaml"))
    assert (config.model_name_or_path, config.train_ds_names) == ("meta: llama", ("train #1.jsonl",))
    assert config.resolved() | {"model_name_or_path": "", "train_ds_names": ""} == load_config(
        Path("configs/gpt_oss_20b.yaml")
    ).resolved() | {"model_name_or_path": "", "train_ds_names": ""}
    shown = d2l("init", "-", "--model", "meta: llama", "--data", "train #1.jsonl")
    assert yaml.safe_load(shown.stdout)["train_ds_names"] == ["train #1.jsonl"]
    assert yaml.safe_load(shown.stdout)["model_name_or_path"] == "meta: llama"
    again = d2l("init")
    assert again.exit_code == 2
    assert "run.yaml exists and is never written over" in again.stderr
    assert load_config(Path("run.yaml")) == config
    assert "the folder no does not exist" in d2l("init", "no/run.yaml").stderr
    refused = d2l("init", "other.yaml", "--preset", "needle", "--data", "x.jsonl")
    assert refused.exit_code == 2
    assert "--preset needle generates its documents" in refused.stderr
    assert "--model is empty" in d2l("init", "other.yaml", "--model", " ").stderr
    assert not Path("other.yaml").exists()
    assert d2l("init", "my run.yaml").stdout.splitlines()[-1].endswith("d2l preflight 'my run.yaml'")


# What is imported, and options given twice


@pytest.mark.parametrize("arguments", [["config"], ["config", "lora_r"], ["config", "--schema"], ["init", "-"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    probe = f"""
import atexit, sys, cli
heavy = ("torch", "transformers", "datasets", "pyarrow", "numpy")
atexit.register(lambda: print("HEAVY", [name for name in heavy if name in sys.modules]))
sys.argv = ["d2l", *{arguments!r}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["preflight", "--data", "a", "--data=b"],
            "--data is given 2 times and takes one value; several files: a glob",
        ),
        (["data", "needle", "-o", "a", "--output", "b"], "--output is given 2 times and takes one value"),
        (["train", "x.yaml", "--max-steps", "1", "--max-steps", "2"], "--max-steps is given 2 times"),
    ],
)
def test_an_option_that_takes_one_value_is_given_once(arguments: list[str], words: str) -> None:
    result = d2l(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
