"""`d2l eval` asks under the conditions that it names, and its scores are those of the written formulas.

What it does
------------
Lets the run's own evaluation answer three questions about two documents with a saved light twin, each under the document's LoRA,
the other one's, none, and with the document in the prompt; and grade pairs of answers whose scores are known.

Why it matters
--------------
An evaluation is what a run is bought for. A control that is the same as what it controls, likelihoods over the question's tokens
too, a mean of perplexities: the figures look as expected, and say that a hypernetwork reads its documents, or that it does not.

How it is detected
------------------
Each likelihood, and the first token of each answer, come from the whole conversation in one pass of an untouched model with
edited weights, in the tokens that the tokenizer library gives. Scores of answers are computed by SQuAD's and ROUGE's formulas,
and the means of the conditions from the answers. Skipped where the implementation has no such evaluation.

How to fix
----------
Bind each question's own LoRA, count the supervised tokens alone, and divide sums by sums over all answers of a condition.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from checks.data.evaluated import QUESTIONS, ExpectedAnswer, asked_records, expected_answers, with_one_right
from checks.faults import override
from checks.implementation import Implementation
from checks.oracles import answers as formulas
from checks.result import Fail, Inapplicable, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.training.saved_twin import reading_config, reading_twin, row_of, saved
from checks.training.steps import TOLERANCE

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.records import Record

# Answers and what was expected: case, punctuation, articles; words twice; their order; none of them; endings like articles.
PROBES = (
    ("The Cat, sat!", "cat sat"),
    ("red red blue", "red blue blue"),
    ("harbour of the north", "the north harbour"),
    ("nobody", "a keeper"),
    ("the", "an"),
    ("Korea", "Kore"),
    ("42 miles", "42 miles away, say the old maps"),
)


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare an evaluation's answers, likelihoods and scores with the formulas."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    records = asked_records(subject)
    if len(records) < len(QUESTIONS):
        return Inapplicable("the run keeps fewer than two different documents")
    config = reading_config(subject)
    rows = [row_of(subject, config, record) for record in records]
    records = with_one_right(subject, records, rows)
    with saved(subject, config, rows) as checkpoint:
        base = reading_twin(subject).base
        found = subject.implementation.evaluation(base, subject.chat, checkpoint, records, 1)
    expected = expected_answers(subject, records, rows)
    answers = {(it["condition"], it["record"], it["query"]): it for it in found["answers"]}
    if answers.keys() != expected.keys():
        return _finding("every question under four conditions", f"{len(answers)} answers instead of {len(expected)}")
    for wanted, actual in (*_problems(answers, expected), *_graded(subject, answers, records), *_means(found, answers)):
        return _finding(wanted, actual)
    worst = max(abs(answers[key]["nll"] / wanted.nll - 1) for key, wanted in expected.items())
    return Pass(
        f"{len(answers)} answers under four conditions are those of the formulas, likelihoods to {worst:.1g}",
        {"first tokens": {" ".join(map(str, key)): sorted(wanted.texts) for key, wanted in expected.items()}},
    )


def _problems(
    answers: Mapping[tuple[str, int, int], Any], expected: Mapping[tuple[str, int, int], ExpectedAnswer]
) -> Iterator[tuple[str, str]]:
    """Yield what is expected of an answer or its likelihood, and what is found."""
    for key, wanted in expected.items():
        found, (condition, record, query) = answers[key], key
        where = f"{condition}, document {record}, question {query}"
        if found["tokens"] != wanted.tokens or not abs(found["nll"] - wanted.nll) <= TOLERANCE * wanted.nll:
            yield (
                f"{where}: {wanted.nll:.6g} nats over {wanted.tokens} tokens",
                f"{found['nll']:.6g} over {found['tokens']}",
            )
        if found["answer"] not in wanted.texts:
            yield f"{where}: an answer that begins with {' or '.join(map(repr, wanted.texts))}", repr(found["answer"])


def _graded(
    subject: "Subject", answers: Mapping[tuple[str, int, int], Any], records: "Sequence[Record]"
) -> Iterator[tuple[str, str]]:
    """Yield what is expected of the scores of an answer, and what is found."""
    given = [
        (found["answer"], records[record].responses[query], found) for (_, record, query), found in answers.items()
    ]
    probed = [(*pair, subject.implementation.grade(*pair)) for pair in PROBES]
    for answer, response, scores in (*probed, *given):
        for name, formula in formulas.SCORES.items():
            if not abs(scores[name] - formula(answer, response)) <= TOLERANCE:
                yield (
                    f"{name} of {answer!r} for {response!r}: {formula(answer, response):.4g}",
                    f"{scores[name]:.4g}",
                )


def _means(found: Mapping[str, Any], answers: Mapping[tuple[str, int, int], Any]) -> Iterator[tuple[str, str]]:
    """Yield what is expected of the scores of a condition, and what is found."""
    of_condition = defaultdict(list)
    for (condition, _, _), answer in answers.items():
        of_condition[condition].append(answer)
    for condition, some in of_condition.items():
        nats, tokens = (sum(it[name] for it in some) for name in ("nll", "tokens"))
        means = {name: sum(it[name] for it in some) / len(some) for name in formulas.SCORES}
        means["perplexity"] = math.exp(nats / tokens)
        for name, wanted in means.items():
            value = found["scores"][condition][name]["value"]
            if not abs(value - wanted) <= TOLERANCE * max(abs(wanted), 1):
                yield f"{name} of {condition}: {wanted:.6g}", f"{value:.6g}"


def _finding(expected: str, actual: str) -> Fail:
    return Fail(
        message="an evaluation asks or grades otherwise than it says",
        expected=expected,
        actual=actual,
        remedy="bind each question's own LoRA, count supervised tokens alone, and divide sums by sums over all answers",
    )


def _evaluating(change: Callable[[dict[str, Any]], None], unless: Callable[["Subject"], str] = lambda _: "") -> Any:
    """Make a fault that changes what an evaluation returns."""

    def evaluation(healthy: Implementation, *arguments: Any) -> Mapping[str, Any]:
        found = dict(healthy.evaluation(*arguments))
        change(found)
        return found

    return override(evaluation=evaluation, unless=unless)


def _without_text(subject: "Subject") -> str:
    """Say why answers of one token have no text: the user is shown what stands behind a header, which is part of them."""
    return "an answer begins with its header (supervision: sampled)" if subject.config.supervision == "sampled" else ""


def _controlled_by_itself(found: dict[str, Any]) -> None:
    """Answer under the own LoRA where none belongs."""
    own = {(it["record"], it["query"]): it for it in found["answers"] if it["condition"] == "document"}
    found["answers"] = [
        {**own[it["record"], it["query"]], "condition": "none"} if it["condition"] == "none" else it
        for it in found["answers"]
    ]


def _swapped(found: dict[str, Any]) -> None:
    """Name each document's own LoRA another one's, and the other way round."""
    names = {"document": "other", "other": "document"}
    found["answers"] = [{**it, "condition": names.get(it["condition"], it["condition"])} for it in found["answers"]]


def _one_token_more(found: dict[str, Any]) -> None:
    found["answers"] = [{**it, "tokens": it["tokens"] + 1} for it in found["answers"]]


def _answers_moved(found: dict[str, Any]) -> None:
    """Give each answer to the next question."""
    texts = [it["answer"] for it in found["answers"]]
    found["answers"] = [
        {**it, "answer": text} for it, text in zip(found["answers"], texts[1:] + texts[:1], strict=True)
    ]


def _mean_perplexity(found: dict[str, Any]) -> None:
    """Take the mean of the answers' perplexities."""
    for condition, scores in found["scores"].items():
        some = [math.exp(it["nll"] / it["tokens"]) for it in found["answers"] if it["condition"] == condition]
        scores["perplexity"]["value"] = sum(some) / len(some)


