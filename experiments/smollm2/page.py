"""The page with what the experiment found: figures with their controls, harm, and ten questions with all their answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2l.evaluation.scores import CONDITIONS, LABELS, Condition

GOALS = (
    "Goals: facts ≥ .95 exact match with the document's LoRA and ≤ .02 with another's; real questions: F1 at least half of "
    "that with the document in the prompt; perplexity of unrelated text within 2%."
)

# Pilots and runs of 2026-11-28 and -29, one seed each, by their own evaluations on held-out documents of the same kind
TRIED = """\
| documents of training | width | targets | learning rates (Muon, AdamW) | step | loss, own LoRA | another's | gap | exact match |
|---|---|---|---|---|---|---|---|---|
| 1 to 3 facts | 192, 1 × 48 | `v_proj` | 5.6e-3, 7e-4 | 60 | 2.21 | 2.37 | 0.16 ± 0.08 | .00 |
| 1 to 3 facts, 30% also recited | 192, 1 × 48 | `v_proj` | 5.6e-3, 7e-4 | 60 | 2.20 | 2.41 | 0.18 ± 0.10 | .00 |
| | | | | 120 | 2.14 | 2.26 | 0.11 ± 0.05 | .00 |
| | 192, 1 × 48 | `v_proj` | 1.6e-2, 1.5e-3 | 30 | 2.43 | 2.56 | 0.13 ± 0.06 | .00 |
| 1 fact, 30% also recited | 192, 1 × 48 | `o_proj` | 1.6e-2, 1.5e-3 | 25 | 2.40 | 2.53 | 0.13 ± 0.04 | .00 |
| | 192, 1 × 48 | `down_proj` | 1.6e-2, 1.5e-3 | 25 | 2.16 | 2.27 | 0.10 ± 0.03 | .00 |
| 1 fact whose value is a single word | 192, 1 × 48 | `down_proj` | 1.6e-2, 1.5e-3 | 50 | 2.82 | 6.81 | 3.99 ± 0.28 | .00 |
| | | | | 100 | 2.22 | 9.01 | 6.79 ± 0.50 | .16 |
| | 384, 4 × 64 | `down_proj` | 1.6e-2, 1.5e-3 | 50 | 2.55 | 8.00 | 5.45 ± 0.31 | .03 |
| | | | | 75 | 1.04 | 8.52 | 7.49 ± 0.40 | .47 |
| | | | | 100 | 0.71 | 8.78 | 8.07 ± 0.39 | .69 |
| then 1–2 facts, 1–2 words; held out 2 | 384, 4 × 64 | `down_proj` | 8e-3, 7.5e-4 | 125 | 4.43 | 8.03 | 3.60 ± 0.19 | .00 |
| | | | | 150 | 3.67 | 8.18 | 4.51 ± 0.24 | .00 |
| | | | | 200 | 4.08 | 8.45 | 4.37 ± 0.25 | .00 |
| 1 fact of a word; held out 1–2 words | 384, 4 × 64 | `down_proj` | 1.6e-2, 1.5e-3 | 50 | 3.67 | 8.05 | 4.39 ± 0.33 | .00 |
| | | | | 100 | 1.99 | 9.11 | 7.11 ± 0.37 | .47 |
| the same, other targets | 384, 4 × 64 | `v_proj` | 1.6e-2, 1.5e-3 | 50 | 4.08 | 6.99 | 2.90 ± 0.29 | .00 |
| | | | | 75 | 2.56 | 8.40 | 5.85 ± 0.41 | .38 |
| from step 125, 1 fact of 1–2 words | | | the same | 150 | 1.42 | 9.11 | 7.70 ± 0.48 | .59 |
| | | | | 200 | 1.15 | 9.60 | 8.46 ± 0.45 | .75 |
| | | | | 250 | 0.90 | 9.04 | 8.14 ± 0.33 | .66 |
| | | | | 300 | 0.35 | 11.83 | 11.48 ± 0.82 | .78 |
| from step 319, 1–2 facts, some of other values | | | the same | 350 | 1.03 | 7.70 | 6.67 ± 0.33 | .62 |
| | | | | 450 | 0.74 | 8.56 | 7.82 ± 0.41 | .66 |
| from step 465, real text around some, taught questions | | | half of it, to 0 | 500 | 0.37 | 9.11 | 8.75 ± 0.39 | .81 |
| | | | | 600 | 0.22 | 9.04 | 8.82 ± 0.39 | .84 |
| the recipe as it is, 1 fact of a word | 384, 4 × 64 | `down_proj` | 1.6e-2, 1.5e-3 | 100 | 1.72 | 9.46 | 7.74 ± 0.41 | .50 |
| | | | | 200 | 1.50 | 10.56 | 9.06 ± 0.47 | .75 |
| from step 215, 1 fact of 1–2 words | | | the same | 300 | 1.94 | 9.36 | 7.43 ± 0.49 | .53 |
| | | | | 400 | 0.33 | 11.00 | 10.68 ± 0.67 | .78 |
| | | | | 500 | 0.23 | 10.70 | 10.47 ± 0.56 | .84 |
| from step 512, 1–2 facts, some of other values | | | the same | 750 | 0.54 | 8.51 | 7.97 ± 0.35 | .75 |
| from step 756, up to 60 tokens of text, taught questions | | | the same | 800 | 1.60 | 7.16 | 5.56 ± 0.31 | .22 |
| | | | | 950 | 0.91 | 8.41 | 7.49 ± 0.33 | .66 |
| | | | | 1050 | 1.51 | 7.49 | 5.98 ± 0.32 | .44 |
| from step 1090, up to 240 tokens, up to 3 facts | | | half of it, to 0 | 1100 | 1.49 | 6.99 | 5.50 ± 0.26 | .41 |
| | | | | 1250 | 0.48 | 7.69 | 7.22 ± 0.33 | .84 |
| | | | | 1509 | 0.22 | 8.13 | 7.91 ± 0.36 | .91 |
| after it, 2 facts of 4 kinds; held out too | | | 1.0e-2, 1.0e-3 | 1525 | 1.60 | 6.91 | 5.30 ± 0.23 | .38 |
| | | | | 1575 | 1.18 | 7.41 | 6.24 ± 0.27 | .47 |
| | | | | 1650 | 0.86 | 7.97 | 7.11 ± 0.33 | .66 |
| anew, after 78 steps of 1 fact, 2 of 12 kinds; held out 2 | | | 1.0e-2, 9.4e-4 | 150 | 2.01 | 6.74 | 4.73 | .20 |
| 36 steps later, 4 kinds; held out too | | | the same | 225 | 1.83 | 6.40 | 4.57 | .14 |
| | | | 4.0e-3, 5.0e-4 | 275 | 1.41 | 6.90 | 5.49 | .30 |
| after the 78 steps, 2 facts of 12 kinds; held out 2 | | | 4.0e-3, 3.7e-4 | 100 | 2.29 | 6.03 | 3.75 ± 0.21 | .22 |
| | | | | 200 | 1.46 | 6.26 | 4.80 ± 0.19 | .36 |
| from step 226, 1 fact and what the document does not say | | | the same | 350 | 0.72 | 3.40 | 2.68 ± 0.14 | .50 |
| anew, 246 steps of 1 fact, a word; held out 2 of 4 kinds | | | 1.6e-2, 1.5e-3 | 200 | 3.37 | 8.64 | 5.28 ± 0.31 | .30 |
| from step 247, the same | | | 4.0e-3, 3.8e-4 | 300 | 3.86 | 10.32 | 6.46 ± 0.35 | .41 |
| from step 302, 2 facts of 4 kinds | | | 6.4e-3, 6.0e-4 | 450 | 1.63 | 6.79 | 5.16 ± 0.19 | .33 |
| from step 464, the same | | | 2.0e-3, 1.9e-4 | 650 | 1.23 | 6.98 | 5.75 ± 0.18 | .42 |
| from step 652, 2 facts, most of different sorts of values | | | 4.0e-3, 3.8e-4 | 750 | 1.60 | 7.78 | 6.18 ± 0.25 | .34 |
| from step 781, half of them two words of different kinds | | | the same | 950 | 1.46 | 6.58 | 5.12 ± 0.20 | .42 |

