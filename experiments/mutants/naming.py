"""Mutants whose red check does not name the cause: judged by reading its message beside the bug; all others name it."""

MISNAMED: dict[str, str] = {
    "attention-residual-lost": "HYP201 sees ranks that are alike, and not the Perceiver's missing residual",
    "budgets-swapped": "several checks stop with the error that no row fits",
    "rows-that-just-fit-dropped": "several checks stop with the error that no row fits",
    "divided-by-all-tokens": "STP201 reports the step that it cannot take, and not its loss",
    "weights-drawn-anew": "OPT202 sees other gradients, and not other weights",
    "gradients-never-zeroed": "OPT202 sees gradients that are too large, and not why",
    "answers-reversed": "DAT301 reports a teacher that does not fit, and not the answers",
    "answer-cut": "DAT301 reports a teacher that does not fit, and not the answers",
    "answer-in-lower-case": "DAT301 reports a teacher that does not fit, and not the answers",
    "supervision-not-passed": "DAT301 reports a teacher that does not fit, and not the supervision",
}
