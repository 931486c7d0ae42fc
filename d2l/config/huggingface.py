"""Values of Hugging Face's TrainingArguments that are written differently here: no limit of steps, a ratio of warmup."""

import math
from collections.abc import Mapping
from typing import Any

from d2l.config.schema import RunConfig

TRANSLATED: dict[str, str] = {
    "warmup_ratio": "the share of max_steps, from 0 to 1, that becomes warmup_steps; not together with warmup_steps",
}
NO_LIMIT = -1  # of max_steps: the length follows from the epochs


def with_own_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Translate what TrainingArguments write differently.

    Returns:
        The values as `RunConfig` takes them, a note for each translation, and the problems: key → what is wrong.
    """
    current, notes = dict(values), []
    problems: dict[str, str] = {}
    default = RunConfig.model_fields["max_steps"].default
    if str(current.get("max_steps")) in (str(NO_LIMIT), str(float(NO_LIMIT))):
        del current["max_steps"]
        notes.append(f"max_steps: {NO_LIMIT} counts as not set: the run has {default:,} steps, the default")
    if "warmup_ratio" not in current:
        return current, notes, problems
    ratio = _number(current.pop("warmup_ratio"))
    steps = _number(current.get("max_steps", default))
    if ratio is None or not 0 <= ratio <= 1:
        problems["warmup_ratio"] = f"expected a number from 0 to 1, found {values['warmup_ratio']!r}"
    elif ratio == 0:
        notes.append("warmup_ratio: 0 changes nothing; see warmup_steps")
    elif "warmup_steps" in current:
        problems["warmup_ratio"] = "warmup_steps is set too; keep one of them"
    elif steps is not None:  # else max_steps is reported
        current["warmup_steps"] = math.ceil(ratio * steps)
        shown = f"{ratio:g} of {steps:,.0f} max_steps"
        notes.append(f"warmup_ratio: {shown} becomes warmup_steps: {current['warmup_steps']}")
    return current, notes, problems


def _number(value: Any) -> float | None:
    """Read a finite number, also one that YAML takes for text (`1e3`); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
