"""Other values in a YAML file of `key: value` lines, whose comments, order and other lines stay as they are."""

from collections.abc import Mapping
from typing import Any

import yaml

from d2l.config.keys import in_yaml
from d2l.config.yaml_file import parse_yaml


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """Return the text with other values of top-level keys; a key that it lacks gets a line at the end.

    A value is written on one line. A comment behind the old value stays; comments inside a value of several lines go with
    it.

    Args:
        text: YAML that `d2l.config.yaml_file.read_yaml` reads.
    """
    root, _ = parse_yaml(text)
    if isinstance(root, yaml.MappingNode) and root.flow_style:  # {key: value}: there are no lines to keep
        return yaml.safe_dump({**yaml.safe_load(text), **values}, sort_keys=False)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    places = {key.value: (key.end_mark.index, value) for key, value in pairs}
    edits, added = [], []
    newline = "\r\n" if "\r\n" in text else "\n"
    for key, value in values.items():
        if key not in places:
            added.append(f"{key}: {in_yaml(value)}{newline}")
            continue
        end_of_key, node = places[key]
        start = text.index(":", end_of_key) + 1
        edits.append((start, max(start, _end(text, node)), f" {in_yaml(value)}"))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    if added and text and not text.endswith("\n"):
        text += newline
    return text + "".join(added)


def _end(text: str, node: yaml.Node) -> int:
    """Return where a value ends; the mark of a block stands behind the empty lines and comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        return _end(text, last[1] if isinstance(last, tuple) else last)
    end: int = node.end_mark.index
    return len(text[:end].rstrip()) if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">") else end
