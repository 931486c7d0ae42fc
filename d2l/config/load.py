"""A YAML file and the command line's options → `RunConfig`, with every mistake at once: its line and the nearest key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from d2l.config.huggingface import with_own_values
from d2l.config.keys import in_yaml
from d2l.config.notes import Notes
from d2l.config.problems import by_line, describe, unknown
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED, is_neutral
from d2l.config.renamed import why_not_read, with_current_names
from d2l.config.schema import REMARKS, RunConfig
from d2l.config.yaml_file import parse_yaml, read_yaml
from d2l.errors import ConfigError
from d2l.io.resources import local_or_shipped, resource

DEFAULT_CONFIG = "configs/tiny_gpt_oss.yaml"
BASE_MODEL = "model_name_or_path"


def load_config(
    path: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    data: str | None = None,
    max_steps: int | None = None,
    output: str | None = None,
) -> RunConfig:
    """Read a YAML file, put the command line's values on top, and check everything at once.

    Args:
        path: the YAML file; `None` for the embedded tiny GPT-OSS. A relative path that does not exist below the working
            directory may name a shipped config (`configs/gpt_oss_20b.yaml`).
        overrides: key → value, as `--set` takes them: a text is read as YAML.
        model, tokenizer, data, max_steps, output: the command line's own options; they win over `overrides`.

    Raises:
        ConfigError: with every problem, its line in the file and the nearest valid key.
    """
    path = find_config(None if path is None else Path(path))
    values, lines, problems = read_yaml(path)
    for key, text in (overrides or {}).items():
        try:
            values[key], lines[key] = parse_yaml(text)[1] if isinstance(text, str) else text, "--set"
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(f"--set {key}: {text!r} is not a YAML value ({str(error).splitlines()[0]})")
    options = {
        BASE_MODEL: ("--model", model),
        "tokenizer_name_or_path": ("--tokenizer", tokenizer),
        "train_ds_names": ("--data", None if data is None else [data]),
        "max_steps": ("--max-steps", max_steps),
        "output_dir": ("--output", output),
    }
    for key, (option, value) in options.items():
        if value is not None:
            values[key], lines[key] = value, option
    config = _checked(values, lines, problems)
    if problems or config is None:
        raise ConfigError(sorted(problems, key=by_line), str(path))
    return config


def _checked(values: Mapping[str, Any], lines: dict[str, str], problems: list[str]) -> RunConfig | None:
    """Translate what the reference and earlier versions wrote, and validate; what is wrong is added to the problems."""
    notes = Notes()
    current, renamed = with_current_names(values)
    for old, new in renamed.items():
        lines.setdefault(new.partition(":")[0], lines.get(old, "default"))
        notes.renamed.append(f"{old} → {new}")
    current, notes.others, wrong = with_own_values(current)
    problems += [f"{lines.get(key, 'default')}: {key}: {text}" for key, text in wrong.items()]
    known = _own_keys(current, lines, problems, notes)
    if BASE_MODEL not in known:
        default = RunConfig.model_fields[BASE_MODEL].default
        notes.others.append(
            f"no base model is named, so the embedded toy {default} is examined: set {BASE_MODEL} or pass --model"
        )
    if REMARKS in known:  # a field of the schema, but no key of a file
        problems.append(f"{lines.get(REMARKS, 'default')}: {unknown((REMARKS,), values)}")
        del known[REMARKS]
    try:
        return RunConfig(**known, remarks=notes.lines())
    except ValidationError as error:
        problems += [describe(item, lines, known) for item in error.errors()]
        return None


def saved_config(values: Mapping[str, Any]) -> RunConfig:
    """Read the configuration that a run or checkpoint was saved with, whatever version wrote it.

    Its remarks name the keys that have another name now.

    Raises:
        ConfigError: it holds keys or values that do not exist, or a key under two names, as no version writes it.
    """
    current, renamed = with_current_names(values)
    notes = Notes(renamed=[f"{old} → {new}" for old, new in renamed.items()])
    try:
        return RunConfig(**current, remarks=notes.lines())
    except ValidationError as error:
        problems = [(str(it["loc"][0]), it["msg"]) for it in error.errors()]
        raise ConfigError([f"{key}: {why_not_read(key, values) or text}" for key, text in problems]) from None


def find_config(path: Path | None) -> Path:
    """Return the file that a config argument names: as it stands, else the shipped one of that name.

    Raises:
        ConfigError: neither exists, or it is no file.
    """
    if path is None:
        return resource(DEFAULT_CONFIG)
    found = local_or_shipped(str(path))
    if found is not None and found.is_file():
        return found
    shipped = ", ".join(f"configs/{name}" for name in shipped_configs())
    if str(path) == "-":
        raise ConfigError(["a configuration is not read from standard input: name a file"])
    wrong = "does not exist"
    if found is not None and found.exists():
        wrong = "is a folder, not a file" if found.is_dir() else "is no regular file"
    raise ConfigError([f"config file {path} {wrong}; shipped configs are {shipped}; `d2l init` writes a new one"])


def shipped_configs() -> list[str]:
    """Return the file names of the shipped configs."""
    return sorted(item.name for item in resource("configs").glob("*.yaml"))


def _own_keys(values: Mapping[str, Any], lines: Mapping[str, str], problems: list[str], notes: Notes) -> dict[str, Any]:
    """Split off the keys of the reference that d2l does not have: noted where harmless, a problem where they matter."""
    known = {}
    for key, value in values.items():
        if key in UNSUPPORTED and is_neutral(key, value):
            notes.neutral.append(f"{key}: {in_yaml(value)}")
        elif key in UNSUPPORTED:
            where, (_, reason) = lines.get(key, "default"), UNSUPPORTED[key]
            problems.append(f"{where}: {key}: {in_yaml(value)} of the reference is not supported: {reason}")
        elif key in HAS_NO_EFFECT:
            notes.without_effect.append(key)
        else:
            known[str(key)] = value
    return known
