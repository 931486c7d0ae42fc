"""From a configuration to the components of a run: tokenizer, chat format, records, rows, base and model.

Training, checks, evaluation and experiments all come through here, so what is diagnosed is what runs.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from d2l.base.config import read_base_config
from d2l.base.files import is_config_only
from d2l.base.load import load_base
from d2l.base.load_plan import plan_load
from d2l.base.masks import attention_layout
from d2l.base.sharding import load_sharded_base
from d2l.config.schema import NEEDLE, RunConfig
from d2l.data.cache import cached_rows, default_folder
from d2l.data.chat.format import ChatFormat, chat_format
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.data.heldout import choose_heldout, one_row_each, require_unseen, without_records
from d2l.data.limits import Limits
from d2l.data.logprobs import require_teacher_logprobs
from d2l.data.needles import Split, needle_records
from d2l.data.records import Record, read_records
from d2l.data.tokenize import OnProgress, Row, Tokenized, tokenize_records
from d2l.errors import DataError, ModelError
from d2l.hypernet.model import DocToLora
from d2l.io.resources import local_or_shipped

CACHED_FROM = 1000  # records: fewer take seconds, and leave nothing behind on the disk


class Components:
    """The components of a run, each built once, when it is first asked for.

    Args:
        config: the resolved configuration.
        on_tokenize: called while the data is tokenized, with the records that are done and all of them.
        records: documents to take instead of those that the configuration names.
        processes: those over which a base is sharded that the configuration wants so; by default it is whole.
        chat: chat format to take, with its tokenizer, instead of those that the configuration names.
        tokenized: token rows of the records, where they were made before.

    Raises:
        ModelError: by a component: the base model, its tokenizer or its chat template cannot be used.
        DataError: by `records` and `tokenized`: no data is named, or it cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        on_tokenize: OnProgress = lambda done, total: None,
        records: Sequence[Record] | None = None,
        processes: int | None = None,
        chat: ChatFormat | None = None,
        tokenized: Tokenized | None = None,
    ) -> None:
        self.config = config
        self._tokenized = tokenized
        self._chat = chat
        self._processes = processes
        self._on_tokenize = on_tokenize
        self._records = records

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the configuration names, else the base model's own."""
        if self._chat is not None:
            return self._chat.tokenizer
        return load_tokenizer(self.config.tokenizer_name_or_path or self.config.model_name_or_path)

    @cached_property
    def chat(self) -> ChatFormat:
        """How conversations are written and supervised."""
        return build_chat(self.config, self.tokenizer) if self._chat is None else self._chat

    @cached_property
    def base_config(self) -> PreTrainedConfig:
        """The base model's config, with room for the tokenizer's ids."""
        return fitted_base_config(self.config, self.tokenizer)

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """The run's documents with their questions."""
        return load_records(self.config) if self._records is None else tuple(self._records)

    @cached_property
    def tokenized(self) -> Tokenized:
        """Token rows of all records, and an account of what is not in them."""
        if self._tokenized is not None:
            return self._tokenized
        return tokenize(self.config, self.base_config, self.chat, self.records, self._on_tokenize)

    @cached_property
    def kept_out(self) -> frozenset[int]:
        """The records that training leaves out for its evaluations: none where others are evaluated."""
        config = self.config
        if config.eval_steps is None or config.val_ds_names or NEEDLE in config.train_ds_names:
            return frozenset()
        return choose_heldout(self.records, config.eval_documents)

    @cached_property
    def rows(self) -> Sequence[Row]:
        """The token rows that training packs."""
        return without_records(self.tokenized.rows, self.kept_out)

    @cached_property
    def heldout(self) -> tuple[tuple[Row, ...], ...]:
        """One row of each held-out document, for each stage of the run; empty without `eval_steps`."""
        if self.config.eval_steps is None:
            return ()
        return tuple(one_row_each(*part, self.config.eval_documents) for part in self._heldout_parts())

    def _heldout_parts(self) -> Iterator[tuple[Sequence[Row], Sequence[Record]]]:
        """Yield rows with the records that their indices mean, for each stage of the run."""
        if self.kept_out:
            others = frozenset(range(len(self.records))) - self.kept_out
            yield without_records(self.tokenized.rows, others), self.records
            return
        for records in heldout_records(self.config, self.records):
            yield tokenize(self.config, self.base_config, self.chat, records).rows, records

    @cached_property
    def base(self) -> PreTrainedModel:
        """The frozen base model, loaded by its plan."""
        return build_base(self.config, self.base_config, self._processes)

    @cached_property
    def model(self) -> DocToLora:
        """The whole model, its hypernetwork initialised from the run's seed."""
        return build_model(self.config, self.base)


