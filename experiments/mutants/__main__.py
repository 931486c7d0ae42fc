"""Command: plant every mutant, run the preflight under each, write the table.

python -m experiments.mutants [--only NAME ...] [--area AREA ...] [--new] [--validate] [--output FOLDER]
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Imported for what they take to import: trials are forked from here.
import accelerate.state  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401

import checks.production
import checks.rules  # noqa: F401
from experiments.mutants.catalogue import MUTANTS
from experiments.mutants.mutant import Mutant
from experiments.mutants.page import Results, as_json, from_json, killed_share, markdown, summary
from experiments.mutants.trial import Verdict, healthy_values, map_parallel, require_green, try_mutant, validate
from experiments.mutants.values import Values
from experiments.mutants.workbench import configurations

# from Python 3.12 on; the forked process runs one thread, and torch has no other here
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
EXPERIMENTS = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the command; return 1 where a mutant is invalid or a hole is left."""
    options = _options()
    if options.page:
        return _page()
    document = _last_table() if options.new else {"mutants": [], "seconds": 0}
    earlier = [(mutant, verdict) for mutant, verdict in from_json(document) if not _is_hole(mutant, verdict)]
    chosen = _chosen(options, {mutant.name for mutant, _ in earlier})
    if not chosen:
        areas = ", ".join(sorted({mutant.area for mutant in MUTANTS}))
        _say(f"no such mutant{', or the page has them killed' if options.new else ''}; areas: {areas}")
        return 2
    started = time.perf_counter()
    configurations()
    healthy = healthy_values(sorted({mutant.witness for mutant in chosen}))
    if options.validate:
        return _validate(chosen, healthy)
    require_green()
    results = []
    for mutant, verdict in zip(chosen, map_parallel(lambda mutant: try_mutant(mutant, healthy), chosen), strict=True):
        results.append((mutant, verdict))
        by = " ".join(red.code for red in verdict.red) or verdict.note
        _say(f"{len(results):4} of {len(chosen)}  {verdict.kind:9} {mutant.name:40} {by[:90]}")
    results = sorted([*earlier, *results], key=lambda result: MUTANTS.index(result[0]))
    seconds = document["seconds"] + time.perf_counter() - started
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    versions["python"] = platform.python_version()
    _say(summary(results))
    whole = len(results) == len(MUTANTS)
    if whole or options.output is not None:
        _write(EXPERIMENTS if options.output is None else options.output, results, versions, seconds)
    killed, of = killed_share(results)
    return 0 if killed == of and all(verdict.kind != "invalid" for _, verdict in results) else 1


def _chosen(options: argparse.Namespace, known: Collection[str]) -> list[Mutant]:
    """Return the mutants that are asked for, without those that are known."""
    return [
        mutant
        for mutant in MUTANTS
        if (not options.only or mutant.name in options.only)
        and (not options.area or mutant.area in options.area)
        and mutant.name not in known
    ]


def _is_hole(mutant: Mutant, verdict: Verdict) -> bool:
    """Tell whether no check killed a mutant that should be killed."""
    return mutant.counts and verdict.kind != "killed"


def _page() -> int:
    """Write the tables of the last whole run anew."""
    document = _last_table()
    results = from_json(document)
    _write(EXPERIMENTS, results, document["versions"], document["seconds"], date.fromisoformat(document["date"]))
    _say(summary(results))
    return 0


def _last_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((EXPERIMENTS / "mutants.json").read_text(encoding="utf-8"))
    return table


def _write(
    folder: Path, results: Results, versions: Mapping[str, str], seconds: float, day: date | None = None
) -> None:
    """Write mutants.md and mutants.json."""
    folder.mkdir(parents=True, exist_ok=True)
    day = day or date.today()
    (folder / "mutants.md").write_text(markdown(results, versions, seconds, day), encoding="utf-8")
    table = json.dumps(as_json(results, versions, seconds, day), indent=1, ensure_ascii=False)
    (folder / "mutants.json").write_text(table + "\n", encoding="utf-8")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant; repeatable")
    parser.add_argument("--area", action="append", help="the mutants of this area; repeatable")
    parser.add_argument(
        "--new", action="store_true", help="those that the page lacks or has as a hole; rows are put in"
    )
    parser.add_argument("--validate", action="store_true", help="prove that each is a mutant, without preflight")
    parser.add_argument("--page", action="store_true", help="write the page of the last run anew, with new judgements")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where mutants.md and mutants.json go")
    return parser.parse_args()


def _validate(chosen: Sequence[Mutant], healthy: dict[str, Values]) -> int:
    """Print for each mutant what its witness shows."""
    invalid = 0
    verdicts = map_parallel(lambda mutant: validate(mutant, healthy), chosen)
    for mutant, validity in zip(chosen, verdicts, strict=True):
        invalid += bool(validity.problem)
        shown = f"INVALID: {validity.problem}" if validity.problem else validity.change
        _say(f"{mutant.name:40} {shown}")
    _say(f"{len(chosen) - invalid} of {len(chosen)} are valid")
    return int(invalid > 0)


if __name__ == "__main__":
    sys.exit(main())
