"""The facts of every configuration key, read from the schema and its descriptions, as plain values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel

from d2l.config.descriptions import GROUPS, STAGE, Description
from d2l.config.schema import REMARKS, CurriculumStage, RunConfig

STAGES = "curriculum"  # the key whose entries have keys of their own
REQUIRED = "required"
CHOICE = "one of the words"


@dataclass(frozen=True)
class Key:
    """What a user has to know of one key.

    Args:
        name: as it is written in the YAML; `curriculum.pairs` for a key of the curriculum's entries.
        group: the heading that it stands under.
        type: in words, such as `whole number or null`.
        default: in YAML, or `required`.
        range: the values that are allowed, in words; empty where the type says all.
        text: one sentence on its meaning.
        effect: when the value changes anything.
        reference: what the reference implementation calls it.
    """

    name: str
    group: str
    type: str
    default: str
    range: str
    text: str
    effect: str
    reference: str

    @property
    def field(self) -> str:
        """Return the name alone, without that of the curriculum before it."""
        return self.name.rpartition(".")[2]

    @property
    def is_choice(self) -> bool:
        """Return whether the range lists the words that are allowed."""
        return self.type == CHOICE

    @property
    def kind(self) -> str:
        """Return the type in a few words: the choices where there are some."""
        return self.range.replace(", ", "|") if self.is_choice else self.type

    def to_json(self) -> dict[str, str]:
        """Return the facts as JSON values."""
        return asdict(self)


@cache
def all_keys() -> dict[str, Key]:
    """Return every key of a run's configuration by its name, in order; those of a curriculum's entry come last."""
    schema = RunConfig.model_json_schema()
    stage = schema["$defs"][CurriculumStage.__name__]["properties"]
    keys = [
        _key(name, name, group, description, schema["properties"][name], RunConfig)
        for group, members in GROUPS.items()
        for name, description in members.items()
    ]
    keys += [
        _key(f"{STAGES}.{name}", name, "An entry of curriculum", description, stage[name], CurriculumStage)
        for name, description in STAGE.items()
    ]
    return {key.name: key for key in keys}


def undescribed() -> list[str]:
    """Return what is wrong with the descriptions: keys without one, descriptions without a key, another order."""
    found = []
    described = [name for members in GROUPS.values() for name in members]
    for fields, names, where in (
        ([name for name in RunConfig.model_fields if name != REMARKS], described, "RunConfig"),
        (list(CurriculumStage.model_fields), list(STAGE), "CurriculumStage"),
    ):
        found += [f"{where}.{name} has no description" for name in fields if name not in names]
        found += [f"{where} has no key {name}, which is described" for name in names if name not in fields]
        if not found and fields != names:
            found.append(f"the descriptions of {where} stand in another order than its keys")
    every = [(name, it) for members in (*GROUPS.values(), STAGE) for name, it in members.items()]
    return found + [f"{name} has an empty description" for name, it in every if not it.text.strip()]


def in_yaml(value: Any) -> str:
    """Write a value in YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _key(
    name: str, field: str, group: str, described: Description, schema: Mapping[str, Any], model: type[BaseModel]
) -> Key:
    info = model.model_fields[field]
    default = info.get_default(call_default_factory=True)
    return Key(
        name=name,
        group=group,
        type=type_in_words(schema),
        default=REQUIRED if info.is_required() else in_yaml(list(default) if isinstance(default, tuple) else default),
        range=range_in_words(schema),
        text=described.text,
        effect=described.effect,
        reference=described.reference,
    )


_TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "object": "mapping",
    "null": "null",
}


def type_in_words(schema: Mapping[str, Any]) -> str:
    """Write the type of a JSON Schema in words."""
    if "anyOf" in schema:
        return " or ".join(type_in_words(part) for part in schema["anyOf"])
    if "enum" in schema:
        return CHOICE
    if schema.get("type") == "array":
        return "list of text" if schema["items"].get("type") == "string" else "list of mappings"
    return _TYPES[schema["type"]]


def range_in_words(schema: Mapping[str, Any]) -> str:
    """Write the constraints of a JSON Schema in words; empty where there are none."""
    if "anyOf" in schema:
        return "; ".join(filter(None, map(range_in_words, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(schema["enum"])
    signs = {
        "minimum": "≥ {}",
        "exclusiveMinimum": "> {}",
        "maximum": "≤ {}",
        "exclusiveMaximum": "< {}",
        "multipleOf": "a multiple of {}",
        "minItems": "at least {} entry",
        "pattern": "matching `{}`",
    }
    parts = [words.format(_number(schema[word])) for word, words in signs.items() if word in schema]
    if words := schema.get("items", {}).get("enum"):
        parts.append(f"each of {', '.join(words)}")
    if isinstance(values := schema.get("additionalProperties"), dict) and (inner := range_in_words(values)):
        parts.append(f"values {inner}")
    return ", ".join(parts)


def _number(limit: Any) -> str:
    """Write a limit: 0 and not 0.0, as which some releases of pydantic hand on the bound of a float."""
    return f"{limit:g}" if isinstance(limit, int | float) else str(limit)
