"""What the experiment measures of a trained run: facts, real questions, harm, and answers of the exported adapter."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2l.data.records import Record, read_records
from d2l.evaluation.scores import CONDITIONS
from d2l.inference.load import TrainedModel, load_model
from d2l.io.atomic import replace_file
from experiments.prove import d2l
from experiments.smollm2 import recipe
from experiments.smollm2.folder import Folder, Report
from experiments.smollm2.harm import measure_harm
from experiments.smollm2.page import Findings, Shown, named_share
from experiments.smollm2.parity import peft_answers
from experiments.smollm2.training import metrics, progress_of

Place = tuple[str, int, int]  # of a question: held-out documents, record, query


def evaluate(folder: Folder, questions: Path | None, threads: int, report: Report) -> Findings:
    """Evaluate what is not evaluated yet of the run's newest checkpoint, and gather the findings."""
    step, _ = progress_of(folder.run)
    results = folder.results(step)
    results.mkdir(parents=True, exist_ok=True)

    def run_eval(name: str, data: Path, *more: object) -> Any:
        file = results / f"{name}.json"
        if not file.exists():
            arguments = ("--data", data, "-o", file, "--max-new-tokens", recipe.ANSWER_TOKENS, *more)
            d2l("eval", folder.run, *arguments, log=file.with_suffix(".log"), threads=threads)
        report(f"evaluated {name}")
        return json.loads(file.read_text(encoding="utf-8"))

    names = {stage.name.removeprefix("heldout-"): folder.data(stage.name) for stage in recipe.HELDOUT}
    facts = {name: run_eval(name, file) for name, file in names.items()}
    real = None if questions is None else run_eval("real", questions, "--limit", recipe.REAL_DOCUMENTS)
    records = {name: read_records([file]) for name, file in names.items()}
    trained = load_model(folder.run)
    drawn, asked = pick(records)
    peft = kept(results / "peft.json", lambda: peft_answers(trained, asked))
    return Findings(
        facts=facts,
        real=real,
        harm=kept(results / "harm.json", lambda: harm_of(folder, trained, records["medium"])),
        named={name: named_share(facts[name], expected_answers(records[name])) for name in facts},
        training=describe_training(folder, trained),
        shown=[show(facts, records, *it) for it in zip(drawn, peft, strict=True)],
    )


def harm_of(folder: Folder, trained: TrainedModel, records: Sequence[Record]) -> Any:
    """Measure what the LoRAs of some documents do to other texts."""
    texts = [record.context for record in read_records([folder.data("texts")])]
    some = records[: recipe.HARM_DOCUMENTS]
    return measure_harm(trained, some, texts[: len(some)]).to_json()


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """Return what the file holds; without it, make it and write the file."""
    if not file.exists():
        value = make()
        with replace_file(file) as partial:
            partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def expected_answers(records: Sequence[Record]) -> dict[tuple[int, int], str]:
    """Return the answers of the records' questions by (record, query)."""
    return {
        (index, query): response
        for index, record in enumerate(records)
        for query, response in enumerate(record.responses)
    }


def pick(records: Mapping[str, Sequence[Record]]) -> tuple[list[Place], list[tuple[Record, str]]]:
    """Draw questions of all held-out documents by seed."""
    places = [(name, *it) for name, made in records.items() for it in expected_answers(made)]
    drawn = random.Random(f"{recipe.SEED} shown").sample(places, recipe.SHOWN)
    return drawn, [(records[name][index], records[name][index].prompts[query]) for name, index, query in drawn]


def show(facts: Mapping[str, Any], records: Mapping[str, Sequence[Record]], place: Place, peft: str) -> Shown:
    """Gather the answers to one question."""
    name, index, query = place
    record = records[name][index]
    answers = {
        it["condition"]: it["answer"] for it in facts[name]["answers"] if (it["record"], it["query"]) == (index, query)
    }
    by_condition = {condition: answers[condition] for condition in CONDITIONS}
    return Shown(record.prompts[query], record.responses[query], by_condition, peft)


def describe_training(folder: Folder, trained: TrainedModel) -> list[str]:
    """Say what was trained, for how long and on how much."""
    steps = metrics(folder.run)
    seconds, tokens = (sum(step[key] for step in steps) for key in ("seconds", "tokens"))
    parameters = sum(value.numel() for value in trained.model.hypernet.parameters())
    changes = json.loads((folder.run / "run.json").read_text(encoding="utf-8"))["changes"]
    starts = sorted({change["step"] for change in changes})
    return [
        f"{len(steps):,} optimizer steps in {seconds / 60:.0f} minutes, {tokens:,} tokens, seed {recipe.SEED}, "
        f"a hypernetwork of {parameters / 1e6:.1f}M parameters on {trained.model.base.device}",
        f"stages: {', '.join(stage.name for stage in recipe.STAGES)}; a new one after steps {', '.join(map(str, starts))}",
        f"loss in the first step {steps[0]['ce_loss']:.3g}",
    ]
