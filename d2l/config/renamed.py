"""Keys under the names that they had in an earlier version, or have in the reference, as they are called now."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NewName:
    """What an old name is called now.

    Args:
        name: the key today.
        becomes: what each value has become; empty where values stay as they are.
        origin: whose name it was.
    """

    name: str
    becomes: Mapping[Any, Any] = field(default_factory=dict)
    origin: str = "d2l 0.1.0"


OLD_NAMES: dict[str, NewName] = {
    "needle_filler_tokens": NewName("needle_filler_words"),
    "use_kl_loss": NewName("loss", {True: "kl", False: "ce"}, "the reference, and d2l 0.1.0"),
}
OLD_STAGE_NAMES: dict[str, NewName] = {
    "filler_tokens": NewName("filler_words"),
    "min_filler_tokens": NewName("min_filler_words"),
}


def with_current_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Translate a configuration that was written for an earlier version or for the reference.

    A key that stands there under both names is left alone under its old one, which is then refused as unknown.

    Returns:
        The values under their current names, and for each key that has another name now: old name → `new name: value`.
    """
    current: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for key, value in values.items():
        new = OLD_NAMES.get(key)
        known = new is not None and (not new.becomes or (isinstance(value, bool) and value in new.becomes))
        if new is None or new.name in values or not known:
            current[key] = value
            continue
        current[new.name] = new.becomes.get(value, value) if new.becomes else value
        notes[key] = f"{new.name}: {current[new.name]}"
    if isinstance(stages := current.get("curriculum"), list | tuple):
        current["curriculum"] = [_stage(stage, notes) for stage in stages]
    return current, notes


def _stage(stage: Any, notes: dict[str, str]) -> Any:
    """Translate an entry of the curriculum; a key under both names keeps its old one, as above."""
    if not isinstance(stage, Mapping):
        return stage
    current = {}
    for key, value in stage.items():
        new = OLD_STAGE_NAMES.get(key)
        if new is None or new.name in stage:
            current[key] = value
            continue
        current[new.name] = value
        notes[f"curriculum: {key}"] = new.name
    return current


def why_not_read(key: str, present: Mapping[str, Any] | None, *, stage: bool = False) -> str | None:
    """Return why a key under its old name was not translated; None where it is no old name.

    Args:
        key: the key that was refused as unknown.
        present: the keys that stand beside it.
        stage: whether it stands in an entry of the curriculum.
    """
    new = (OLD_STAGE_NAMES if stage else OLD_NAMES).get(key)
    if new is None:
        return None
    if new.name in (present or {}):
        return f"{key} is the old name of {new.name}, which is set too; remove {key}"
    values = ", ".join(f"{_yaml(old)} as {new.name}: {value}" for old, value in new.becomes.items())
    return f"{key} is called {new.name} now and reads {values} only; write {new.name}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
