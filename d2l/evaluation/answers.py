"""Answers to questions about several documents at once, each under its document's LoRA, and likelihoods of expected ones."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy, pad

from d2l.data.limits import Limits
from d2l.data.packing import collate
from d2l.data.records import Record
from d2l.data.tokenize import Query, Row, tokenize_record
from d2l.errors import DataError
from d2l.hypernet.lora import Lora
from d2l.inference.generate import decode_answer, encode_prompt, find_stop_ids, generate, truncate_at_stop
from d2l.inference.load import TrainedModel

# Of a batch of prompts, at most: a step of decoding takes hardly longer for many rows than for one.
ROWS = 16
TOKENS = 2**14


def generate_answers(
    trained: TrainedModel, loras: Sequence[Lora] | None, questions: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Generate greedy answers; questions of equal length share a batch, whatever their documents.

    Args:
        loras: of one context, one for each question; None for the base alone.
    """
    prompts = [encode_prompt(trained.chat, question) for question in questions]
    stop = find_stop_ids(trained.chat, trained.model.base.generation_config.eos_token_id)
    answers = [""] * len(prompts)
    for places in _batches([len(ids) for ids in prompts]):
        rows = torch.tensor([prompts[place] for place in places])
        bound = None if loras is None else _stack([loras[place] for place in places])
        new = generate(trained.model, bound, rows, stop=stop, max_new_tokens=max_new_tokens)
        for place, tokens in zip(places, new.tolist(), strict=True):
            answers[place] = decode_answer(trained.chat, truncate_at_stop(tokens, stop))
    return answers


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the places of prompts of one length, as many as a batch may have."""
    for length in sorted(set(lengths)):
        places = [place for place, it in enumerate(lengths) if it == length]
        rows = max(1, min(ROWS, TOKENS // length))
        yield from (places[start : start + rows] for start in range(0, len(places), rows))


def _stack(loras: Sequence[Lora]) -> Lora:
    """Put LoRAs of one context side by side, those of a smaller rank with zeros behind it."""
    rank = max(lora.rank for lora in loras)

    def side(tensors: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {
            name: torch.cat([pad(it[name], (0, 0, 0, rank - it[name].shape[2])) for it in tensors])
            for name in tensors[0]
        }

    return Lora(side([lora.A for lora in loras]), side([lora.B for lora in loras]), loras[0].scale)


@torch.no_grad()
def compute_likelihoods(trained: TrainedModel, lora: Lora | None, record: Record) -> list[tuple[float, int]]:
    """Compute the negative log-likelihood of each expected answer in nats, and count its supervised tokens.

    Args:
        lora: of one context; None for the base alone.

    Raises:
        DataError: a question cannot be tokenized.
    """
    plain = replace(record, logprobs_vals=None, logprobs_indices=None)
    part = tokenize_record(0, plain, trained.chat, Limits(), None)
    if part.dropped or part.problems:
        raise DataError("; ".join([*map(str, part.dropped), *part.problems]))
    results: list[tuple[float, int]] = []
    queries = [query for row in part.rows for query in row.queries]
    for packed in _packed(queries, trained.config.max_packed_inp_len):
        batch = collate([Row(record=0, chunks=((0,),), queries=tuple(packed))]).to(trained.model.base.device)
        logits = trained.model.logits(batch, lora, positions=batch.prediction_positions).float()
        losses = cross_entropy(logits, batch.labels[0, batch.label_positions], reduction="none").double()
        sums = losses.new_zeros(len(packed)).index_add(0, batch.label_queries, losses)
        results += zip(sums.tolist(), (query.n_labels for query in packed), strict=True)
    return results


def _packed(queries: Sequence[Query], most: int) -> Iterator[list[Query]]:
    """Yield the queries in order, as many at a time as have at most so many tokens, or one that has more."""
    taken: list[Query] = []
    for query in queries:
        if taken and sum(len(it.input_ids) for it in (*taken, query)) > most:
            yield taken
            taken = []
        taken.append(query)
    if taken:
        yield taken