Width: of the latents, and of what they read of a token: its key heads by their size. The narrow ones had LoRAs of rank 8, the
wider ones of rank 4, and nothing was changed alone. Through one head of 48, 48 numbers pass of what a token is, of 576 in the
base, and held-out words came out as their neighbours (*switch* as *check*). Values of one word are read within 60 steps of 28
documents by the wider one, also words that training never had, with `v_proj` as with `down_proj`: what kept `v_proj` from
reading before was the width, or several facts from the first step. Narrow, values of several tokens stayed at what all
answers have in common, and a fifth of them mixed into words undid the words in 15 steps. Two facts at once, at half the rates
and right after single words, were not learnt either. In the first whole run 150 steps of one or two words at the full rates
(the loss averaged by document) came between, and then two facts at once, other values and real text went along. The second
whole run ended with step 1509 and is that of the tables below; the rows behind it go on from it, with twice the questions a
row. The next rows begin anew with as many questions, which take as long as two rows of half as many: a loss of .3 after 60
steps of 8.5 s instead of 100 of 4.6 s. No pilot of them came to read the question, which of two facts shows as an exact match
above .5: at the first rates gradient norms rose to 600; at 1/1.6 of them two facts stayed at .42 in training, at a quarter at
.48, where the loss fell faster, since single words are read better. A second question that the document does not answer, to
be answered with *unknown*, got what the first got, in 130 steps. Answers that are the sentence of the fact, as the base gives
them, were no help: after 50 steps no word was read (a loss of .65 a token of 13, where a word alone was at .6).

