"""From a configuration to what a plan is made of: the model's sizes, the rows, and the card."""

from dataclasses import dataclass

from d2l.base.config import read_base_config
from d2l.build import Components
from d2l.config.schema import RunConfig
from d2l.data.tokenize import OnProgress
from d2l.errors import ConfigError, ModelError
from d2l.plan.cards import H100, Card, card_here, find_card, sized_card
from d2l.plan.rows import UNLIMITED, AssumedRows, DataRows, Rows
from d2l.plan.sizes import Model


@dataclass(frozen=True)
class PlanInputs:
    """What a plan is made of.

    Attributes:
        remarks: what was taken in place of something that is not here, a sentence each.
    """

    model: Model
    rows: Rows
    card: Card
    remarks: tuple[str, ...]


def plan_inputs(
    config: RunConfig,
    gpu: str | None = None,
    document_tokens: int | None = None,
    on_tokenize: OnProgress = lambda done, total: None,
    processes: int = 1,
) -> PlanInputs:
    """Find everything that a plan needs; no weights are read.

    Args:
        gpu: name or size of a card; default: the configuration's `device_memory`, the GPU here, or an H100.
        document_tokens: of every document, in place of the run's data.
        processes: cards that share each optimizer step.

    Raises:
        ConfigError: there is no such card, or the run would drop documents of that length.
        ModelError: the base model or a named tokenizer cannot be read.
        DataError: the data cannot be used.
    """
    _require_taken(config, document_tokens)
    card, remarks = _card(config, gpu), []
    if card is None:
        card = H100
        remarks.append("no GPU here and none named: planned for an H100; name another one with --gpu")
    components, rows, base_config = Components(config, on_tokenize), None, None
    if config.train_ds_names and document_tokens is None:
        try:
            _ = components.tokenizer
        except ModelError as error:
            if config.tokenizer_name_or_path is not None:
                raise
            remarks.append(f"the data was not read, as there is no tokenizer: {str(error).splitlines()[0]}")
        else:
            rows = DataRows.of(components.rows, f"those of {', '.join(config.train_ds_names)}")
            base_config = components.base_config
    if base_config is None:
        base_config = read_base_config(config.model_name_or_path)
    model = Model(base_config, "cuda", card.capability, processes)
    return PlanInputs(model, rows or AssumedRows(document_tokens), card, tuple(remarks))


def _require_taken(config: RunConfig, document_tokens: int | None) -> None:
    """Refuse documents that are longer than a run takes."""
    limits = {name: getattr(config, name) for name in ("max_ctx_len", "max_packed_ctx_len")}
    for name, most in limits.items():
        if document_tokens is not None and most != UNLIMITED and document_tokens > most:
            problem = f"--document-tokens: a run drops documents of {document_tokens:,} tokens, as {name} is {most:,}"
            raise ConfigError([f"{problem}: raise it (--set {name}={document_tokens}), or plan shorter ones"])


def _card(config: RunConfig, gpu: str | None) -> Card | None:
    if gpu is not None:
        return find_card(gpu)
    return card_here() if config.device_memory is None else sized_card(config.device_memory)
