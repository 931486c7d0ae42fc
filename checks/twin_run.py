"""d2l's runs as the checks drive them: saved, evaluated, trained to their end, in a group of processes, and loaded again."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir
from uuid import uuid4

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from checks.implementation import RunInputs
from d2l.build import build_model
from d2l.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, take_snapshot, write_snapshot
from d2l.config.load import saved_config
from d2l.config.schema import RunConfig
from d2l.data.chat.format import ChatFormat
from d2l.data.tokenize import Row
from d2l.errors import CheckpointError
from d2l.fingerprint import run_fingerprint
from d2l.hypernet import lora, memory
from d2l.hypernet.model import DocToLora
from d2l.inference.batch import Internalizer
from d2l.inference.documents import Document, merge
from d2l.inference.load import TrainedModel, restore_model
from d2l.inference.servers import AdapterForm
from d2l.train import gradients, optimizer
from d2l.train.changes import compare_configs, compare_inputs
from d2l.train.loop import Trainer, train_steps
from d2l.train.metrics import EVALUATED
from d2l.train.watch import Watch

PACKED = 512  # tokens of a pass: several short questions, or chunks, share one
BUCKET_BYTES = 4096  # of a twin's gradients that are summed at once: it has several buckets, as a hypernetwork has


class Run(Trainer):
    """The trainer, with checkpoints as folders, and one watch for all evaluations of the same rows."""

    _watched: tuple[Sequence[Row], Watch, Path] | None = None

    def save(self, folder: Path) -> None:
        """Write a checkpoint into a new folder."""
        save_checkpoint(folder, self.checkpoint())

    def save_while(self, folder: Path, work: Callable[[], object]) -> None:
        """Write the checkpoint of this moment after something else was done, as one is that is written in the background."""
        snapshot = take_snapshot(self.checkpoint())
        work()
        write_snapshot(folder, snapshot)

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        self.restore(load_checkpoint(folder))

    def evaluate(self, rows: Sequence[Row]) -> dict[str, float]:
        """Score held-out rows as a run does, into a folder that is removed again; return what evaluation.jsonl has."""
        if self._watched is None or self._watched[0] != rows:
            folder = Path(gettempdir(), f"d2l-{uuid4().hex}")
            self._watched = rows, Watch(self, folder, [rows]), folder
        _, watch, folder = self._watched
        folder.mkdir(mode=0o700)
        try:
            with _of_twin():
                scores = watch.evaluate(self.step_number)
        finally:
            rmtree(folder)
        return {name.removeprefix(EVALUATED): value for name, value in scores.items()}

    def train(self, folder: Path, heldout: Sequence[Sequence[Row]]) -> None:
        """Take all steps of a run in an empty folder; held-out rows are evaluated where there are any."""
        with _of_twin():
            for _ in train_steps(self, folder, Watch(self, folder, heldout)):
                pass


def run_in_group(model: DocToLora, rows: Sequence[Row], config: RunConfig) -> Run:
    """Make a run at its start in a forked process of torch's default group, with the others of it."""
    PartialState._reset_state()  # of the process that this one was forked from
    gradients.BUCKET_BYTES = BUCKET_BYTES
    return Run(model, rows, config)


@contextmanager
def in_pieces() -> Iterator[None]:
    """Read documents, and step matrices, in the smallest pieces."""
    whole = memory.PIECE_BYTES, optimizer.STACK_VALUES
    memory.PIECE_BYTES = optimizer.STACK_VALUES = 1
    try:
        yield
    finally:
        memory.PIECE_BYTES, optimizer.STACK_VALUES = whole


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Multiply the contexts of a packed row by their LoRAs in one grouped product; torch's takes no float64."""
    own, multiply = lora.has_grouped_products, functional.grouped_mm

    def by_group(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
        groups = rows.tensor_split(offs[:-1].tolist())
        return torch.cat([group @ matrix for group, matrix in zip(groups, matrices, strict=True)])

    lora.has_grouped_products = lambda tokens, A, B, lengths: all(lengths)
    functional.grouped_mm = by_group  # type: ignore[assignment]
    try:
        yield
    finally:
        lora.has_grouped_products, functional.grouped_mm = own, multiply


def changes_of_resuming(then: RunInputs, now: RunInputs) -> set[str]:
    """Name what a run that was started with some inputs has to be allowed when it goes on with others."""
    prints = [run_fingerprint(it.config, it.base_config, it.chat, it.records, {}) for it in (then, now)]
    configured = compare_configs(then.config, now.config, {"step": 1, "processes": then.processes}, now.processes)
    return {it.field for it in (*configured, *compare_inputs(prints[0].to_json(), prints[1]))}


def load_here(base: PreTrainedModel, chat: ChatFormat, place: Path) -> TrainedModel:
    """Load a checkpoint for inference around a base that is here."""
    checkpoint = load_checkpoint(place)
    config = saved_config(dict(checkpoint.state["config"]))
    return restore_model(build_model(config, base), chat, config, checkpoint, find_checkpoint(place))


def internalize(trained: TrainedModel, documents: Sequence[str], folder: Path, form: AdapterForm, packed: bool) -> None:
    """Write the adapter of a document, or of several as one, as `d2l internalize` does.

    Raises:
        CheckpointError: it cannot be written.
    """
    parts = [Document(folder.name, str(number), "", text) for number, text in enumerate(documents)]
    document = parts[0] if len(parts) == 1 else merge(parts, folder.name)
    (outcome,) = Internalizer(trained, form, lambda _: folder, PACKED if packed else None).run([document])
    if outcome.card is None:
        raise CheckpointError(outcome.reason)


@contextmanager
def _of_twin() -> Iterator[None]:
    """Silence what a run says of its documents: of a twin's it helps nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
