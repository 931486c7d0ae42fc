"""A YAML file of `key: value` lines: its values, where each key stands, and what is wrong with the file itself."""

import math
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from d2l.errors import ConfigError

ROOM_FOR_ALIASES = 100_000  # characters that aliases may add when written out; the largest shipped config has 3,000


def parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Parse YAML into its nodes and its value; a few lines whose aliases stand for gigabytes are refused.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: it holds a value that does not exist, a number that is another one than it looks, or aliases that stand
            for too much.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and _written_out(root, {}) > len(text) + ROOM_FOR_ALIASES:
        raise ValueError(f"its aliases stand for more than {ROOM_FOR_ALIASES:,} characters; write out what is meant")
    value = yaml.safe_load(text)
    for node in _scalars(root):
        meant = yaml.safe_load(node.value) if _UNLIKE_DECIMAL.fullmatch(node.value) and node.tag in _NUMBERS else None
        if meant is not None and node.value.replace("_", "").lstrip("+-0") != str(abs(meant)):
            line = f"line {node.start_mark.line + 1}: " if "\n" in text else ""
            raise ValueError(
                f"{line}{node.value} is the number {meant} in YAML; write {meant}, or the number that is meant"
            )
    return root, value


# YAML 1.1 (https://yaml.org/type/int.html): 010 is octal, 1:30 counts sixties; no newer YAML and no reader takes them so.
_UNLIKE_DECIMAL = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Yield all values, and keys, that are neither lists nor mappings."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.CollectionNode):
        for child in chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value:
            yield from _scalars(child)


def _written_out(node: yaml.Node, sizes: dict[yaml.Node, float]) -> float:
    """Return a size in characters with every alias written out: infinite where one stands inside its own anchor."""
    if node not in sizes:
        sizes[node] = math.inf  # stands while its children are measured
        if isinstance(node, yaml.ScalarNode):
            sizes[node] = 1 + len(node.value)
        else:
            children = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            sizes[node] = 1 + sum(_written_out(child, sizes) for child in children)
    return sizes[node]


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Read the top-level values, where each key stands (`line 3`), and the problems of single lines.

    Raises:
        ConfigError: the file cannot be read, or is no YAML of keys and values.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root, values = parse_yaml(text)
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
