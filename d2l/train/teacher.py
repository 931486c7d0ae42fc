"""Teacher for the KL loss: the frozen base itself, with each document in the prompt of its questions.

For every supervised token of an answer it gives the top-k tokens with their log-probabilities. A hypernetwork trained on
them is trained to answer as the base does with the document in its prompt (context distillation).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from d2l.base.masks import packed_masks
from d2l.data.chat.format import ChatFormat
from d2l.data.limits import DoesNotFitError, Limits, check_question_length
from d2l.data.packing import PackedBatch, collate, pack
from d2l.data.records import Record, document_in_prompts
from d2l.data.tables import compact
from d2l.data.tokenize import Query, Row, tokenize_record
from d2l.errors import DataError

TopK = tuple[Tensor, Tensor]  # log-probabilities and ids, [supervised token, k]
_NO_DOCUMENT = ((0,),)  # a row needs a chunk; the teacher does not read it


def require_teachable(
    records: Sequence[Record],
    base_config: PreTrainedConfig,
    chat: ChatFormat,
    top_k: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Refuse records that `add_teacher_logprobs` would refuse, before the base is loaded and hours are spent on others.

    Raises:
        DataError: as `add_teacher_logprobs`.
    """
    limits = _limits(base_config, top_k)
    for index, record in enumerate(records):
        _make_question_rows(index, _untaught(record), chat, limits)
        on_progress(index + 1, len(records))


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
    """Return the records with the base's `top_k` tokens and their natural-log probabilities at every supervised token.

    Args:
        records: documents with questions; teacher logprobs that they have are replaced.
        base: the frozen base, with the attention implementation of the run.
        chat: chat format of the run, which decides which tokens are supervised.
        top_k: number of tokens that are kept for each supervised one.
        packed_tokens: upper bound on the tokens of a forward pass, which questions with their documents share; a longer
            question has a pass of its own.
        on_progress: called after every pass, with the number of passes done, and of all.

    Raises:
        DataError: a document with its question exceeds `max_position_embeddings` of the base, an answer has other
            supervised tokens with the document in the prompt, or `top_k` exceeds the vocabulary.
    """
    limits = _limits(base.config, top_k)
    rows = [
        row
        for index, record in enumerate(records)
        for row in _make_question_rows(index, _untaught(record), chat, limits)
    ]
    packing = pack([row.size for row in rows], packed_tokens, len(rows), seed=0)
    passes = [*packing.groups, *((alone.row,) for alone in packing.oversized)]
    by_row: dict[int, TopK] = {}
    for number, group in enumerate(passes, start=1):
        by_row |= dict(zip(group, _compute_top_k(base, collate([rows[row] for row in group]), top_k), strict=True))
        on_progress(number, len(passes))
    in_order = iter(by_row[row] for row in range(len(rows)))
    return [_add_logprobs(record, list(islice(in_order, len(record.prompts)))) for record in records]


def _limits(base_config: PreTrainedConfig, top_k: int) -> Limits:
    """Return the base's limit on a question with its document; refuse a `top_k` beyond its vocabulary."""
    if top_k > base_config.vocab_size:
        raise DataError(f"top_k: {top_k:,} is more than the {base_config.vocab_size:,} tokens of the base")
    return Limits(max_position_embeddings=getattr(base_config, "max_position_embeddings", None) or -1)


def _untaught(record: Record) -> Record:
    return replace(record, logprobs_vals=None, logprobs_indices=None)


def _make_question_rows(index: int, record: Record, chat: ChatFormat, limits: Limits) -> list[Row]:
    """Make a row for every question with the document in its prompt.

    Raises:
        DataError: a question is too long, or its supervised tokens differ from those without the document.
    """
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
        if _supervised_ids(alone) != _supervised_ids(within):
            raise DataError(
                f"record {index}, prompt {position} ({record.source}): the chat template supervises "
                f"{len(_supervised_ids(alone))} tokens of the answer, and {len(_supervised_ids(within))} or others with the "
                "document in the prompt; use a template that writes an answer alike after any prompt"
            )
    return [Row(record=index, chunks=_NO_DOCUMENT, queries=(query,)) for query in queries[1]]


def _supervised_ids(query: Query) -> list[int]:
    return [label for label in query.labels if label >= 0]


def _compute_top_k(base: PreTrainedModel, batch: PackedBatch, top_k: int) -> list[TopK]:
    """Compute the top-k log-probabilities at every supervised token, for each question of a batch."""
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


def _add_logprobs(record: Record, tables: Sequence[TopK]) -> Record:
    """Return a record with the teacher logprobs of its questions."""
    values, ids = (tuple(compact(table[part].tolist()) for table in tables) for part in (0, 1))
    return replace(record, logprobs_vals=values, logprobs_indices=ids)
