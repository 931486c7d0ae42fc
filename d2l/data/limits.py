"""How long documents, chunks and questions may be, and what is said of those that are longer."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

from d2l.config.schema import RunConfig
from d2l.errors import DataError


@dataclass(frozen=True)
class Limits:
    """Everything of a run's configuration that shapes rows, by the same names. In tokens; -1 means no limit.

    `max_ctx_len` and the chunk lengths count the template's affixes around the text. `max_position_embeddings` is of the
    base's config: the longest text that it was made for, so a limit for every chunk and every question.
    """

    max_ctx_len: int = -1
    max_ctx_chunk_len: int = -1
    min_ctx_chunk_len: int = -1
    max_ctx_chunk_num: int | None = None
    num_chunk_probs: dict[int, float] | None = None
    max_qas_len: int = -1
    max_qas_per_sample: int = -1
    max_packed_inp_len: int = -1
    max_packed_ctx_len: int = -1
    max_position_embeddings: int = -1

    @classmethod
    def of(cls, config: RunConfig, base_config: PreTrainedConfig | None = None) -> "Limits":
        """The limits that a run's configuration sets, and its base model."""
        values: dict[str, Any] = {field.name: getattr(config, field.name, -1) for field in fields(cls)}
        values["max_position_embeddings"] = getattr(base_config, "max_position_embeddings", None) or -1
        return cls(**values)


class DoesNotFitError(DataError):
    """A document or a question that no row can hold. `kind` groups reasons for counting."""

    def __init__(self, kind: str, reason: str) -> None:
        self.kind = kind
        super().__init__(reason)


def check_chunk_length(length: int, limits: Limits) -> None:
    """Refuse a document whose longest chunk, affixes included, is beyond what the base model was made for.

    Raises:
        DoesNotFitError: it is.
    """
    if 0 <= limits.max_position_embeddings < length:
        raise DoesNotFitError(
            "document too long",
            f"{_beyond_the_base(length, 'document in one chunk', limits)}; set max_ctx_chunk_len to at most "
            f"{limits.max_position_embeddings}",
        )


def check_question_length(length: int, limits: Limits) -> None:
    """Refuse a question with its answer that no row can hold.

    Raises:
        DoesNotFitError: it is over a limit.
    """
    for name in ("max_qas_len", "max_packed_inp_len"):
        if 0 <= getattr(limits, name) < length:
            raise DoesNotFitError("question too long", over(length, "question and answer", name, getattr(limits, name)))
    if 0 <= limits.max_position_embeddings < length:
        raise DoesNotFitError("question too long", _beyond_the_base(length, "question and answer", limits))


def over(length: int, what: str, name: str, limit: int) -> str:
    """That something is over a limit of the configuration, and what to raise it to."""
    return f"{length:,} tokens of {what} > {name} {limit:,}; raise {name} to at least {length:,}"


def _beyond_the_base(length: int, what: str, limits: Limits) -> str:
    return f"{length:,} tokens of {what} > {limits.max_position_embeddings:,}, the max_position_embeddings of the base"
