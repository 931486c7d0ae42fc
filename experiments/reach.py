"""Reach of the method: documents longer than in training, and 8 values of 4 digits between 256 words of filler.

Two hypernetworks, each trained by the recipe of `configs/needle_tiny.yaml` on other documents, by the commands of d2l.
Each has a page and a figure; there are no bounds.

    python experiments/reach.py
    python experiments/reach.py --boundaries RUN    # a trained run on documents cut by either `chunking`, in minutes
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

from prove import CONFIG, d2l

from d2l.build import Components
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.chunks import chunk_document
from d2l.data.limits import Limits
from d2l.data.needles import needle_records
from d2l.data.records import Record
from d2l.evaluation.scores import LABELS, exact_match
from d2l.inference.generate import ask, internalize, tokenize_document
from d2l.inference.load import load_model

PAGES = Path("experiments")
CHUNKS = (1, 2, 4, 8, 16, 24, 32, 40)
CHUNK_WORDS = 6  # two pairs, or two sentences of filler, of three words each
WIDER = ((2, 4, 0), (4, 4, 0), (8, 4, 0), (8, 4, 64), (8, 4, 128), (8, 4, 256), (8, 4, 512), (16, 4, 0), (16, 4, 256))
ODD = ((3, 4, 0), (5, 4, 0), (7, 4, 0))  # chunks of two pairs, of equal length, split some of an odd number
BASE_STEPS = 400
FIRST_STAGES = (
    {"pairs": 1, "digits": 1, "passing": 0.9},
    {"pairs": 2, "digits": 1, "passing": 0.85},
    {"pairs": 2, "digits": 2, "passing": 0.85},
)


@dataclass(frozen=True)
class Experiment:
    """Training of a hypernetwork, and the documents on which it is evaluated.

    Attributes:
        name: name of the page and the figure.
        title, text: title and introduction of the page.
        changes: changed fields of the recipe.
        base_training: kinds of documents on which the shipped base is trained further, in order, with a learning rate.
        kinds: options of `d2l data needle` for each kind of held-out documents, by its name.
    """

    name: str
    title: str
    text: str
    changes: Mapping[str, Any]
    base_training: Sequence[tuple[Mapping[str, int], float]]
    kinds: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class KindResult:
    """Results on one kind of documents.

    Attributes:
        kind: name of the kind.
        scores: scores of every condition, as `d2l eval` writes them.
        whole, cut: exact match (0 or 1) with the document's LoRA, for every pair that lies in one chunk, and for every
            pair that a boundary between chunks splits.
    """

    kind: str
    scores: Mapping[str, Any]
    whole: Sequence[float]
    cut: Sequence[float]


def experiments() -> tuple[Experiment, Experiment]:
    """Return both experiments: more chunks than in training, and more and longer values."""
    two = {"pairs": 2, "digits": 2}
    longer = Experiment(
        "chunks",
        "Longer than in training",
        "Two pairs of two digits between filler, in chunks of two pairs or sentences: trained on documents of 1 to 8 "
        "chunks, evaluated on 1 to 40. Rows are numbers of chunks.",
        {
            "curriculum": (
                *FIRST_STAGES,
                two | {"min_filler_words": 0, "filler_words": 7 * CHUNK_WORDS, "documents": 40000},
            ),
            "max_packed_ctx_len": 1024,
        },
        (),
        {str(n): two | {"filler_words": CHUNK_WORDS * (n - 1)} for n in CHUNKS},
    )
    wider = Experiment(
        "values",
        "More and longer values",
        "Trained on up to eight pairs of four digits between filler, in chunks of up to two pairs or sentences. Rows are "
        "pairs × digits. Chunks are of ten words, the last of what is left, so that no boundary splits a pair.",
        {
            "curriculum": (
                *FIRST_STAGES,
                {"pairs": 2, "digits": 4, "passing": 0.7},
                {"pairs": 4, "digits": 4, "passing": 0.7},
                {"pairs": 8, "digits": 4, "min_filler_words": 0, "filler_words": 256, "documents": 40000},
            ),
            "max_ctx_chunk_len": 14,  # four tokens of the chat template around two pairs of five words
            "max_packed_ctx_len": 2048,
            "max_steps": 3000,
            "decay_steps": 1500,
        },
        (({"pairs": 4, "digits": 4}, 1.2e-3), ({"pairs": 8, "digits": 4, "filler_words": 256}, 4e-4)),
        {
            f"{pairs} × {digits}, {filler} words of filler": {"pairs": pairs, "digits": digits, "filler_words": filler}
            for pairs, digits, filler in WIDER
        },
    )
    return longer, wider


def write_config(path: Path, changes: Mapping[str, Any]) -> Path:
    """Write the recipe with some fields changed, and return the path."""
    values = load_config(CONFIG).model_dump(exclude={"remarks"}) | dict(changes)
    path.write_text(RunConfig(**values).to_yaml(), encoding="utf-8")
    return path


def train(experiment: Experiment, work: Path) -> Path:
    """Train the base where needed, and the hypernetwork; return the run's folder."""
    base = load_config(CONFIG).model_name_or_path
    for number, (documents, rate) in enumerate(experiment.base_training, start=1):
        start, base = base, str(work / f"base-{number}")
        config = write_config(work / f"base-{number}.yaml", {"curriculum": (documents,)})
        how = ("--start", start, "--learning-rate", rate, "--max-steps", BASE_STEPS)
        # exit code 1: its accuracy is below the target, which the column "document in the prompt" shows
        d2l("pretrain-tiny", config, "-o", base, *how, log=work / f"base-{number}.log", accepted=(0, 1))
    config, run = write_config(work / "config.yaml", experiment.changes), work / "run"
    d2l("train", config, "--model", base, "--output", run, log=work / "train.log")
    return run


