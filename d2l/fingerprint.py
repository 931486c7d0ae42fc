"""Identity of a run and its base model: hashes of everything that shapes the run, and facts of the base's config."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from d2l.config.schema import RunConfig
from d2l.data.chat.format import ChatFormat
from d2l.data.records import Record

# Where a run takes place, who is told of it, and what is accepted of it does not shape it.
_PLACE_KEYS = {
    *("output_dir", "cache", "cache_dir", "device_memory", "base_sharding"),
    *("report_to", "logging_steps", "grace_seconds", "select_checks", "ignore_checks"),
}


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of everything that shapes a run: each part as a sha256 or version, and one hash over all parts.

    Attributes:
        parts: `config`, `base_config`, `tokenizer`, `chat`, `data`, and a version for each library.
        base_config: the values behind that part, so that a difference can be named.
        records: the number of records behind `data`.
    """

    parts: dict[str, str]
    base_config: dict[str, Any] = field(default_factory=dict)
    records: int = 0

    @property
    def total(self) -> str:
        """Hex sha256 over all parts."""
        return _sha256(json.dumps(self.parts, sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values, as checkpoints keep it."""
        return asdict(self)


def run_fingerprint(
    config: RunConfig,
    base_config: PreTrainedConfig,
    chat: ChatFormat | None,
    records: Sequence[Record] | None,
    versions: dict[str, str],
) -> Fingerprint:
    """Hash configuration, base config, template, tokenizer and data; add the library versions."""
    settings = {key: value for key, value in config.resolved().items() if key not in _PLACE_KEYS}
    base = json.loads(base_config.to_json_string())
    base.pop("transformers_version", None)  # of the library that reads it, which is a part of its own
    parts = {
        "config": _sha256(json.dumps(settings, sort_keys=True)),
        "base_config": _sha256(json.dumps(base, sort_keys=True)),
        "chat": chat.fingerprint if chat else "none",
        "tokenizer": chat.tokenizer_fingerprint if chat else "none",
        "data": _data_sha256(records) if records else "none",
    }
    return Fingerprint(parts | versions, base, len(records or ()))


def _data_sha256(records: Sequence[Record]) -> str:
    """Hash the JSON list of all records, record by record: as one text it would be as large as the data."""
    total = hashlib.sha256(b"[")
    for index, record in enumerate(records):
        total.update(f"{', ' if index else ''}{json.dumps(_contents(record), default=list)}".encode())
    total.update(b"]")
    return total.hexdigest()


def _contents(record: Record) -> list[Any]:
    """Return all of a record that rows are made of; a teacher's logprobs only where it has them."""
    contents: list[Any] = [record.context, record.prompts, record.responses]
    teacher = [record.logprobs_vals, record.logprobs_indices]
    return contents if record.logprobs_vals is None else contents + teacher


def base_facts(base_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the facts that identify the base model, as JSON values; every checkpoint keeps them."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {name: getattr(base_config, name) for name in names}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
