"""A YAML file and the command line's options → `RunConfig`, with every mistake at once: its line and the nearest key."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.renamed import with_current_names
from d2l.config.schema import RunConfig
from d2l.errors import ConfigError
from d2l.io.resources import local_or_shipped, resource

DEFAULT_CONFIG = "configs/tiny_gpt_oss.yaml"


def load_config(
    path: Path | str | None = None,
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
    path = find_config(None if path is None else Path(path))
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
    values, renamed = with_current_names(values)
    for old, new in renamed.items():
        lines.setdefault(new.partition(":")[0], lines.get(old, "default"))
        remarks.append(f"{old} is called {new} now")
    known = _drop_reference_only(values, lines, problems, remarks)
    try:
        config = RunConfig(**known, remarks=tuple(remarks))
    except ValidationError as error:
        problems += [_describe(item, lines) for item in error.errors()]
    if problems:
        raise ConfigError(sorted(problems, key=_by_line), str(path))
    return config


def saved_config(values: Mapping[str, Any]) -> RunConfig:
    """Read the configuration that a run or checkpoint was saved with, whatever version wrote it.

    Raises:
        ConfigError: it holds keys or values that no longer exist.
    """
    current, _ = with_current_names(values)
    try:
        return RunConfig(**current)
    except ValidationError as error:
        raise ConfigError([f"{it['loc'][0]}: {it['msg']}" for it in error.errors()]) from None


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
