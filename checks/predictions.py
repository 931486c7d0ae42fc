"""What a report predicts of the run's steps, from the evidence of its checks."""

from checks.result import Report
from d2l.train.first_step import Prediction
from d2l.train.metrics import GIB

ROWS_FROM, MEMORY_FROM = "DAT305", "MEM401"  # the checks that read packed rows back, and that reckon the memory


def predicted_by(report: Report) -> Prediction:
    """Return the figures that a report has; a check that was skipped or left out gives none."""
    evidence = {outcome.code: outcome.evidence for outcome in report}
    memory = evidence.get(MEMORY_FROM, {})
    reckoned = {"loading", "peak"} <= memory.keys()
    return Prediction(
        context_tokens_per_row=evidence.get(ROWS_FROM, {}).get("context_tokens_per_row"),
        cuda_peak_gib=max(memory["loading"], memory["peak"]) / GIB if reckoned else None,
    )