The last six rows are one more pilot anew, with the rows' old length. At a quarter of the rates single words went from a loss
of .12 to .02 in twenty steps, and from an exact match of .95 to .99, all in training. It did not help two facts: of four kinds
they stayed at .49 in training after 350 steps. Values of different sorts were told apart at once: two of a word, a digit, a
month, a day, a given name, a colour and a good, each of one token, rose from .35 to .88 in training within 90 steps, or seven
minutes. At the pilot's end (step 957) 74 documents of two sorts of values had .97 of their questions answered right, and none
had one answer to both; two words of different kinds, the same model's, .47 (46 documents), 45 of them with one answer. Those
documents are of the training split, with its values: training, which drew from them in random order, had read about a fifth of
the first, and two fifths of the second. For some sorts it is the base's own expectation of an answer that picks the value, not
what the question is about: *Name a month of the year.*, which training never asked, was answered with the document's month in
17 of 18 documents that had one beside another sort (one in 12 would be chance), *Name a day of the week.* in 7 of 9 (one in
7), *Name a number.* in 14 of 19 (one in 8), but *a person* in 10 of 17, *a colour* in 5 of 16, *something that is sold* in 1
of 11. No other controls were measured. Nor was it the rates: at those of the pilot that did come to read the question (1.0e-2,
1.0e-3) two words stayed at .44 for 80 steps more."""


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
        "## On the way to it",
        TRIED,
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
        "| documents | questions | | exact match | names the value | F1 | perplexity of the answer | alike |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, evaluation in findings.facts.items():
        size = size_of(evaluation["answers"])
        for condition in CONDITIONS:
            score = evaluation["scores"][condition]
            cells = [
                f"{evaluation['documents']} {name}, {size}",
                str(evaluation["questions"]),
                LABELS[condition],
                _interval(score["exact"]),
                f"{findings.named[name][condition]:.3f}",
                _interval(score["f1"]),
                f"{score['perplexity']['value']:.4g}",
                "" if score["alike"] is None else f"{score['alike']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    note = (
        "\nThe base answers in whole sentences, so that with the document in its prompt it names the value and seldom gives "
        "it alone: compare its column *names the value*. Alike: the share of documents of several facts whose questions all "
        "got one answer."
    )
    return "\n".join(lines) + "\n" + note


def size_of(answers: Sequence[Mapping[str, Any]]) -> str:
    """Return the fewest and most tokens and chunks of the documents that were asked about."""
    tokens, chunks = (sorted({it[key] for it in answers}) for key in ("document_tokens", "chunks"))
    several = f"{chunks[0]}–{chunks[-1]}" if len(chunks) > 1 else str(chunks[0])
    return f"{tokens[0]}–{tokens[-1]} tokens, {several} chunk{'s' if chunks[-1] > 1 else ''}"


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
