"""Study of target modules, features, losses and optimizers: needles on a tiny GPT-OSS, one budget, several seeds.

Every variant trains the same hypernetwork on the same documents for the same number of steps, and is evaluated on unseen
documents: the share of questions whose answer tokens all have the highest logit, with the document's LoRA and with
another document's. `targets_page.py` turns the JSON file into a page and a figure.

    python experiments/targets.py --output experiments/targets.json
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d2l.build import Components, build_model, load_records
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.epochs import epoch_batches
from d2l.data.needles import needle_records
from d2l.data.packing import PackedBatch
from d2l.data.records import Record
from d2l.data.tokenize import Row
from d2l.hypernet.lora import Lora
from d2l.hypernet.model import DocToLora
from d2l.io.atomic import replace_file
from d2l.train.loop import Trainer
from d2l.train.losses import Normalizer, compute_loss
from d2l.train.processes import OneProcess
from d2l.train.teacher import add_teacher_logprobs

CONFIG = "configs/needle_tiny.yaml"
UNSEEN = 192  # documents
SEEDS = (1, 2, 3)
TOP_K = 8  # tokens of the teacher that the KL loss compares

TARGETS: dict[str, tuple[str, ...]] = {
    "q_proj": ("q_proj",),
    "k_proj": ("k_proj",),
    "v_proj": ("v_proj",),
    "o_proj": ("o_proj",),
    "v_proj + o_proj": ("o_proj", "v_proj"),
    "all four": ("k_proj", "o_proj", "q_proj", "v_proj"),
    "mlp (residual route)": ("mlp",),
}
FEATURES: dict[str, dict[str, Any]] = {
    "per layer, as published": {"ctx_encoder_type": "per_layer_activations"},
    "early exit, layer 1": {"ctx_encoder_type": "early_exit", "layer_idx": 1},
    "early exit, layer 3": {"ctx_encoder_type": "early_exit", "layer_idx": 3},
    "all layers side by side": {},
}


@dataclass(frozen=True)
class Variant:
    """Row of the study: its changes to the shipped config."""

    part: str
    name: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Result of one seed of a variant.

    Attributes:
        exact, other: exact match on unseen documents with the document's LoRA and with another's.
        train: exact match of the last steps, with the curriculum's moving average.
        stage: last curriculum stage, 1 for the first.
        seconds: CPU time of the training.
    """

    part: str
    name: str
    seed: int
    exact: float
    other: float
    train: float
    stage: int
    seconds: float


def variants() -> list[Variant]:
    """Return all rows, in the order of the page."""
    rows = [Variant("targets", name, {"target_modules": modules}) for name, modules in TARGETS.items()]
    rows += [Variant("features", name, changes) for name, changes in FEATURES.items()]
    rows.append(Variant("curriculum", "1 pair, then 2", {}))
    rows.append(Variant("curriculum", "2 pairs from the first step", {"curriculum": STAGES[1:]}))
    rows.append(Variant("loss", "cross-entropy to the answers", {"curriculum": TWO_DIGITS}))
    kl = {"curriculum": TWO_DIGITS, "loss": "kl"}
    rows.append(Variant("loss", "KL to the base with the document in its prompt", kl))
    rows.append(Variant("query scale", "10", {}))
    rows.append(Variant("query scale", "1, as published", {"perceiver_query_scale": 1.0}))
    rows.append(Variant("optimizer", "Muon for weights, AdamW for the rest", {}))
    rows.append(Variant("optimizer", "AdamW", {"muon_learning_rate": None, "weight_decay": 0.01}))
    return rows


STAGES = ({"pairs": 1, "digits": 1}, {"pairs": 2, "digits": 1})
# For the losses. The base was not trained on documents of two values with one digit: with such a document in its prompt it
# ends the answer after that digit with a probability of .37 only, so its logprobs are no good teacher there.
TWO_DIGITS = ({"pairs": 1, "digits": 1}, {"pairs": 2, "digits": 2})


