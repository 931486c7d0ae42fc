"""Length limits for documents, chunks and questions, and the messages for what exceeds them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

from d2l.config.schema import Chunking, RunConfig
from d2l.errors import DataError


@dataclass(frozen=True)
class Limits:
    """Settings of a run that shape its rows, under the names of the configuration. In tokens; -1 means no limit.

    `max_ctx_len` and the chunk lengths count the template's affixes around the text. `max_position_embeddings` comes from
    the base's config: the longest text that the base was trained for, a limit for every chunk and every question.
    """

    max_ctx_len: int = -1
    max_ctx_chunk_len: int = -1
    min_ctx_chunk_len: int = -1
    max_ctx_chunk_num: int | None = None
    num_chunk_probs: dict[int, float] | None = None
    chunking: Chunking = "equal"
    chunk_overlap: int = 0
    max_qas_len: int = -1
    max_qas_per_sample: int = -1
    max_packed_inp_len: int = -1
    max_packed_ctx_len: int = -1
    max_position_embeddings: int = -1

    @classmethod
    def of(cls, config: RunConfig, base_config: PreTrainedConfig | None = None) -> "Limits":
        """Read the limits from a run's configuration and the config of its base model."""
        values: dict[str, Any] = {field.name: getattr(config, field.name, -1) for field in fields(cls)}
        values["max_position_embeddings"] = getattr(base_config, "max_position_embeddings", None) or -1
        return cls(**values)


_OF_QUESTIONS = ("max_qas_len", "max_packed_inp_len")


class DoesNotFitError(DataError):
    """A document or question does not fit into any row. `kind` groups reasons for counting."""

    def __init__(self, kind: str, reason: str) -> None:
        self.kind = kind
        super().__init__(reason)


def check_document_text(text: str, least_tokens: Callable[[str], int], limits: Limits) -> None:
    """Refuse a document that is so long that it cannot fit, before it is tokenized.

    Args:
        least_tokens: `ChatFormat.least_tokens`.

    Raises:
        DoesNotFitError: the message names the limit.
    """
    _check_text(text, least_tokens, limits, ("max_ctx_len", "max_packed_ctx_len"), "document")


def check_question_text(text: str, least_tokens: Callable[[str], int], limits: Limits) -> None:
    """Refuse a rendered question with its answer that is so long that it cannot fit, before it is tokenized.

    Raises:
        DoesNotFitError: the message names the limit.
    """
    _check_text(text, least_tokens, limits, _OF_QUESTIONS, "question and answer")


def _check_text(
    text: str, least_tokens: Callable[[str], int], limits: Limits, names: tuple[str, ...], what: str
) -> None:
    for name in names:
        limit = getattr(limits, name)
        if 0 <= limit < len(text) and (least := least_tokens(text)) > limit:
            reason = describe_excess(least, what, name, limit)
            raise DoesNotFitError(f"{what.split()[0]} too long", f"at least {reason} (by its {len(text):,} characters)")


def check_chunk_length(length: int, limits: Limits) -> None:
    """Refuse a document whose longest chunk, affixes included, exceeds `max_position_embeddings` of the base.

    Raises:
        DoesNotFitError: the chunk is too long.
    """
    if 0 <= limits.max_position_embeddings < length:
        raise DoesNotFitError(
            "document too long",
            f"{_describe_excess_of_base(length, 'document in one chunk', limits)}; set max_ctx_chunk_len to at most "
            f"{limits.max_position_embeddings}",
        )


def check_question_length(length: int, limits: Limits) -> None:
    """Refuse a question whose tokens, with its answer, exceed a limit.

    Raises:
        DoesNotFitError: the message names the limit.
    """
    for name in _OF_QUESTIONS:
        if 0 <= getattr(limits, name) < length:
            reason = describe_excess(length, "question and answer", name, getattr(limits, name))
            raise DoesNotFitError("question too long", reason)
    if 0 <= limits.max_position_embeddings < length:
        raise DoesNotFitError("question too long", _describe_excess_of_base(length, "question and answer", limits))


def describe_excess(length: int, what: str, name: str, limit: int) -> str:
    """Describe how far something exceeds a limit of the configuration, and what to raise the limit to."""
    return f"{length:,} tokens of {what} > {name} {limit:,}; raise {name} to at least {length:,}"


def _describe_excess_of_base(length: int, what: str, limits: Limits) -> str:
    return f"{length:,} tokens of {what} > {limits.max_position_embeddings:,}, the max_position_embeddings of the base"
