"""A JSON Schema (draft 2020-12) of configurations, for editors: it accepts every file that `load_config` accepts."""

from copy import deepcopy
from typing import Any

from d2l.config.descriptions import GROUPS, STAGE
from d2l.config.huggingface import NO_LIMIT, TRANSLATED
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.renamed import OLD_NAMES, OLD_STAGE_NAMES, NewName
from d2l.config.schema import REMARKS, CurriculumStage, RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LISTS_OF_NAMES = (
    "target_modules",
    "train_ds_names",
    "report_to",
    "select_checks",
)  # one name may stand without a list


def json_schema() -> dict[str, Any]:
    """Return the schema as JSON values: own keys first, then old names and keys of the reference as deprecated."""
    schema = RunConfig.model_json_schema()
    properties = schema["properties"]
    del properties[REMARKS]
    for group, members in GROUPS.items():
        for name, description in members.items():
            properties[name] |= {"description": f"{description.text}.", "$comment": group}
    for name in _LISTS_OF_NAMES:
        inner = {key: properties[name].pop(key) for key in ("type", "items", "minItems") if key in properties[name]}
        properties[name]["anyOf"] = [inner, {"type": "string"}]
    steps = properties["max_steps"]
    steps["anyOf"] = [{"type": steps.pop("type"), "minimum": steps.pop("minimum")}, {"const": NO_LIMIT}]

    stage = schema["$defs"][CurriculumStage.__name__]
    for name, description in STAGE.items():
        stage["properties"][name]["description"] = f"{description.text}."
    _add_old_names(stage["properties"], OLD_STAGE_NAMES)
    _add_old_names(properties, OLD_NAMES)
    _add_reference_keys(properties)
    _without_titles(schema)
    head = {"$schema": DIALECT, "title": "Configuration of a d2l run", "description": "`d2l config` lists the keys."}
    return head | {key: value for key, value in schema.items() if key not in head}


def _add_old_names(properties: dict[str, Any], names: dict[str, NewName]) -> None:
    for old, new in names.items():
        same = deepcopy(properties[new.name])
        values = {"type": "boolean", "default": False} if new.becomes else same
        properties[old] = values | {"description": f"Called {new.name} now.", "deprecated": True}


def _add_reference_keys(properties: dict[str, Any]) -> None:
    for key, (values, reason) in UNSUPPORTED.items():
        text = f"A key of the reference that d2l does not have: {reason}."
        properties[key] = {"enum": _distinct(values), "description": text, "deprecated": True}
    for key, reason in HAS_NO_EFFECT.items():
        properties[key] = {"description": f"Without an effect here: {reason}.", "deprecated": True}
    for key, text in TRANSLATED.items():
        number = {"type": "number", "minimum": 0, "maximum": 1}
        properties[key] = number | {"description": f"Translated: {text}.", "deprecated": True}


def _distinct(values: tuple[Any, ...]) -> list[Any]:
    """Return the values without those that JSON cannot tell apart: 0 and 0.0."""
    found: list[Any] = []
    for value in values:
        if not any(value == it and isinstance(value, bool) == isinstance(it, bool) for it in found):
            found.append(value)
    return found


def _without_titles(part: Any) -> None:
    """Remove the titles that pydantic makes from names: they say nothing more."""
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        if isinstance(value, dict) and isinstance(value.get("title"), str):
            del value["title"]
        _without_titles(value)
