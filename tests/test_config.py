"""The configuration: every mistake at once with its line, the reference's keys, and a resolved config that reads back."""

import time
from itertools import pairwise
from pathlib import Path
from typing import get_args

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
        ("max_ctx_chunk_len: 64\nnum_chunk_probs: {0: 0.5, 1: 0.5}\n", "chunk counts of 1 or more"),
        ("max_ctx_chunk_len: 64\nnum_chunk_probs: {}\n", "at least one entry"),
        ("min_ctx_chunk_len: 65\nmax_ctx_chunk_len: 64\n", "must not be above max_ctx_chunk_len (64)"),
        ("layer_idx: 2\nctx_encoder_type: embed_only\n", "only used with ctx_encoder_type: early_exit"),
        ("lora_dropout: 0.1\n", "not supported"),
        ("target_modules: []\n", "at least 1 item"),
        ("current_date: tomorrow\n", "should match pattern"),
        ("\x00", "not valid YAML"),
        ("seed: 1\nlora_r: 010\n", "line 2: 010 is the number 8 in YAML; write 8, or the number that is meant"),
        ("max_steps: 1:30\n", "line 1: 1:30 is the number 90 in YAML"),
        ("num_chunk_probs: {1: 0.5, 011: 0.5}\n", "011 is the number 9 in YAML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        load_config(write(tmp_path, text))
    assert expected in str(caught.value)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]\n" for old, new in pairwise("abcdefghi")
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join(9 * [f'*{old}'])}]}}\n" for old, new in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "text", [LAUGHS, MERGES, "train_ds_names: &a [*a]\n", f"a: &a {'x' * 2000}\nb: [{'*a, ' * 100}]\n"]
)
def test_aliases_that_stand_for_gigabytes_are_refused_at_once(tmp_path: Path, text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="aliases stand for more than 100,000 characters"):
        load_config(write(tmp_path, text))
    with pytest.raises(ConfigError, match="aliases stand for more than 100,000 characters"):
        load_config(overrides={"train_ds_names": text})
    assert time.monotonic() - started < 5


def test_plain_aliases_and_long_lists_are_read(tmp_path: Path) -> None:
    names = [f"file-{number}.jsonl" for number in range(20_000)]
    text = f"train_ds_names: {names}\nlora_r: &size 04\nlatent_size: *size\n"
    config = load_config(write(tmp_path, text))
    assert (len(config.train_ds_names), config.latent_size) == (20_000, 4)


def test_command_line_values_win_and_are_named_in_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "lora_r: 4\nmax_steps: 7\n")
    config = load_config(path, {"lora_r": "16", "target_modules": "[v_proj, q_proj]"}, max_steps=3, data="x.jsonl")
    assert (config.lora_r, config.max_steps, config.train_ds_names) == (16, 3, ("x.jsonl",))
    assert config.target_modules == ("q_proj", "v_proj")  # sorted, as the reference orders its modules
    with pytest.raises(ConfigError, match="--set: lora_r") as caught:
        load_config(path, {"lora_r": "none"}, max_steps=0)
    assert "--max-steps: max_steps" in str(caught.value)


def test_harmless_keys_of_the_reference_are_remarks_and_others_problems(tmp_path: Path) -> None:
    text = "model_name_or_path: m\nstreaming: false\noptim: adamw_torch\nlogging_dir: x\nnotes: mine\n"
    assert load_config(write(tmp_path, text)).remarks == (
        "2 keys of the reference change nothing at this value: streaming: false, optim: adamw_torch; "
        "`d2l config KEY` says why",
        "2 keys of the reference have no effect here: logging_dir, notes; `d2l config KEY` says why",
    )
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


def test_a_file_without_a_base_model_says_what_is_examined(tmp_path: Path) -> None:
    path = write(tmp_path, "lora_r: 4\n")
    (remark,) = load_config(path).remarks
    assert "the embedded toy configs/models/tiny_gpt_oss is examined" in remark
    assert not load_config(path, model="openai/gpt-oss-20b").remarks
    assert not load_config(path, {"model_name_or_path": "openai/gpt-oss-20b"}).remarks


NUMBERS = [
    name
    for name, field in RunConfig.model_fields.items()
    if {int, float} & {field.annotation, *get_args(field.annotation)}
]


@pytest.mark.parametrize("value", ["true", "false", ".inf", "-.inf", ".nan", "nan", "1e400"])
@pytest.mark.parametrize("key", NUMBERS)
def test_booleans_and_what_is_not_finite_are_no_numbers(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"line 1: {key}: "):
        load_config(write(tmp_path, f"{key}: {value}\n"))


@pytest.mark.parametrize("text", ["1e3", "1000.0", "1.0e+3", "1000", "'1000'", "1E3"])
def test_whole_numbers_in_any_notation(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, f"max_steps: {text}\nneedle_documents: {text}\n")).max_steps == 1000
    assert load_config(write(tmp_path, "learning_rate: 4e-5\n")).learning_rate == 4e-5
    for wrong in ("1.5", "1e-3", "ten", "[1]"):
        with pytest.raises(ConfigError, match="line 1: max_steps: "):
            load_config(write(tmp_path, f"max_steps: {wrong}\n"))


