"""From a configuration to what a run consists of: base, tokenizer, chat format, rows and model.

Training and the checks both come through here, so what is diagnosed is what runs.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from d2l.base.files import is_config_only
from d2l.base.load import load_base, plan_load, read_base_config
from d2l.base.masks import attention_layout
from d2l.config import NEEDLE, RunConfig, Stage
from d2l.data.cache import cached_rows, default_folder
from d2l.data.chat import ChatFormat, chat_format, load_tokenizer
from d2l.data.limits import Limits
from d2l.data.needle import needle_records
from d2l.data.packing import PackedBatches, pack
from d2l.data.records import Record, read_records
from d2l.data.shards import row_sizes
from d2l.data.teachers import require_teachers
from d2l.data.tokenize import OnProgress, Row, Tokenized, tokenize_records
from d2l.errors import DataError, ModelError
from d2l.hypernet.model import DocToLora
from d2l.paths import local_or_shipped

CACHED_FROM = 1000  # records: fewer take seconds, and leave nothing behind on the disk


def run_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the configuration names, else the base model's own.

    Raises:
        ModelError: there is none, or it cannot be reached.
    """
    return load_tokenizer(config.tokenizer_name_or_path or config.model_name_or_path)


def run_base_config(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The base model's config. A base that is random anyway gets the vocabulary of the tokenizer in use.

    Raises:
        ModelError: no such model, one whose documents cannot be packed, or weights with fewer embeddings than the
            tokenizer has ids.
    """
    base_config = read_base_config(config.model_name_or_path)
    attention_layout(base_config)
    if tokenizer is None or len(tokenizer) <= base_config.vocab_size:
        return base_config
    if not is_config_only(config.model_name_or_path):
        raise ModelError(
            f"{config.model_name_or_path} has {base_config.vocab_size:,} token embeddings, the tokenizer "
            f"{tokenizer.name_or_path} has {len(tokenizer):,} ids; pass the model's own with --tokenizer"
        )
    base_config.vocab_size = len(tokenizer)
    return base_config


def base_facts(base_config: PreTrainedConfig) -> dict[str, Any]:
    """What another base model is told apart by, as JSON values; kept in every checkpoint."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {name: getattr(base_config, name) for name in names}


def run_chat(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The chat format: the template that the configuration names, else the shipped or the tokenizer's own.

    Raises:
        ModelError: the template's file cannot be read, or there is no template.
    """
    template = None
    if config.chat_template is not None:
        try:
            named = local_or_shipped(config.chat_template) or Path(config.chat_template)
            template = named.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"chat_template: cannot read {config.chat_template}: {error}") from None
    return chat_format(tokenizer, template=template, supervision=config.supervision, current_date=config.current_date)


def run_records(config: RunConfig) -> tuple[Record, ...]:
    """The run's documents: files, or generated needles.

    Raises:
        DataError: no data is named, or a file or record cannot be used.
    """
    if not config.train_ds_names:
        raise DataError("no training data: pass --data FILE, or set train_ds_names")
    records: list[Record] = []
    for name in config.train_ds_names:
        if name == NEEDLE:
            for number, stage in enumerate(run_stages(config)):
                records += needle_records(
                    documents=_documents(config, stage),
                    pairs=stage.pairs,
                    digits=stage.digits,
                    filler_tokens=stage.filler_tokens,
                    seed=config.seed + number,
                    style=config.needle_style,
                    min_filler_tokens=stage.min_filler_tokens,
                )[: config.max_train_samples_per_ds]
        else:
            records += read_records([name], config.max_train_samples_per_ds)
    return tuple(records)


def run_stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of the run's generated needles; a single one without a curriculum."""
    single = Stage(pairs=config.needle_pairs, digits=config.needle_digits, filler_tokens=config.needle_filler_tokens)
    return config.curriculum or (single,)


def stage_rows(config: RunConfig, rows: Sequence[Row]) -> list[range]:
    """Which of a run's rows belong to each stage of its curriculum; all of them to one stage without a curriculum."""
    if not config.curriculum:
        return [range(len(rows))]
    firsts = accumulate((_documents(config, stage) for stage in config.curriculum), initial=0)
    borders = [bisect_left(range(len(rows)), first, key=lambda row: rows[row].record) for first in firsts]
    return [range(*pair) for pair in pairwise(borders)]


def _documents(config: RunConfig, stage: Stage) -> int:
    return config.needle_documents if stage.documents is None else stage.documents


def run_rows(
    config: RunConfig,
    chat: ChatFormat,
    records: Sequence[Record],
    on_progress: OnProgress = lambda done, total: None,
) -> Tokenized:
    """Tokenized rows of all records, and an account of what is not in them; many records are tokenized once and kept.

    Args:
        on_progress: called after every record.

    Raises:
        DataError: no row is left, teacher logprobs are missing or do not match, or the cache cannot be written.
    """
    base_config = read_base_config(config.model_name_or_path)
    if config.use_kl_loss:
        require_teachers(records, max(base_config.vocab_size, len(chat.tokenizer)))
    limits = Limits.of(config, base_config)
    if not config.cache or len(records) < CACHED_FROM:
        return tokenize_records(records, chat, limits, config.seed, on_progress)
    folder = default_folder() if config.cache_dir is None else Path(config.cache_dir)
    return cached_rows(records, chat, limits, config.seed, folder, on_progress)


def epoch_batches(config: RunConfig, rows: Sequence[Row], epoch: int, among: range | None = None) -> PackedBatches:
    """The packed batches of an epoch, in its own order, each made when it is asked for.

    Args:
        among: the rows to take; default: all.

    Raises:
        DataError: no row fits the packed lengths.
    """
    among = range(len(rows)) if among is None else among
    sizes = row_sizes(rows)[among.start : among.stop]
    packing = pack(sizes, config.max_packed_inp_len, config.max_packed_ctx_len, seed=config.seed + epoch)
    if not packing.groups:
        raise DataError(f"no row fits max_packed_inp_len and max_packed_ctx_len: {packing.oversized[0].reason}")
    return PackedBatches(rows, [[among[row] for row in group] for group in packing.groups])


def run_base(config: RunConfig, base_config: PreTrainedConfig) -> PreTrainedModel:
    """The frozen base, loaded by its plan.

    Raises:
        ModelError: the weights are absent or do not fit.
    """
    return load_base(config.model_name_or_path, base_config, plan_load(config, base_config), config.seed)


def run_model(config: RunConfig, base: PreTrainedModel) -> DocToLora:
    """The model around a base, its hypernetwork initialised from the run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return DocToLora(base, config)


@dataclass(frozen=True)
class Fingerprint:
    """What shapes a run, each part as a sha256 or version, and one hash over all of it."""

    parts: dict[str, str]

    @property
    def total(self) -> str:
        """Hex sha256 over all parts."""
        return _sha256(json.dumps(self.parts, sort_keys=True))


def run_fingerprint(
    config: RunConfig,
    base_config: PreTrainedConfig,
    chat: ChatFormat | None,
    records: Sequence[Record] | None,
    versions: dict[str, str],
) -> Fingerprint:
    """Hash configuration, base config, template, tokenizer and data; name the library versions."""
    places = {"output_dir", "cache", "cache_dir"}
    settings = {key: value for key, value in config.resolved().items() if key not in places}
    parts = {
        "config": _sha256(json.dumps(settings, sort_keys=True)),
        "base_config": _sha256(base_config.to_json_string()),
        "chat": chat.fingerprint if chat else "none",
        "tokenizer": chat.tokenizer_fingerprint if chat else "none",
        "data": _sha256(json.dumps([[r.context, r.prompts, r.responses] for r in records])) if records else "none",
    }
    return Fingerprint(parts | versions)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
