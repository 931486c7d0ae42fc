"""Witnesses of what follows a training: a checkpoint in use, documents that become adapters, and several in one."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from d2l.build import Components
from d2l.checkpoint import Checkpoint, FoundCheckpoint, load_checkpoint, save_checkpoint
from d2l.config.schema import RunConfig
from d2l.inference.adapter import WEIGHTS
from d2l.inference.batch import Internalizer
from d2l.inference.documents import Document
from d2l.inference.load import TrainedModel, restore_model
from d2l.inference.merge import merge_documents
from d2l.inference.servers import AdapterForm
from experiments.mutants.values import Values
from experiments.mutants.witnesses_model import build, kinds, one_batch
from experiments.mutants.workbench import document_records


def internalize(values: Values) -> None:
    """Turn documents into adapters, alone and in packs, and again where some have changed, in another form, of others."""
    config = RunConfig(**kinds()["early_exit"].model_dump() | {"max_ctx_chunk_len": 60, "num_chunk_probs": None})
    texts = [record.context for record in document_records()[:3]]
    with tempfile.TemporaryDirectory() as name:
        trained, other = (_saved(config, Path(name) / str(factor), factor) for factor in (1.0, 2.0))
        longer = [texts[0], f"{texts[1]} {texts[2]}", f"Of it: {texts[2]}"]
        bfloat16 = AdapterForm(dtype="bfloat16")
        for title, pack, turns in (
            ("alone", None, [(trained, texts, AdapterForm()), (trained, longer, AdapterForm())]),
            ("packed", 200, [(trained, texts, AdapterForm()), (trained, texts, AdapterForm(server="vllm"))]),
            ("rounded", None, [(trained, texts, bfloat16), (trained, longer, AdapterForm())]),
            ("others", None, [(trained, texts, AdapterForm()), (other, texts, AdapterForm())]),
        ):
            for turn, (model, documents, form) in enumerate(turns):
                values |= {
                    f"{title} {turn} {key}": value
                    for key, value in _written(model, documents, form, Path(name) / title, pack).items()
                }


def _saved(config: RunConfig, folder: Path, factor: float) -> TrainedModel:
    """Save a model whose weights are a multiple of those of a seed, and restore it into a new one, as a command does."""
    weights = {key: factor * value for key, value in build(config).hypernet.state_dict().items()}
    save_checkpoint(folder, Checkpoint(weights, {}, {"step": 1}))
    chat = Components(config).chat
    return restore_model(build(config, nonzero=False), chat, config, load_checkpoint(folder), FoundCheckpoint(folder))


def _written(
    trained: TrainedModel, texts: Sequence[str], form: AdapterForm, folder: Path, pack_tokens: int | None
) -> Values:
    """Internalize documents into a folder; return what became of each, and what its adapter holds then."""
    found = Values()
    documents = [Document(f"{number}", f"{number}", f"{number}", text) for number, text in enumerate(texts)]
    for outcome in Internalizer(trained, form, lambda name: folder / name, pack_tokens).run(documents):
        key = outcome.document.id
        found[key] = [outcome.status, outcome.read, outcome.reused]
        if outcome.card is not None:
            found[f"{key} card"] = [outcome.card.rank, *outcome.card.chunks.values(), *outcome.card.chunk_hashes]
            found |= {f"{key} {name}": it for name, it in load_file(folder / key / WEIGHTS).items()}
    return found


def merging(values: Values) -> None:
    """Merge the LoRAs of documents of other numbers of chunks into one."""
    config = kinds()["early_exit"]
    model = build(config)
    with torch.no_grad():
        made = model.lora(one_batch(config))
        merged = merge_documents([made[0], made[1], made[2]])
    values |= {f"{side} {key}": it for side in ("A", "B") for key, it in getattr(merged, side).items()}
    values["ranks"] = [merged.rank, merged.bias_rank]
