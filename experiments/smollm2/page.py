"""The page with what the experiment found: figures with their controls, harm, and ten questions with all their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2l.evaluation.scores import CONDITIONS, LABELS, Condition

GOALS = (
    "Goals: facts ≥ .95 exact match with the document's LoRA and ≤ .02 with another's; real questions: F1 at least half of "
    "that with the document in the prompt; perplexity of unrelated text within 2%."
)


@dataclass(frozen=True)
class Shown:
    """A question with the expected answer, the answers under all conditions, and that of the adapter in PEFT."""

    question: str
    expected: str
    answers: Mapping[Condition, str]
    peft: str


@dataclass(frozen=True)
class Findings:
    """Everything on the page.

    Attributes:
        facts: evaluations (JSON) by the name of their documents.
        real: evaluation of real questions; None where none were given.
        harm: see `Harm`.
        named: by condition, the share of answers to facts in which the value occurs, among other words or not.
        training: see `describe_training`.
        shown: picked by seed.
    """

    facts: Mapping[str, Mapping[str, Any]]
    real: Mapping[str, Any] | None
    harm: Mapping[str, Any]
    named: Mapping[str, Mapping[Condition, float]]
    training: Sequence[str]
    shown: Sequence[Shown]


def named_share(evaluation: Mapping[str, Any], expected: Mapping[tuple[int, int], str]) -> dict[Condition, float]:
    """Return by condition the share of answers in which the expected value occurs as it is written.

    Args:
        evaluation: JSON of `d2l eval`.
        expected: answers by (record, query).
    """
    found: dict[Condition, list[bool]] = {condition: [] for condition in CONDITIONS}
    for it in evaluation["answers"]:
        value = expected[it["record"], it["query"]].casefold()
        found[it["condition"]].append(value in it["answer"].casefold())
    return {condition: sum(values) / len(values) for condition, values in found.items()}


def write_page(findings: Findings, curve: str) -> str:
    """Write the page in Markdown."""
    parts = [
        "# On a real language model",
        "Written by `make real`: SmolLM2-135M-Instruct, real text of this machine's packages, facts placed into it. "
        + GOALS,
        "## Training",
        "\n".join(f"* {line}" for line in findings.training),
        f"![Loss and other curves over the steps]({curve})",
        "## Facts of the held-out split, whose names and values never occur in training",
        _facts_table(findings),
        _real(findings.real),
        "## Harm",
        _harm_table(findings.harm),
        f"## {len(findings.shown)} questions, picked by seed",
        _shown_table(findings.shown),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts_table(findings: Findings) -> str:
    lines = [
        "| documents | questions | | exact match | names the value | F1 | perplexity of the answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, evaluation in findings.facts.items():
        for condition in CONDITIONS:
            score = evaluation["scores"][condition]
            cells = [
                f"{evaluation['documents']} {name}",
                str(evaluation["questions"]),
                LABELS[condition],
                _interval(score["exact"]),
                f"{findings.named[name][condition]:.3f}",
                _interval(score["f1"]),
                f"{score['perplexity']['value']:.4g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    note = (
        "\nThe base answers in whole sentences, so that with the document in its prompt it names the value and seldom gives "
        "it alone: compare its column *names the value*."
    )
    return "\n".join(lines) + "\n" + note


def _real(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "## Real questions\n\nNot asked: no file of documents with questions was given (`--questions FILE`)."
    lines = [
        f"## Real questions\n\n{evaluation['documents']} documents, {evaluation['questions']} questions.\n",
        "| | exact match | F1 | relative F1 | perplexity of the answer |",
        "|---|---|---|---|---|",
    ]
    for condition in CONDITIONS:
        score = evaluation["scores"][condition]
        relative = "" if score["relative_f1"] is None else f"{score['relative_f1']:.3f}"
        cells = [_interval(score["exact"]), _interval(score["f1"]), relative, f"{score['perplexity']['value']:.4g}"]
        lines.append(f"| {LABELS[condition]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _harm_table(harm: Mapping[str, Any]) -> str:
    change = harm["unrelated"]["LoRA"] / harm["unrelated"]["no LoRA"] - 1
    lines = [
        "| perplexity per token | with its LoRA | with another's | without |",
        "|---|---|---|---|",
        "| the document itself | " + " | ".join(f"{value:.4g}" for value in harm["own"].values()) + " |",
        f"| unrelated real text | {harm['unrelated']['LoRA']:.4g} ({change:+.1%}) | | {harm['unrelated']['no LoRA']:.4g} |",
        "",
        f"Unrelated questions under the LoRAs of {harm['documents']} documents: {harm['same_answers']:.0%} of the answers "
        f"are the base's own word for word; F1 with them {harm['answers_f1']:.3f}.",
    ]
    return "\n".join(lines)


def _shown_table(shown: Sequence[Shown]) -> str:
    labels = [LABELS[condition] for condition in CONDITIONS]
    lines = [f"| question | expected | {' | '.join(labels)} | the adapter in PEFT |", "|---" * (len(labels) + 3) + "|"]
    for it in shown:
        cells = [it.question, it.expected, *(it.answers[condition] for condition in CONDITIONS), it.peft]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    same = sum(it.peft == it.answers["document"] for it in shown)
    return "\n".join(lines) + f"\n\nThe adapter exported to PEFT gives the same answer in {same} of {len(shown)}."


def _cell(text: str) -> str:
    """Return a text as it can stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
