"""Mutants whose red check does not name the cause: judged by reading its message beside the bug; all others name it."""

MISNAMED: dict[str, str] = {
    "attention-residual-lost": "HYP201 sees ranks that are alike, and not the Perceiver's missing residual",
}
