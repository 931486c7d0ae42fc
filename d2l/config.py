"""The run's configuration: one flat YAML with the field names of the reference implementation, frozen once read.

`load_config` reports every mistake at once, each with its line and the nearest valid key. What comes back is what runs
and what is saved; nothing changes it later.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from d2l.errors import ConfigError
from d2l.paths import local_or_shipped, resource
from d2l.reference_keys import HAS_NO_EFFECT, UNSUPPORTED

DEFAULT_CONFIG = "configs/tiny_gpt_oss.yaml"
NEEDLE = "needle"

Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=-1, description="tokens; -1 means no limit")]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class RunConfig(BaseModel):
    """Everything that shapes a run. Lengths are in tokens, the learning rate is per optimizer step.

    `remarks` holds what was said about keys of the reference that have no effect here; it is not part of what is saved.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # Base model and tokenizer
    model_name_or_path: str = Field("configs/models/tiny_gpt_oss", description="hub id, local folder or config file")
    tokenizer_name_or_path: str | None = Field(None, description="default: the model's own")
    chat_template: str | None = Field(None, description="a Jinja file; default: the shipped training template")
    current_date: str | None = Field(None, pattern=r"^\d{4}-\d{2}-\d{2}$", description="the date templates print")
    supervision: Literal["content", "sampled"] = "content"
    attn_implementation: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    expert_weights: Literal["auto", "packed", "dequantize", "native"] = "auto"

    # Context encoder
    ctx_encoder_type: Literal["embed_only", "per_layer_activations", "early_exit", "concat_layers"] = "early_exit"
    layer_idx: Annotated[int, Field(ge=0)] | None = Field(None, description="early exit; default: a quarter of layers")
    quantize_ctx_encoder: bool = False

    # Hypernetwork
    lora_r: Count = 8
    target_modules: tuple[str, ...] = Field(("q_proj",), min_length=1)
    latent_size: Count = 512
    n_latent_queries: Count = 208
    num_blocks: Count = 8
    num_self_attn_per_block: Annotated[int, Field(ge=0)] = 0
    shared_weights: bool = False
    num_pre_head_layers: Annotated[int, Field(ge=0)] = 1
    per_rank_gen: bool = True
    per_layer_processing: bool = True
    use_bias: bool = True

    # Data
    train_ds_names: tuple[str, ...] = Field((), description=f"JSONL, Parquet or dataset folders; or {NEEDLE!r}")
    max_train_samples_per_ds: Count | None = None
    needle_documents: Count = 64
    needle_pairs: Count = 2
    needle_digits: Annotated[int, Field(ge=1, le=4)] = 2
    needle_style: Literal["sentences", "pairs"] = "sentences"
    needle_filler_tokens: Annotated[int, Field(ge=0, description="words of filler text")] = 16
    max_ctx_len: Length = -1
    max_qas_len: Length = 2048
    max_qas_per_sample: Length = -1
    max_ctx_chunk_len: Length = -1
    min_ctx_chunk_len: Length = -1
    max_ctx_chunk_num: Count | None = None
    num_chunk_probs: dict[int, Annotated[float, Field(ge=0, le=1)]] | None = None
    max_packed_inp_len: Count = 16384
    max_packed_ctx_len: Count = 32768
    cache: bool = Field(True, description="keep the token rows of 1,000 records and more on disk, for the next run")
    cache_dir: str | None = Field(None, description="where; default: d2l in the user's cache folder")

    # Loss
    use_kl_loss: bool = False
    use_per_ctx_average_loss: bool = False
    gen_lora_l1_reg_coef: Annotated[float, Field(ge=0)] = 0.0

    # Optimization
    learning_rate: Annotated[float, Field(gt=0)] = 4e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lr_scheduler_type: Literal["cosine_with_min_lr", "constant_with_warmup", "linear"] = "cosine_with_min_lr"
    min_lr: Annotated[float, Field(ge=0)] = 1e-7
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    max_steps: Count = 1000
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] = Field(default_factory=lambda: {"use_reentrant": False})
    seed: Annotated[int, Field(ge=0)] = 42

    # Output
    output_dir: str = "runs"
    save_steps: Count = 500
    save_total_limit: Count = 2

    remarks: tuple[str, ...] = Field((), exclude=True)

    @field_validator("layer_idx")
    @classmethod
    def _layer_idx_is_for_early_exit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("ctx_encoder_type", "early_exit") != "early_exit":
            raise ValueError("only used with ctx_encoder_type: early_exit; remove it or change the type")
        return value

    @field_validator("target_modules", "train_ds_names", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("target_modules")
    @classmethod
    def _targets_are_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a module is named twice")
        return tuple(sorted(value))  # the reference sorts modules by name; every shape follows that order

    @field_validator("min_ctx_chunk_len")
    @classmethod
    def _chunks_have_room(cls, value: int, info: ValidationInfo) -> int:
        longest = info.data.get("max_ctx_chunk_len", -1)
        if value != -1 and longest != -1 and value > longest:
            raise ValueError(f"must not be above max_ctx_chunk_len ({longest})")
        return value

    @field_validator("num_chunk_probs")
    @classmethod
    def _probabilities_sum_to_one(cls, value: dict[int, float] | None, info: ValidationInfo) -> dict[int, float] | None:
        if value is None:
            return None
        if min(value, default=0) < 1:
            raise ValueError("needs at least one entry, and chunk counts of 1 or more")
        if abs(sum(value.values()) - 1) > 1e-6:
            raise ValueError(f"probabilities must sum to 1, these sum to {sum(value.values()):g}")
        if info.data.get("max_ctx_chunk_len", -1) == -1:
            raise ValueError("needs max_ctx_chunk_len, the longest chunk")
        return value

    def resolved(self) -> dict[str, Any]:
        """The configuration as plain JSON values, complete, in the order of the fields."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The configuration as YAML that `load_config` reads back to an equal value."""
        return yaml.safe_dump(self.resolved(), sort_keys=False)


def load_config(
    path: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    data: str | None = None,
    max_steps: int | None = None,
    output: str | None = None,
) -> RunConfig:
    """Read a YAML file, put what the command line says on top, and check everything at once.

    Args:
        path: the YAML file; `None` for the embedded tiny GPT-OSS. A relative path that does not exist below the working
            directory may name a shipped config (`configs/gpt_oss_20b.yaml`).
        overrides: `key → value` from `--set`, values in YAML.
        model, tokenizer, data, max_steps, output: the command line's own options; they win over `overrides`.

    Raises:
        ConfigError: with every problem, its line in the file and the nearest valid key.
    """
    path = find_config(path)
    values, lines, problems = _read_yaml(path)
    for key, text in (overrides or {}).items():
        try:
            values[key], lines[key] = yaml.safe_load(text), "--set"
        except yaml.YAMLError as error:
            problems.append(f"--set {key}: {text!r} is not a YAML value ({str(error).splitlines()[0]})")
    options = {
        "model_name_or_path": ("--model", model),
        "tokenizer_name_or_path": ("--tokenizer", tokenizer),
        "train_ds_names": ("--data", None if data is None else [data]),
        "max_steps": ("--max-steps", max_steps),
        "output_dir": ("--output", output),
    }
    for key, (option, value) in options.items():
        if value is not None:
            values[key], lines[key] = value, option

    remarks: list[str] = []
    known = _drop_reference_only(values, lines, problems, remarks)
    try:
        config = RunConfig(**known, remarks=tuple(remarks))
    except ValidationError as error:
        problems += [_describe(item, lines) for item in error.errors()]
    if problems:
        raise ConfigError(sorted(problems, key=_by_line), str(path))
    return config


def find_config(path: Path | None) -> Path:
    """The file that a config argument names: as it stands, else the shipped one of that name.

    Raises:
        ConfigError: neither exists.
    """
    if path is None:
        return resource(DEFAULT_CONFIG)
    found = local_or_shipped(str(path))
    if found is not None and found.is_file():
        return found
    shipped = sorted(item.name for item in resource("configs").glob("*.yaml"))
    raise ConfigError(
        [f"config file {path} does not exist; shipped configs are {', '.join(f'configs/{n}' for n in shipped)}"]
    )


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Top-level values, where each key stands (`line 3`), and the problems of the file itself."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot read {path}: {error}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError([f"{where}not valid YAML: {getattr(error, 'problem', error)}"], str(path)) from None
    if root is None:
        return {}, {}, []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(["line 1: expected `key: value` lines, found something else"], str(path))
    lines: dict[str, str] = {}
    problems = []
    for key_node, _ in root.value:
        where = f"line {key_node.start_mark.line + 1}"
        if key_node.value in lines:
            problems.append(f"{where}: {key_node.value} is set a second time (first on {lines[key_node.value]})")
        lines.setdefault(key_node.value, where)
    return values, lines, problems


def _drop_reference_only(
    values: Mapping[str, Any], lines: Mapping[str, str], problems: list[str], remarks: list[str]
) -> dict[str, Any]:
    """Split off the keys of the reference that d2l does not have: noted where harmless, a problem where they matter."""
    known = {}
    for key, value in values.items():
        if key in UNSUPPORTED:
            neutral, reason = UNSUPPORTED[key]
            if value in neutral:
                remarks.append(f"{key}: {value} (a key of the reference) changes nothing and is left out")
            else:
                problems.append(f"{lines[key]}: {key}: {value} of the reference is not supported: {reason}")
        elif key in HAS_NO_EFFECT:
            remarks.append(f"{key}: {value} (a key of the reference) has no effect here: {HAS_NO_EFFECT[key]}")
        else:
            known[str(key)] = value
    return known


def _by_line(problem: str) -> tuple[bool, int]:
    """The file's problems in the order of its lines, then those of the command line."""
    where, _, _ = problem.partition(":")
    number = where.removeprefix("line ")
    return (not number.isdigit(), int(number) if number.isdigit() else 0)


def _describe(error: Any, lines: Mapping[str, str]) -> str:
    """One problem of pydantic as one line: where, what, and what to write instead."""
    key, inner = str(error["loc"][0]), ".".join(str(part) for part in error["loc"][1:])
    where = lines.get(key, "default")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, RunConfig.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "`d2l preflight --help` and README list the keys"
        return f"{where}: unknown key {key}; {hint}"
    name = f"{key}[{inner}]" if inner else key
    message = str(error["msg"]).removeprefix("Value error, ")
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        near = difflib.get_close_matches(
            error["input"], str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", "), n=1
        )
        hint = f"; did you mean {near[0]}?" if near else ""
    return f"{where}: {name}: {message}, found {error['input']!r}{hint}"
