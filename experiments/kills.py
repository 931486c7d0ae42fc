"""Runs that are killed and damaged: each is continued by its own commands and has to end equal to one left alone.

    python experiments/kills.py --page benchmarks/faults.md    # 300 trials: what `make kills` does
    python experiments/kills.py --trials 10 --seed 7

A trial sends a tiny run up to three signals, also while it is resumed, at instants drawn over its whole duration: SIGKILL, or
one of SIGTERM, SIGUSR1 and SIGINT, which ask it to stop. In some trials every operation on files is stretched, so that most
instants fall into a save, a pruning or a rename; in some the newest checkpoint is then cut off or has a bit flipped. In
others no file may grow beyond a size drawn at random, as on a full disk: the run has to end with a message of ours. At the
end the weights, the optimizer's moments and every line of metrics and evaluations must be those of the run left alone, bit
for bit, and no leftover may lie about.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from d2l.checkpoint import find_checkpoint, load_checkpoint
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.errors import CheckpointError
from d2l.io.run_folder import EVALUATIONS, EVENTS, METRICS, step_folders
from d2l.train.metrics import MEASURED
from d2l.train.run import train
from d2l.train.start import start_new, start_resumed
from d2l.train.stopping import SIGNALS, Interrupted, StopRequest, stop_on_signals

KINDS = ("kill", "stretched", "stretched, cut off", "stretched, flipped", "stretched, asked to stop", "no room")
BEGIN, END = "<!-- make kills -->\n", "<!-- end of make kills -->\n"
PROGRESS = 25  # trials between two lines
STOPPED = 12  # the exit code of a run that was asked to stop
STRETCH = 0.004  # seconds before each operation on files
TINY = {
    "max_steps": 6,
    "save_steps": 1,
    "save_total_limit": 2,
    "eval_steps": 3,
    "eval_documents": 2,
    "gradient_accumulation_steps": 1,
    "needle_documents": 3,
    "latent_size": 8,
    "n_latent_queries": 4,
    "num_blocks": 1,
    "learning_rate": 0.01,
}
PREFLIGHT = {"fingerprint": "", "summary": {}}


@dataclass(frozen=True)
class Trial:
    """What became of a run.

    Attributes:
        kind: one of `KINDS`.
        kills: how many signals hit it while it ran.
        damage: what was done to its newest checkpoint, or to its room; empty where nothing.
        problem: what is not as it should be; empty where the run ended equal.
    """

    kind: str
    kills: int
    damage: str
    problem: str


def go_on(config: RunConfig, stretched: bool) -> None:
    """Start the run, or resume it where the folder says that there is one, as a user would; end with 12 where stopped."""
    torch.set_num_threads(1)
    if stretched:
        for place, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree")):
            setattr(place, name, _later(getattr(place, name)))
    stop = StopRequest()
    with stop_on_signals(stop.receive):
        try:
            try:
                with start_new(config, numbered=False) as start:
                    cause = train(config, start, preflight=PREFLIGHT, on_step=lambda _: None, stop=stop)
            except CheckpointError as refusal:
                if "--resume" not in str(refusal):
                    raise
                with start_resumed(config, Path(config.output_dir)) as start:
                    cause = train(config, start, preflight=PREFLIGHT, on_step=lambda _: None, stop=stop)
        except Interrupted:
            os._exit(STOPPED)
    if cause is not None:
        os._exit(STOPPED)


def _later(operation: Callable[..., Any]) -> Callable[..., Any]:
    def stretched(*arguments: Any, **options: Any) -> Any:
        time.sleep(STRETCH)
        return operation(*arguments, **options)

    return stretched


def without_room(action: Callable[[], None], limit: int) -> None:
    """Do something while writing to a file beyond so many bytes is an OSError (Python ignores SIGXFSZ)."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # what is said of an error must have room