def test_no_limit_of_steps_counts_as_not_set(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model_name_or_path: m\nmax_steps: -1\n"))
    assert config.max_steps == 1000
    assert config.remarks == ("max_steps: -1 counts as not set: the run has 1,000 steps, the default",)
    with pytest.raises(ConfigError, match="max_steps: must be greater than or equal to 1, found -2"):
        load_config(write(tmp_path, "max_steps: -2\n"))


@pytest.mark.parametrize(
    ("text", "steps"),
    [("warmup_ratio: 0.03\nmax_steps: 400\n", 12), ("warmup_ratio: 0.0301\n", 31), ("warmup_ratio: 0\n", 100)],
)
def test_a_warmup_ratio_becomes_steps_with_a_note(tmp_path: Path, text: str, steps: int) -> None:
    config = load_config(write(tmp_path, text + "model_name_or_path: m\n"))
    assert config.warmup_steps == steps
    assert len(config.remarks) == 1
    assert config.remarks[0].startswith("warmup_ratio: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("warmup_ratio: 0.1\nwarmup_steps: 5\n", "line 1: warmup_ratio: warmup_steps is set too; keep one of them"),
        ("warmup_ratio: 3\n", "line 1: warmup_ratio: expected a number from 0 to 1, found 3"),
        ("warmup_ratio: true\n", "expected a number from 0 to 1, found True"),
        ("max_steps: x\nwarmup_ratio: 0.1\n", "1 problem"),
        ("loss: ce\nuse_kl_loss: true\n", "line 2: use_kl_loss is the old name of loss, which is set too; remove"),
        ("use_kl_loss: maybe\n", "use_kl_loss is called loss now and reads true as loss: kl, false as loss: ce only"),
        (
            "train_ds_names: needle\ncurriculum:\n- {pairs: 1, digits: 1, filler_words: 1, filler_tokens: 2}\n",
            "line 2: curriculum[0].filler_tokens: filler_tokens is the old name of filler_words, which is set too",
        ),
        (
            "train_ds_names: needle\ncurriculum:\n- {pars: 1, digits: 1}\n",
            "line 2: unknown key curriculum[0].pars; did you mean pairs?",
        ),
        ("train_ds_names: needle\ncurriculum:\n- {digits: 1}\n", "line 2: curriculum[0].pairs: Field required"),
        ("remarks: [x]\n", "line 1: unknown key remarks"),
        ("zzz: 1\n", "line 1: unknown key zzz; `d2l config` lists the keys"),
        ("per_device_train_batch_size: true\n", "is not supported"),
        ("<<: {streaming: true}\n", "streaming: true of the reference is not supported"),
        ("lora_r: 2021-02-30\n", "not valid YAML"),
    ],
)
def test_a_mistake_of_names_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert expected in str(caught.value)


def test_a_folder_and_standard_input_are_no_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, not a file"):
        find_config(tmp_path)
    with pytest.raises(ConfigError, match="not read from standard input"):
        find_config(Path("-"))
    with pytest.raises(ConfigError, match="/dev/null is no regular file"):
        find_config(Path("/dev/null"))
    with pytest.raises(ConfigError, match="config file /no/file does not exist"):
        find_config(Path("/no/file"))


def test_the_schedulers_options_become_keys_with_a_note(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "lr_scheduler_kwargs: {min_lr: 1.0e-6, num_decay_steps: 30}\n"))
    assert (config.min_lr, config.decay_steps) == (1e-6, 30)
    assert sum(remark.startswith("lr_scheduler_kwargs: ") for remark in config.remarks) == 2
    assert load_config(write(tmp_path, "lr_scheduler_kwargs: null\n")).min_lr == RunConfig().min_lr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "lr_scheduler_kwargs: {power: 2}",
            "line 1: lr_scheduler_kwargs: expected min_lr, num_decay_steps only, found power",
        ),
        ("lr_scheduler_kwargs: 5", "lr_scheduler_kwargs: expected a mapping of min_lr, num_decay_steps, found 5"),
        (
            "min_lr: 0\nlr_scheduler_kwargs: {min_lr: 1.0e-6}",
            "line 2: lr_scheduler_kwargs: min_lr is set too; keep one",
        ),
        ("num_train_epochs: 3", "num_train_epochs: 3 of the reference is not supported"),
        ("seed: 99999999999999999999", "line 1: seed: must be less than 4294967296"),
        (
            "max_steps: 99999999999999999999",
            "line 1: max_steps: expected a whole number of at most 9,007,199,254,740,992",
        ),
    ],
)
def test_what_has_no_place_here_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, f"{text}\n"))
    assert expected in str(caught.value)


@pytest.mark.parametrize("text", ["current_date: 2025-08-05", "current_date: '2025-08-05'"])
def test_a_day_is_read_with_and_without_quotes(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, f"{text}\n")).current_date == "2025-08-05"


def test_epochs_have_no_effect_beside_a_number_of_steps(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "num_train_epochs: 3\nmax_steps: 10\n"))
    assert config.max_steps == 10
    assert "num_train_epochs: 3 has no effect: max_steps is set" in config.remarks


def test_overrides_from_python_may_be_values(tmp_path: Path) -> None:
    config = load_config(None, {"max_steps": 10, "cache": False, "target_modules": ["o_proj"], "seed": "3"})
    assert (config.max_steps, config.cache, config.target_modules, config.seed) == (10, False, ("o_proj",), 3)
