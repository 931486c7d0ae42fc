"""What a document's LoRA does to text and questions that have nothing to do with the document, and to the document itself."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

import torch

from d2l.data.packing import collate
from d2l.data.records import Record
from d2l.data.tokenize import IGNORE_INDEX, Query, Row
from d2l.evaluation.answers import generate_answers
from d2l.evaluation.scores import exact_match, token_f1
from d2l.hypernet.lora import Lora
from d2l.inference.generate import internalize
from d2l.inference.load import TrainedModel
from experiments.smollm2.recipe import ANSWER_TOKENS

QUESTIONS = (
    "What is the capital of France?",
    "How many days has a week?",
    "What colour is the sky on a clear day?",
    "Which planet is closest to the sun?",
    "What do bees make?",
    "Name the largest ocean.",
    "What is two plus three?",
    "What is water made of?",
)
_NO_DOCUMENT = ((0,),)  # a row needs a chunk; nothing reads it


@dataclass(frozen=True)
class Harm:
    """Means over documents; perplexities per token of plain text, not in the form of a conversation.

    Attributes:
        own: perplexity of the document under its own LoRA, another document's, and none.
        unrelated: perplexity of another real text under the document's LoRA, and without one.
        same_answers: share of unrelated questions that are answered word for word as without a LoRA.
        answers_f1: F1 of the words of those answers and of the ones without a LoRA.
    """

    documents: int
    own: dict[str, float]
    unrelated: dict[str, float]
    same_answers: float
    answers_f1: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def measure_harm(
    trained: TrainedModel,
    records: Sequence[Record],
    texts: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Harm:
    """Compare the base with and without the LoRA of each document.

    Args:
        records: at least two documents.
        texts: a text for each document that has nothing to do with it.
    """
    alone = generate_answers(trained, None, QUESTIONS, ANSWER_TOKENS)
    sums: dict[str, list[float]] = {}
    same, overlap = [], []
    for place, (record, text) in enumerate(zip(records, texts, strict=True)):
        lora, other = (internalize(trained, it.context) for it in (record, records[place - 1]))
        for name, bound, read in (
            ("own LoRA", lora, record.context),
            ("other LoRA", other, record.context),
            ("no LoRA", None, record.context),
            ("unrelated, LoRA", lora, text),
            ("unrelated, no LoRA", None, text),
        ):
            total, tokens = text_likelihood(trained, bound, read)
            sums.setdefault(name, [0.0, 0.0])
            sums[name][0] += total
            sums[name][1] += tokens
        answers = generate_answers(trained, [lora] * len(QUESTIONS), QUESTIONS, ANSWER_TOKENS)
        same += [exact_match(now, before) for now, before in zip(answers, alone, strict=True)]
        overlap += [token_f1(now, before) for now, before in zip(answers, alone, strict=True)]
        on_progress(place + 1, len(records))
    perplexity = {name: exp(total / tokens) for name, (total, tokens) in sums.items()}
    return Harm(
        documents=len(records),
        own={name: perplexity[name] for name in ("own LoRA", "other LoRA", "no LoRA")},
        unrelated={name: perplexity[f"unrelated, {name}"] for name in ("LoRA", "no LoRA")},
        same_answers=sum(same) / len(same),
        answers_f1=sum(overlap) / len(overlap),
    )


@torch.no_grad()
def text_likelihood(trained: TrainedModel, lora: Lora | None, text: str) -> tuple[float, int]:
    """Return the negative log-likelihood of a plain text in nats, and the number of its tokens after the first."""
    ids = tuple(trained.chat.encode_contents(text))
    query = Query(ids, (IGNORE_INDEX, *ids[1:]))
    batch = collate([Row(record=0, chunks=_NO_DOCUMENT, queries=(query,))]).to(trained.model.base.device)
    logits = trained.model.logits(batch, lora, positions=batch.prediction_positions).float()
    labels = batch.labels[0, batch.label_positions]
    return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")), len(labels)
