"""How far it goes: documents longer than any in training, and more and longer values than `make prove` asks for.

One network, trained by the recipe of `configs/needle_tiny.yaml` on documents with filler, is asked about two sorts of
documents, by the commands that users have. Each makes a page and a figure; nothing here has a bound to miss.

    python benchmarks/reach.py
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from prove import CONDITIONS, CONFIG, d2l

from d2l.config import RunConfig
from d2l.config_file import load_config

PAGES = Path("benchmarks")
COMMON = (
    "Two pairs of two digits between filler, in chunks of two pairs or sentences, on the shipped base; the other settings "
    "are those of `configs/needle_tiny.yaml`."
)
CHUNKS = (1, 2, 4, 8, 16, 24, 32, 40)
CHUNK_WORDS = 6  # two pairs, or two sentences of filler, of three words each
WIDER = ((4, 2, 0), (8, 2, 0), (16, 2, 0), (4, 2, 64), (8, 2, 64), (8, 2, 256), (2, 4, 0), (8, 4, 256))


TWO = {"pairs": 2, "digits": 2}
CHANGES = {  # of the recipe: filler in the last stage, up to eight chunks
    "curriculum": (
        {"pairs": 1, "digits": 1, "passing": 0.9},
        {"pairs": 2, "digits": 1, "passing": 0.85},
        TWO | {"passing": 0.85},
        TWO | {"min_filler_tokens": 0, "filler_tokens": 7 * CHUNK_WORDS, "documents": 40000},
    ),
    "max_packed_ctx_len": 1024,
}


@dataclass(frozen=True)
class Inquiry:
    """Held-out documents that the trained network is asked about.

    Attributes:
        name: of its page and figure; title, text: of the page.
        kinds: a name for each kind of documents, and what `d2l data needle` makes them from.
    """

    name: str
    title: str
    text: str
    kinds: Mapping[str, Mapping[str, int]]


def inquiries() -> tuple[Inquiry, Inquiry]:
    """More chunks than in training; then more pairs and longer values."""
    longer = Inquiry(
        "chunks",
        "Longer than in training",
        "Trained on documents of 1 to 8 chunks, asked about 1 to 40. Rows are numbers of chunks.",
        {str(n): TWO | {"filler_tokens": CHUNK_WORDS * (n - 1)} for n in CHUNKS},
    )
    wider = Inquiry(
        "values",
        "More values than in training, and longer ones",
        "Asked about more pairs than the network saw in training, and about four digits, which the base never saw either.",
        {
            f"{pairs} × {digits}, {filler} words of filler": {"pairs": pairs, "digits": digits, "filler_tokens": filler}
            for pairs, digits, filler in WIDER
        },
    )
    return longer, wider


def ask(inquiry: Inquiry, trained: Path, work: Path, documents: int) -> None:
    """Ask about every kind of documents, and write the page and its figure."""
    folder = work / inquiry.name
    folder.mkdir()
    recipe = load_config(CONFIG)
    base = ("--model", recipe.model_name_or_path)
    rows, lines = [], []
    for number, (kind, needles) in enumerate(inquiry.kinds.items()):
        data, result = folder / f"asked-{number}.jsonl", folder / f"asked-{number}.json"
        options = [part for key, value in needles.items() for part in (f"--{key.replace('_', '-')}", value)]
        how = ("--documents", documents, "--style", "pairs", "--split", "heldout", "--seed", number)
        d2l("data", "needle", "-o", data, *options, *how, log=folder / "data.log")
        lines.append(data.read_text(encoding="utf-8"))
        d2l("eval", trained, "--data", data, *base, "-o", result, log=folder / f"eval-{number}.log")
        rows.append((kind, json.loads(result.read_text(encoding="utf-8"))["scores"]))
    together, figure = folder / "asked.jsonl", PAGES / f"reach_{inquiry.name}.svg"
    together.write_text("".join(lines), encoding="utf-8")
    drawn = folder / "figure.svg"
    d2l("eval", trained, "--data", together, *base, "--plot", drawn, log=folder / "eval.log")
    figure.write_bytes(drawn.read_bytes())
    figure.with_suffix(".md").write_text(page(inquiry, trained, rows, figure, documents), encoding="utf-8")


def page(
    inquiry: Inquiry,
    trained: Path,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    figure: Path,
    documents: int,
) -> str:
    """The table, what training saw of each stage, and the figure, in Markdown."""
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = [label for label, _, _ in CONDITIONS.values()]
    lines = [f"| exact match | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}"]
    for kind, scores in rows:
        cells = [
            f"{it['value']:.3f} [{it['low']:.2f}, {it['high']:.2f}]" for it in (scores[c]["exact"] for c in CONDITIONS)
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    stages = {step["stage"]: step for step in metrics}  # the last step of each
    course = "; ".join(
        f"{stage.pairs} × {stage.digits}"
        + (f" with up to {stage.filler_tokens} words of filler" if stage.filler_tokens else "")
        + (f" until step {stages[number]['step']:,}" if number in stages else " never reached")
        for number, stage in enumerate(load_config(trained / "config.yaml").curriculum, start=1)
    )
    return (
        f"# {inquiry.title}\n\nWritten by `make reach`. {COMMON} {inquiry.text} One seed, held-out documents whose pairs and "
        f"filler never occur in training, {documents} of each kind; brackets are 95% confidence intervals over documents."
        f"\n\n{chr(10).join(lines)}\n\nStages: {course}.\n\n![]({figure.name})\n"
    )


def main() -> None:
    """Train a network, then ask about all documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="a new folder for everything that is made; default: runs/reach-N")
    parser.add_argument("--run", type=Path, help="of an earlier call; default: it is trained here")
    parser.add_argument("--only", choices=[inquiry.name for inquiry in inquiries()], help="default: both")
    parser.add_argument("--documents", type=int, default=32, help="of each kind that is asked about")
    asked = parser.parse_args()
    work = asked.work or next(path for n in count(1) if not (path := Path(f"runs/reach-{n}")).exists())
    work.mkdir(parents=True)
    trained = asked.run
    if trained is None:
        config, trained = work / "config.yaml", work / "run"
        config.write_text(
            RunConfig(**load_config(CONFIG).model_dump(exclude={"remarks"}) | CHANGES).to_yaml(), encoding="utf-8"
        )
        d2l("train", config, "--output", trained, log=work / "train.log")
    wanted = [inquiry for inquiry in inquiries() if asked.only in (None, inquiry.name)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        for job in [pool.submit(ask, inquiry, trained, work, asked.documents) for inquiry in wanted]:
            job.result()


if __name__ == "__main__":
    main()
