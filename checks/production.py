"""The implementation of d2l, as the checks reach it: each method calls the function that a run calls."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from checks.implementation import Implementation, RunInputs
from checks.judged import describe_judged
from checks.machine import free_disk, free_memory, gpu, peak_memory, requirements, save_seconds
from checks.offered import Offered
from checks.plugins import Plugin, load_plugins
from checks.quiet import quiet_transformers
from checks.subject import Subject
from checks.twin_run import PACKED, Run, as_on_gpu, changes_of_resuming, in_pieces, internalize, load_here, run_in_group
from d2l.base.blocks import block_mask, first_visible
from d2l.base.config import read_base_config
from d2l.base.files import save_mxfp4
from d2l.base.load import inspect_base, load_base, random_base
from d2l.base.load_plan import LoadPlan, plan_load
from d2l.build import Components, build_base, build_chat, build_model, fitted_base_config, load_records, tokenize
from d2l.checkpoint import find_checkpoint, load_checkpoint
from d2l.config.load import saved_config
from d2l.config.schema import RunConfig
from d2l.data.cache import cached_rows
from d2l.data.chat.format import ChatFormat
from d2l.data.epochs import epoch_batches
from d2l.data.packing import PackedBatch
from d2l.data.records import Record, document_in_prompts
from d2l.data.tokenize import Limits, OnProgress, Row, Tokenized
from d2l.errors import ModelError
from d2l.evaluation.run import evaluate
from d2l.evaluation.scores import exact_match, rouge_l, token_f1
from d2l.fingerprint import run_fingerprint
from d2l.hypernet.lora import Lora
from d2l.hypernet.model import DocToLora
from d2l.hypernet.targets import find_targets
from d2l.inference.adapter import export_adapter
from d2l.inference.generate import decode_answer, encode_prompt, find_stop_ids, generate, truncate_at_stop
from d2l.inference.merge import merge_documents
from d2l.inference.servers import AdapterDtype, AdapterForm
from d2l.reference.load import import_reference
from d2l.train.loop import batch_loss
from d2l.train.losses import Normalizer
from d2l.train.optimizer import learning_rates
from d2l.train.processes import OneProcess
from d2l.train.teacher import add_teacher_logprobs


class Production:
    """d2l behind the protocol `checks.implementation.Implementation`.

    Args:
        on_tokenize: called with the records that are tokenized so far, and all of them.
    """

    def __init__(self, on_tokenize: OnProgress = lambda done, total: None) -> None:
        self._on_tokenize = on_tokenize

    def plan(self, config: RunConfig, base_config: PreTrainedConfig) -> LoadPlan:
        return plan_load(config, base_config)

    def build_base(self, base_config: PreTrainedConfig, plan: LoadPlan, seed: int) -> PreTrainedModel:
        return random_base(base_config, plan, seed)

    def save_base(self, base: PreTrainedModel, folder: Path) -> None:
        save_mxfp4(base, folder)

    def load_base(self, folder: Path, plan: LoadPlan) -> PreTrainedModel:
        with quiet_transformers():
            return load_base(str(folder), read_base_config(str(folder)), plan, seed=0)

    def load_sharded_base(self, config: RunConfig) -> PreTrainedModel:
        with quiet_transformers():
            return build_base(config, read_base_config(config.model_name_or_path), distributed.get_world_size())

    def inspect_base(
        self, config: RunConfig, base_config: PreTrainedConfig, plan: LoadPlan
    ) -> Mapping[str, Tensor] | None:
        with quiet_transformers():
            return inspect_base(config.model_name_or_path, base_config, plan)

    def build(self, base: PreTrainedModel, config: RunConfig) -> DocToLora:
        return DocToLora(base, config)

    def initial(self, base: PreTrainedModel, config: RunConfig) -> DocToLora:
        return build_model(config, base)

    def targets(self, base: PreTrainedModel, names: Sequence[str]) -> Mapping[str, Sequence[nn.Module]]:
        return find_targets(base, names)

    def chat(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        return build_chat(config, tokenizer)

    def records(self, config: RunConfig) -> Sequence[Record]:
        return load_records(config)

    def rows(self, config: RunConfig, chat: ChatFormat, records: Sequence[Record]) -> Tokenized:
        base_config = fitted_base_config(config, chat.tokenizer)
        return tokenize(config, base_config, chat, records, self._on_tokenize)

    def cached_rows(self, config: RunConfig, chat: ChatFormat, records: Sequence[Record], folder: Path) -> Tokenized:
        limits = Limits.of(config, fitted_base_config(config, chat.tokenizer))
        return cached_rows(records, chat, limits, config.seed, folder, per_shard=1)

    def divided(
        self, config: RunConfig, chat: ChatFormat, records: Sequence[Record], tokenized: Tokenized
    ) -> tuple[Sequence[Row], Sequence[Sequence[Row]]]:
        components = Components(config, records=records, chat=chat, tokenized=tokenized)
        return components.rows, components.heldout

    def teacher(
        self, base: PreTrainedModel, chat: ChatFormat, records: Sequence[Record], top_k: int
    ) -> Sequence[Record]:
        return add_teacher_logprobs(records, base, chat, top_k=top_k, packed_tokens=PACKED)

    def document_in_prompts(self, records: Sequence[Record]) -> Sequence[Record]:
        return [document_in_prompts(record) for record in records]

    def batches(self, config: RunConfig, rows: Sequence[Row]) -> Sequence[PackedBatch]:
        return epoch_batches(config, rows, epoch=0)

    def block_mask(self, position_ids: Tensor, window: int | None) -> BlockMask:
        return block_mask(first_visible(position_ids, window))

    def loss(self, model: DocToLora, batches: Sequence[PackedBatch], config: RunConfig) -> tuple[Tensor, Tensor]:
        normalizer = Normalizer.of(batches, config.lora_r)
        losses = [batch_loss(model, batch, normalizer, config) for batch in batches]
        task = torch.stack([loss.task for loss in losses]).sum()
        return task, config.gen_lora_l1_reg_coef * torch.stack([loss.l1 for loss in losses]).sum()

    def in_pieces(self) -> AbstractContextManager[None]:
        return in_pieces()

    def as_on_gpu(self) -> AbstractContextManager[None]:
        return as_on_gpu()

    def trainer(self, model: DocToLora, rows: Sequence[Row], config: RunConfig) -> Run:
        return Run(model, rows, config, OneProcess(model.base.device))

    def trainer_in_group(self, model: DocToLora, rows: Sequence[Row], config: RunConfig) -> Run:
        return run_in_group(model, rows, config)

    def train(self, run: Run, folder: Path) -> Sequence[Path]:
        run.train(folder, [])
        return sorted((folder / "checkpoints").iterdir())

    def train_evaluated(self, run: Run, folder: Path, heldout: Sequence[Sequence[Row]]) -> None:
        run.train(folder, heldout)

    def evaluate(self, run: Run, rows: Sequence[Row]) -> Mapping[str, float]:
        return run.evaluate(rows)

    def generate(
        self, model: DocToLora, lora: Lora | None, prompts: Tensor, stop: Sequence[int], max_new_tokens: int
    ) -> Tensor:
        return generate(model, lora, prompts, stop=stop, max_new_tokens=max_new_tokens)

    def prompt(self, chat: ChatFormat, question: str) -> Sequence[int]:
        return encode_prompt(chat, question)

    def answer(self, chat: ChatFormat, ids: Sequence[int]) -> str:
        return decode_answer(chat, truncate_at_stop(ids, find_stop_ids(chat, None)))

    def newest(self, folder: Path) -> Path:
        return find_checkpoint(folder).folder

    def changes(self, then: RunInputs, now: RunInputs) -> Collection[str]:
        return changes_of_resuming(then, now)

    def learning_rates(self, config: RunConfig, steps: Sequence[int]) -> Sequence[float]:
        return learning_rates(config, steps)

    def read(self, folder: Path) -> tuple[RunConfig, Mapping[str, Tensor]]:
        checkpoint = load_checkpoint(folder)
        return saved_config(dict(checkpoint.state["config"])), checkpoint.hypernet

    def export(self, lora: Lora, base: PreTrainedModel, folder: Path) -> None:
        export_adapter(lora, base, folder, base.config.name_or_path or "")

    def internalize(
        self,
        base: PreTrainedModel,
        chat: ChatFormat,
        checkpoint: Path,
        documents: Sequence[str],
        folder: Path,
        *,
        dtype: AdapterDtype = "float32",
        packed: bool = False,
        rank: int | None = None,
    ) -> None:
        internalize(load_here(base, chat, checkpoint), documents, folder, AdapterForm("peft", rank, dtype, 1.0), packed)

    def merge(self, loras: Sequence[Lora]) -> Lora:
        return merge_documents(loras)

    def evaluation(
        self, base: PreTrainedModel, chat: ChatFormat, checkpoint: Path, records: Sequence[Record], max_new_tokens: int
    ) -> Mapping[str, Any]:
        return evaluate(load_here(base, chat, checkpoint), records, max_new_tokens=max_new_tokens).to_json()

    def grade(self, answer: str, expected: str) -> Mapping[str, float]:
        scores = {"exact": exact_match, "f1": token_f1, "rouge_l": rouge_l}
        return {name: score(answer, expected) for name, score in scores.items()}

    def import_reference(self, file: Path, folder: Path) -> None:
        import_reference(file, folder)

    def gpu(self) -> str | None:
        return gpu()

    def free_memory(self) -> int | None:
        return free_memory()

    def peak_memory(self, work: Callable[[], object]) -> int | None:
        return peak_memory(work)

    def requirements(self) -> dict[str, str]:
        return requirements()

    def plugins(self) -> Sequence[Plugin]:
        return load_plugins()

    def free_disk(self, config: RunConfig) -> int:
        return free_disk(config)

    def save_seconds(self, config: RunConfig, size: int) -> float:
        return save_seconds(config, size)


class Another(Offered):
    """Another implementation than d2l; plugins are this machine's, whatever is examined on it."""

    def plugins(self) -> Sequence[Plugin]:
        return load_plugins()


