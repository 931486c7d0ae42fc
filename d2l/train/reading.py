"""Whether the hypernetwork reads its documents, judged from evaluations: a healthy loss and LoRA norm do not tell.

A hypernetwork that does not read still learns what all answers have in common: with the document's features set to zero,
configs/needle_tiny.yaml brings the loss from 3.70 to 0.90 in 75 steps while `gen_lora_l1_norm` rises as in a run that reads.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from d2l.train.heldout import DISTANCE, HeldoutScores
from d2l.train.metrics import LOSS_SUFFIX

# Distance of two documents' updates, each at norm 1. In runs of configs/needle_tiny.yaml that learn it is 0.05 and more at
# every evaluation, also before they have learnt anything (with Muon 0.44 to 1.24 in 110 steps, with AdamW alone and
# perceiver_query_scale: 1 from 0.05 to 1.05 in 60); in configs/tiny_gpt_oss.yaml, whose random base cannot be taught,
# 0.013 and more. With features of zero it is below 1e-7 at every step, whatever the documents' numbers of chunks.
SAME = 1e-4
# Standard errors by which the loss under another document's LoRA lies above that under the own one. The runs that learn have
# 4.1 and more from step 30 on, 6.7 and more from step 50 on, over 500 steps. A run that trains under the LoRAs of other
# documents brings the loss from 3.73 to 0.9 all the same, and has 1.6 at most; one on the random base 0.9.
LEAST_ERRORS = 3.0
PATIENCE = 3  # evaluations in a row without such a gap
LEAST_STEP = 100


class ReadingGuard:
    """Looks at each evaluation of a run, and says once that documents are not read."""

    def __init__(self) -> None:
        self._without_gap, self._said = 0, False

    def recall(self, evaluations: Iterable[Mapping[str, Any]], loss: str, warmup_steps: int) -> None:
        """Count on from the evaluations of a run that goes on.

        What was said while it warmed up is said again: whether a LoRA was still zero stands in no file.

        Args:
            evaluations: lines of evaluation.jsonl, in the order of their steps.
            loss: the name of the task's loss.
        """
        own, alone = (f"{control}_{loss}{LOSS_SUFFIX}" for control in ("document", "none"))
        for record in evaluations:
            if {own, alone, "swap_gap", "swap_gap_error", DISTANCE} <= record.keys():
                late = record["step"] > max(warmup_steps, LEAST_STEP)
                learnt = record[own] < record[alone]
                self._count(late and learnt and record["swap_gap"] < LEAST_ERRORS * record["swap_gap_error"])
                same = record["step"] > warmup_steps and record[DISTANCE] < SAME
                self._said = self._said or same or self._without_gap >= PATIENCE

    def observe(self, scores: HeldoutScores, step: int, warmup_steps: int) -> str:
        """Return what is wrong, in words; empty where nothing is, and where it has been said."""
        if self._said:
            return ""
        found = self._same_updates(scores, step > warmup_steps) or self._no_gap(
            scores, step > max(warmup_steps, LEAST_STEP)
        )
        self._said = bool(found)
        return found

    def _same_updates(self, scores: HeldoutScores, warm: bool) -> str:
        """Find LoRAs that are alike; before the end of the warm-up they may still be zero."""
        distance = scores.distance
        if distance >= SAME or not (warm or not scores.is_zero):
            return ""
        own, alone = scores.answers["document"].loss, scores.answers["none"].loss
        return (
            f"the hypernetwork does not read its documents: the LoRAs of two documents differ by {distance:.2g} of their "
            f"size, expected {SAME:g} or more; the held-out loss is {own:.4g} under them and {alone:.4g} without; are the "
            "features of documents constant, or the Perceiver's weights stuck? `d2l preflight` looks for both"
        )

    def _no_gap(self, scores: HeldoutScores, late: bool) -> str:
        """Find LoRAs that help alike, whichever document they are of, at several evaluations."""
        own, alone = scores.answers["document"].loss, scores.answers["none"].loss
        self._count(late and own < alone and scores.gap < LEAST_ERRORS * scores.gap_error)
        if self._without_gap < PATIENCE:
            return ""
        return (
            f"the hypernetwork does not use its documents: at {PATIENCE} evaluations in a row another document's LoRA was as "
            f"good as the own one (held-out loss {scores.answers['other'].loss:.4g} and {own:.4g}, {alone:.4g} without a "
            f"LoRA); expected a gap of {LEAST_ERRORS:g} standard errors or more; do the answers depend on the documents, "
            "and does each question come with its own one?"
        )

    def _count(self, alike: bool) -> None:
        """Count evaluations in a row at which LoRAs helped alike."""
        self._without_gap = self._without_gap + 1 if alike else 0
