"""The context encoder gives the hidden states that transformers itself gives, of the layers that the run names.

What it does
------------
Reads the chunks of several documents, packed, with the run's context encoder on the tiny twin, and each chunk alone with
the model library's own `output_hidden_states=True`.

Why it matters
--------------
Features of another layer, or without the final norm, train a hypernetwork that no published checkpoint fits, and that a
corrected version cannot continue. Layers in reverse order give every layer of the base the features of another one.

How it is detected
------------------
In float64, the features of every chunk must be, to 1e-4 of the largest value, those that `ctx_encoder_type` and `layer_idx`
name: embeddings and outputs of the layers below, the last of them after the final norm.

How to fix
----------
Take the inputs of the decoder's layers, the last after `decoder.norm`, under masks that keep chunks apart.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.offered import offered
from checks.oracles import features
from checks.probes import TOLERANCE, base_in_double, difference, in_double, packed_rows
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed
from d2l.data.packing import collate

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.data.tokenize import Row

REMEDY = "take the inputs of the decoder's layers, the last after its final norm"


KINDS = ("per_layer_activations", "early_exit", "concat_layers", "embed_only")


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare the features of every chunk, packed, with those of the chunk alone: the run's kind, then all others."""
    own = subject.twin_config.ctx_encoder_type
    base = base_in_double(subject.twin_base())
    rows = packed_rows(subject)[:2]  # of three chunks
    inputs = [features.layer_inputs(base, chunk) for row in rows for chunk in row.chunks]
    evidence: dict[str, Any] = {}
    for kind in (own, *(kind for kind in KINDS if kind != own)):
        problem, evidence[kind] = _examine(subject, base, kind, rows, inputs)
        if problem is not None:
            return problem
    worst = max(max(found["by_chunk"]) for found in evidence.values())
    return Pass(f"features of {len(evidence)} kinds are transformers' hidden states to {worst:.1g}", evidence)


def _examine(
    subject: "Subject", base: Any, kind: str, rows: "Sequence[Row]", inputs: Sequence[Sequence[Tensor]]
) -> tuple[Fail | None, dict[str, list[float]]]:
    """Compare the features of one kind; return the finding, if any, and the distances."""
    config = subject.twin_config
    if kind != config.ctx_encoder_type:
        config = changed(config, ctx_encoder_type=kind, layer_idx=None)
    model = (
        subject.twin() if config == subject.twin_config else subject.implementation.build(subject.twin_base(), config)
    )
    actual = offered(in_double(model), "features")(collate(rows))[0]
    expected = [features.of_chunk(base, seen, kind, config.layer_idx) for seen in inputs]
    whole = torch.cat(expected, dim=-2)
    if actual.shape != whole.shape:
        finding = Fail(
            message="the context encoder gives features of another shape",
            expected=f"{list(whole.shape)} for {kind}",
            actual=str(list(actual.shape)),
            remedy=REMEDY,
        )
        return finding, {}
    found = dict(enumerate(map(difference, actual.split([len(seen[0]) for seen in inputs], dim=-2), expected)))
    evidence = {"by_chunk": list(found.values()), "by_layer": _by_layer(actual, whole)}
    worst = max(found, key=lambda chunk: found[chunk])
    if found[worst] <= TOLERANCE:
        return None, evidence
    wrong = [layer for layer, distance in enumerate(evidence["by_layer"]) if distance > TOLERANCE]
    where = f", layers {', '.join(map(str, wrong))} of {len(whole)}" if whole.ndim == 3 else ""
    finding = Fail(
        message="the context encoder's features are not the hidden states that the configuration names",
        expected=f"{kind} of transformers' hidden states, within {TOLERANCE:g} of the largest value",
        actual=f"chunk {worst}: {found[worst]:.2g} off{where}",
        remedy=REMEDY,
        evidence=evidence,
    )
    return finding, evidence


def _by_layer(actual: Tensor, expected: Tensor) -> list[float]:
    """Return the difference of each layer; empty where there is one set of features."""
    return [difference(*pair) for pair in zip(actual, expected, strict=True)] if expected.ndim == 3 else []


def _with_features(model: Any, change: Callable[[Tensor], Tensor]) -> Model:
    """Let a model read changed features."""
    read = model.features
    model.features = lambda batch: change(read(batch))
    return model


def _another_norm(healthy: Implementation, base: Any, config: Any) -> Model:
    return _with_features(healthy.build(base, config), lambda x: 1.5 * x + 0.1 * x.roll(1, -1))


def _another_layer(healthy: Implementation, base: Any, config: Any) -> Model:
    """Read another layer than the exit, or give all layers in another order."""
    match config.ctx_encoder_type:
        case "per_layer_activations":
            return _with_features(healthy.build(base, config), lambda x: x.flip(1))
        case "concat_layers":
            return _with_features(healthy.build(base, config), lambda x: x.roll(base.config.hidden_size, -1))
        case "embed_only":
            return healthy.build(base, changed(config, ctx_encoder_type="early_exit", layer_idx=1))
    layers = len(base.get_decoder().layers)
    exit_at = layers // 4 if config.layer_idx is None else config.layer_idx
    return healthy.build(base, changed(config, layer_idx=exit_at + 1 if exit_at + 1 < layers else exit_at - 1))


def _one_layer(subject: "Subject") -> str:
    return "the base has one layer" if subject.twin_base_config.num_hidden_layers == 1 else ""


RULE = Rule(
    code="ENC201",
    name="features-wrong",
    stage="twin",
    severity="error",
    sources=("failure mode C38", "https://github.com/SakanaAI/doc-to-lora", "https://arxiv.org/abs/2602.15902"),
    requires=("ATT201", "ATT205", "LOR203"),
    check=check,
    faults=(
        Fault("norm-wrong", "features go through another norm", override(build=_another_norm)),
        Fault(
            "another-layer",
            "features of another layer, or layers in another order",
            override(build=_another_layer, unless=_one_layer),
        ),
    ),
)
