"""Several documents at once: recall from two documents that are merged, beside each alone and one document of both.

Held-out needles of the shipped demonstration (`configs/demo`), or of any checkpoint of needles in pairs. Writes a page.

    python experiments/two_documents.py
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from d2l.data.needles import needle_records
from d2l.data.records import Record
from d2l.evaluation.answers import generate_answers
from d2l.evaluation.scores import exact_match
from d2l.hypernet.lora import Lora
from d2l.inference.generate import ask, internalize
from d2l.inference.load import TrainedModel, load_model
from d2l.inference.merge import merge_documents

PAGE = Path("experiments/two_documents.md")
SIZES = (2, 4)  # pairs in a document
DIGITS, DRAWS, TOKENS = 2, 100, 6
FIRST, SECOND = "first", "second"
COLUMNS = {
    "alone": "each document alone",
    FIRST: "both merged: asked about the first",
    SECOND: "both merged: asked about the second",
    "whole": "one document of both",
    "foreign": "two other documents merged",
}
Results = Mapping[str, Sequence[float]]


def split(record: Record) -> tuple[Record, Record]:
    """Cut a document of pairs into two, which share no key."""
    half = len(record.prompts) // 2

    def part(place: slice) -> Record:
        stated = record.responses[place]
        return Record(" ".join(stated), record.prompts[place], stated, record.source)

    return part(slice(half)), part(slice(half, None))


def measure(trained: TrainedModel, pairs: int) -> tuple[dict[str, list[float]], bool]:
    """Ask about two documents of so many pairs each under every condition.

    Returns:
        Exact match by condition, a mean for each draw of two documents; and whether all merged LoRAs were those of one
        document of both, up to rounding.
    """
    wholes = needle_records(DRAWS, 2 * pairs, DIGITS, 0, seed=0, split="heldout", style="pairs")
    results: dict[str, list[float]] = {name: [] for name in COLUMNS}
    previous = _merge(trained, split(wholes[-1]))
    equal = True
    for record in wholes:
        parts = split(record)
        one, other = (internalize(trained, part.context) for part in parts)
        merged, whole = merge_documents([one, other]), internalize(trained, record.context)
        equal = equal and _are_close(merged, whole)
        alone = [recall(trained, lora, part) for lora, part in zip((one, other), parts, strict=True)]
        results["alone"].append(float(np.mean(alone)))
        for name, part in zip((FIRST, SECOND), parts, strict=True):
            results[name].append(recall(trained, merged, part))
        results["whole"].append(recall(trained, whole, record))
        results["foreign"].append(recall(trained, previous, record))
        previous = merged
    return results, equal


def measure_conflicts(trained: TrainedModel) -> list[float]:
    """Ask for a key that both documents state, with different values: the shares of the first, the second, and neither."""
    counts = np.zeros(3)
    records = needle_records(2 * DRAWS, 2, DIGITS, 0, seed=1, split="heldout", style="pairs")
    for one, other in zip(records[::2], records[1::2], strict=True):
        value = other.responses[0].split()[1:]
        answers = (one.responses[0], " ".join((one.prompts[0], *value)))
        if answers[0] == answers[1]:
            continue
        second = Record(f"{answers[1]} {other.responses[1]}", one.prompts[:1], answers[1:], one.source)
        answer = ask(trained, _merge(trained, (one, second)), one.prompts[0], TOKENS)
        counts[answers.index(answer) if answer in answers else 2] += 1
    return [float(share) for share in counts / counts.sum()]


def recall(trained: TrainedModel, lora: Lora, record: Record) -> float:
    """Return the share of a document's questions that are answered right."""
    answers = generate_answers(trained, [lora] * len(record.prompts), record.prompts, TOKENS)
    return float(np.mean([exact_match(*pair) for pair in zip(answers, record.responses, strict=True)]))


def _merge(trained: TrainedModel, records: Sequence[Record]) -> Lora:
    return merge_documents([internalize(trained, record.context) for record in records])


def _are_close(one: Lora, other: Lora) -> bool:
    return all(
        a[name].shape == b[name].shape and torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5)
        for a, b in ((one.A, other.A), (one.B, other.B))
        for name in a
    )


def _cell(values: Sequence[float]) -> str:
    """Return a mean with its 95% interval from resampled documents."""
    draws = np.random.default_rng(0).choice(np.asarray(values), size=(2000, len(values)))
    low, high = np.percentile(draws.mean(axis=1), (2.5, 97.5))
    return f"{np.mean(values):.3f} [{low:.2f}, {high:.2f}]"


def write_page(name: str, results: Mapping[int, tuple[Results, bool]], conflicts: Sequence[float]) -> str:
    """Write the page of a checkpoint, in Markdown."""
    lines = [
        "# Several documents at once",
        "",
        f"Written by `experiments/two_documents.py` on `{name}`. {DRAWS} draws of two held-out documents of needles with "
        f"{DIGITS} digits, which share no key; each is turned into a LoRA by itself, and both are merged: ranks side by "
        "side, the learned bias once. Exact match; brackets are 95% confidence intervals over draws of documents. Rows are "
        "pairs in each of the two documents.",
        "",
        "| pairs | " + " | ".join(COLUMNS.values()) + " | merged LoRA = that of one document of both |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for pairs, (values, equal) in results.items():
        cells = [_cell(values[column]) for column in COLUMNS]
        lines.append(f"| {pairs} + {pairs} | {' | '.join(cells)} | {'yes' if equal else 'no'} |")
    first, second, neither = conflicts
    lines += [
        "",
        f"Where both documents of two pairs state the same key with different values, the answer is the first's in "
        f"{first:.0%}, the second's in {second:.0%} and another in {neither:.0%} of draws.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure a checkpoint, and write its page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", default="demo", help="a checkpoint of needles in pairs; default: demo")
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    trained = load_model(options.checkpoint)
    page = write_page(
        options.checkpoint, {pairs: measure(trained, pairs) for pairs in SIZES}, measure_conflicts(trained)
    )
    options.output.write_text(page, encoding="utf-8")
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
