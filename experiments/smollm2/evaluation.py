"""What the experiment measures of a trained run: facts, real questions, harm, and answers of the exported adapter."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from d2l.data.records import read_records
from d2l.evaluation.scores import CONDITIONS
from d2l.inference.load import TrainedModel, load_model
from d2l.io.atomic import replace_file
from experiments.prove import d2l
from experiments.smollm2 import recipe
from experiments.smollm2.folder import Folder, Report
from experiments.smollm2.harm import measure_harm
from experiments.smollm2.page import Findings, Shown, named_share
from experiments.smollm2.parity import peft_answers
from experiments.smollm2.training import metrics


def evaluate(folder: Folder, questions: Path | None, threads: int, report: Report) -> Findings:
    """Evaluate what is not evaluated yet, and gather the findings."""
    facts = {}
    for stage in recipe.HELDOUT:
        facts[stage.name.removeprefix("heldout-")] = run_eval(folder, stage.name, folder.data(stage.name), threads)
        report(f"evaluated {stage.name}")
    real = None
    if questions is not None:
        real = run_eval(folder, "real", questions, threads, "--limit", recipe.REAL_DOCUMENTS)
        report("evaluated real questions")
    trained = load_model(folder.run)
    records = read_records([folder.data(recipe.HELDOUT[1].name)])[: recipe.HARM_DOCUMENTS]
    texts = [record.context for record in read_records([folder.data("texts")])]
    harm = kept(folder.harm, lambda: measure_harm(trained, records, texts[: len(records)]).to_json())
    report("measured harm")
    expected = {name: expected_answers(folder.data(f"heldout-{name}")) for name in facts}
    return Findings(
        facts=facts,
        real=real,
        harm=harm,
        named={name: named_share(facts[name], expected[name]) for name in facts},
        training=describe_training(folder, trained),
        shown=pick(folder, facts, trained),
    )


def run_eval(folder: Folder, name: str, data: Path, threads: int, *more: object) -> Any:
    """Run `d2l eval` unless its result is there."""
    file = folder.evaluation(name)
    if not file.exists():
        arguments = ("--data", data, "-o", file, "--max-new-tokens", recipe.ANSWER_TOKENS, *more)
        d2l("eval", folder.run, *arguments, log=file.with_suffix(".log"), threads=threads)
    return json.loads(file.read_text(encoding="utf-8"))


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """Return what the file holds; without it, make it and write the file."""
    if not file.exists():
        value = make()
        with replace_file(file) as partial:
            partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def expected_answers(file: Path) -> dict[tuple[int, int], str]:
    """Return the answers of a file's questions by (record, query)."""
    return {
        (index, query): response
        for index, record in enumerate(read_records([file]))
        for query, response in enumerate(record.responses)
    }


def pick(folder: Folder, facts: Mapping[str, Any], trained: TrainedModel) -> list[Shown]:
    """Draw questions of all held-out documents by seed, with their answers."""
    records = {name: read_records([folder.data(f"heldout-{name}")]) for name in facts}
    places = [
        (name, index, query)
        for name, all_ in records.items()
        for index, it in enumerate(all_)
        for query in range(len(it.prompts))
    ]
    drawn = random.Random(f"{recipe.SEED} shown").sample(places, recipe.SHOWN)
    asked = [(records[name][index], records[name][index].prompts[query]) for name, index, query in drawn]
    peft = kept(folder.peft, lambda: peft_answers(trained, asked))
    shown = []
    for (name, index, query), (record, question), other in zip(drawn, asked, peft, strict=True):
        answers = {
            it["condition"]: it["answer"]
            for it in facts[name]["answers"]
            if (it["record"], it["query"]) == (index, query)
        }
        by_condition = {condition: answers[condition] for condition in CONDITIONS}
        shown.append(Shown(record.context, question, record.responses[query], by_condition, other))
    return shown


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
        f"loss in the first step {steps[0].get('ce_loss', float('nan')):.3g}",
    ]
