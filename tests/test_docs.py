"""CHECKS.md and explanations, made from toy rules whose files are made here."""

import importlib
import json
import sys
from dataclasses import replace

import pytest

from checks.catalogue import facts_of
from checks.docs import SECTIONS, as_json, explain, main, problems, render_markdown, sections, summary
from checks.result import Pass, UsageError
from checks.rule import Fault, Rule

DOCUMENTATION = "Packed documents do not see each other | at all.\n\n" + "\n\n".join(
    f"{heading}\n{'-' * len(heading)}\nText of {heading.lower()}." for heading in SECTIONS
)


@pytest.fixture
def rule(tmp_path, monkeypatch):
    """Return what makes the facts of a rule whose `check` lives in a file of its own with the given docstring."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(documentation=DOCUMENTATION, code="ATT201", name="packed-documents-leak", **rest):
        module = f"toy_rule_{len(made)}"
        (tmp_path / f"{module}.py").write_text(
            f'"""{documentation}\n"""\n\n\ndef check(subject):\n    return subject\n'
        )
        importlib.invalidate_caches()
        check = importlib.import_module(module).check
        made.append(module)
        fault = Fault("mask-none", "no mask is passed", lambda subject: subject)
        rest = {"stage": "twin", "severity": "error", "sources": ("failure mode F2",), "faults": (fault,)} | rest
        return facts_of(Rule(code=code, name=name, check=check, **rest))

    yield make
    for module in made:
        del sys.modules[module]


def test_sections_are_read_from_the_file(rule):
    assert summary(rule()) == "Packed documents do not see each other | at all."
    assert sections(rule()) == {heading: f"Text of {heading.lower()}." for heading in SECTIONS}


def test_a_complete_rule_has_no_problems(rule):
    assert problems([rule(), rule(code="ATT202", name="future-visible", requires=("ATT201",))]) == []


@pytest.mark.parametrize(
    ("documentation", "words"),
    [
        (DOCUMENTATION.replace("How to fix\n----------\n", ""), "sections must be"),
        (DOCUMENTATION.replace("How to fix", "How to repair"), "sections must be"),
        (f"{DOCUMENTATION}\n\nSource\n------\nFix 2.", "sections must be"),
        (DOCUMENTATION.replace("Text of how to fix.", ""), "section 'How to fix' is empty"),
        (DOCUMENTATION.partition("\n\n")[2], "first line"),
        ("", "sections must be"),
    ],
)
def test_missing_documentation_is_a_problem(rule, documentation, words):
    assert any(words in problem and problem.startswith("ATT201") for problem in problems([rule(documentation)]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"code": "ATT1"}, "three capitals"),
        ({"name": "Packed_documents"}, "kebab-case"),
        ({"faults": ()}, "planted fault"),
        ({"requires": ("ATT999",)}, "requires ATT999"),
        ({"requires": ("ATT201",)}, "requires ATT201"),
        ({"sources": ()}, "at least one source"),
        ({"sources": ("fix 2", "fix 2")}, "each of them once"),
        ({"sources": ("fix 2", "DESIGN, decision 6")}, "there is no source 'DESIGN, decision 6'"),
        ({"sources": ("failure mode 99",)}, "must have the anchor failure-mode-99 once. Got 0"),
        ({"sources": ("docs/missing.md",)}, "docs/missing.md is not shipped"),
    ],
)
def test_a_rule_out_of_order_is_a_problem(rule, change, words):
    assert any(words in problem for problem in problems([replace(rule(), **change)]))


def test_codes_names_and_fault_names_are_used_once(rule):
    first = rule()
    assert problems([first, first]) == ["ATT201: ATT201 is taken", "ATT201: packed-documents-leak is taken"]
    assert any("planted fault" in problem for problem in problems([replace(first, faults=first.faults * 2)]))


def test_stages_stand_in_order(rule):
    late = [rule(), rule(code="CFG101", name="a-typo", stage="static")]
    assert any("order of their stages" in problem for problem in problems(late))


def test_explain_takes_code_or_name(rule):
    text = explain([rule()], "att201")
    assert text == explain([rule()], "packed-documents-leak")
    assert text.splitlines()[:2] == ["ATT201 packed-documents-leak", "Packed documents do not see each other | at all."]
    for words in (
        "requires  nothing",
        "Sources\n-------\nFailure mode F2: NaN with flash kernels; ",
        "How to fix\n----------\nText of how to fix.",
        "mask-none: no mask",
    ):
        assert words in text


def test_explain_suggests(rule):
    with pytest.raises(UsageError, match="did you mean ATT201 packed-documents-leak"):
        explain([rule()], "ATT210")


def test_markdown_has_an_index_and_every_part(rule):
    text = render_markdown([rule(), rule(code="DAT301", name="labels-lost", stage="data", requires=("ATT201",))])
    for words in (
        "## Stage twin\n",
        "## Stage data\n",
        "| [ATT201](#att201) | packed-documents-leak | error | Packed documents do not see each other \\| at all. |",
        '<a id="att201"></a>\n\n## ATT201 packed-documents-leak\n',
        "- requires: ATT201\n",
        "### Why it matters\n\nText of why it matters.\n",
        "### Sources\n\n- [Failure mode F2: NaN with flash kernels; ",
        "](docs/failure_modes.md#failure-mode-f2)\n",
        "### Planted faults\n\n- `mask-none`: no mask is passed\n",
    ):
        assert words in text
    assert text.endswith("no mask is passed\n")


def test_main_prints_or_says_what_is_missing(rule, monkeypatch, capsys):
    monkeypatch.setattr("checks.docs.read_catalogue", lambda: (rule(),))
    main()
    assert capsys.readouterr().out == render_markdown([rule()])
    monkeypatch.setattr("checks.docs.read_catalogue", lambda: (rule(""),))
    with pytest.raises(SystemExit, match="sections must be"):
        main()


def test_json_has_title_and_link_of_every_source(rule):
    (check,) = json.loads(as_json([rule(sources=("fix 2", "huggingface/peft#2826"))]))
    fix, thread = check["sources"]
    assert (fix["source"], fix["title"]) == ("fix 2", "Fix 2: attention in training")
    assert fix["link"].endswith("docs/nine_fixes.md#fix-2")
    assert thread["link"] == "https://github.com/huggingface/peft/issues/2826"


def test_documentation_of_a_rule_is_that_of_its_check():
    assert Rule("A", "b", "twin", "error", (), lambda subject: Pass("")).documentation == __doc__
