"""What a verdict is about, for people: base model, tokenizer, data, versions, device."""

from collections.abc import Sequence
from importlib import metadata

import torch
from transformers import PreTrainedTokenizerBase

from checks.implementation import Implementation
from checks.plugins import load_plugins
from d2l.config.schema import RunConfig
from d2l.data.records import Record


def describe_judged(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    tokenizer_absent: str,
    records: Sequence[Record] | None,
    records_absent: str,
    implementation: Implementation | None,
) -> dict[str, str]:
    """Describe what a verdict is about."""
    named = "model_name_or_path" in config.model_fields_set
    packages = ("torch", "transformers", "peft", "accelerate")
    judged = {
        "base model": config.model_name_or_path
        + ("" if named else " (the configuration names none: the embedded tiny GPT-OSS stands in)"),
        "tokenizer": tokenizer_absent if tokenizer is None else str(tokenizer.name_or_path),
        "data": records_absent if records is None else f"{', '.join(config.train_ds_names)}: {len(records):,} records",
        "versions": ", ".join(f"{package} {metadata.version(package)}" for package in packages),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only",
    }
    if implementation is not None:
        judged["implementation"] = f"{type(implementation).__module__}.{type(implementation).__qualname__}"
    if plugins := load_plugins():
        judged["plugins"] = ", ".join(map(str, plugins))
    return judged
