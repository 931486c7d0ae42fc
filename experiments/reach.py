"""How far it goes: documents longer than any in training, and 8 values of 4 digits between 256 words of filler.

Two networks, each trained by the recipe of `configs/needle_tiny.yaml` with other documents, by the commands that users
have. Each makes a page and a figure; nothing here has a bound to miss.

    python experiments/reach.py
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

from prove import CONDITIONS, CONFIG, d2l

from d2l.build import run_chat, run_tokenizer
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.limits import Limits
from d2l.data.tokenize import chunk_document

PAGES = Path("benchmarks")
CHUNKS = (1, 2, 4, 8, 16, 24, 32, 40)
CHUNK_WORDS = 6  # two pairs, or two sentences of filler, of three words each
WIDER = ((2, 4, 0), (4, 4, 0), (8, 4, 0), (8, 4, 64), (8, 4, 128), (8, 4, 256), (8, 4, 512), (16, 4, 0), (16, 4, 256))
READING_STEPS = 400
FIRST_STAGES = (
    {"pairs": 1, "digits": 1, "passing": 0.9},
    {"pairs": 2, "digits": 1, "passing": 0.85},
    {"pairs": 2, "digits": 2, "passing": 0.85},
)


@dataclass(frozen=True)
class Experiment:
    """A network and what it is asked about.

    Attributes:
        name: of its page and figure; title, text: of the page.
        changes: of the recipe's fields.
        reads: documents that the shipped base first learns to read, one sort after the other, at a learning rate.
        kinds: a name for each kind of held-out documents, and what `d2l data needle` makes them from.
    """

    name: str
    title: str
    text: str
    changes: Mapping[str, Any]
    reads: Sequence[tuple[Mapping[str, int], float]]
    kinds: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Asked:
    """What one kind of documents gave.

    Attributes:
        kind: its name.
        scores: of every condition, as `d2l eval` writes them.
        whole, cut: exact match with the document's LoRA, 0 or 1, of every pair that stands whole in a chunk, and of every
            pair that a boundary between chunks cuts in two.
    """

    kind: str
    scores: Mapping[str, Any]
    whole: Sequence[float]
    cut: Sequence[float]


def experiments() -> tuple[Experiment, Experiment]:
    """More chunks than in training; then more and longer values, far apart."""
    two = {"pairs": 2, "digits": 2}
    longer = Experiment(
        "chunks",
        "Longer than in training",
        "Two pairs of two digits between filler, in chunks of two pairs or sentences: trained on documents of 1 to 8 "
        "chunks, asked about 1 to 40. Rows are numbers of chunks.",
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
        "TrainedModel on up to eight pairs of four digits between filler, in chunks of up to two pairs or sentences. Rows are "
        "pairs × digits. "
        "Chunks are of equal length: where sentences do not fill them, boundaries cut pairs in two, which the last columns "
        "count apart.",
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


def config_file(path: Path, changes: Mapping[str, Any]) -> Path:
    """The recipe with some fields changed, as a file."""
    values = load_config(CONFIG).model_dump(exclude={"remarks"}) | dict(changes)
    path.write_text(RunConfig(**values).to_yaml(), encoding="utf-8")
    return path


def train(experiment: Experiment, work: Path) -> Path:
    """Train its base, where it needs one, and its network: the folder of the run."""
    base = load_config(CONFIG).model_name_or_path
    for number, (documents, rate) in enumerate(experiment.reads, start=1):
        start, base = base, str(work / f"base-{number}")
        config = config_file(work / f"base-{number}.yaml", {"curriculum": (documents,)})
        how = ("--start", start, "--learning-rate", rate, "--max-steps", READING_STEPS)
        # exit code 1: it does not read all of them, which the column "document in the prompt" will show
        d2l("pretrain-tiny", config, "-o", base, *how, log=work / f"base-{number}.log", accepted=(0, 1))
    config, run = config_file(work / "config.yaml", experiment.changes), work / "run"
    d2l("train", config, "--model", base, "--output", run, log=work / "train.log")
    return run


def ask(experiment: Experiment, run: Path, work: Path, documents: int) -> None:
    """Ask about every kind of documents, and write the page and its figure."""
    base = ("--model", load_config(run / "config.yaml").model_name_or_path)
    rows, lines = [], []
    for number, (kind, needles) in enumerate(experiment.kinds.items()):
        data, result = work / f"asked-{number}.jsonl", work / f"asked-{number}.json"
        options = [part for key, value in needles.items() for part in (f"--{key.replace('_', '-')}", value)]
        how = ("--documents", documents, "--style", "pairs", "--split", "heldout", "--seed", number)
        d2l("data", "needle", "-o", data, *options, *how, log=work / "data.log")
        d2l("eval", run, "--data", data, *base, "-o", result, log=work / f"eval-{number}.log")
        lines += data.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines[-documents:]]
        rows.append(read_answers(kind, records, json.loads(result.read_text(encoding="utf-8")), run))
    together, drawn = work / "asked.jsonl", work / "figure.svg"
    together.write_text("".join(lines), encoding="utf-8")
    d2l("eval", run, "--data", together, *base, "--plot", drawn, log=work / "eval.log")
    figure = PAGES / f"reach_{experiment.name}.svg"
    figure.write_bytes(drawn.read_bytes())
    figure.with_suffix(".md").write_text(page(experiment, run, rows, figure, documents), encoding="utf-8")


def read_answers(kind: str, records: Sequence[Mapping[str, Any]], result: Mapping[str, Any], run: Path) -> Asked:
    """The scores, and which answers are about pairs that a boundary between chunks cuts."""
    config = load_config(run / "config.yaml")
    chat, limits = run_chat(config, run_tokenizer(config)), Limits.of(config)
    chunks = [[chat.decode(chunk) for chunk in chunk_document(it["context"], chat, limits)] for it in records]
    by_whole: dict[bool, list[float]] = {True: [], False: []}
    for answer in result["answers"]:
        if answer["condition"] == "document":
            pair = records[answer["record"]]["responses"][answer["query"]]
            by_whole[any(pair in chunk for chunk in chunks[answer["record"]])].append(answer["exact"])
    return Asked(kind, result["scores"], by_whole[True], by_whole[False])


def page(experiment: Experiment, run: Path, rows: Sequence[Asked], figure: Path, documents: int) -> str:
    """The table, what training saw of each stage, and the figure, in Markdown."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    labels, any_cut = [label for label, _, _ in CONDITIONS.values()], any(row.cut for row in rows)
    labels += ["its LoRA: pairs whole in a chunk", "its LoRA: pairs cut in two"] if any_cut else []
    lines = [f"| exact match | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}"]
    for row in rows:
        spans = [row.scores[condition]["exact"] for condition in CONDITIONS]
        cells = [f"{it['value']:.3f} [{it['low']:.2f}, {it['high']:.2f}]" for it in spans]
        for exact in (row.whole, row.cut) if any_cut else ():
            cells.append(f"{fmean(exact):.3f} of {len(exact)}" if exact else "none")
        lines.append(f"| {row.kind} | {' | '.join(cells)} |")
    stages = {step["stage"]: step for step in metrics}  # the last step of each
    course = "; ".join(
        f"{stage.pairs} × {stage.digits}"
        + (f" with up to {stage.filler_words} words of filler" if stage.filler_words else "")
        + (f" until step {stages[number]['step']:,}" if number in stages else " never reached")
        for number, stage in enumerate(load_config(run / "config.yaml").curriculum, start=1)
    )
    seconds = sum(step["seconds"] for step in metrics)
    base = "the shipped base, which first learnt to read such documents" if experiment.reads else "the shipped base"
    return (
        f"# {experiment.title}\n\nWritten by `make reach`. {experiment.text} One seed on {base}; other settings are those of "
        f"`configs/needle_tiny.yaml`. Held-out documents whose pairs and filler never occur in training, {documents} of each "
        f"kind; brackets are 95% confidence intervals over documents.\n\n{chr(10).join(lines)}\n\nStages: {course}. Training "
        f"took {seconds / 60:.0f} minutes on one thread.\n\n![]({figure.name})\n"
    )


def main() -> None:
    """Run the experiments beside each other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="a new folder for everything that is made; default: runs/reach-N")
    parser.add_argument("--only", choices=[experiment.name for experiment in experiments()], help="default: both")
    parser.add_argument("--run", type=Path, help="with --only, of an earlier call; default: it is trained here")
    parser.add_argument("--documents", type=int, default=32, help="of each kind that is asked about")
    asked = parser.parse_args()
    if asked.run and not asked.only:
        parser.error("--run belongs to one experiment: give --only as well")
    work = asked.work or next(path for n in count(1) if not (path := Path(f"runs/reach-{n}")).exists())

    def carry_out(experiment: Experiment) -> None:
        folder = work / experiment.name
        folder.mkdir(parents=True)
        ask(experiment, asked.run or train(experiment, folder), folder, asked.documents)

    with ThreadPoolExecutor() as pool:
        for job in [pool.submit(carry_out, it) for it in experiments() if asked.only in (None, it.name)]:
            job.result()


if __name__ == "__main__":
    main()
