"""Keys of Hugging Face's TrainingArguments that are written differently here: lengths, warmup, the scheduler's options."""

import math
from collections.abc import Mapping
from typing import Any

from d2l.config.schema import RunConfig

TRANSLATED: dict[str, str] = {
    "warmup_ratio": "the share of max_steps, from 0 to 1, that becomes warmup_steps; not together with warmup_steps",
    "lr_scheduler_kwargs": "its min_lr and num_decay_steps become min_lr and decay_steps; other entries are refused",
}
SCHEDULER_OPTIONS = {"min_lr": "min_lr", "num_decay_steps": "decay_steps"}
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
    elif "max_steps" in current and current.pop("num_train_epochs", None) is not None:
        notes.append(f"num_train_epochs: {values['num_train_epochs']} has no effect: max_steps is set")
    _translate_scheduler_options(current, notes, problems)
    _translate_warmup_ratio(current, notes, problems)
    return current, notes, problems


def _translate_scheduler_options(values: dict[str, Any], notes: list[str], problems: dict[str, str]) -> None:
    """Put the entries of `lr_scheduler_kwargs` in the place of our keys."""
    options = values.pop("lr_scheduler_kwargs", None) or {}
    known = ", ".join(SCHEDULER_OPTIONS)
    if not isinstance(options, Mapping):
        problems["lr_scheduler_kwargs"] = f"expected a mapping of {known}, found {options!r}"
    elif unknown := [str(name) for name in options if name not in SCHEDULER_OPTIONS]:
        problems["lr_scheduler_kwargs"] = f"expected {known} only, found {', '.join(unknown)}"
    elif double := [SCHEDULER_OPTIONS[name] for name in options if SCHEDULER_OPTIONS[name] in values]:
        problems["lr_scheduler_kwargs"] = f"{', '.join(double)} is set too; keep one of them"
    else:
        for name, value in options.items():
            values[SCHEDULER_OPTIONS[name]] = value
            notes.append(f"lr_scheduler_kwargs: {name} becomes {SCHEDULER_OPTIONS[name]}: {value}")


def _translate_warmup_ratio(values: dict[str, Any], notes: list[str], problems: dict[str, str]) -> None:
    """Compute `warmup_steps` from `warmup_ratio` and `max_steps`."""
    if "warmup_ratio" not in values:
        return
    given = values.pop("warmup_ratio")
    ratio = _number(given)
    steps = _number(values.get("max_steps", RunConfig.model_fields["max_steps"].default))
    if ratio is None or not 0 <= ratio <= 1:
        problems["warmup_ratio"] = f"expected a number from 0 to 1, found {given!r}"
    elif ratio == 0:
        notes.append("warmup_ratio: 0 changes nothing; see warmup_steps")
    elif "warmup_steps" in values:
        problems["warmup_ratio"] = "warmup_steps is set too; keep one of them"
    elif steps is not None:  # else max_steps is reported
        values["warmup_steps"] = math.ceil(ratio * steps)
        shown = f"{ratio:g} of {steps:,.0f} max_steps"
        notes.append(f"warmup_ratio: {shown} becomes warmup_steps: {values['warmup_steps']}")


def _number(value: Any) -> float | None:
    """Read a finite number, also one that YAML takes for text (`1e3`); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
