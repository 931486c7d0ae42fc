"""A checkpoint of the reference implementation, imported, is the same hypernetwork number by number.

What it does
------------
Writes the tiny twin's hypernetwork as the reference's trainer would (`pytorch_model.bin`, with pickled dataclasses
between the tensors), imports the file, and builds a model from nothing but the folder that comes out.

Why it matters
--------------
A checkpoint of the reference took days on eight GPUs. A parameter that is skipped stays at its initial value, a
configuration that is read wrongly gives another scale or another encoder; both load without an error and answer badly.

How it is detected
------------------
Every tensor must come back equal in every bit, none missing; the LoRA of a document must equal the twin's to 1e-4.

How to fix
----------
Import with `d2l import-reference`; it reads the file without unpickling, and refuses what it does not know.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checks.faults import Override, override
from checks.implementation import Implementation
from checks.probes import TOLERANCE, difference, probe_batch
from checks.reference_file import reference_state, write_reference_file
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import build_drawn, changed
from d2l.config.schema import RunConfig
from d2l.errors import D2LError

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.hypernet.lora import Lora

Tensors = Mapping[str, torch.Tensor]

UNNAMED = ("perceiver_heads", "perceiver_head_dim")  # no file of the reference names these: all have the same
REMEDY = "import with `d2l import-reference`, every tensor under its own name, and keep the folder's config"


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare tensors and LoRAs, before and after."""
    if own := _beyond_the_reference(subject.config):
        return Inapplicable(
            f"the reference has no {own}, so no checkpoint of it could be imported into this configuration"
        )
    config = changed(subject.twin_config, **{name: getattr(subject.config, name) for name in UNNAMED})
    model = build_drawn(subject.implementation, subject.twin_base(), config, seed=0)
    tensors = dict(model.hypernet.state_dict())
    batch = probe_batch(subject)
    expected = model.lora(batch)
    sizes = {name: (expected.A[name].shape[-1], expected.B[name].shape[-1]) for name in expected.A}
    import_reference = subject.implementation.import_reference
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        file, imported = Path(folder) / "pytorch_model.bin", Path(folder) / "imported"
        write_reference_file(file, reference_state(tensors, config, subject.twin_base_config, sizes))
        try:
            import_reference(file, imported)
            read, found = subject.implementation.read(imported)
        except D2LError as error:
            return Fail(
                message="a checkpoint of the reference cannot be imported",
                expected="a folder",
                actual=str(error),
                remedy=REMEDY,
            )
    names = sorted(tensors.keys() | found.keys())
    differing = [name for name in names if not _is_same(found.get(name), tensors.get(name))]
    evidence = {"tensors": len(tensors), "changed": differing}
    if differing:
        actual = f"{len(differing)} of {len(tensors)} tensors changed or missing; first: {differing[0]}"
        return Fail(
            message="the import changes the weights",
            expected="every tensor equal in every bit",
            actual=actual,
            remedy=REMEDY,
            evidence=evidence,
        )
    try:
        fresh = subject.implementation.build(subject.twin_base(), read)
        fresh.hypernet.load_state_dict(found)
        distance = _difference(fresh.lora(batch), expected)
    except (RuntimeError, D2LError) as problem:
        actual = str(problem).strip().splitlines()[-1].strip()
        return Fail(
            message="the imported configuration is of another model",
            expected="one that the weights fit",
            actual=actual,
            remedy=REMEDY,
            evidence=evidence,
        )
    if distance > TOLERANCE:
        return Fail(
            message="the imported model makes other LoRAs",
            expected=f"the LoRA of the model that was saved, within {TOLERANCE:g}",
            actual=f"{distance:.2g} off",
            remedy=REMEDY,
            evidence={**evidence, "lora": distance},
        )
    return Pass(f"all {len(tensors)} tensors equal, LoRAs within {distance:.1g}", {**evidence, "lora": distance})


def _beyond_the_reference(config: RunConfig) -> str:
    """Name what the configuration has and the reference has not; empty where there is nothing."""
    keys = [key for key in UNNAMED if getattr(config, key) != RunConfig.model_fields[key].default]
    values = {key: getattr(config, key) for key in keys}
    if config.ctx_encoder_type == "concat_layers":
        values["ctx_encoder_type"] = config.ctx_encoder_type
    return ", ".join(f"{key}: {value}" for key, value in values.items())


def _is_same(actual: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if actual is None or expected is None or actual.dtype != expected.dtype:
        return False
    return torch.equal(actual, expected)


def _difference(actual: "Lora", expected: "Lora") -> float:
    """Return the largest relative difference of A, B and scale."""
    scales = [torch.tensor([lora.scale]) for lora in (actual, expected)]
    pairs = [(actual.A[name], expected.A[name]) for name in expected.A]
    pairs += [(actual.B[name], expected.B[name]) for name in expected.B]
    return max(difference(*pair) for pair in [*pairs, (scales[0], scales[1])])


def _read(change: Callable[[RunConfig, Tensors], tuple[RunConfig, Tensors]]) -> Override:
    """Make a fault of a folder that holds something else than was imported."""

    def read(healthy: Implementation, folder: Path) -> tuple[RunConfig, Tensors]:
        return change(*healthy.read(folder))

    return override(read=read)


def _skipped(config: RunConfig, tensors: Tensors) -> tuple[RunConfig, Tensors]:
    """Leave out the last tensor."""
    *kept, _ = sorted(tensors)
    return config, {name: tensors[name] for name in kept}


def _rounded(config: RunConfig, tensors: Tensors) -> tuple[RunConfig, Tensors]:
    """Round the weights through bfloat16."""
    return config, {name: value.bfloat16().to(value.dtype) for name, value in tensors.items()}


def _another_encoder(config: RunConfig, tensors: Tensors) -> tuple[RunConfig, Tensors]:
    """Take features of another place in the encoder; where there is but one set of them, shapes do not show it."""
    if config.ctx_encoder_type == "embed_only":
        return changed(config, ctx_encoder_type="early_exit", layer_idx=1), tensors
    return changed(config, ctx_encoder_type="embed_only", layer_idx=None), tensors


RULE = Rule(
    code="IMP201",
    name="import-changes-numbers",
    stage="twin",
    severity="error",
    sources=("fix 6", "failure mode F6", "failure mode 22"),
    requires=("HYP202",),
    check=check,
    faults=(
        Fault("tensor-skipped", "a tensor stays at its initial value", _read(_skipped)),
        Fault("rounded", "weights go through bfloat16", _read(_rounded)),
        Fault(
            "rank-wrong",
            "another rank, and with it another scale",
            _read(lambda config, tensors: (changed(config, lora_r=config.lora_r + 1), tensors)),
        ),
        Fault("encoder-wrong", "features of other layers", _read(_another_encoder)),
    ),
)
