"""Documents packed into one row do not see each other, and each comes out as if it were alone.

What it does
------------
Packs documents and questions longer than the sliding window into one row of the tiny twin. It edits the first and looks
at the others, and compares every one with itself in a row of its own: the generated LoRA (the context encoder and the
aggregator), the logits of the questions under it, and those of the base against its own forward without masks.

Why it matters
--------------
GPT-OSS does not hand `position_ids` to its mask builders, so under eager attention, the documented fix for NaN, packed
documents attend to each other. The loss looks normal and the model learns to read its neighbour's document. An all-ones
mask or a cache has the same effect on Llama and the like. A single 4D mask stops the leak but drops the sliding window.

How it is detected
------------------
Editing a neighbour must change nothing, and packed must equal alone, to 1e-4 of the largest value. A leak or a lost
window changes values by 1e-2 and more.

How to fix
----------
Pass one mask for each layer type, built with `position_ids` (`d2l.base.masks.packed_masks`), to the question pass and to
the context encoder alike, and `use_cache=False`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.probes import TOLERANCE, alone, difference, probe_rows
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from d2l.base.attention import PER_DOCUMENT
from d2l.data.packing import PackedBatch, collate

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.tokenize import Row


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare packed with an edited neighbour and with alone: LoRAs, logits under them, and the base's own logits."""
    model = subject.twin()
    rows = _two_questions_each(subject)
    batch, singles = collate(rows), alone(rows)
    lora = model.lora(batch)
    logits = model.logits(batch, lora)
    edited = _edit_first(batch, subject.twin_base_config.vocab_size)
    first = batch.contexts.lengths[0]
    name = next(iter(lora.B))
    solo_lora = torch.cat([model.lora(single).B[name] for single in singles])
    solo_logits = torch.cat([model.logits(single, lora[i : i + 1]) for i, single in enumerate(singles)])
    evidence = {
        "lora_after_editing_neighbour": difference(model.lora(edited).B[name][1:], lora.B[name][1:]),
        "lora_packed_against_alone": difference(lora.B[name], solo_lora),
        "logits_after_editing_neighbour": difference(model.logits(edited, lora)[first:], logits[first:]),
        "logits_packed_against_alone": difference(logits, solo_logits),
        "base_packed_against_its_own_forward": difference(model.logits(batch, None), _own_forward(model, rows)),
    }
    worst = max(evidence, key=lambda key: evidence[key])
    if evidence[worst] > TOLERANCE:
        leaks = "neighbour" in worst
        return Fail(
            message="packed documents see each other"
            if leaks
            else "a packed document comes out differently than alone",
            expected=f"differences of at most {TOLERANCE:g} of the largest value",
            actual=f"{worst.replace('_', ' ')}: {evidence[worst]:.2g}",
            remedy="build one mask for each layer type from position_ids and pass it in both passes, with use_cache=False",
            evidence=evidence,
        )
    return Pass(f"editing a neighbour and packing change at most {evidence[worst]:.1g}", evidence)


def _two_questions_each(subject: "Subject") -> "list[Row]":
    """Make the probe's rows with a second question for each document: questions of one document must not meet either."""
    pairs = zip(probe_rows(subject), probe_rows(subject, questions=(9, 6, 11), seed=1), strict=True)
    return [replace(row, queries=row.queries + other.queries) for row, other in pairs]


def _own_forward(model: Model, rows: "list[Row]") -> torch.Tensor:
    """Return the base's logits of every question alone, as transformers computes them without masks of ours, `[T, V]`.

    Each is a row of one batch, and what fills a shorter row stands behind the question, where a causal model cannot see it.
    """
    questions = [torch.tensor(query.input_ids) for row in rows for query in row.queries]
    logits = model.base(input_ids=pad_sequence(questions, batch_first=True), use_cache=False).logits
    return torch.cat([row[: len(question)] for row, question in zip(logits, questions, strict=True)])


