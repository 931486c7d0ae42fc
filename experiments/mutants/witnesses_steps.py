"""Witnesses of what only large or spoilt steps run: losses in slices, matrices in stacks, the Perceiver in pieces, snapshots."""

from dataclasses import replace
from random import Random
from unittest import mock

import torch

from checks.twin_run import as_on_gpu
from d2l.base import blocks
from d2l.build import Components
from d2l.checkpoint import Checkpoint, take_snapshot
from d2l.data.chunks import split_context
from d2l.data.limits import Limits
from d2l.data.packing import collate
from d2l.hypernet import memory
from d2l.train import losses, optimizer
from d2l.train.loop import Trainer
from d2l.train.losses import Normalizer, compute_loss, lora_l1
from d2l.train.processes import OneProcess
from experiments.mutants.values import Values
from experiments.mutants.witnesses_model import SMALL, build, kinds, one_batch, refusal
from experiments.mutants.witnesses_training import CPU, training_configs
from experiments.mutants.workbench import configurations, llama_config


def pieces(values: Values) -> None:
    """Read documents in pieces of a chunk under a layer or few, and take the gradients."""
    for name in ("per_layer_activations", "early_exit"):
        config = kinds()[name]
        model, batch = build(config), one_batch(config)
        with mock.patch.object(memory, "PIECE_BYTES", 2**17):
            logits = model.logits(batch, model.lora(batch), batch.prediction_positions)
            logits[:, :50].float().square().sum().backward()
        values[f"{name} logits"] = logits.detach()
        values |= {f"{name} {key}": it.grad for key, it in model.hypernet.named_parameters() if it.grad is not None}


def slices(values: Values) -> None:
    """Compute losses of few label tokens at a time, and the L1 term of a step whose first micro-batch is short."""
    config = configurations()["llama"]
    rows = Components(config).rows
    batches = [collate([replace(row, chunks=row.chunks[:1]) for row in rows[3:5]]), one_batch(config)]
    normalizer = Normalizer.of(batches, 2)
    values["counts"] = list(vars(normalizer).values())
    made = build(kinds()["early_exit"]).lora(batches[1])
    values["l1"] = lora_l1(made, normalizer).detach()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(batches[1].label_positions), 1024, generator=generator, requires_grad=True)
    for kind in ("ce", "kl"):
        with mock.patch.object(losses, "SLICE_BYTES", 2**14):
            loss = compute_loss(logits, batches[1], made, normalizer, loss=kind, use_per_ctx_average_loss=True)
            (gradient,) = torch.autograd.grad(loss.total, logits, retain_graph=True)
        values |= {f"{kind} gradient": gradient, f"{kind} loss": loss.task.detach()}


def stacks(values: Values) -> None:
    """Take a step by Muon where few matrices are orthogonalized at once."""
    config = llama_config(**SMALL, muon_learning_rate=0.03)
    hypernet = build(config).hypernet
    made = optimizer.make_optimizer(hypernet, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in hypernet.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    with mock.patch.object(optimizer, "STACK_VALUES", 512):
        made.step()
    values |= dict(hypernet.state_dict())


def grouped_lora(values: Values) -> None:
    """Multiply contexts of unequal lengths by their LoRAs as where one kernel takes all of them."""
    config = kinds()["early_exit"]
    model, batch = build(config), one_batch(config)
    with as_on_gpu(), torch.no_grad():
        values["logits"] = model.logits(batch, model.lora(batch))


def unsound(values: Values) -> None:
    """Spoil a weight and a moment after a step each, and take another one; change what was copied to be saved."""
    for name in ("weight", "moment"):
        config = training_configs()["kl"]
        trainer = Trainer(build(config), Components(config).rows, config, OneProcess(CPU))
        trainer.step()
        parameter = trainer.model.hypernet.head.weight
        spoilt = parameter.data if name == "weight" else trainer.optimizer.state[parameter]["exp_avg_sq"]
        spoilt.flatten()[0] = 1e30 if name == "weight" else torch.inf
        values[f"spoilt {name}"] = refusal(trainer.step)
    kept = torch.ones(2)
    snapshot = take_snapshot(Checkpoint({"kept": kept}, {}, {}))
    kept.zero_()
    values["snapshot"] = snapshot.hypernet["kept"]


def cuts(values: Values) -> None:
    """Cut documents with overlaps, at places, and into drawn numbers of chunks of a least length."""
    words = [*range(7, 400, 7), 400]
    for overlap in (0, 5):
        for least in (-1, 40, 55):
            limits = Limits(max_ctx_chunk_len=60, min_ctx_chunk_len=least, chunk_overlap=overlap)
            drawn = replace(limits, max_ctx_chunk_len=300, num_chunk_probs={1: 0.1, 7: 0.3, 9: 0.6})
            for length in (100, 230, 400):
                places = ([*range(31, length, 31), length], [it for it in words if it < length] + [length])
                for title, chosen, at in (
                    *(("equal", limits, ()), ("placed", limits, places)),
                    *(("drawn", drawn, ()), ("drawn at places", drawn, places)),
                ):
                    found = split_context(range(length), (1, 2), (3,), chosen, Random(4), at)
                    values[f"{title} {overlap} {least} {length}"] = [list(chunk) for chunk in found]


def block_tables(values: Values) -> None:
    """Make the block mask of a row of many blocks and documents."""
    positions = torch.cat([torch.arange(length) for length in (300, 90, 500, 1, 260)])[None]
    for window in (None, 128):
        mask = blocks.block_mask(blocks.first_visible(positions, window))
        values |= {f"{window} partial": mask.kv_num_blocks, f"{window} full": mask.full_kv_num_blocks}
        values |= {f"{window} places": mask.kv_indices, f"{window} full places": mask.full_kv_indices}
