"""A YAML file of `key: value` lines: its values, where each key stands, and what is wrong with the file itself."""

from pathlib import Path
from typing import Any

import yaml

from d2l.errors import ConfigError


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Read the top-level values, where each key stands (`line 3`), and the problems of single lines.

    Raises:
        ConfigError: the file cannot be read, or is no YAML of keys and values.
    """
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
    except (ValueError, RecursionError) as error:  # a date that no calendar has; thousands of open brackets
        raise ConfigError([f"not valid YAML: {error}"], str(path)) from None
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