def evaluate(experiment: Experiment, run: Path, work: Path, documents: int) -> None:
    """Evaluate on every kind of documents, and write the page and its figure."""
    base = ("--model", load_config(run / "config.yaml").model_name_or_path)
    rows, lines = [], []
    for number, (kind, needles) in enumerate(experiment.kinds.items()):
        data, result = work / f"heldout-{number}.jsonl", work / f"heldout-{number}.json"
        options = [part for key, value in needles.items() for part in (f"--{key.replace('_', '-')}", value)]
        how = ("--documents", documents, "--style", "pairs", "--split", "heldout", "--seed", number)
        d2l("data", "needle", "-o", data, *options, *how, log=work / "data.log")
        d2l("eval", run, "--data", data, *base, "-o", result, log=work / f"eval-{number}.log")
        lines += data.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines[-documents:]]
        rows.append(read_answers(kind, records, json.loads(result.read_text(encoding="utf-8")), run))
    together, drawn = work / "heldout.jsonl", work / "figure.svg"
    together.write_text("".join(lines), encoding="utf-8")
    d2l("eval", run, "--data", together, *base, "--plot", drawn, log=work / "eval.log")
    figure = PAGES / f"reach_{experiment.name}.svg"
    figure.write_bytes(drawn.read_bytes())
    figure.with_suffix(".md").write_text(page(experiment, run, rows, figure, documents), encoding="utf-8")


def read_answers(kind: str, records: Sequence[Mapping[str, Any]], result: Mapping[str, Any], run: Path) -> KindResult:
    """Read the scores, and split the answers by whether a boundary between chunks splits their pair."""
    config = load_config(run / "config.yaml")
    chat, limits = Components(config).chat, Limits.of(config)
    chunks = [[chat.decode(chunk) for chunk in chunk_document(it["context"], chat, limits)] for it in records]
    by_whole: dict[bool, list[float]] = {True: [], False: []}
    for answer in result["answers"]:
        if answer["condition"] == "document":
            pair = records[answer["record"]]["responses"][answer["query"]]
            by_whole[any(pair in chunk for chunk in chunks[answer["record"]])].append(answer["exact"])
    return KindResult(kind, result["scores"], by_whole[True], by_whole[False])


