"""Whether an earlier report speaks for a run: it passed, is as it was written, and nothing that it judged has changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.choice import read_ignores
from checks.differences import read_report
from checks.result import Report, UsageError
from checks.rule import Rule
from checks.runner import Observer, run_checks
from checks.seal import code_fingerprint, digest

if TYPE_CHECKING:
    from checks.subject import Subject

PLACES = ("versions", "device", "plugins")  # of what a report says that it judged; the rest is in the fingerprint
ANEW = "device"  # a stage that is judged anew, but for what lasts: free memory and disk are what they are now


def reuse(
    place: Path,
    subject: "Subject",
    rules: Sequence[Rule],
    ignore: Mapping[str, str],
    observe: Observer = lambda rule: None,
    today: date | None = None,
) -> tuple[Report | None, str]:
    """Return the report of an earlier preflight with what changes on a device judged anew, or None, and what to say of it.

    Args:
        place: a JSON report, or the folder of a run.
        subject: what would be judged.
        rules: all of them.
        ignore: what the user accepts now, see `checks.choice.read_ignores`.

    Raises:
        UsageError: see `run_checks`.
    """
    try:
        document = read_report(place)
    except UsageError as error:
        return None, str(error)
    if reasons := _against(document, subject, rules, ignore, today or date.today()):
        return None, f"the report {place} does not speak for this run: {'; '.join(reasons)}"
    earlier = Report.from_json(document)
    now = [rule for rule in rules if not rule.lasting]
    anew = run_checks(subject, now, stages=(ANEW,), ignore=ignore, observe=observe, today=today)
    fresh = {outcome.code: outcome for outcome in anew.outcomes}
    outcomes = tuple(fresh.get(outcome.code, outcome) for outcome in earlier.outcomes)
    report = replace(earlier, config=subject.name, judged=dict(subject.judged), outcomes=outcomes)
    return report, f"the report {place} speaks for this run: stage {ANEW} is judged anew, the rest is taken from it"


def _against(
    document: Mapping[str, Any], subject: "Subject", rules: Sequence[Rule], ignore: Mapping[str, str], today: date
) -> list[str]:
    """Return what stands against a report, in words."""
    if document.get("digest") != digest(document):
        return ["it is not as it was written"]
    judged, codes = document["judged"], {it["code"] for it in document["outcomes"]}
    reasons = []
    if document["fingerprint"] != subject.fingerprint:
        reasons.append("it judged another configuration, data, base, tokenizer, template or library")
    if document["code"] != code_fingerprint():
        reasons.append("it was written by other code of d2l")
    reasons += [
        f"it judged on other {what}: {judged.get(what, 'none')}, and here are {subject.judged.get(what, 'none')}"
        for what in PLACES
        if judged.get(what) != subject.judged.get(what)
    ]
    if missing := [rule.code for rule in rules if rule.code not in codes]:
        reasons.append(f"it did not judge {', '.join(missing)}")
    if document["summary"]["exit_code"] != 0:
        reasons.append("it does not pass")
    accepted = {code for it in read_ignores(rules, ignore) if it.holds(today) for code in it.codes}
    if no_more := [it["code"] for it in document["outcomes"] if it["ignored"] and it["code"] not in accepted]:
        reasons.append(f"it ignores {', '.join(no_more)}, which this run does not")
    return reasons
