"""Page and figure of the study of targets, from the outcomes that `targets.py` wrote.

python experiments/targets_page.py experiments/targets.json
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

Outcomes = Sequence[Mapping[str, Any]]
VALUES_ALONE = 0.55  # recall of values without their keys: one of two, or both equal by chance
HEADINGS = {
    "targets": "Targets",
    "features": "Features",
    "curriculum": "Curriculum",
    "loss": "Loss",
    "query scale": "Scale of the initial queries",
    "optimizer": "Optimizer",
}
NOTES = {
    "loss": "Documents of one pair with one digit, then of two pairs with two, on pairs never seen; chance is .01. With two "
    "pairs of one digit the teacher itself is wrong: the base, with the document in its prompt, ends an answer of one "
    "digit with a probability of .37 only, and the KL loss then reaches .42 to .49 in all.\n\n",
    "optimizer": "AdamW with its own weight decay of .01, at the learning rate that was best for it before.\n\n",
}


def group_by_variant(outcomes: Outcomes) -> dict[tuple[str, str], Outcomes]:
    """Group the outcomes by variant, in the order of the study."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome["part"], outcome["name"]), []).append(outcome)
    return groups


def table(groups: Mapping[tuple[str, str], Outcomes], part: str) -> str:
    """Make the table of one part in Markdown, best first."""
    rows = [(name, seeds) for (of, name), seeds in groups.items() if of == part]
    rows.sort(key=lambda row: -mean(seed["exact"] for seed in row[1]))
    lines = ["| | mean | seeds | stages reached | another document's LoRA | seconds |", "|---|---|---|---|---|---|"]
    for name, seeds in rows:
        exact, other = ([seed[key] for seed in seeds] for key in ("exact", "other"))
        each = " ".join(f"{value:.2f}" for value in exact)
        stages = " ".join(str(seed["stage"]) for seed in seeds)
        seconds = mean(seed["seconds"] for seed in seeds)
        lines.append(f"| {name} | {mean(exact):.2f} | {each} | {stages} | {mean(other):.2f} | {seconds:.0f} |")
    return "\n".join(lines)


def page(study: Mapping[str, Any], figure: str) -> str:
    """Make the whole page in Markdown."""
    groups = group_by_variant(study["outcomes"])
    parts = dict.fromkeys(part for part, _ in groups)
    sections = "\n\n".join(f"## {HEADINGS[part]}\n\n{NOTES.get(part, '')}{table(groups, part)}" for part in parts)
    return (
        "# Which targets, features and stages can carry a document\n\n"
        "Written by `make study`. The recipe of `configs/needle_tiny.yaml` with one thing changed, on the tiny GPT-OSS "
        f"that is shipped: {study['steps']} optimizer steps on one thread, first documents of one pair, then of two, "
        "one digit each. The share of questions on unseen documents whose every answer token is the likeliest, with the "
        "document's LoRA; chance is .10, and .55 what values without their keys reach. Seconds are of the "
        f"processor, all runs side by side.\n\n![]({figure})\n\n{sections}\n"
    )


def draw(study: Mapping[str, Any], path: Path) -> None:
    """Draw every variant's mean as a bar, its seeds as points."""
    groups = group_by_variant(study["outcomes"])
    drawn = Figure(figsize=(8, 0.32 * len(groups) + 1), layout="constrained")
    axes = drawn.add_subplot()
    names = [f"{name}  ({part})" for part, name in groups]
    values = [[seed["exact"] for seed in seeds] for seeds in groups.values()]
    axes.barh(names, [mean(seeds) for seeds in values], color="#9ecae1")
    for place, seeds in enumerate(values):
        axes.plot(seeds, [place] * len(seeds), "o", color="#08519c", markersize=4)
    axes.axvline(0.1, color="#999999", linewidth=0.8, linestyle=":")
    axes.axvline(VALUES_ALONE, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_xlabel("exact match on unseen documents")
    drawn.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write the page and the figure beside the JSON file."""
    source = Path(sys.argv[1])
    study = json.loads(source.read_text(encoding="utf-8"))
    draw(study, source.with_suffix(".svg"))
    source.with_suffix(".md").write_text(page(study, source.with_suffix(".svg").name), encoding="utf-8")


if __name__ == "__main__":
    main()