def compare_chunkings(run: Path, needles: Sequence[tuple[int, int, int]], documents: int) -> str:
    """Answer questions about the same documents in equal chunks and in chunks of whole sentences; return a table.

    A pair or a sentence of filler stands in a line of its own, which ends a sentence; the tokens are the same. The
    hypernetwork is the same too, whatever `chunking` it was trained with.

    Args:
        needles: pairs, digits and words of filler of each kind of documents.
    """
    trained = load_model(run)
    lines = [
        "| exact match | chunking | chunks | all pairs | whole in a chunk | cut in two |",
        "|---|---|---|---|---|---|",
    ]
    for pairs, digits, filler in needles:
        records = needle_records(documents, pairs, digits, filler, seed=0, split="heldout", style="pairs")
        for chunking in ("equal", "sentences"):
            cutting = replace(trained, config=trained.config.model_copy(update={"chunking": chunking}))
            n_chunks, by_whole = 0, {True: [], False: []}  # type: int, dict[bool, list[float]]
            for record in map(_by_lines, records):
                chunks = [trained.chat.decode(chunk) for chunk in tokenize_document(cutting, record.context)]
                n_chunks += len(chunks)
                lora = internalize(cutting, record.context)
                for prompt, pair in zip(record.prompts, record.responses, strict=True):
                    exact = exact_match(ask(trained, lora, prompt, max_new_tokens=2 * (digits + 1)), pair)
                    by_whole[any(pair in chunk for chunk in chunks)].append(exact)
            found = [[*by_whole[True], *by_whole[False]], by_whole[True], by_whole[False]]
            cells = [f"{fmean(exact):.3f} of {len(exact)}" if exact else "none" for exact in found]
            kind = f"{pairs} × {digits}, {filler} words of filler"
            lines.append(f"| {kind} | {chunking} | {n_chunks / documents:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_lines(record: Record) -> Record:
    """Write every pair and every sentence of filler, which have as many words, into a line of its own."""
    words, length = record.context.split(), len(record.responses[0].split())
    parts = (" ".join(words[at : at + length]) for at in range(0, len(words), length))
    return replace(record, context="\n".join(parts))


def page(experiment: Experiment, run: Path, rows: Sequence[KindResult], figure: Path, documents: int) -> str:
    """Make the page in Markdown: the table, the curriculum stages that training reached, and the figure."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    labels, any_cut = list(LABELS.values()), any(row.cut for row in rows)
    labels += ["its LoRA: pairs whole in a chunk", "its LoRA: pairs cut in two"] if any_cut else []
    lines = [f"| exact match | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}"]
    for row in rows:
        estimates = [row.scores[condition]["exact"] for condition in LABELS]
        cells = [f"{it['value']:.3f} [{it['low']:.2f}, {it['high']:.2f}]" for it in estimates]
        for exact in (row.whole, row.cut) if any_cut else ():
            cells.append(f"{fmean(exact):.3f} of {len(exact)}" if exact else "none")
        lines.append(f"| {row.kind} | {' | '.join(cells)} |")
    stages = {step["stage"]: step for step in metrics}  # the last step of each
    stages_reached = "; ".join(
        f"{stage.pairs} × {stage.digits}"
        + (f" with up to {stage.filler_words} words of filler" if stage.filler_words else "")
        + (f" until step {stages[number]['step']:,}" if number in stages else " never reached")
        for number, stage in enumerate(load_config(run / "config.yaml").curriculum, start=1)
    )
    seconds = sum(step["seconds"] for step in metrics)
    base = "the shipped base, trained further on such documents" if experiment.base_training else "the shipped base"
    return (
        f"# {experiment.title}\n\nWritten by `make reach`. {experiment.text} One seed on {base}; other settings are those of "
        f"`configs/needle_tiny.yaml`. Held-out documents whose pairs and filler never occur in training, {documents} of each "
        f"kind; brackets are 95% confidence intervals over documents.\n\n{chr(10).join(lines)}\n\nStages: {stages_reached}. "
        f"Training took {seconds / 60:.0f} minutes on one thread.\n\n![]({figure.name})\n"
    )


def main() -> None:
    """Run the experiments in parallel."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="a new folder for all output; default: runs/reach-N")
    parser.add_argument(
        "--only",
        choices=[experiment.name for experiment in experiments()],
        help="run this experiment alone; default: both",
    )
    parser.add_argument("--run", type=Path, help="with --only: evaluate the run in this folder; default: train it")
    parser.add_argument("--boundaries", type=Path, metavar="RUN", help="only compare both kinds of chunks on this run")
    parser.add_argument(
        "--needles",
        type=int,
        nargs=3,
        action="append",
        metavar=("PAIRS", "DIGITS", "FILLER"),
        help="with --boundaries: documents to ask about, of this kind; may be repeated; default: 3, 5 and 7 pairs",
    )
    parser.add_argument("--documents", type=int, default=32, help="number of held-out documents of each kind")
    options = parser.parse_args()
    if options.boundaries:
        sys.stdout.write(f"{compare_chunkings(options.boundaries, options.needles or ODD, options.documents)}\n")
        return
    if options.run and not options.only:
        parser.error("--run belongs to one experiment: give --only as well")
    work = options.work or next(path for n in count(1) if not (path := Path(f"runs/reach-{n}")).exists())

    def run(experiment: Experiment) -> None:
        folder = work / experiment.name
        folder.mkdir(parents=True)
        evaluate(experiment, options.run or train(experiment, folder), folder, options.documents)

    with ThreadPoolExecutor() as pool:
        for job in [pool.submit(run, it) for it in experiments() if options.only in (None, it.name)]:
            job.result()


if __name__ == "__main__":
    main()
