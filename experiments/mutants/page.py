"""The table of mutants, as Markdown and as JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

from experiments.mutants.catalogue import MUTANTS
from experiments.mutants.mutant import Mutant
from experiments.mutants.naming import MISNAMED
from experiments.mutants.trial import Red, Verdict

Results = Sequence[tuple[Mutant, Verdict]]

_INTRODUCTION = """# Mutants

`make mutants` plants small bugs into `d2l/`, one at a time, and runs the preflight under each: on
`configs/tiny_gpt_oss.yaml`, where that is green on the same dequantized, with attention per document and by blocks, and then
on a tiny Llama with documents from a file, a KL loss, averages per context and an L1 term, on the same Llama evaluated as it
trains, with cross-entropy, chunks of sentences that overlap, documents that the file has twice, and Muon, and on both with a
base that is sharded over two processes ([workbench.py](mutants/workbench.py)).
Each bug is proven to apply, to be reached and to change a number (the last column). *Killed* means by a red check; a crash
of a check does not count. A survivor is a hole unless the list judges it equivalent or outside the claims. Whether the red
check names the cause was judged by reading ([naming.py](mutants/naming.py)).
"""


def killed_share(results: Results) -> tuple[int, int]:
    """Return how many mutants are killed, and of how many that are valid, not equivalent and not outside the claims."""
    counted = [verdict.kind for mutant, verdict in results if verdict.kind != "invalid" and mutant.counts]
    return counted.count("killed"), len(counted)


def naming_share(results: Results) -> tuple[int, int]:
    """Return how many mutants are killed by a check that names the cause, and of how many that count."""
    named = [
        verdict.kind == "killed" and mutant.name not in MISNAMED
        for mutant, verdict in results
        if verdict.kind != "invalid" and mutant.counts
    ]
    return sum(named), len(named)


def summary(results: Results) -> str:
    """Return the counts by area, with the kill rate, as a Markdown table."""
    lines = ["| area | killed | crashed | survived | judged | invalid | killed of those that count |"]
    lines.append("|---|---|---|---|---|---|---|")
    areas = list(dict.fromkeys(mutant.area for mutant, _ in results))
    for area in [*areas, "all"]:
        some = [(mutant, verdict) for mutant, verdict in results if area in (mutant.area, "all")]
        kinds = Counter(verdict.kind for mutant, verdict in some if mutant.counts or verdict.kind == "killed")
        judged = sum(verdict.kind in ("survived", "crashed") and not mutant.counts for mutant, verdict in some)
        invalid = sum(verdict.kind == "invalid" for _, verdict in some)
        killed, of = killed_share(some)
        share = f"{killed} of {of}, {killed / of:.0%}" if of else "none"
        counts = f"{kinds['killed']} | {kinds['crashed']} | {kinds['survived']} | {judged} | {invalid}"
        lines.append(f"| {area} | {counts} | {share} |")
    named, of = naming_share(results)
    share = f"{named / of:.1%}" if of else "none"
    return "\n".join([*lines, "", f"Killed by a check that names the cause: {named} of {of}, {share}."])


def markdown(results: Results, versions: Mapping[str, str], seconds: float, day: date) -> str:
    """Return the whole page."""
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = (
        f"Latest run {day.isoformat()}, {len(results)} mutants in {seconds / 60:.0f} minutes of all runs, with {listed}.\n"
        "Mutants that are new or changed since the last whole run may have been run by themselves (`--new`)."
    )
    parts = [_INTRODUCTION, head, summary(results)]
    for area in dict.fromkeys(mutant.area for mutant, _ in results):
        rows = [_row(mutant, verdict) for mutant, verdict in results if mutant.area == area]
        heading = "| mutant | what it spoils | outcome | names it | its witness |\n|---|---|---|---|---|"
        parts.append(f"## {area[0].upper()}{area[1:]}\n\n" + "\n".join([heading, *rows]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _row(mutant: Mutant, verdict: Verdict) -> str:
    cells = [
        f"{mutant.name}<br>`{mutant.symbol}`",
        mutant.why,
        _outcome(mutant, verdict),
        _naming(mutant, verdict),
        verdict.change,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _naming(mutant: Mutant, verdict: Verdict) -> str:
    if verdict.kind != "killed":
        return ""
    return f"no: {MISNAMED[mutant.name]}" if mutant.name in MISNAMED else "yes"


def _outcome(mutant: Mutant, verdict: Verdict) -> str:
    if verdict.kind == "killed":
        return f"killed ({verdict.config}): " + "; ".join(f"{red.code} {red.name}" for red in verdict.red)
    if verdict.kind == "survived":
        return f"**survived**{': ' + mutant.judgement if mutant.judgement else ''}"
    return f"**{verdict.kind}**: {verdict.note}"


def as_json(results: Results, versions: Mapping[str, str], seconds: float, day: date) -> dict[str, Any]:
    """Return everything as JSON values, the messages of the red checks included."""
    killed, of = killed_share(results)
    return {
        "date": day.isoformat(),
        "versions": dict(versions),
        "seconds": round(seconds),
        "killed": killed,
        "counted": of,
        "mutants": [
            asdict(mutant) | asdict(verdict) | {"seconds": round(verdict.seconds, 1)} for mutant, verdict in results
        ],
    }


def from_json(document: Mapping[str, Any]) -> list[tuple[Mutant, Verdict]]:
    """Return the results of an earlier run, with the judgements that the list has now; without mutants that it has otherwise."""
    mutants = {mutant.name: mutant for mutant in MUTANTS}
    results = []
    for entry in document["mutants"]:
        mutant = mutants.get(entry["name"])
        if mutant is None or any(getattr(mutant, name) != entry[name] for name in ("symbol", "old", "new", "witness")):
            continue
        red = tuple(Red(**each) for each in entry["red"])
        verdict = Verdict(entry["kind"], entry["config"], red, entry["note"], entry["change"], entry["seconds"])
        results.append((mutant, verdict))
    return results
