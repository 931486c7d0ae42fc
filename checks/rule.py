"""Rules: what is checked, when, why, and the faults that prove that the check can see."""

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from checks.result import Result, Severity, Stage, UsageError

if TYPE_CHECKING:
    from checks.subject import Subject


class HasCodeAndName(Protocol):
    """A rule or its facts, as `find_rule` compares them."""

    @property
    def code(self) -> str:
        """Return the code, such as `ATT201`."""

    @property
    def name(self) -> str:
        """Return the name, such as `packed-documents-leak`."""


Known = TypeVar("Known", bound=HasCodeAndName)


@dataclass(frozen=True)
class Fault:
    """A defect that can be planted. `plant` returns a new subject that has it, and leaves the given one alone.

    `plant` raises `NotApplicable` where the subject has nothing that could be spoilt in this way.
    """

    name: str
    description: str
    plant: "Callable[[Subject], Subject]"

    @property
    def replaces(self) -> frozenset[str]:
        """Name the implementation's methods that are all this fault changes; empty where it may change anything."""
        return getattr(self.plant, "replaces", frozenset())

    @property
    def configures(self) -> frozenset[str]:
        """Name the fields of the configuration that this fault sets beside; see `checks.faults.Override.under`."""
        return frozenset(getattr(self.plant, "configured", ()))


@dataclass(frozen=True)
class Rule:
    """One check. Its documentation is the docstring of the module that defines `check`.

    Args:
        code: stable and never used twice, such as `ATT201`.
        name: kebab-case, describes the fault and not the fix, such as `packed-documents-leak`.
        sources: keys of the documented fixes, failure modes and threads that the rule comes from; see `checks.sources`.
        requires: codes of earlier rules without which this one measures nothing; if one of them fails, this one is
            blocked instead of reporting the same cause twice.
        lasting: of a rule of stage `device`: takes the real weights, and holds for every run that is the same in everything;
            the others are judged anew by a run that reuses a report.
        plugin: distribution and version that it comes from, which `checks.plugins` puts in; empty for d2l's own.
    """

    code: str
    name: str
    stage: Stage
    severity: Severity
    sources: tuple[str, ...]
    check: "Callable[[Subject], Result]"
    requires: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    lasting: bool = False
    plugin: str = ""

    @property
    def documentation(self) -> str:
        """Return the docstring of the rule's file."""
        return sys.modules[self.check.__module__].__doc__ or ""


def find_rule(rules: Sequence[Known], code_or_name: str) -> Known:
    """Find the rule of that code or name, in any case.

    Args:
        rules: rules, or their facts.

    Raises:
        UsageError: there is none; the nearest ones are named.
    """
    wanted = code_or_name.strip().lower()
    known = {key.lower(): rule for rule in rules for key in (rule.code, rule.name)}
    if wanted in known:
        return known[wanted]
    similar = [*difflib.get_close_matches(wanted, known, n=3), *(key for key in known if wanted and wanted in key)]
    near = [known[key] for key in similar][:3]
    hint = " or ".join(f"{rule.code} {rule.name}" for rule in dict.fromkeys(near))
    advice = f"did you mean {hint}?" if hint else "`d2l checks` lists them all"
    raise UsageError(f"there is no check {code_or_name!r}: {advice}")
