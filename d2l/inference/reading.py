"""Chunks of documents read into their LoRAs: each by itself, or several in a pack.

A chunk that is read by itself has the same LoRA to the last bit whatever else is read; in a pack its neighbours decide the
shapes of the products, and the last bits with them.
"""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from d2l.config.schema import RunConfig
from d2l.data.chunks import Ids, chunk_document
from d2l.data.limits import DoesNotFitError, Limits, describe_excess
from d2l.data.packing import collate, pack
from d2l.data.tokenize import Row
from d2l.errors import DataError
from d2l.hypernet.lora import Lora, merge_chunks
from d2l.hypernet.model import DocToLora
from d2l.inference.load import TrainedModel

MOST_FACTOR_BYTES = 4 << 30  # of one document's chunks, in float32 on the host


def cut(trained: TrainedModel, text: str, before: int = 0) -> tuple[Ids, ...]:
    """Tokenize a document into chunks as long as in training, however many: they are read one after another.

    Args:
        before: chunks of other documents in the same adapter, which share the memory.

    Raises:
        DataError: it is empty, a chunk is longer than a packed row of training, or its factors need too much memory.
    """
    config = trained.config
    limits = replace(
        Limits.of(config, trained.model.base.config), max_ctx_len=-1, max_packed_ctx_len=-1, max_ctx_chunk_num=None
    )
    most = max(0, MOST_FACTOR_BYTES // chunk_bytes(trained.model) - before)
    if limits.max_ctx_chunk_len >= 0 and trained.chat.least_tokens(text) > most * limits.max_ctx_chunk_len:
        raise _too_many(f"over {most:,}", most)
    try:
        chunks = chunk_document(text, trained.chat, limits)
    except DoesNotFitError as error:
        raise DataError(f"the document does not fit the checkpoint: {error}") from error
    longest = max(map(len, chunks))
    if longest > config.max_packed_ctx_len:
        reason = describe_excess(longest, "document in one chunk", "max_packed_ctx_len", config.max_packed_ctx_len)
        raise DataError(
            f"the document does not fit the checkpoint: {reason}\ntrain with max_ctx_chunk_len, or pass a shorter document"
        )
    if len(chunks) > most:
        raise _too_many(f"{len(chunks):,}", most)
    return chunks


def trained_bounds(config: RunConfig) -> tuple[int | None, int]:
    """Return at most how many chunks of a document, and how long ones, a run's limits let it see; None: any number."""
    longest = config.max_ctx_chunk_len
    if longest < 0:
        return 1, config.max_ctx_len if config.max_ctx_len >= 0 else config.max_packed_ctx_len
    drawn = max(config.num_chunk_probs or (1,))
    counts = [max(drawn, config.max_packed_ctx_len // longest)]
    counts += [config.max_ctx_chunk_num] if config.max_ctx_chunk_num is not None else []
    counts += [max(drawn, -(-config.max_ctx_len // longest))] if config.max_ctx_len >= 0 else []
    return max(1, min(counts)), longest


def describe_beyond(config: RunConfig, chunks: Sequence[Ids]) -> list[str]:
    """Describe in which way a document is longer than those of the training."""
    most, longest = trained_bounds(config)
    found = []
    if most is not None and len(chunks) > most:
        found.append(f"{len(chunks):,} chunks, trained with at most {most:,}: answers may be worse")
    if (length := max(map(len, chunks))) > longest:
        found.append(f"a chunk of {length:,} tokens, trained with at most {longest:,}: answers may be worse")
    return found


def chunk_hash(chunk: Ids) -> str:
    """Return 128 bits of the SHA-256 of a chunk's tokens, in hexadecimal."""
    return hashlib.sha256(array("q", chunk).tobytes()).hexdigest()[:32]


def chunk_bytes(model: DocToLora) -> int:
    """Return the bytes of the factors of a chunk, in float32."""
    shape = model.hypernet.shape
    return 4 * shape.config.lora_r * shape.n_layers * sum(d_in + d_out for d_in, d_out in shape.modules.values())


@torch.no_grad()
def read_chunks(model: DocToLora, chunks: Mapping[str, Ids], pack_tokens: int | None) -> Iterator[tuple[str, Lora]]:
    """Read chunks into LoRAs of one entry each, without the bias, in float32 on the host.

    Args:
        chunks: their tokens, by any keys.
        pack_tokens: most tokens that are read in one pass of the base, if no chunk is longer; None: each chunk alone.
    """
    keys, lengths = list(chunks), [len(chunk) for chunk in chunks.values()]
    groups: Sequence[Sequence[int]] = [(place,) for place in range(len(keys))]
    if pack_tokens is not None and keys:
        groups = pack([(0, length) for length in lengths], 1, max(pack_tokens, *lengths), seed=0).groups
    for group in groups:
        batch = collate([Row(0, tuple(chunks[keys[place]] for place in group), ())])
        made = _on_host(model.chunk_loras(batch.to(model.base.device)))
        for number, place in enumerate(group):
            yield keys[place], made[number]


@torch.no_grad()
def join(model: DocToLora, chunks: Sequence[Lora]) -> Lora:
    """Join the LoRAs of a document's chunks and the learned bias, ranks side by side."""
    A, B = (
        {name: torch.cat([getattr(chunk, side)[name] for chunk in chunks]) for name in chunks[0].A}
        for side in ("A", "B")
    )
    bias = model.hypernet.bias()
    return merge_chunks(Lora(A, B, chunks[0].scale), [len(chunks)], None if bias is None else _on_host(bias))


def _on_host(lora: Lora) -> Lora:
    """Copy a LoRA to the host's memory in float32, with the scale folded into B."""

    def moved(side: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        return {name: x.detach().float().cpu() * factor for name, x in side.items()}

    return Lora(moved(lora.A, 1.0), moved(lora.B, lora.scale), 1.0)


def _too_many(found: str, most: int) -> DataError:
    return DataError(
        f"the document is too large: {found} chunks, of which {most:,} fit into {MOST_FACTOR_BYTES >> 30} GiB; split it"
    )
