"""The narrow protocol through which an implementation of Doc-to-LoRA is diagnosed: `Implementation` and its parts.

`checks/production.py` is d2l's own; a reference, a fork or a user's own can stand in its place.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from d2l.config.schema import RunConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from d2l.base.load_plan import LoadPlan
    from d2l.data.chat.format import ChatFormat
    from d2l.data.packing import PackedBatch
    from d2l.data.records import Record
    from d2l.data.tokenize import Row, Tokenized
    from d2l.hypernet.lora import Lora
    from d2l.inference.servers import AdapterDtype


@dataclass(frozen=True)
class RunInputs:
    """What a run is made of, as far as resuming it compares.

    Attributes:
        processes: that share each step.
    """

    config: RunConfig
    base_config: "PreTrainedConfig"
    chat: "ChatFormat"
    records: Sequence["Record"]
    processes: int = 1


class Model(Protocol):
    """A base, its context encoder and its hypernetwork."""

    @property
    def base(self) -> "PreTrainedModel":
        """Return the frozen base."""

    @property
    def hypernet(self) -> nn.Module:
        """Return the module that trains."""

    def features(self, batch: "PackedBatch") -> Tensor:
        """Return what the context encoder makes of all chunks, `[1, layers, Tc, hidden]` or `[1, Tc, features]`."""

    def lora(self, batch: "PackedBatch") -> "Lora":
        """Return the merged LoRA of every context of a packed row."""

    def logits(self, batch: "PackedBatch", lora: "Lora | None", positions: Tensor | None = None) -> Tensor:
        """Return the logits of the questions, `[T or positions, V]`, under `lora`, or of the base alone."""

    def gradient_checkpointing_enable(self, kwargs: Mapping[str, Any]) -> None:
        """Recompute the base's layers in the backward pass."""


class Stepper(Protocol):
    """A run in progress on some rows."""

    @property
    def model(self) -> Model:
        """Return the model in training."""

    def step(self) -> Any:
        """Take one optimizer step and return its metrics: `task_loss`, `grad_norm`, and `exact_match` where it has one.

        Raises:
            Exception: of any kind, before anything is changed, where the step is not finite or has no label.
        """

    def require_sound_state(self) -> None:
        """Raise an exception of any kind where the last update has spoilt weights or moments, as every step does."""

    def save(self, folder: Path) -> None:
        """Write all that is needed to continue elsewhere into a new folder."""

    def save_while(self, folder: Path, work: Callable[[], object]) -> None:
        """Do something, such as the next steps, and write what `save` would have written before."""

    def resume(self, folder: Path) -> None:
        """Continue from such a folder."""


