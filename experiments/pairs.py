"""Pairs of planted faults: with two at once both are named, or one is blocked by the other and named once that is gone.

    python experiments/pairs.py            # one fault of every check, all pairs: what `make pairs` does
    python experiments/pairs.py --all      # every fault with every fault of another check

A report that names one cause of two, and turns green or silent about the other, would send its reader home too early.
Only the two checks and what they require are run: nothing else decides their outcome; and where one is skipped, the checks
that it names. A requirement that uses nothing of what either fault changes keeps the outcome that it has without them.
"""

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

from checks.faults import Override, Used, override
from checks.processes import available_cores, in_processes
from checks.production import make_subject
from checks.result import NotApplicable, NotOffered, Outcome
from checks.rule import Fault, Rule
from checks.rules import RULES
from checks.runner import examine
from checks.selftest import concerns, measure_alone
from checks.subject import Subject, changed
from checks.threads import one_thread
from d2l.config.load import load_config
from d2l.errors import D2LError

Planted = tuple[Rule, Fault]
CONFIG = Path("configs/tiny_gpt_oss.yaml")


@dataclass(frozen=True)
class Pair:
    """Two planted faults and what became of them: both named, blocked, inapplicable together, or lost."""

    first: str
    second: str
    result: str
    detail: str = ""


@dataclass(frozen=True)
class Clean:
    """The run without faults, what every check says of it, and the checks of which a fault can change that."""

    subject: Subject
    outcomes: Mapping[str, Outcome]
    changed: Mapping[Fault, frozenset[str]]

    @classmethod
    def of(cls, subject: Subject, planted: Sequence[Planted]) -> "Clean":
        """Run every check on a subject, each by itself."""
        outcomes, used = measure_alone(subject, RULES)
        changed = {fault: frozenset(_changed_by(fault, subject, used)) for _, fault in planted}
        return cls(subject, {outcome.code: outcome for outcome in outcomes}, changed)


def _changed_by(fault: Fault, subject: Subject, used: Mapping[str, Used]) -> Iterator[str]:
    """Yield the checks whose outcome a fault can change: any, where it cannot be planted by itself."""
    try:
        planted = fault.plant(subject)
    except (NotApplicable, NotOffered, D2LError):
        planted = None
    yield from (rule.code for rule in RULES if planted is None or concerns(rule, fault, planted, subject, used))


def clean_subject() -> Subject:
    """Return the shipped tiny run, on a machine with room for it."""
    room = override(
        gpu=lambda healthy: "cpu", free_memory=lambda healthy: 2**60, free_disk=lambda healthy, config: 2**60
    )
    return room(make_subject(load_config(CONFIG)))


def faults(everything: bool = False) -> list[Planted]:
    """List the faults of all checks, or the first of each."""
    return [(rule, fault) for rule in RULES for fault in (rule.faults if everything else rule.faults[:1])]


def pairs(planted: Sequence[Planted]) -> list[tuple[Planted, Planted]]:
    """List all pairs of faults of different checks."""
    return [(one, two) for one, two in itertools.combinations(planted, 2) if one[0] != two[0]]


def try_pair(clean: Clean, one: Planted, two: Planted) -> Pair:
    """Plant both and look at what the report makes of them."""
    names = [f"{rule.code} {fault.name}" for rule, fault in (one, two)]
    faulty, reason = _planted(clean.subject, one[1], two[1])
    if faulty is None:
        return Pair(*names, "inapplicable", reason)
    changed = {one[0].code, two[0].code}.union(*(clean.changed.get(fault, ()) for _, fault in (one, two)))

    def known(judged: Subject, rule: Rule) -> Outcome | None:
        return None if rule.code in changed or judged is not faulty else clean.outcomes.get(rule.code)

    def outcomes(*rules: Rule) -> dict[str, Outcome]:
        found = examine(faulty, _needed(*rules), {}, lambda rule: None, known=known)
        return {outcome.code: outcome for outcome in found}

    found = outcomes(one[0], two[0])
    first, second = found[one[0].code], found[two[0].code]
    if first.found_fault and second.found_fault:
        return Pair(*names, "both named")
    for named, hidden in ((first, second), (second, first)):
        if not named.found_fault:
            continue
        if hidden.blocked_by and found[hidden.blocked_by].found_fault:
            return Pair(*names, "blocked", f"{hidden.code} by {hidden.blocked_by}")
        if hidden.outcome == "skip":  # it says which checks judge what it waits for; one of them has to be red
            judges = [rule for rule in RULES if rule.code in hidden.message]
            if causes := [code for code, outcome in outcomes(*judges).items() if outcome.found_fault]:
                return Pair(*names, "blocked", f"{hidden.code} by {', '.join(causes)}")
    for hidden, other in ((one, two), (two, one)):
        if not found[hidden[0].code].found_fault and not _shows_under(other[1], *hidden, clean.subject):
            return Pair(*names, "inapplicable", f"{hidden[1].name} is no fault under the settings of {other[1].name}")
    return Pair(*names, "lost", "; ".join(map(_words, (first, second))))


