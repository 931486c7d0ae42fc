"""A teacher for the KL loss: the frozen base itself, reading each document in the prompt of its questions.

For every supervised token of an answer it says which tokens are likeliest, and how likely. A hypernetwork that learns
from that learns to answer as the base would answer with the document at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from d2l.base.masks import packed_masks
from d2l.data.chat.format import ChatFormat
from d2l.data.limits import DoesNotFitError, Limits, check_question_length
from d2l.data.packing import PackedBatch, collate, pack
from d2l.data.records import Record, document_in_prompts
from d2l.data.tokenize import Query, Row, tokenize_record
from d2l.errors import DataError

Answer = tuple[Tensor, Tensor]  # [supervised token, k]: log-probabilities and ids
_NO_DOCUMENT = ((0,),)  # a row has a chunk; here nobody reads it


@torch.no_grad()
def add_teacher_logprobs(
    records: Sequence[Record],
    base: PreTrainedModel,
    chat: ChatFormat,
    *,
    top_k: int,
    packed_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """The records with the base's natural-log probabilities of the `top_k` likeliest tokens at every supervised one.

    Args:
        records: any teacher that they have is replaced.
        base: frozen, with the attention implementation of the run.
        chat: template and supervision of the run: they decide which tokens are supervised.
        top_k: entries a token.
        packed_tokens: questions with their documents share forward passes of at most so many tokens; a longer one has
            a pass of its own.
        on_progress: called with the passes done and all passes.

    Raises:
        DataError: a document with its question is longer than the base was made for, an answer is read differently with
            the document in the prompt, or `top_k` is beyond the vocabulary.
    """
    if top_k > base.config.vocab_size:
        raise DataError(f"top_k: {top_k:,} is more than the {base.config.vocab_size:,} tokens of the base")
    limits = Limits(max_position_embeddings=getattr(base.config, "max_position_embeddings", None) or -1)
    plain = [replace(record, logprobs_vals=None, logprobs_indices=None) for record in records]
    rows = [row for index, record in enumerate(plain) for row in _question_rows(index, record, chat, limits)]
    packing = pack([row.size for row in rows], packed_tokens, len(rows), seed=0)
    passes = [*packing.groups, *((alone.row,) for alone in packing.oversized)]
    taught: dict[int, Answer] = {}
    for number, group in enumerate(passes, start=1):
        taught |= dict(zip(group, _likeliest(base, collate([rows[row] for row in group]), top_k), strict=True))
        on_progress(number, len(passes))
    in_order = iter(taught[row] for row in range(len(rows)))
    return [_with_answers(record, list(islice(in_order, len(record.prompts)))) for record in records]


def _question_rows(index: int, record: Record, chat: ChatFormat, limits: Limits) -> list[Row]:
    """A row for every question with the document in its prompt; the supervised tokens are those without it."""
    queries = []
    for version in (record, document_in_prompts(record)):
        part = tokenize_record(index, version, chat, Limits(), None)
        if part.dropped or part.problems:
            raise DataError("\n".join([*map(str, part.dropped), *part.problems]))
        queries.append([query for row in part.rows for query in row.queries])
    for position, query in enumerate(queries[1]):
        try:
            check_question_length(len(query.input_ids), limits)
        except DoesNotFitError as error:
            where = f"record {index}, prompt {position} ({record.source}), with its document"
            raise DataError(f"{where}: {error}; leave it out: this teacher cannot read it") from None
    for position, (alone, within) in enumerate(zip(*queries, strict=True)):
        if _supervised(alone) != _supervised(within):
            raise DataError(
                f"record {index}, prompt {position} ({record.source}): the chat template supervises "
                f"{len(_supervised(alone))} tokens of the answer, and {len(_supervised(within))} or others with the "
                "document in the prompt; use a template that writes an answer alike after any prompt"
            )
    return [Row(record=index, chunks=_NO_DOCUMENT, queries=(query,)) for query in queries[1]]


def _supervised(query: Query) -> list[int]:
    return [label for label in query.labels if label >= 0]


def _likeliest(base: PreTrainedModel, batch: PackedBatch, top_k: int) -> list[Answer]:
    """The likeliest tokens at every supervised one, for each question of a batch."""
    batch = batch.to(base.device)
    output = base(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=packed_masks(base, batch.position_ids),
        use_cache=False,
        logits_to_keep=batch.prediction_positions,
    )
    values, ids = torch.log_softmax(output.logits[0].float(), dim=-1).topk(top_k)
    counts = torch.bincount(batch.label_queries).tolist()
    return list(zip(values.cpu().split(counts), ids.cpu().split(counts), strict=True))


def _with_answers(record: Record, answers: Sequence[Answer]) -> Record:
    values, ids = (tuple(tuple(map(tuple, answer[part].tolist())) for answer in answers) for part in (0, 1))
    return replace(record, logprobs_vals=values, logprobs_indices=ids)
