"""The installed libraries are those that d2l was made for.

What it does
------------
Compares the version of every library that d2l needs with the lowest that its package names.

Why it matters
--------------
`pip` does not repair what another package has downgraded, and a checkout needs no installation at all. An older library mostly
imports without a word: attention functions, cache classes and loading hooks of transformers have changed their meaning between
versions, and an older torch has no `grouped_mm` with a backward.

How it is detected
------------------
From the metadata of the installed distribution. Upper bounds are not judged: newer versions are tried as they appear.

How to fix
----------
Install what is named, into the environment that runs d2l.
"""

from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from checks.faults import override
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject


def check(subject: "Subject") -> Result:
    """Look up the installed version of every requirement."""
    needed = subject.implementation.requirements()
    if not needed:
        return Skip("no installed distribution names its requirements: pip install it")
    requirements = {text: Requirement(text) for text in needed}
    evidence = {"installed": {it.name: needed[text] for text, it in requirements.items()}}
    wrong = {
        text: needed[text] or "absent"
        for text, it in requirements.items()
        if not needed[text] or not it.specifier.contains(needed[text], prereleases=True)
    }
    if wrong:
        return Fail(
            message=f"older libraries than d2l was made for: {', '.join(requirements[text].name for text in wrong)}",
            expected=", ".join(f"{requirements[text].name}{requirements[text].specifier}" for text in wrong),
            actual=", ".join(f"{requirements[text].name} {found}" for text, found in wrong.items()),
            remedy=f"pip install {' '.join(repr(text) for text in wrong)}",
            evidence=evidence,
        )
    return Pass(f"{len(needed)} libraries are as new as they have to be", evidence)


def _one_of_them_old(healthy: object, *_: object) -> dict[str, str]:
    return {"transformers>=5.13": "4.57.1", "torch>=2.11": "2.13.0+cpu"}


RULE = Rule(
    code="ENV101",
    name="libraries-too-old",
    stage="static",
    severity="error",
    sources=("failure mode 19",),
    check=check,
    faults=(
        Fault("old-transformers", "transformers of the last major version", override(requirements=_one_of_them_old)),
    ),
)