class Implementation(Protocol):
    """The functions through which an implementation is diagnosed. Twins are tiny, random, float32 and on the CPU.

    Only `build` is necessary. What an implementation, its model or its stepper lacks is `NotOffered`, and the checks
    that need it are skipped. `checks.foreign` has defaults for an implementation other than d2l.
    """

    def plan(self, config: RunConfig, base_config: "PreTrainedConfig") -> "LoadPlan":
        """Return how the base would be loaded."""

    def build_base(self, base_config: "PreTrainedConfig", plan: "LoadPlan", seed: int) -> "PreTrainedModel":
        """Make a random frozen base."""

    def save_base(self, base: "PreTrainedModel", folder: Path) -> None:
        """Write a base in the file format of its family's checkpoints."""

    def load_base(self, folder: Path, plan: "LoadPlan") -> "PreTrainedModel":
        """Read a base as the run would."""

    def load_sharded_base(self, config: RunConfig) -> "PreTrainedModel":
        """Read the run's base, in all processes of torch's default group, each of which then holds a share of every weight."""

    def inspect_base(
        self, config: RunConfig, base_config: "PreTrainedConfig", plan: "LoadPlan"
    ) -> "Mapping[str, Tensor] | None":
        """Return the tensors in the files of the run's base, on the meta device; `None` where they are not on this machine.

        Raises:
            ModelError: they are not those of a whole checkpoint of the model.
        """

    def build(self, base: "PreTrainedModel", config: RunConfig) -> Model:
        """Make the whole model around a base."""

    def initial(self, base: "PreTrainedModel", config: RunConfig) -> Model:
        """Make the whole model as a run begins with it: by the seed of its configuration, whatever was drawn before."""

    def targets(self, base: "PreTrainedModel", names: Sequence[str]) -> Mapping[str, Sequence[nn.Module]]:
        """Return the modules that would be adapted: for each name one in every layer."""

    def chat(self, config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> "ChatFormat":
        """Return the chat format of the run."""

    def records(self, config: RunConfig) -> Sequence["Record"]:
        """Read the documents that `train_ds_names` names, or generate them, in that order."""

    def rows(self, config: RunConfig, chat: "ChatFormat", records: Sequence["Record"]) -> "Tokenized":
        """Tokenize records into rows, and list what was dropped."""

    def cached_rows(
        self, config: RunConfig, chat: "ChatFormat", records: Sequence["Record"], folder: Path
    ) -> "Tokenized":
        """Return the same as `rows`, through the cache that lies in this folder, in as many files as records where it can."""

    def divided(
        self, config: RunConfig, chat: "ChatFormat", records: Sequence["Record"], tokenized: "Tokenized"
    ) -> "tuple[Sequence[Row], Sequence[Sequence[Row]]]":
        """Return the rows that training packs, and those of held-out documents, one of each, for every stage of the run.

        Args:
            config: with `eval_steps`.
            tokenized: what `rows` returned for these records.
        """

    def teacher(
        self, base: "PreTrainedModel", chat: "ChatFormat", records: Sequence["Record"], top_k: int
    ) -> Sequence["Record"]:
        """Return the records with the base's likeliest tokens, its document before each question, for the KL loss."""

    def document_in_prompts(self, records: Sequence["Record"]) -> Sequence["Record"]:
        """Return the records as a model without a LoRA is asked: each document before its questions."""

    def batches(self, config: RunConfig, rows: Sequence["Row"]) -> Sequence["PackedBatch"]:
        """Pack the rows of one epoch."""

    def block_mask(self, position_ids: Tensor, window: int | None) -> "BlockMask":
        """Return the block mask of flex_attention for a packed row, on the CPU.

        Args:
            position_ids: int64 [1, T], which begin with 0 in every document.
            window: tokens that a token sees, itself included; None: all of its document.
        """

    def loss(self, model: Any, batches: Sequence["PackedBatch"], config: RunConfig) -> tuple[Tensor, Tensor]:
        """Return the task loss and the weighted L1 term of one step made of these micro-batches, with gradients."""

    def in_pieces(self) -> AbstractContextManager[None]:
        """Let runs meanwhile do in the smallest pieces what they do in pieces at real sizes: read documents, step by Muon."""

    def as_on_gpu(self) -> AbstractContextManager[None]:
        """Let models meanwhile compute the way that they do on a newer GPU, as far as a CPU can."""

    def trainer(self, model: Any, rows: Sequence["Row"], config: RunConfig) -> Stepper:
        """Make a run at its start."""

    def trainer_in_group(self, model: Any, rows: Sequence["Row"], config: RunConfig) -> Stepper:
        """Make a run at its start that shares its steps with the other processes of torch's default group, on CPUs."""

    def train(self, run: Any, folder: Path) -> Sequence[Path]:
        """Take the steps of a whole run, and write its checkpoints below an empty folder; return those left, oldest first."""

    def train_evaluated(self, run: Any, folder: Path, heldout: Sequence[Sequence["Row"]]) -> None:
        """Do the same, and evaluate held-out rows meanwhile, of which there are some for each stage of the run."""

    def evaluate(self, run: Any, rows: Sequence["Row"]) -> Mapping[str, float]:
        """Score held-out rows, a document each, in the middle of a run; see `checks.oracles.heldout` for the names of scores."""

    def generate(
        self, model: Any, lora: "Lora | None", prompts: Tensor, stop: Sequence[int], max_new_tokens: int
    ) -> Tensor:
        """Answer prompts, int64 [n, T], greedily, each with the LoRA of its own context; None: with the base alone.

        Returns:
            The new tokens, int64 [n, up to max_new_tokens]; behind a stop token, anything.
        """

    def prompt(self, chat: "ChatFormat", question: str) -> Sequence[int]:
        """Return the tokens after which an evaluation lets a model answer a question."""

    def answer(self, chat: "ChatFormat", ids: Sequence[int]) -> str:
        """Return the text for the user of the tokens that a model wrote, up to the one that ends its answer."""

    def newest(self, folder: Path) -> Path:
        """Return the checkpoint that a run's folder is continued from: its newest whole one."""

    def changes(self, then: RunInputs, now: RunInputs) -> Collection[str]:
        """Name what refuses to continue a run with other inputs: configuration keys, or parts of the rest."""

    def learning_rates(self, config: RunConfig, steps: Sequence[int]) -> Sequence[float]:
        """Return the learning rates that the run's schedule gives these optimizer steps, counted from 0."""

    def read(self, folder: Path) -> tuple[RunConfig, Mapping[str, Tensor]]:
        """Return the configuration and the trained tensors, by name, of a folder of `save` or `import_reference`."""

    def export(self, lora: "Lora", base: "PreTrainedModel", folder: Path) -> None:
        """Write one document's LoRA as an adapter folder of PEFT."""

    def internalize(
        self,
        base: "PreTrainedModel",
        chat: "ChatFormat",
        checkpoint: Path,
        documents: Sequence[str],
        folder: Path,
        *,
        dtype: "AdapterDtype" = "float32",
        packed: bool = False,
        rank: int | None = None,
    ) -> None:
        """Write what a saved run makes of a document, or of several as one, as an adapter folder of PEFT.

        Args:
            checkpoint: a folder of `save`.
            folder: new, or that of an earlier adapter, which is brought up to date.
            dtype: of the file.
            packed: whether chunks are read together.
            rank: of the nearest adapter of that rank, however far it is; None: as generated.

        Raises:
            Exception: the adapter that lies in the folder is of another checkpoint.
        """

    def merge(self, loras: Sequence["Lora"]) -> "Lora":
        """Put the LoRAs of documents, of one context each, together to one that stands for all of them."""

    def evaluation(
        self,
        base: "PreTrainedModel",
        chat: "ChatFormat",
        checkpoint: Path,
        records: Sequence["Record"],
        max_new_tokens: int,
    ) -> Mapping[str, Any]:
        """Return what `d2l eval --format json` prints of a saved run on some records: their `answers` and `scores`."""

    def grade(self, answer: str, expected: str) -> Mapping[str, float]:
        """Return the scores of an answer: `exact`, `f1` and `rouge_l`, 0 to 1."""

    def import_reference(self, file: Path, folder: Path) -> None:
        """Turn a checkpoint file of the reference into a checkpoint folder."""

    def requirements(self) -> Mapping[str, str]:
        """Return what the implementation needs (`torch>=2.11`) → the version that is installed, empty where it is absent."""

    def plugins(self) -> Sequence[Any]:
        """Return what installed distributions register as checks, as `checks.plugins.Plugin`."""

    def gpu(self) -> str | None:
        """Return the GPU that the run would use, as torch names it; `None` without one."""

    def free_memory(self) -> int | None:
        """Return the bytes of the GPU that the run could use; `None` without one."""

    def peak_memory(self, work: Callable[[], object]) -> int | None:
        """Do something, and return the most bytes of the GPU that tensors took meanwhile; `None` without one."""

    def free_disk(self, config: RunConfig) -> int:
        """Return the free bytes where the run's folder would be."""

    def save_seconds(self, config: RunConfig, size: int) -> float:
        """Save so many bytes there as a checkpoint is saved, leave nothing behind, and return the seconds that it took.

        Raises:
            OSError: nothing can be written there.
        """