def _edit_first(batch: PackedBatch, vocabulary: int) -> PackedBatch:
    """Replace every token of the first document and of its question."""
    ctx_ids, input_ids = batch.ctx_ids.clone(), batch.input_ids.clone()
    for ids, length in ((ctx_ids, batch.chunks.lengths[0]), (input_ids, batch.contexts.lengths[0])):
        ids[:, :length] = (ids[:, :length] + 1) % vocabulary
    return replace(batch, ctx_ids=ctx_ids, input_ids=input_ids)


def _without_masks(healthy: Implementation, base: Any, config: Any) -> Model:
    """Take the row for one document: masks know causality and windows only."""
    model: Any = healthy.build(base, config)
    masks = model.attention_mask
    model.attention_mask = lambda position_ids: _unaware(masks, position_ids)
    return model


def _unaware(masks: Any, position_ids: torch.Tensor) -> Any:
    """Make masks that take the row for one document, written out: without any, transformers looks for documents itself."""
    made, length = masks(_one_document(position_ids)), position_ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()[None, None]
    if isinstance(made, dict):
        return {kind: causal if mask is None else mask for kind, mask in made.items()}
    return causal if made is None else made


def _one_document(position_ids: torch.Tensor) -> torch.Tensor:
    """Positions that never restart, of the same shape."""
    return torch.arange(position_ids.shape[-1], device=position_ids.device).expand_as(position_ids)


def _with_one_mask(healthy: Implementation, base: Any, config: Any) -> Model:
    """Use the mask of the full-attention layers in every layer."""
    model: Any = healthy.build(base, config)
    masks = model.attention_mask

    def one(position_ids: Any) -> Any:
        by_type = masks(position_ids)
        return dict.fromkeys(by_type, by_type["full_attention"])

    model.attention_mask = one
    return model


def _one_layer_type(subject: "Subject") -> str:
    kinds = set(getattr(subject.base_config, "layer_types", None) or ())
    if subject.plan.attention.value == PER_DOCUMENT:
        return "attention one document at a time takes the window from each layer and not from its mask"
    return "" if len(kinds) > 1 else "all layers of this model share one mask"


def _reads_embeddings(subject: "Subject") -> str:
    config, layers = subject.config, subject.twin_base_config.num_hidden_layers
    exit_at = layers // 4 if config.layer_idx is None else config.layer_idx
    reads = config.ctx_encoder_type == "embed_only" or (config.ctx_encoder_type == "early_exit" and exit_at == 0)
    return "the context encoder reads embeddings, which see no other token" if reads else ""


def _encoder_without_masks(healthy: Implementation, base: Any, config: Any) -> Model:
    """Take the row for one document in the context encoder; the question pass is right."""
    model: Any = healthy.build(base, config)
    encoder, masks = model.encoder, model.attention_mask
    model.encoder = lambda ids, position_ids, attention_mask: encoder(ids, position_ids, _unaware(masks, position_ids))
    return model


RULE = Rule(
    code="ATT201",
    name="packed-documents-leak",
    stage="twin",
    severity="error",
    sources=(
        "fix 2",
        "failure mode F2",
        "failure mode 1",
        "failure mode 2",
        "failure mode C1",
        "failure mode C3",
        "failure mode C44",
        "huggingface/transformers#39997",
    ),
    requires=("LOR204", "ATT202"),
    check=check,
    faults=(
        Fault(
            "no-mask",
            "masks that do not know where a document begins, as under plain eager attention",
            override(build=_without_masks),
        ),
        Fault(
            "one-mask",
            "one mask for all layer types: the sliding window is lost",
            override(build=_with_one_mask, unless=_one_layer_type),
        ),
        Fault(
            "encoder-leak",
            "only the context encoder's masks do not know where a document begins",
            override(build=_encoder_without_masks, unless=_reads_embeddings),
        ),
    ),
)
