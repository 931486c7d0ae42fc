"""How far it goes: documents longer than any in training, and more and longer values than `make prove` asks for.

Two experiments, from the recipe of `configs/needle_tiny.yaml`, by the commands that users have. Writes a page and its
figures; nothing here has a bound to miss.

    python benchmarks/reach.py
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from prove import CONDITIONS, CONFIG, d2l

from d2l.config import RunConfig
from d2l.config_file import load_config
from d2l.scores import Condition

PAGE = Path("benchmarks/reach.md")
Needles = Mapping[str, int]

SHORT = ({"pairs": 1, "digits": 1, "passing": 0.9}, {"pairs": 2, "digits": 1, "passing": 0.85})
CHUNKS = (1, 2, 4, 8, 16, 24, 32, 40)
CHUNK_WORDS = 6  # two pairs, or two sentences of filler, of three words each


@dataclass(frozen=True)
class Experiment:
    """A run and the documents that it is asked about.

    Attributes:
        name: of its folder and its figure.
        changes: of the recipe.
        asked: a name for each kind of held-out documents, and what `d2l data needle` makes them from.
        own_base: whether a base is trained that reads the last stage's documents; else it is the shipped one.
    """

    name: str
    changes: Mapping[str, Any]
    asked: Mapping[str, Needles] = field(default_factory=dict)
    own_base: bool = False


def experiments() -> tuple[Experiment, Experiment]:
    """More chunks than in training; then values of four digits, eight of them, between filler."""
    two = {"pairs": 2, "digits": 2}
    longer = Experiment(
        "chunks",
        {
            "curriculum": (*SHORT, two, two | {"min_filler_tokens": 0, "filler_tokens": 42, "documents": 40000}),
            "max_packed_ctx_len": 1024,
        },
        {str(n): two | {"filler_tokens": CHUNK_WORDS * (n - 1)} for n in CHUNKS},
    )
    wider = Experiment(
        "values",
        {
            "curriculum": (
                *SHORT,
                {"pairs": 2, "digits": 2, "passing": 0.85},
                {"pairs": 2, "digits": 4, "passing": 0.7},
                {"pairs": 4, "digits": 4, "passing": 0.7},
                {"pairs": 8, "digits": 4, "min_filler_tokens": 0, "filler_tokens": 256, "documents": 20000},
            ),
            "max_ctx_chunk_len": 24,  # four tokens of the chat template around four pairs, or sentences of filler
            "max_packed_ctx_len": 2048,
            "max_steps": 2000,
            "decay_steps": 1200,
            "save_steps": 2000,
        },
        {
            f"{pairs} pairs of {digits} digits, {filler} words of filler": {
                "pairs": pairs,
                "digits": digits,
                "filler_tokens": filler,
            }
            for pairs, digits, filler in (
                (2, 2, 0),
                (4, 2, 0),
                (2, 4, 0),
                (4, 4, 0),
                (8, 4, 0),
                (8, 4, 64),
                (8, 4, 256),
            )
        },
        own_base=True,
    )
    return longer, wider


def run(experiment: Experiment, work: Path, documents: int) -> str:
    """Train, ask, and return the page's section."""
    folder = work / experiment.name
    folder.mkdir()
    config = folder / "config.yaml"
    values = load_config(CONFIG).model_dump(exclude={"remarks"}) | dict(experiment.changes)
    config.write_text(RunConfig(**values).to_yaml(), encoding="utf-8")
    base: Path | str = values["model_name_or_path"]
    if experiment.own_base:
        base = folder / "base"
        d2l("pretrain-tiny", config, "-o", base, log=folder / "pretrain.log", accepted=(0, 1))  # 1: not yet
    trained = folder / "run"
    d2l("train", config, "--model", base, "--output", trained, log=folder / "train.log")
    rows, lines = [], []
    for number, (kind, needles) in enumerate(experiment.asked.items()):
        data, result = folder / f"asked-{number}.jsonl", folder / f"asked-{number}.json"
        options = [part for key, value in needles.items() for part in (f"--{key.replace('_', '-')}", value)]
        how = ("--documents", documents, "--style", "pairs", "--split", "heldout", "--seed", number)
        d2l("data", "needle", "-o", data, *options, *how, log=folder / "data.log")
        lines.append(data.read_text(encoding="utf-8"))
        d2l("eval", trained, "--data", data, "--model", base, "-o", result, log=folder / f"eval-{number}.log")
        rows.append((kind, json.loads(result.read_text(encoding="utf-8"))["scores"]))
    together, figure = folder / "asked.jsonl", PAGE.with_name(f"reach_{experiment.name}.svg")
    together.write_text("".join(lines), encoding="utf-8")
    drawn = folder / "figure.svg"
    d2l("eval", trained, "--data", together, "--model", base, "--plot", drawn, log=folder / "eval.log")
    figure.write_bytes(drawn.read_bytes())
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return section(experiment, rows, metrics, figure)


def section(
    experiment: Experiment,
    rows: Sequence[tuple[str, Mapping[Condition, Any]]],
    metrics: Sequence[Mapping[str, Any]],
    figure: Path,
) -> str:
    """The table, what training saw of each stage, and the figure, in Markdown."""
    labels = [label for label, _, _ in CONDITIONS.values()]
    lines = [f"| exact match | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}"]
    for kind, scores in rows:
        cells = [
            f"{it['value']:.3f} [{it['low']:.2f}, {it['high']:.2f}]" for it in (scores[c]["exact"] for c in CONDITIONS)
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    stages = {step["stage"]: step for step in metrics}  # the last step of each
    course = "; ".join(
        f"{stage['pairs']} × {stage['digits']}"
        + (f" with up to {stage['filler_tokens']} words of filler" if stage.get("filler_tokens") else "")
        + (f" until step {stages[number]['step']:,}" if number in stages else " never reached")
        for number, stage in enumerate(experiment.changes["curriculum"], start=1)
    )
    seconds = sum(step["seconds"] for step in metrics)
    return f"{chr(10).join(lines)}\n\nStages: {course}. {seconds:.0f} s of training.\n\n![]({figure.name})\n"


def main() -> None:
    """Run both experiments beside each other and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="a new folder for everything that is made; default: runs/reach-N")
    parser.add_argument("--documents", type=int, default=32, help="of each kind that is asked about")
    parser.add_argument("--processes", type=int, default=2, help="experiments at a time, one thread each")
    asked = parser.parse_args()
    work = asked.work or next(path for n in count(1) if not (path := Path(f"runs/reach-{n}")).exists())
    work.mkdir(parents=True)
    with ThreadPoolExecutor(asked.processes) as pool:
        chunks, values = pool.map(lambda experiment: run(experiment, work, asked.documents), experiments())
    PAGE.write_text(
        "# How far it goes\n\n"
        "Written by `python benchmarks/reach.py`: one seed, held-out documents whose pairs and filler never occur in "
        f"training, {asked.documents} of each kind; brackets are 95% confidence intervals over documents.\n\n"
        "## Longer than in training\n\n"
        "Two pairs of two digits between filler, read in chunks of two pairs or sentences. Trained on 1 to 8 chunks, "
        f"asked about 1 to 40, on the shipped base. Rows are numbers of chunks.\n\n{chunks}\n"
        "## More values, longer ones, and filler\n\n"
        "On a base of the same size that was trained to read such documents; chunks of four pairs or sentences.\n\n"
        f"{values}",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
