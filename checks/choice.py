"""Which checks run, and whose findings the user accepts: by code, by name, or by the letters that codes begin with."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from checks.result import STAGES, UsageError
from checks.rule import Rule, find_rule
from d2l.config.schema import RunConfig

_PREFIX = re.compile(r"[A-Z]{2,3}\d?")  # of codes such as ATT201: ATT, ATT2; ATT20 is taken for a slip
_DATED = re.compile(r"(?P<reason>.*)@(?P<last_day>\d{4}-\d{2}-\d{2})", re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """The rules to run, in their order; `required` of them were asked for one by one, or by their stage."""

    rules: tuple[Rule, ...]
    required: frozenset[str]


@dataclass(frozen=True)
class Ignore:
    """What the user accepts.

    Args:
        named: the check as the user named it: a code, or the letters that several begin with.
        codes: of the checks that this is about.
        reason: why a finding of theirs is acceptable.
        last_day: the last day on which it is accepted; None: always.
    """

    named: str
    codes: frozenset[str]
    reason: str
    last_day: date | None = None

    def holds(self, today: date) -> bool:
        """Tell whether it is still accepted."""
        return self.last_day is None or today <= self.last_day


def reads_data(stages: Collection[str]) -> bool:
    """Tell whether the checks of these stages read the run's data; empty means all."""
    return not stages or not {"data", "device"}.isdisjoint(stages)


def choose(rules: Sequence[Rule], stages: Collection[str], select: Collection[str]) -> Choice:
    """Return the rules of these stages and of this selection.

    Args:
        select: codes, names or beginnings of codes, several in one text with commas between; empty means all.

    Raises:
        UsageError: an unknown stage, code or name, or a selection that leaves nothing.
    """
    for stage in stages:
        if stage not in STAGES:
            raise UsageError(f"there is no stage {stage!r}: expected one of {', '.join(STAGES)}")
    tokens = [token for text in select for token in text.split(",") if token.strip()]
    if select and not tokens:
        raise UsageError("nothing would be checked: the selection names no check")
    single = {token: rule for token in tokens if (rule := _single(rules, token)) is not None}
    for rule in single.values():
        if stages and rule.stage not in stages:
            raise UsageError(
                f"{rule.code} {rule.name} belongs to stage {rule.stage}, which is not among the chosen stages "
                f"{', '.join(stages)}: add --stage {rule.stage} or leave --stage out"
            )
    selected = {rule.code for token in tokens for rule in find_rules(rules, token)}
    chosen = tuple(
        rule for rule in rules if (not stages or rule.stage in stages) and (not tokens or rule.code in selected)
    )
    if not chosen:
        what = f" that {' or '.join(tokens)} names" if tokens else ""
        raise UsageError(f"nothing would be checked: there is no check{what} in stage {' or '.join(stages or STAGES)}")
    required = chosen if stages else single.values()
    return Choice(chosen, frozenset(rule.code for rule in required))


def chosen_by(
    config: RunConfig, select: Collection[str], ignore: Mapping[str, str]
) -> tuple[Collection[str], dict[str, str]]:
    """Return a selection and what is ignored, together with the configuration's own: a selection goes before its own."""
    return select or config.select_checks, config.ignore_checks | dict(ignore)


def find_rules(rules: Sequence[Rule], token: str) -> tuple[Rule, ...]:
    """Return the rule of that code or name, or those whose codes begin so (`ATT`, `ATT2`).

    Raises:
        UsageError: there is none; the nearest ones are named.
    """
    found = _single(rules, token)
    return (found,) if found is not None else _beginning(rules, token) or (find_rule(rules, token),)


def _single(rules: Sequence[Rule], token: str) -> Rule | None:
    """Return the rule of that code or name; None where it is the beginning of codes."""
    return None if _beginning(rules, token) else find_rule(rules, token)


def _beginning(rules: Iterable[Rule], token: str) -> tuple[Rule, ...]:
    letters = token.strip().upper()
    return tuple(rule for rule in rules if _PREFIX.fullmatch(letters) and rule.code.startswith(letters))


def read_ignores(rules: Sequence[Rule], reasons: Mapping[str, str]) -> tuple[Ignore, ...]:
    """Return what the user accepts.

    Args:
        reasons: code, name or beginning of codes → `REASON` or `REASON@YYYY-MM-DD`, the last day on which it is accepted.

    Raises:
        UsageError: an unknown check, one that is named twice, an empty reason, or a day that does not exist.
    """
    ignores: list[Ignore] = []
    for token, text in reasons.items():
        found = find_rules(rules, token)
        named = found[0].code if _single(rules, token) else token.strip().upper()
        for rule in found:
            if any(rule.code in ignore.codes for ignore in ignores):
                raise UsageError(f"{rule.code} is ignored twice: give one reason")
        dated = _DATED.fullmatch(text)
        reason = (dated["reason"] if dated else text).strip()
        if not reason:
            raise UsageError(f"{named} is ignored without a reason: write --ignore {named}=REASON")
        last_day = _day(dated["last_day"], named) if dated else None
        ignores.append(Ignore(named, frozenset(rule.code for rule in found), reason, last_day))
    return tuple(ignores)


def _day(text: str, named: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{named} is ignored until {text}, a day that does not exist") from None
