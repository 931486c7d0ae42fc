"""Proof that training works: from random weights to held-out answers with their controls, by the commands of d2l alone.

A tiny GPT-OSS is pretrained to answer questions about documents in its prompt; three seeds of a hypernetwork are trained
to turn documents into LoRAs for it; each is evaluated on documents whose pairs and filler never occur in training.
Writes the table and the figure of the README, and fails when a bound is missed.

    python experiments/prove.py
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from d2l.evaluation.scores import LABELS, Condition

CONFIG = Path("configs/needle_tiny.yaml")
README, PAGE, FIGURE = Path("README.md"), Path("experiments/needle.md"), Path("experiments/needle.svg")
BEGIN, END = "<!-- the proof: begin -->\n", "<!-- the proof: end -->\n"
SEEDS = (1, 2, 3)
DOCUMENTS, PAIRS, DIGITS = 128, 4, 2
BOUNDS: dict[Condition, tuple[float, bool]] = {  # bound on exact match, and whether it is a lower bound
    "document": (0.98, True),
    "other": (0.03, False),
    "none": (0.01, False),
    "in_prompt": (0.98, True),
}
MAX_SECONDS = 600.0  # of training for a seed, on one thread


@dataclass(frozen=True)
class Proof:
    """Result of one seed: its scores, and the wall time (seconds) and optimizer steps of its training."""

    seed: int
    scores: dict[str, Any]
    seconds: float
    steps: int

    def problems(self) -> list[str]:
        """List every bound that the seed misses."""
        found = []
        for condition, (bound, is_lower) in BOUNDS.items():
            exact = self.scores[condition]["exact"]["value"]
            if exact < bound if is_lower else exact > bound:
                sign = "≥" if is_lower else "≤"
                found.append(f"seed {self.seed}: {LABELS[condition]}: {exact:.3f}, expected {sign} {bound}")
        if self.seconds > MAX_SECONDS:
            found.append(f"seed {self.seed}: trained for {self.seconds:.0f} s, expected ≤ {MAX_SECONDS:.0f} s")
        return found


def d2l(*arguments: object, log: Path, accepted: Sequence[int] = (0,), threads: int = 1) -> None:
    """Run a command of this checkout, installed or not, with its output in `log`; exit where its exit code is not accepted.

    Args:
        threads: of the processor; with more than one, processes that share the cores spin.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "cli", *map(str, arguments)]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode not in accepted:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{tail}")


def prove(work: Path, base: Path, data: Path, seed: int) -> Proof:
    """Train and evaluate one seed."""
    run, evaluation = work / f"seed-{seed}", work / f"seed-{seed}.json"
    options = ("--model", base, "--set", f"seed={seed}", "--output", run)
    d2l("train", CONFIG, *options, log=work / f"train-{seed}.log")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    plot = ("--plot", work / f"seed-{seed}.svg")
    d2l("eval", run, "--data", data, "--model", base, "-o", evaluation, *plot, log=work / f"eval-{seed}.log")
    scores = json.loads(evaluation.read_text())["scores"]
    return Proof(seed, scores, sum(step["seconds"] for step in steps), len(steps))


def table(proofs: Sequence[Proof]) -> str:
    """Make the table of exact match for every condition and seed, in Markdown."""
    lines = [
        f"| exact match | bound | {' | '.join(f'seed {proof.seed}' for proof in proofs)} |",
        f"|---|---|{'---|' * len(proofs)}",
    ]
    for condition, (bound, is_lower) in BOUNDS.items():
        estimates = [proof.scores[condition]["exact"] for proof in proofs]
        cells = [f"{it['value']:.3f} [{it['low']:.3f}, {it['high']:.3f}]" for it in estimates]
        lines.append(f"| {LABELS[condition]} | {'≥' if is_lower else '≤'} {bound} | {' | '.join(cells)} |")
    cells = [f"{proof.seconds:.0f} s, {proof.steps:,} steps" for proof in proofs]
    lines.append(f"| training | ≤ {MAX_SECONDS:.0f} s | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def publish(proofs: Sequence[Proof], work: Path) -> None:
    """Write the table into the README and a page of its own, with the first seed's figure."""
    text = (
        f"{DOCUMENTS} held-out documents of {PAIRS} pairs with {DIGITS} digits, {DOCUMENTS * PAIRS} questions, chance "
        f"{10.0**-DIGITS:.0%}; brackets are 95% confidence intervals over documents.\n\n{table(proofs)}"
    )
    figure = f"\n![The four conditions, seed {proofs[0].seed}]({FIGURE})\n"
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{text}{figure}{END}{after}", encoding="utf-8")
    PAGE.write_text(f"# It learns\n\nWritten by `make prove`.\n\n{text}\n![]({FIGURE.name})\n", encoding="utf-8")
    FIGURE.write_bytes((work / f"seed-{proofs[0].seed}.svg").read_bytes())


def main() -> None:
    """Run the whole proof; the exit code is 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="a new folder for all output; default: runs/prove-N")
    parser.add_argument("--base", type=Path, help="a base that `d2l pretrain-tiny` made; default: train one")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=2, help="seeds that run at a time, one thread each")
    options = parser.parse_args()
    options.work = options.work or next(path for n in count(1) if not (path := Path(f"runs/prove-{n}")).exists())
    if options.work.exists():
        raise SystemExit(f"{options.work} exists and is never written over: give --work another name")
    options.work.mkdir(parents=True)
    started = time.perf_counter()

    def report(text: str) -> None:
        sys.stdout.write(f"{time.perf_counter() - started:>6.0f} s  {text}\n")
        sys.stdout.flush()

    data = options.work / "heldout.jsonl"
    needles = ("--documents", DOCUMENTS, "--pairs", PAIRS, "--digits", DIGITS, "--filler-words", 0)
    d2l("data", "needle", "-o", data, *needles, "--style", "pairs", "--split", "heldout", log=options.work / "data.log")
    base = options.base
    if base is None:
        base = options.work / "base"
        report(f"seed 0 of the base, to {base}")
        d2l("pretrain-tiny", CONFIG, "-o", base, "--seed", 0, log=options.work / "pretrain.log")
    report(f"seeds {', '.join(map(str, options.seeds))} of the hypernetwork, {options.processes} at a time")
    with ThreadPoolExecutor(options.processes) as pool:
        jobs = [pool.submit(prove, options.work, base, data, seed) for seed in options.seeds]
        proofs = []
        for job in jobs:
            proofs.append(job.result())
            report(f"seed {proofs[-1].seed}: exact match {proofs[-1].scores['document']['exact']['value']:.3f}")
    publish(proofs, options.work)
    problems = [problem for proof in proofs for problem in proof.problems()]
    report("every bound holds" if not problems else "missed:\n" + "\n".join(problems))
    sys.stdout.write("\n" + table(proofs))
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