def make_subject(
    config: RunConfig,
    name: str = "",
    on_tokenize: OnProgress = lambda done, total: None,
    implementation: Implementation | None = None,
    with_data: bool = True,
) -> Subject:
    """Make the subject of a configuration, with whatever of the run's inputs is available here.

    Args:
        implementation: what would run it; default: d2l.
        on_tokenize: called while the data is tokenized, with the records that are done and all of them.
        with_data: whether the data is read; without, it is no part of the fingerprint, and checks of stage `data` skip.

    Raises:
        ModelError: there is no such base model.
        DataError: data is named and cannot be used.
    """
    components = Components(config)
    tokenizer, tokenizer_absent = None, ""
    try:
        tokenizer = components.tokenizer
    except ModelError as error:
        if config.tokenizer_name_or_path is not None:
            raise
        tokenizer_absent = f"no tokenizer: {str(error).splitlines()[0]}; pass --tokenizer FOLDER"
    records, records_absent = None, "no data: pass --data FILE, or set train_ds_names"
    if config.train_ds_names and with_data:
        records = components.records
    elif config.train_ds_names:
        records_absent = "the data was not read: stage data was not requested"
    base_config = fitted_base_config(config, tokenizer)
    chat = None
    if tokenizer is not None:
        try:
            chat = components.chat
        except ModelError:
            chat = None  # LBL101 reports it
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    return Subject(
        name=name or config.model_name_or_path,
        config=config,
        base_config=base_config,
        implementation=Production(on_tokenize) if implementation is None else Another(implementation),
        tokenizer=tokenizer,
        tokenizer_absent=tokenizer_absent,
        records=records,
        records_absent=records_absent,
        judged=describe_judged(config, tokenizer, tokenizer_absent, records, records_absent, implementation),
        identity=run_fingerprint(config, base_config, chat, records, versions),
    )
