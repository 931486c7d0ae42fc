"""Witnesses of held-out documents: their scores, the rows of training beside them, and when a run is evaluated on which."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from d2l.build import Components
from d2l.config.schema import RunConfig
from d2l.data.epochs import epoch_batches
from d2l.data.records import write_records
from d2l.data.shards import row_sizes
from d2l.hypernet.distance import mean_distance
from d2l.io.run_folder import EVALUATIONS
from d2l.train.heldout import Answers, Heldout, _joined
from d2l.train.loop import Trainer, train_steps
from d2l.train.processes import OneProcess
from d2l.train.watch import Watch
from experiments.mutants.values import Values
from experiments.mutants.witnesses_model import build
from experiments.mutants.witnesses_training import CPU, training_configs
from experiments.mutants.workbench import records_with_copies


def heldout(values: Values) -> None:
    """Score documents by both losses, in several batches of several documents and of other ranks."""
    for name in ("kl", "ce"):
        config = training_configs()[name]
        model, seen = build(config), {row.record: row for row in reversed(Components(config).rows)}
        scored = Heldout(model, [*seen.values()], config)
        for turn in range(2):
            scores = scored.evaluate()
            values |= {f"{name} {turn} {key}": value for key, value in scores.to_json().items()}
            for control, found in scores.answers.items():
                values[f"{name} {turn} {control}"] = list(found.by_document)
            values[f"{name} {turn} gaps"] = scores.gaps
            values[f"{name} {turn} half"] = mean_distance(scores.pairs[::2], *sorted(scores.pairs[0].one)[:1])
    joined = _joined([Answers(0.5, 0.25, (1.0, 2.0)), Answers(1.5, 0.5, (3.0,))])  # random weights answer nothing
    values["joined"] = [joined.loss, joined.exact_match, *joined.by_document]


def evaluated_run(values: Values) -> None:
    """Train with evaluations, through a change of the stage and to a step that is no multiple, and read their file."""
    changes = {"eval_steps": 2, "eval_documents": 3, "max_steps": 5, "save_steps": 5, "needle_documents": 4}
    config = RunConfig(**training_configs()["curriculum"].model_dump() | changes)
    components = Components(config)
    trainer = Trainer(build(config), components.rows, config, OneProcess(CPU))
    values["documents"] = [[asdict(row) for row in rows] for rows in components.heldout]
    with tempfile.TemporaryDirectory() as name:
        watch = Watch(trainer, Path(name), components.heldout)
        reported = []
        for metrics in train_steps(trainer, Path(name), watch):
            reported.append([metrics.step, sorted(watch.evaluation)])
            if metrics.step == 2:
                trainer.curriculum._passing[0] = -1.0  # the next step ends the first stage
        lines = [json.loads(line) for line in (Path(name) / EVALUATIONS).read_text().splitlines()]
    values["reported"] = reported
    for line in lines:
        values |= {f"{line['step']} {key}": value for key, value in line.items() if key != "seconds"}


def kept_out(values: Values) -> None:
    """Keep some documents of a file out of training, one of them twice in it, and pack the others."""
    with tempfile.TemporaryDirectory() as name:
        write_records(Path(name) / "documents.jsonl", records_with_copies())
        changes = {"train_ds_names": [str(Path(name) / "documents.jsonl")], "eval_steps": 2, "eval_documents": 4}
        config = RunConfig(**training_configs()["ce"].model_dump() | changes)
        components = Components(config)
        values["kept out"] = sorted(components.kept_out)
        values["sizes"] = row_sizes(components.rows).tolist()
        values["packed"] = [list(batch.record_ids) for batch in epoch_batches(config, components.rows, 0)]
        values["evaluated"] = [[row.record for row in rows] for rows in components.heldout]