def _shows_under(other: Fault, rule: Rule, fault: Fault, subject: Subject) -> bool:
    """Tell whether a fault by itself is named under the settings in which another shows, where that needs any."""
    settings = other.plant.configured if isinstance(other.plant, Override) else {}
    if not settings:
        return True
    try:
        planted = fault.plant(replace(subject, config=changed(subject.config, **settings)))
    except NotApplicable:
        return False
    outcomes = examine(planted, _needed(rule), {}, lambda rule: None)
    return next(outcome.found_fault for outcome in outcomes if outcome.code == rule.code)


def _planted(subject: Subject, one: Fault, two: Fault) -> tuple[Subject | None, str]:
    """Plant both, in whichever order is possible: some faults are made from what another has spoilt."""
    reason = ""
    for first, second in ((one, two), (two, one)):
        try:
            spoilt = first.plant(subject)
            both = second.plant(spoilt)
            if same := _changed(subject, spoilt) & _changed(spoilt, both):
                return None, f"both set {', '.join(same)}"
            return both, ""
        except (NotApplicable, NotOffered, D2LError) as error:
            reason = str(error).splitlines()[0]
    return None, reason


def _changed(before: Subject, after: Subject) -> set[str]:
    """Return the keys of the configuration that a fault has set."""
    return {key for key, value in after.config if value != getattr(before.config, key)}


def _needed(*rules: Rule) -> list[Rule]:
    """Return these rules and all that they require, in the order of running."""
    by_code = {rule.code: rule for rule in RULES}
    found: set[str] = set()
    waiting = [rule.code for rule in rules]
    while waiting:
        code = waiting.pop()
        if code not in found:
            found.add(code)
            waiting += by_code[code].requires
    return [rule for rule in RULES if rule.code in found]


def _words(outcome: Outcome) -> str:
    blocked = f" by {outcome.blocked_by}" if outcome.blocked_by else ""
    return f"{outcome.code} {outcome.outcome}{blocked}: {outcome.message[:80]}"


def run(clean: Clean, chosen: Sequence[tuple[Planted, Planted]]) -> Iterator[Pair]:
    """Try the pairs on all cores."""
    return in_processes(lambda index: try_pair(clean, *chosen[index]), len(chosen), available_cores())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all faults of every check instead of the first")
    parser.add_argument("--output", type=Path, help="write the outcomes to this JSON file")
    options = parser.parse_args()
    started = time.perf_counter()
    with one_thread():
        planted = faults(options.all)
        chosen = pairs(planted)
        clean = Clean.of(clean_subject(), planted)
        outcomes = []
        for pair in run(clean, chosen):
            outcomes.append(pair)
            if pair.result == "lost":
                sys.stdout.write(f"{pair.first} + {pair.second}: {pair.detail}\n")
                sys.stdout.flush()
    counts = Counter(pair.result for pair in outcomes)
    seconds = time.perf_counter() - started
    summary = ", ".join(f"{number} {what}" for what, number in counts.most_common())
    sys.stdout.write(f"{len(outcomes)} pairs in {seconds:.0f} s: {summary}\n")
    if options.output:
        document = {"date": str(date.today()), "counts": dict(counts), "pairs": [asdict(pair) for pair in outcomes]}
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if counts["lost"] else 0)


if __name__ == "__main__":
    main()
