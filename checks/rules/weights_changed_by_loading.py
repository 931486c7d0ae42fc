"""An MXFP4 checkpoint on disk is what the run's loader makes of it, value by value.

What it does
------------
Writes the tiny twin of an MXFP4 model to disk in the official layout (`*_blocks`, `*_scales`), reads it back with the
run's own loader, and compares every tensor, and the logits. Then it takes a tensor out of the file, and loads it again.

Why it matters
--------------
Saving a dequantized model and loading it again gives randomly initialised experts and only a line in a load report. A
transposed `down_proj` of the real model loads without an error, since it is square. A swapped nibble, a missing scale or
a stale rotary buffer is a model that answers nonsense, under a loss that looks like a hard data set.

How it is detected
------------------
Every tensor that was written must come back equal in every bit, experts after decoding, none missing; logits to 1e-4. The
file that lacks a tensor must be refused.

How to fix
----------
Load with `d2l.base.load.load_base`; save dequantized models with `save_pretrained(..., save_original_format=False)`.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from checks.faults import override
from checks.implementation import Implementation
from checks.probes import TOLERANCE, difference, probe_batch
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule
from d2l.errors import ModelError

if TYPE_CHECKING:
    from checks.subject import Subject

REMEDY = "load with d2l.base.load.load_base; save dequantized models with save_original_format=False"


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare every tensor and the logits, before and after the disk."""
    if subject.twin_plan.experts.value == "dense":
        return Inapplicable(f"{subject.twin_plan.experts.reason}: the checkpoint is not in MXFP4")
    written = subject.twin_base()
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        path = Path(folder) / "base"
        try:
            subject.implementation.save_base(written, path)
            read = subject.implementation.load_base(path, subject.twin_plan)
        except ModelError as error:
            return Fail(
                message="the twin's weights cannot be read back",
                expected="every tensor",
                actual=str(error),
                remedy=REMEDY,
            )
        removed = _remove_tensor(path)
        try:
            subject.implementation.load_base(path, subject.twin_plan)
        except Exception:  # an implementation has errors of its own
            removed = ""
    before, after = dict(written.state_dict()), dict(read.state_dict())
    changed = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    ids = probe_batch(subject).input_ids
    expected, actual = (base(input_ids=ids, use_cache=False).logits for base in (written, read))
    change = difference(actual, expected)
    evidence = {"tensors": len(before), "changed": changed, "logits": change}
    if changed or set(after) != set(before) or change > TOLERANCE:
        what = f"{len(changed)} of {len(before)} tensors differ, logits by {change:.2g}"
        return Fail(
            message="loading changes the weights",
            expected=f"all {len(before)} tensors equal in every bit, logits within {TOLERANCE:g}",
            actual=f"{what}; first: {changed[0] if changed else 'none'}",
            remedy=REMEDY,
            evidence=evidence,
        )
    if removed:
        return Fail(
            message="a checkpoint that lacks a tensor is loaded",
            expected="an error that names what is missing",
            actual=f"a base, from files without {removed}: its values are whatever they were initialised to",
            remedy="compare the names in the files with those of the model, and stop where one is missing",
        )
    return Pass(f"all {len(before)} tensors come back equal, logits within {change:.1g}", evidence)


def _remove_tensor(folder: Path) -> str:
    """Take the first layer norm out of a checkpoint's files; return its name."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("norm.weight"):
                del tensors[name]
                save_file(tensors, path, metadata={"format": "pt"})
                return name
    return ""


def _missing_filled(healthy: Implementation, folder: Path, plan: Any) -> Any:
    """Give a tensor that no file holds the values of any other of its size."""
    try:
        return healthy.load_base(folder, plan)
    except ModelError:
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        norm = next(name for name in tensors if name.endswith("norm.weight"))
        missing = "model.layers.0.input_layernorm.weight"
        save_file({missing: tensors[norm].clone(), **tensors}, path, metadata={"format": "pt"})
        return healthy.load_base(folder, plan)


def _spoilt(change: Any) -> Any:
    def load_base(healthy: Implementation, folder: Path, plan: Any) -> Any:
        base = healthy.load_base(folder, plan)
        for name, tensor in base.state_dict().items():
            if ".mlp.experts.down_proj" in name and not name.endswith("bias"):
                with torch.no_grad():
                    tensor.copy_(change(name, tensor))
        return base

    return load_base


def _swapped_nibbles(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return (tensor >> 4 | tensor << 4) if name.endswith("_blocks") else tensor


def _without_blocks(subject: "Subject") -> str:
    packed = subject.twin_plan.experts.value == "packed"
    return "" if packed else "the run dequantizes its experts while loading, and holds no MXFP4 blocks"


def _random_experts(name: str, tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if tensor.dtype == torch.uint8:
        drawn = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
        return drawn if name.endswith("_blocks") else tensor
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def _lost_rotary(healthy: Implementation, folder: Path, plan: Any) -> Any:
    """Leave buffers that are in no file as they were allocated."""
    base = healthy.load_base(folder, plan)
    base.get_decoder().rotary_emb.inv_freq.zero_()
    return base


RULE = Rule(
    code="QNT201",
    name="weights-changed-by-loading",
    stage="twin",
    severity="error",
    sources=("fix 1", "failure mode F1", "failure mode 32", "failure mode 34", "failure mode C13"),
    requires=("QNT101", "QNT102", "HYP201"),
    check=check,
    faults=(
        Fault(
            "nibbles-swapped",
            "odd and even elements change places",
            override(load_base=_spoilt(_swapped_nibbles), unless=_without_blocks),
        ),
        Fault(
            "random-experts", "experts are initialised instead of loaded", override(load_base=_spoilt(_random_experts))
        ),
        Fault("missing-filled", "a tensor that no file holds is filled in", override(load_base=_missing_filled)),
        Fault("rotary-lost", "buffers that no file holds are not computed", override(load_base=_lost_rotary)),
    ),
)