def run_variant(variant: Variant, seed: int, steps: int, documents: int) -> Outcome:
    """Train one seed of a variant for `steps`, and evaluate it on unseen documents."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    base_values = load_config(Path(CONFIG)).model_dump(exclude={"remarks"})
    fixed = {"curriculum": STAGES, "needle_documents": documents, "max_steps": steps, "decay_steps": steps // 4}
    config = RunConfig(**base_values | fixed | variant.changes | {"seed": seed})
    data_config = config.model_copy(update={"seed": 0})  # every seed and variant sees the same documents
    components = Components(data_config)
    base, records = components.base, components.records
    if config.needs_teacher:
        records = tuple(
            add_teacher_logprobs(records, base, components.chat, top_k=TOP_K, packed_tokens=config.max_packed_inp_len)
        )
    rows = Components(data_config, records=records).rows
    started = time.process_time()
    trainer = Trainer(build_model(config, base), rows, config, OneProcess(torch.device("cpu")))
    for _ in range(steps):
        metrics = trainer.step()
    seconds = time.process_time() - started
    unseen_config = data_config.model_copy(update={"loss": "ce"})
    unseen = Components(unseen_config, records=unseen_records(data_config)).rows
    exact, other = recall(trainer.model, config, list(unseen))
    return Outcome(
        part=variant.part,
        name=variant.name,
        seed=seed,
        exact=exact,
        other=other,
        train=trainer.curriculum.average,
        stage=metrics.stage,
        seconds=seconds,
    )


def unseen_records(config: RunConfig) -> list[Record]:
    """Make documents whose pairs never occur in training; with one digit (too few pairs for a split), never together."""
    last = config.stages[-1]
    if last.digits > 1:
        return needle_records(UNSEEN, last.pairs, last.digits, 0, seed=999, split="heldout", style="pairs")
    seen = {frozenset(record.responses) for record in load_records(config)}
    drawn = needle_records(2 * UNSEEN, last.pairs, last.digits, 0, seed=999, style="pairs")
    return [record for record in drawn if frozenset(record.responses) not in seen][:UNSEEN]


@torch.no_grad()
def recall(model: DocToLora, config: RunConfig, rows: list[Row]) -> tuple[float, float]:
    """Measure exact match with each document's LoRA, and with that of the next document in its batch."""
    batches = list(epoch_batches(config, rows, epoch=0))
    normalizer = Normalizer.of(batches, config.lora_r)
    loras = [model.lora(batch) for batch in batches]
    return tuple(
        sum(exact_match(model, batch, shift(lora, by), normalizer) for batch, lora in zip(batches, loras, strict=True))
        for by in (0, 1)
    )  # type: ignore[return-value]


def shift(lora: Lora, by: int) -> Lora:
    """Give each context the LoRA of the one `by` places further."""
    A, B = ({name: x.roll(by, 0) for name, x in side.items()} for side in (lora.A, lora.B))
    return replace(lora, A=A, B=B)


def exact_match(model: DocToLora, batch: PackedBatch, lora: Lora, normalizer: Normalizer) -> float:
    """Return the batch's part of the share of questions whose answer tokens all have the highest logit."""
    logits = model.logits(batch, lora, positions=batch.prediction_positions)
    return float(compute_loss(logits, batch, lora, normalizer).exact_match)


def outcomes(
    seeds: list[int], steps: int, documents: int, done: list[Outcome], processes: int
) -> Iterator[list[Outcome]]:
    """Run every seed of every variant that is not `done`, and yield the outcomes of each run.

    Seeds are the outer loop, so that an interrupted study has complete rounds. Rows of different parts with the same
    changes share a run.
    """
    have = {(outcome.part, outcome.name, outcome.seed) for outcome in done}
    with ProcessPoolExecutor(processes) as pool:
        jobs = {}
        for seed in seeds:
            groups: dict[str, list[Variant]] = {}
            for variant in variants():
                groups.setdefault(json.dumps(_changes(variant), sort_keys=True), []).append(variant)
            for group in groups.values():
                missing = [variant for variant in group if (variant.part, variant.name, seed) not in have]
                if missing:
                    jobs[pool.submit(run_variant, missing[0], seed, steps, documents)] = missing
        for job in as_completed(jobs):
            yield [replace(job.result(), part=variant.part, name=variant.name) for variant in jobs[job]]


def _changes(variant: Variant) -> dict[str, Any]:
    """Return the values of a variant that differ from the shipped config."""
    shipped = load_config(Path(CONFIG)).model_dump()
    return {key: value for key, value in variant.changes.items() if shipped[key] != value}


def main() -> None:
    """Run the study and write the file after every run; outcomes in the file are not run again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--documents", type=int, default=8000)
    parser.add_argument("--processes", type=int, default=2, help="number of runs at a time, one thread each")
    options = parser.parse_args()
    done: list[Outcome] = []
    if options.output.exists():
        before = json.loads(options.output.read_text())
        if (before["steps"], before["documents"]) != (options.steps, options.documents):
            raise SystemExit(f"{options.output} is of {before['steps']} steps and {before['documents']} documents")
        done = [Outcome(**values) for values in before["outcomes"]]
    for found in outcomes(options.seeds, options.steps, options.documents, list(done), options.processes):
        done += found
        order = [(variant.part, variant.name) for variant in variants()]
        done.sort(key=lambda it: (order.index((it.part, it.name)), it.seed))
        values = {"steps": options.steps, "documents": options.documents, "outcomes": [asdict(it) for it in done]}
        with replace_file(options.output) as partial:
            partial.write_text(json.dumps(values, indent=1))
        for outcome in found:
            sys.stdout.write(
                f"{outcome.part:<12}{outcome.name:<28}seed {outcome.seed}  exact {outcome.exact:.3f}  "
                f"other {outcome.other:.3f}  stage {outcome.stage}  train {outcome.train:.3f}  {outcome.seconds:.0f} s\n"
            )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
