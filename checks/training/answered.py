"""The loss rows with labels of which some are what the model finds likeliest, so that some questions are answered right."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from checks.oracles import edited_weights
from d2l.data.packing import collate
from d2l.data.tokenize import Query, Row

RIGHT, NEARLY = (0, 3), 5  # of the loss rows' six questions: answered right; right but for the last label


@torch.no_grad()
def answered_rows(model: Any, rows: Sequence[Row]) -> list[Row]:
    """Return the loss rows with labels that the model finds likeliest in some questions, and unlikely in the others."""
    lora = model.lora(collate(rows))
    answered, number = [], 0
    for context, row in enumerate(rows):
        a, b = ({name: x[context] for name, x in side.items()} for side in (lora.A, lora.B))
        queries = []
        for query in row.queries:
            order = edited_weights.logits(model.base, query.input_ids, a, b, lora.scale).argsort(-1)  # ascending
            queries.append(_labelled(query, order, number))
            number += 1
        answered.append(replace(row, queries=tuple(queries)))
    return answered


def _labelled(query: Query, order: torch.Tensor, number: int) -> Query:
    """Give a question labels: likeliest where it is to be right, else the least likely."""
    places = [place for place, label in enumerate(query.labels) if label != -100]
    labels = list(query.labels)
    for place in places:
        right = number in RIGHT or (number == NEARLY and place != places[-1])
        labels[place] = int(order[place - 1, -1 if right else 0])
    return replace(query, labels=tuple(labels))