def in_child(
    action: Callable[[], None], log: Path, kill_after: float | None = None, number: signal.Signals = signal.SIGKILL
) -> int:
    """Run an action in a forked process that gets a signal after so many seconds; return its exit code, -9 where killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:  # whatever it is: a child must not go on where its parent does
            log.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, number)  # a child that has ended waits to be asked for its status
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def try_run(config: RunConfig, kind: str, seconds: float, expected: dict[str, Any], draw: random.Random) -> Trial:
    """Kill a run, damage it, let it end, and compare it."""
    folder = Path(config.output_dir)
    log, kills, damage = folder.with_suffix(".log"), 0, ""
    run = partial(go_on, config, kind.startswith("stretched"))
    if kind == "no room":
        limit = draw.randrange(max(path.stat().st_size for path in folder.parent.glob("whole-*/checkpoints/*/*")))
        if in_child(partial(without_room, run, limit), log) == 1:
            damage = f"no file over {limit} bytes"
            if "\nd2l.errors." not in log.read_text(encoding="utf-8"):
                return Trial(kind, kills, damage, log.read_text(encoding="utf-8"))
    for _ in range(draw.randint(1, 3)):
        number = draw.choice(SIGNALS) if kind.endswith("asked to stop") else signal.SIGKILL
        status = in_child(run, log, draw.uniform(0, 1.1 * seconds), number)
        kills += status in (STOPPED, -number)  # that of the signal itself: before the run could take it
        if status == 1:
            return Trial(kind, kills, damage, log.read_text(encoding="utf-8"))
    steps = step_folders(folder)
    if kind in ("stretched, cut off", "stretched, flipped") and len(steps) > 1:  # the first has none before it
        damage = _damage(steps[-1], "cut" in kind, draw)
    if in_child(run, log) != 0:
        return Trial(kind, kills, damage, log.read_text(encoding="utf-8"))
    return Trial(
        kind, kills, damage, "; ".join(name for name, value in ending(folder).items() if value != expected[name])
    )


def _damage(checkpoint: Path, cut: bool, draw: random.Random) -> str:
    """Cut a file of a checkpoint off, or flip a bit of it; return what was done."""
    file = draw.choice(sorted(checkpoint.iterdir()))
    contents = bytearray(file.read_bytes())
    place = draw.randrange(len(contents))
    if cut:
        del contents[place:]
    else:
        contents[place] ^= 1 << draw.randrange(8)
    file.write_bytes(contents)
    return f"{file.relative_to(checkpoint.parent)} {'cut off' if cut else 'flipped'} at {place}"


def ending(folder: Path) -> dict[str, Any]:
    """Return all that two equal runs have in common at their end."""
    checkpoint = load_checkpoint(find_checkpoint(folder).folder)
    tensors = {**checkpoint.hypernet, **checkpoint.trainer}
    lines = [
        json.loads(line)
        for name in (METRICS, EVALUATIONS)
        for line in (folder / name).read_text(encoding="utf-8").splitlines()
    ]
    return {
        "step": checkpoint.state["step"],
        "tensors": {name: value.numpy().tobytes() for name, value in tensors.items()},
        "metrics": [{key: value for key, value in line.items() if key not in MEASURED} for line in lines],
        "leftovers": [str(path.relative_to(folder)) for path in folder.rglob(".*")],
        "files": sorted(path.name for path in folder.iterdir() if path.name != EVENTS),  # says that it was resumed
    }


def measure(config: RunConfig, stretched: bool) -> tuple[float, dict[str, Any]]:
    """Let a run alone; return its seconds and its ending."""
    log = Path(config.output_dir).with_suffix(".log")
    started = time.perf_counter()
    if in_child(partial(go_on, config, stretched), log) != 0:
        raise SystemExit(log.read_text(encoding="utf-8"))
    return time.perf_counter() - started, ending(Path(config.output_dir))


def run_trials(count: int, seed: int, place: Path) -> Iterator[Trial]:
    """Yield trials of every kind in turn, and report each problem as it is found."""

    def config(name: str) -> RunConfig:
        return load_config(None, {**TINY, "output_dir": str(place / name)})

    whole = {stretched: measure(config(f"whole-{stretched}"), stretched) for stretched in (False, True)}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        seconds, expected = whole[kind.startswith("stretched")]
        trial = try_run(config(f"run-{number}"), kind, seconds, expected, random.Random(f"{seed} {number}"))
        if trial.problem:
            sys.stdout.write(f"trial {number} ({kind}, {trial.kills} kills, {trial.damage}): {trial.problem}\n")
            sys.stdout.flush()
        else:
            shutil.rmtree(place / f"run-{number}")
        yield trial


def table(trials: Sequence[Trial]) -> str:
    """Return the counts by kind, as Markdown."""
    rows = ["| kind | runs | signals | damaged | ended equal |", "|---|---|---|---|---|"]
    for kind in KINDS:
        own = [trial for trial in trials if trial.kind == kind]
        ended = Counter(not trial.problem for trial in own)[True]
        rows.append(
            f"| {kind} | {len(own)} | {sum(it.kills for it in own)} | {sum(bool(it.damage) for it in own)} | {ended} |"
        )
    return "\n".join(rows)


def write_page(page: Path, text: str) -> None:
    """Put the table between its two marks in a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="a Markdown page whose table of kills is replaced")
    options = parser.parse_args()
    started, trials = time.perf_counter(), list[Trial]()
    with tempfile.TemporaryDirectory(prefix="d2l-kills-") as place, suppress(KeyboardInterrupt):  # what was seen stands
        for trial in run_trials(options.trials, options.seed, Path(place)):
            trials.append(trial)
            if len(trials) % PROGRESS == 0:
                sys.stdout.write(
                    f"{len(trials)} of {options.trials}, {sum(bool(it.problem) for it in trials)} not equal\n"
                )
                sys.stdout.flush()
    if not trials:
        raise SystemExit(130)
    text = f"{table(trials)}\n\nSeed {options.seed}; {(time.perf_counter() - started) / len(trials):.1f} s a run."
    sys.stdout.write(f"{text}\n")
    if options.page and len(trials) == options.trials:
        write_page(options.page, text)
    raise SystemExit(any(trial.problem for trial in trials))


if __name__ == "__main__":
    main()
