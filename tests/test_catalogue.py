"""Facts of checks, read from source files; that they equal those of the imported rules is shown in test_rules."""

from pathlib import Path

import pytest

from checks.catalogue import CheckFacts, FaultFacts, read_catalogue

RULE = '''"""What must hold.

What it does
------------
Looks.
"""

RULE = Rule(
    code="TOY201", name="toy-rule", stage="twin", severity="error", sources=("fix 1", "fix " "2"), check=check,
    faults=(Fault("own", "the rule's " "own", plant(1)),),
)
'''
LIST = "from x import b, a\n\nRULES: tuple[Rule, ...] = (b.RULE, a.RULE)\n"


def write(folder: Path, b: str = RULE, listed: str = LIST) -> Path:
    (folder / "__init__.py").write_text(listed, encoding="utf-8")
    (folder / "a.py").write_text(RULE.replace("TOY201", "TOY202"), encoding="utf-8")
    (folder / "b.py").write_text(b, encoding="utf-8")
    return folder


def test_facts_are_read_in_the_order_of_the_list(tmp_path: Path) -> None:
    first, second = read_catalogue(write(tmp_path))
    assert first == CheckFacts(
        code="TOY201",
        name="toy-rule",
        stage="twin",
        severity="error",
        sources=("fix 1", "fix 2"),
        requires=(),
        documentation="What must hold.\n\nWhat it does\n------------\nLooks.",
        faults=(FaultFacts("own", "the rule's own"),),
    )
    assert second.code == "TOY202"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"toy-rule"', "NAME"), r"b.py:9: a fact must be a literal. Got NAME"),
        (('"the rule\'s " "own"', "f'{x}'"), r"b.py:10: a fact must be a literal"),
        (("RULE = Rule(", "OTHER = Rule("), r"b.py: RULE must be a call of Rule"),
    ],
)
def test_a_fact_that_is_computed_is_refused(change: tuple[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        read_catalogue(write(tmp_path, RULE.replace(*change)))


def test_a_list_without_rules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RULES"):
        read_catalogue(write(tmp_path, listed="RULES = make()\n"))