def fitted_base_config(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """Read the base model's config. A base that is random anyway gets the vocabulary of the tokenizer in use.

    Args:
        tokenizer: None where none can be had; then the config stays as it is.

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


def build_chat(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Put a tokenizer together with the template that the configuration names, else the shipped or its own.

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
    return chat_format(
        tokenizer,
        template=template,
        supervision=config.supervision,
        current_date=config.current_date,
        control_tokens=config.control_tokens,
    )


def load_records(config: RunConfig) -> tuple[Record, ...]:
    """Read the run's documents from files, or generate needles.

    Raises:
        DataError: no data is named, or files or records cannot be used: each with its entry of train_ds_names.
    """
    names = config.train_ds_names
    if not names:
        raise DataError("no training data: pass --data FILE, or set train_ds_names")
    records: list[Record] = []
    failures: list[str] = []
    for index, name in enumerate(names):
        try:
            records += _needles(config) if name == NEEDLE else read_records([name], config.max_train_samples_per_ds)
        except DataError as error:
            key = f"train_ds_names[{index}]" + (" (or --data)" if len(names) == 1 else "")
            failures.append(f"{key}: {error}")
    if failures:
        advice = "`d2l preflight CONFIG --set 'train_ds_names=[]'` checks everything else, without the data"
        raise DataError("\n\n".join([*failures, advice]))
    return tuple(records)


def heldout_records(config: RunConfig, trained: Sequence[Record]) -> list[list[Record]]:
    """Generate held-out needles for every stage, or read `val_ds_names`, which hold for the whole run.

    Raises:
        DataError: a file or a record in it cannot be used, or training has the same document.
    """
    if NEEDLE in config.train_ds_names:  # twice as many: short documents are drawn more than once
        return [
            _stage_needles(config, number, 2 * config.eval_documents, "heldout") for number in range(len(config.stages))
        ]
    try:
        records = read_records(config.val_ds_names)
    except DataError as error:
        raise DataError(f"val_ds_names: {error}") from None
    require_unseen(records, trained)
    return [records]


def _needles(config: RunConfig) -> list[Record]:
    """Generate the documents of every stage."""
    records: list[Record] = []
    for number, stage in enumerate(config.stages):
        records += _stage_needles(config, number, config.documents_of(stage))[: config.max_train_samples_per_ds]
    return records


def _stage_needles(config: RunConfig, number: int, documents: int, split: Split = "train") -> list[Record]:
    """Generate documents of one stage."""
    stage = config.stages[number]
    return needle_records(
        documents=documents,
        pairs=stage.pairs,
        digits=stage.digits,
        filler_words=stage.filler_words,
        seed=config.seed + number,
        split=split,
        style=config.needle_style,
        min_filler_words=stage.min_filler_words,
    )


def tokenize(
    config: RunConfig,
    base_config: PreTrainedConfig,
    chat: ChatFormat,
    records: Sequence[Record],
    on_progress: OnProgress = lambda done, total: None,
) -> Tokenized:
    """Tokenize all records; 1,000 and more are tokenized once and kept on disk.

    Args:
        on_progress: called after every record, with the records that are done and all of them.

    Raises:
        DataError: no row is left, teacher logprobs are missing or do not match, or the cache cannot be written.
    """
    if config.needs_teacher:
        require_teacher_logprobs(records, max(base_config.vocab_size, len(chat.tokenizer)))
    limits = Limits.of(config, base_config)
    if not config.cache or len(records) < CACHED_FROM:
        return tokenize_records(records, chat, limits, config.seed, on_progress)
    folder = default_folder() if config.cache_dir is None else Path(config.cache_dir)
    return cached_rows(records, chat, limits, config.seed, folder, on_progress)


def build_base(config: RunConfig, base_config: PreTrainedConfig, processes: int | None = None) -> PreTrainedModel:
    """Load the frozen base by its plan.

    Args:
        processes: see `Components`.

    Raises:
        ModelError: the weights are absent or do not fit, or cannot be sharded.
    """
    name, plan = config.model_name_or_path, plan_load(config, base_config)
    if config.base_sharding == "none" or processes is None:
        return load_base(name, base_config, plan, config.seed)
    return load_sharded_base(name, base_config, plan, config.seed, processes=processes)


def build_model(config: RunConfig, base: PreTrainedModel) -> DocToLora:
    """Put a hypernetwork around a base, initialised from the run's seed."""
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU; torch.manual_seed would reach every GPU's state too
        torch.default_generator.manual_seed(config.seed)
        return DocToLora(base, config)