def _grading(**change: Callable[[str, str], float]) -> Any:
    """Make a fault of the scores of an answer."""

    def grade(healthy: Implementation, answer: str, expected: str) -> Mapping[str, float]:
        return {**healthy.grade(answer, expected), **{name: it(answer, expected) for name, it in change.items()}}

    return override(grade=grade)


def _f1_of_sets(answer: str, expected: str) -> float:
    found, wanted = (set(formulas.squad_words(text)) for text in (answer, expected))
    shared = len(found & wanted)
    return 2 * shared / (len(found) + len(wanted)) if found and wanted else float(found == wanted)


RULE = Rule(
    code="EVL302",
    name="graded-otherwise",
    stage="data",
    severity="error",
    sources=("failure mode 30", "https://arxiv.org/abs/1606.05250"),
    requires=("EVL301", "EVL202", "DAT303", "DAT309", "SAV201"),
    check=check,
    faults=(
        Fault(
            "controlled-by-itself",
            "without a document, the document's LoRA is bound",
            _evaluating(_controlled_by_itself),
        ),
        Fault("loras-swapped", "own and other LoRAs are swapped", _evaluating(_swapped)),
        Fault("one-token-more", "likelihoods count a token of the question", _evaluating(_one_token_more)),
        Fault("answers-moved", "each answer is given to the next question", _evaluating(_answers_moved, _without_text)),
        Fault("mean-perplexity", "perplexity is a mean over answers", _evaluating(_mean_perplexity)),
        Fault("case-counts", "exact match looks at case and punctuation", _grading(exact=lambda a, b: float(a == b))),
        Fault("f1-of-sets", "F1 counts each word once", _grading(f1=_f1_of_sets)),
        Fault("order-ignored", "ROUGE-L looks at words in any order", _grading(rouge_l=formulas.f1)),
    ),
)
