"""One command from a package index to a page of figures: SmolLM2-135M learns to take in documents. Stopped anywhere, it
goes on where it was when it is called again.

    python -m experiments.smollm2 --minutes 150 --questions documents.jsonl
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from d2l.build import Components
from d2l.config.load import load_config
from d2l.data.records import Record, read_records
from d2l.errors import D2LError
from d2l.inference.load import TrainedModel
from d2l.io.atomic import replace_file
from experiments.prove import d2l
from experiments.smollm2 import recipe
from experiments.smollm2.convert import convert
from experiments.smollm2.documents import Passage, find_passages
from experiments.smollm2.evaluation import evaluate
from experiments.smollm2.facts import Words, fact_records
from experiments.smollm2.fetch import fetch
from experiments.smollm2.folder import Folder, Report
from experiments.smollm2.material import single_words, teach, write_once
from experiments.smollm2.page import write_page
from experiments.smollm2.teacher import TOP_K, certain
from experiments.smollm2.training import Plan, train

PAGE = Path("experiments/smollm2.md")


def main() -> None:
    """Do what is not done yet, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"), help="all files but the page")
    parser.add_argument("--minutes", type=float, default=recipe.MINUTES, help="time for everything")
    parser.add_argument("--questions", type=Path, help="real documents with questions that are held out: JSONL")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the figures go")
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()

    def report(text: str) -> None:
        sys.stdout.write(f"{time.perf_counter() - started:>6.0f} s  {text}\n")
        sys.stdout.flush()

    try:
        run_experiment(Folder(options.folder), options, report)
    except D2LError as error:
        raise SystemExit(str(error)) from None


def run_experiment(folder: Folder, options: argparse.Namespace, report: Report) -> None:
    """Fetch, make the data, train, evaluate, and write the page."""
    require_same_recipe(folder)
    report(f"seed {recipe.SEED}; everything is in {folder.place}")
    fetch(folder.gguf)
    convert(folder.gguf, folder.base)
    files = make_data(folder, report)
    minutes = options.minutes * (1 - recipe.EVALUATION_SHARE)
    train(folder.config, folder.run, Plan(recipe.STAGES, files, minutes), options.threads, report)
    report("evaluation")
    findings = evaluate(folder, options.questions, options.threads, report)
    folder.curve.unlink(missing_ok=True)  # of a run that went on since
    d2l("plot", folder.run, "-o", folder.curve, log=folder.place / "plot.log")
    curve = options.page.with_suffix(".svg")
    with replace_file(curve) as partial:
        partial.write_bytes(folder.curve.read_bytes())
    with replace_file(options.page) as partial:
        partial.write_text(write_page(findings, curve.name), encoding="utf-8")
    report(f"wrote {options.page} and {curve}")


def require_same_recipe(folder: Folder) -> None:
    """Refuse a folder whose files were made by another recipe; note the recipe in a new one."""
    now = json.dumps(recipe.as_json(), indent=1)
    if not folder.recipe.exists():
        folder.place.mkdir(parents=True, exist_ok=True)
        folder.recipe.write_text(now, encoding="utf-8")
    elif folder.recipe.read_text(encoding="utf-8") != now:
        raise SystemExit(f"{folder.place} was made by another recipe ({folder.recipe}): give --folder another name")


def make_data(folder: Folder, report: Report) -> list[Path]:
    """Write the configuration and every file of documents that is missing; return those of the stages."""
    files = [folder.data(stage.name) for stage in recipe.STAGES]
    others = [folder.data(stage.name) for stage in (*recipe.HELDOUT, recipe.WATCHED)]
    cuda = torch.cuda.is_available()
    watched = folder.data(recipe.WATCHED.name)
    recipe.write_config(folder.config, folder.base, files[0], watched, folder.run, cuda=cuda)
    texts = folder.data("texts")
    if all(file.exists() for file in (*files, *others, texts)):
        return files
    passages = find_passages()
    report(f"{len(passages):,} passages of real text")
    base = base_alone(folder)
    words = single_words(passages, base.chat)
    report(f"{len(words.first):,} words of one token, the rarest of them {words.first[-1]!r}")
    for stage in (*recipe.HELDOUT, recipe.WATCHED):
        heldout = fact_records(passages, stage.shape, stage.documents, recipe.SEED, "heldout", words)
        write_once(folder.data(stage.name), lambda made=heldout: certain(made, base.chat))  # watched under both losses
    write_once(texts, lambda: unrelated_texts(passages))
    own = [passage for passage in passages if passage.split == "train"]
    write_once(folder.data("taught"), lambda: teach(base, own, recipe.SEED, report))
    with_teacher = folder.place / "data" / "taught-logprobs.jsonl"
    if not with_teacher.exists():
        arguments = ("--data", folder.data("taught"), "-o", with_teacher, "--top-k", TOP_K)
        d2l("data", "teacher", folder.config, *arguments, log=folder.place / "teacher.log")
    taught = read_records([with_teacher])
    for stage, file in zip(recipe.STAGES, files, strict=True):
        write_once(file, lambda it=stage: make_stage(passages, words, it, taught, base))
        report(f"data of stage {stage.name}")
    return files


def make_stage(
    passages: Sequence[Passage], words: Words, stage: recipe.Stage, taught: Sequence[Record], base: TrainedModel
) -> list[Record]:
    """Make the documents of a stage; with teacher logprobs where real text has them."""
    records = fact_records(passages, stage.shape, stage.documents, recipe.SEED, "train", words)
    if not stage.taught:
        return records
    mixed = certain(records, base.chat) + [taught[place % len(taught)] for place in range(stage.taught)]
    random.Random(f"{recipe.SEED} mixed").shuffle(mixed)
    return mixed


def unrelated_texts(passages: Sequence[Passage]) -> list[Record]:
    """Draw real text of the held-out split, which no document of the evaluation is made of in the same place."""
    held = [passage for passage in passages if passage.split == "heldout" and len(passage.sentences) > 2]
    drawn = random.Random(f"{recipe.SEED} unrelated").sample(held, recipe.HARM_DOCUMENTS)
    return [Record(" ".join(passage.sentences), ("-",), ("-",), "unrelated") for passage in drawn]


def base_alone(folder: Folder) -> TrainedModel:
    """Load the base with a hypernetwork that is not trained and that nobody asks."""
    config = load_config(folder.config)
    components = Components(config)
    return TrainedModel(components.model.eval(), components.chat, config)


if __name__ == "__main__":
    main()
