"""Keys under the names that they had in an earlier version, or have in the reference, as they are called now."""

from collections.abc import Mapping
from typing import Any

# Old name → new name; the value stays.
_RENAMED = {"needle_filler_tokens": "needle_filler_words"}
_RENAMED_IN_STAGES = {"filler_tokens": "filler_words", "min_filler_tokens": "min_filler_words"}
# Old name → new name, and what each value has become.
_TRANSLATED: dict[str, tuple[str, dict[Any, Any]]] = {"use_kl_loss": ("loss", {True: "kl", False: "ce"})}


def with_current_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Translate a configuration that was written for an earlier version or for the reference.

    A key that stands there under both names is left alone under its old one, which is then refused as unknown.

    Returns:
        The values under their current names, and for each key that has another name now: old name → `new name: value`.
    """
    current: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for key, value in values.items():
        name, becomes = _TRANSLATED.get(key, (_RENAMED.get(key, key), {}))
        known = not becomes or (isinstance(value, bool) and value in becomes)
        if name == key or name in values or not known:
            current[key] = value
            continue
        current[name] = becomes.get(value, value) if becomes else value
        notes[key] = f"{name}: {current[name]}"
    if isinstance(stages := current.get("curriculum"), list | tuple):
        current["curriculum"] = [_stage(stage, notes) for stage in stages]
    return current, notes


def _stage(stage: Any, notes: dict[str, str]) -> Any:
    if not isinstance(stage, Mapping):
        return stage
    for old, new in _RENAMED_IN_STAGES.items():
        if old in stage:
            notes[f"curriculum: {old}"] = new
    return {_RENAMED_IN_STAGES.get(key, key): value for key, value in stage.items()}
