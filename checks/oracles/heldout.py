"""The scores of held-out documents: losses, exact match, gaps and distances, under the names of evaluation.jsonl.

Sources: losses by `checks.oracles.loss`; a gap is a document's mean loss a label token under another document's LoRA less that
under its own; the standard error of a mean is s / √n, s with n - 1 degrees of freedom; the distance of two updates is
‖ΔW / ‖ΔW‖ - ΔW' / ‖ΔW'‖‖, of matrices that are formed here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checks.oracles import loss
from checks.oracles.loss import Losses


@dataclass(frozen=True)
class Answered:
    """What a model made of the questions of all documents.

    Attributes:
        losses: [document][question] of the losses of its label tokens.
        right: [document][question], whether every label is the likeliest token.
    """

    losses: Losses
    right: Sequence[Sequence[bool]]

    @property
    def exact_match(self) -> float:
        """Return the share of questions that are answered right."""
        questions = [right for document in self.right for right in document]
        return sum(questions) / len(questions)

    @property
    def by_document(self) -> list[float]:
        """Return the mean loss of each document's label tokens."""
        return [float(torch.cat(list(document)).mean()) for document in self.losses]


def scores(answers: Mapping[str, Answered], name: str, per_context: bool) -> dict[str, float]:
    """Return the losses, exact matches and gaps of documents under their own LoRA, another document's and none.

    Args:
        answers: by `document`, `other` and `none`.
        name: of the loss: `ce` or `kl`.
        per_context: whether losses are means over contexts, else over all label tokens.
    """
    mean = loss.context_mean if per_context else loss.token_mean
    own, other = answers["document"].by_document, answers["other"].by_document
    gaps = [theirs - mine for mine, theirs in zip(own, other, strict=True)]
    gap = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((it - gap) ** 2 for it in gaps) / (len(gaps) - 1))
    found = {f"{control}_{name}_loss": float(mean(it.losses)) for control, it in answers.items()}
    found |= {f"{control}_exact_match": it.exact_match for control, it in answers.items()}
    return {**found, "documents": len(gaps), "swap_gap": gap, "swap_gap_error": spread / math.sqrt(len(gaps))}


def distances(updates: Sequence[Mapping[str, Tensor]], others: Sequence[int]) -> dict[str, float]:
    """Return the mean distance of each document's update to that of another one, of all modules and of each.

    Args:
        updates: of each document, module -> ΔW of all layers, any shape; without what all documents share.
        others: index of the other document, for each.
    """
    modules = list(updates[0])
    found = {f"lora_distance_{name}": _distance(updates, others, [name]) for name in modules}
    return {"lora_distance": _distance(updates, others, modules), **found}


def _distance(updates: Sequence[Mapping[str, Tensor]], others: Sequence[int], modules: Sequence[str]) -> float:
    vectors = [torch.cat([update[name].double().flatten() for name in modules]) for update in updates]
    directions = [vector / vector.norm() for vector in vectors]
    return sum(float((it - directions[other]).norm()) for it, other in zip(directions, others, strict=True)) / len(
        others
    )
