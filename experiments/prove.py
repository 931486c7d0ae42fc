"""The proof that it learns: from random weights to held-out answers with their controls, by the commands that users have.

A tiny GPT-OSS learns to read, three seeds of the hypernetwork learn to turn documents into LoRAs for it, and each is
asked about documents whose pairs and filler never occurred in training. Writes the table and the figure that README
shows, and fails when a bound is missed.

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

CONFIG = Path("configs/needle_tiny.yaml")
README, PAGE, FIGURE = Path("README.md"), Path("experiments/needle.md"), Path("experiments/needle.svg")
BEGIN, END = "<!-- the proof: begin -->\n", "<!-- the proof: end -->\n"
SEEDS = (1, 2, 3)
DOCUMENTS, PAIRS, DIGITS = 128, 4, 2
CONDITIONS = {  # label, bound on exact match, whether it is a least one
    "document": ("the document's LoRA", 0.98, True),
    "other": ("another document's LoRA", 0.03, False),
    "none": ("no document", 0.01, False),
    "in_prompt": ("document in the prompt", 0.98, True),
}
LIMIT = 600.0  # seconds of training for a seed, on one thread


@dataclass(frozen=True)
class Proof:
    """One seed: what it reached, and how long its training took in seconds of wall time and in optimizer steps."""

    seed: int
    scores: dict[str, Any]
    seconds: float
    steps: int

    def problems(self) -> list[str]:
        """Every bound that it misses."""
        found = []
        for condition, (label, bound, least) in CONDITIONS.items():
            exact = self.scores[condition]["exact"]["value"]
            if exact < bound if least else exact > bound:
                found.append(f"seed {self.seed}: {label}: {exact:.3f}, expected {'≥' if least else '≤'} {bound}")
        if self.seconds > LIMIT:
            found.append(f"seed {self.seed}: trained for {self.seconds:.0f} s, expected ≤ {LIMIT:.0f} s")
        return found


def d2l(*arguments: object, log: Path, accepted: Sequence[int] = (0,)) -> None:
    """Run a command of this installation, which must end with an accepted exit code; its output goes to `log`."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # with more, processes that share the cores spin
    command = [str(Path(sys.executable).with_name("d2l")), *map(str, arguments)]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=one_thread, check=False)
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
    """Exact match of every condition and seed, in Markdown."""
    lines = [
        f"| exact match | bound | {' | '.join(f'seed {proof.seed}' for proof in proofs)} |",
        f"|---|---|{'---|' * len(proofs)}",
    ]
    for condition, (label, bound, least) in CONDITIONS.items():
        spans = [proof.scores[condition]["exact"] for proof in proofs]
        cells = [f"{it['value']:.3f} [{it['low']:.3f}, {it['high']:.3f}]" for it in spans]
        lines.append(f"| {label} | {'≥' if least else '≤'} {bound} | {' | '.join(cells)} |")
    cells = [f"{proof.seconds:.0f} s, {proof.steps:,} steps" for proof in proofs]
    lines.append(f"| training | ≤ {LIMIT:.0f} s | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def publish(proofs: Sequence[Proof], work: Path) -> None:
    """Put the table into README and a page of its own, and the first seed's figure beside it."""
    text = (
        f"{DOCUMENTS} held-out documents of {PAIRS} pairs with {DIGITS} digits, {DOCUMENTS * PAIRS} questions, chance "
        f"{10.0**-DIGITS:.0%}; brackets are 95% confidence intervals over documents.\n\n{table(proofs)}"
    )
    figure = f"\n![The four conditions, seed {proofs[0].seed}]({FIGURE})\n"
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, behind = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{text}{figure}{END}{behind}", encoding="utf-8")
    PAGE.write_text(f"# It learns\n\nWritten by `make prove`.\n\n{text}\n![]({FIGURE.name})\n", encoding="utf-8")
    FIGURE.write_bytes((work / f"seed-{proofs[0].seed}.svg").read_bytes())


def main() -> None:
    """Run the whole proof; exit code 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="a new folder for everything that is made; default: runs/prove-N")
    parser.add_argument("--base", type=Path, help="a base of `d2l pretrain-tiny`; default: one is trained here")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time, one thread each")
    asked = parser.parse_args()
    asked.work = asked.work or next(path for n in count(1) if not (path := Path(f"runs/prove-{n}")).exists())
    if asked.work.exists():
        raise SystemExit(f"{asked.work} exists and is never written over: give --work another name")
    asked.work.mkdir(parents=True)
    started = time.perf_counter()

    def say(text: str) -> None:
        sys.stdout.write(f"{time.perf_counter() - started:>6.0f} s  {text}\n")
        sys.stdout.flush()

    data = asked.work / "heldout.jsonl"
    needles = ("--documents", DOCUMENTS, "--pairs", PAIRS, "--digits", DIGITS, "--filler-words", 0)
    d2l("data", "needle", "-o", data, *needles, "--style", "pairs", "--split", "heldout", log=asked.work / "data.log")
    base = asked.base
    if base is None:
        base = asked.work / "base"
        say(f"seed 0 of the base, to {base}")
        d2l("pretrain-tiny", CONFIG, "-o", base, "--seed", 0, log=asked.work / "pretrain.log")
    say(f"seeds {', '.join(map(str, asked.seeds))} of the hypernetwork, {asked.processes} at a time")
    with ThreadPoolExecutor(asked.processes) as pool:
        jobs = [pool.submit(prove, asked.work, base, data, seed) for seed in asked.seeds]
        proofs = []
        for job in jobs:
            proofs.append(job.result())
            say(f"seed {proofs[-1].seed}: exact match {proofs[-1].scores['document']['exact']['value']:.3f}")
    publish(proofs, asked.work)
    problems = [problem for proof in proofs for problem in proof.problems()]
    say("every bound holds" if not problems else "missed:\n" + "\n".join(problems))
    sys.stdout.write("\n" + table(proofs))
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
