"""The experts multiply by the numbers that their MXFP4 bytes stand for.

What it does
------------
Writes a checkpoint of the tiny twin in the official layout with fixed bytes, all 256 of them under several scales, reads it
with the run's own loader, and looks at the matrices by which the experts multiply.

Why it matters
--------------
A codec that is judged by itself is never wrong. Nibbles in the other order, a scale of twice the size, a lost sign or a
single wrong code make another model of the same checkpoint; it still runs, and its loss looks like a hard data set.

How it is detected
------------------
For the first and last expert of the first and last layer, a matrix of each projection must be, in every bit, the decoding
of the bytes by the table of the OCP Microscaling specification.

How to fix
----------
Decode E2M1 with its sign in the highest bit and the first element in the low nibble, times 2^(scale - 127).
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from checks.faults import override
from checks.implementation import Implementation
from checks.oracles import mxfp4
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

PROJECTIONS = ("gate_up_proj", "down_proj")
SCALES = (117, 134)  # bytes of the smallest and largest scale: 2^-10 to 2^7
NOT_MXFP4 = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "linear", "einsum", "addmm", "baddbmm", "_grouped_mm"}
Bytes = tuple[Tensor, Tensor]  # blocks [E, out, in / 32, 16] and scales [E, out, in / 32], uint8


class _Factors(TorchFunctionMode):
    """Collects the floating point matrices that enter products while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in PRODUCTS:
            operands = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
            self.seen += [x.detach() for x in operands if x.is_floating_point() and x.ndim > 1]
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare the matrices of the experts' products with decoded bytes."""
    if subject.twin_plan.experts.value == "dense":
        return Inapplicable(f"{subject.twin_plan.experts.reason}: there are no MXFP4 experts")
    fixed = {name: _fixed_bytes(subject, name) for name in PROJECTIONS}
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        path = Path(folder) / "base"
        _write(subject, fixed, path)
        base = subject.implementation.load_base(path, subject.twin_plan)
    compared = 0
    for layer, experts, expert in _some_experts(base):
        factors = _factors(experts, expert, base)
        for name in PROJECTIONS:
            blocks, scales = (part[expert] for part in fixed[name])
            expected = mxfp4.decode(blocks, scales)
            shapes = (expected.shape, expected.T.shape)
            fitting = [x for x in factors if x.shape[-2:] in shapes]
            candidates = [matrix for x in fitting for matrix in x.reshape(-1, *x.shape[-2:])]
            if not candidates:
                return Inapplicable(
                    f"no product with a matrix of {name}'s size {list(expected.shape)} can be seen in the experts"
                )
            compared += 1
            if not any(_is_same(matrix, expected) for matrix in candidates):
                nearest = max((_oriented(m, expected) for m in candidates), key=lambda m: _agreement(m, expected))
                return _finding(f"{name} of expert {expert} in layer {layer}", nearest, expected, blocks, scales)
    return Pass(
        f"{compared} matrices of the experts' products are, bit for bit, their bytes by the specification",
        {"matrices": compared, "scale_bytes": list(SCALES)},
    )


def _fixed_bytes(subject: "Subject", name: str) -> Bytes:
    """Make blocks with every byte value and scales of several sizes, the same at every run; experts differ."""
    config = subject.twin_base_config
    hidden, intermediate = config.hidden_size, config.intermediate_size
    width_out, width_in = (2 * intermediate, hidden) if name == "gate_up_proj" else (hidden, intermediate)
    shape = (config.num_local_experts, width_out, width_in // 32)
    places = torch.arange(shape[0] * shape[1] * shape[2])
    low, high = SCALES
    scales = (low + places * 5 % (high - low + 1)).to(torch.uint8).reshape(shape)
    bytes_ = torch.arange(16 * len(places)) * 37 + places.repeat_interleave(16) // 16
    return (bytes_ % 256).to(torch.uint8).reshape(*shape, 16), scales


def _write(subject: "Subject", fixed: dict[str, Bytes], folder: Path) -> None:
    """Write the twin in the layout of the official checkpoints, with these bytes as experts of every layer."""
    config = deepcopy(subject.twin_base_config)
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_MXFP4}
    config.save_pretrained(folder)
    projection = re.compile(rf"\.mlp\.experts\.({'|'.join(PROJECTIONS)})(_blocks|_scales)?$")
    state = {name: x.clone() for name, x in subject.twin_base().state_dict().items() if not projection.search(name)}
    for layer in range(config.num_hidden_layers):
        for name, parts in fixed.items():
            for kind, part in zip(("blocks", "scales"), parts, strict=True):
                state[f"model.layers.{layer}.mlp.experts.{name}_{kind}"] = part.clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _some_experts(base: Any) -> Iterator[tuple[int, Any, int]]:
    """Yield layer, its experts and an expert's number: first and last of the first and last layer."""
    layers = base.get_decoder().layers
    for layer in dict.fromkeys((0, len(layers) - 1)):
        for expert in dict.fromkeys((0, base.config.num_local_experts - 1)):
            yield layer, layers[layer].mlp.experts, expert


def _factors(experts: Any, expert: int, base: Any) -> list[Tensor]:
    """Return the matrices that enter products while one expert reads one token, as the block calls its experts."""
    token = torch.full((1, base.config.hidden_size), 2.0**-10, dtype=base.dtype)
    with _Factors() as factors:
        experts(token, torch.tensor([[expert]]), torch.ones(1, 1, dtype=base.dtype))
    return factors.seen


def _oriented(matrix: Tensor, expected: Tensor) -> Tensor:
    """Return a matrix as [out, in], whichever way it enters the product."""
    both = [x.double() for x in (matrix, matrix.T) if x.shape == expected.shape]
    return max(both, key=lambda x: _agreement(x, expected))


def _is_same(matrix: Tensor, expected: Tensor) -> bool:
    return torch.equal(_oriented(matrix, expected), expected)


def _agreement(matrix: Tensor, expected: Tensor) -> float:
    return float((matrix == expected).double().mean())


def _finding(place: str, used: Tensor, expected: Tensor, blocks: Tensor, scales: Tensor) -> Fail:
    """Describe the first wrong number, and what all wrong ones have in common."""
    wrong = used != expected
    row, column = wrong.nonzero()[0].tolist()
    byte, scale = int(blocks[row].flatten()[column // 2]), int(scales[row, column // 32])
    stands = f"byte 0x{byte:02X}, {'high' if column % 2 else 'low'} nibble, scale byte {scale}"
    ratios = (used[wrong] / expected[wrong]).unique()
    common = f", all by a factor of {float(ratios[0]):g}" if len(ratios) == 1 else ""
    return Fail(
        message="MXFP4 bytes are decoded to other numbers than they stand for",
        expected=f"{float(expected[row, column]):g} for {stands}",
        actual=f"{float(used[row, column]):g} in {place}; {float(wrong.double().mean()):.0%} of its numbers are wrong{common}",
        remedy="decode by the OCP Microscaling specification: low nibble first, sign in its highest bit, times 2^(scale - 127)",
        evidence={"where": place, "wrong": float(wrong.double().mean()), "row": row, "column": column},
    )


def _decoding(change: Callable[[Tensor, Tensor], Bytes]) -> Any:
    """Make a fault of experts that decode changed bytes: blocks and scales as they are used, not as they are stored."""

    def build_base(healthy: Implementation, base_config: Any, plan: Any, seed: int) -> Any:
        return _with_changed_bytes(healthy.build_base(base_config, plan, seed), change)

    def load_base(healthy: Implementation, folder: Path, plan: Any) -> Any:
        base = _with_changed_bytes(healthy.load_base(folder, plan), change)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            packed = [name for name in file.keys() if name.endswith("_blocks")]  # noqa: SIM118  (it is no mapping)
            for name in packed if plan.experts.value == "dequantize" else ():
                parts = file.get_tensor(name), file.get_tensor(name.replace("_blocks", "_scales"))
                base.get_parameter(name.removesuffix("_blocks")).data = _dense(*change(*parts), dtype=base.dtype)
        return base

    return override(build_base=build_base, load_base=load_base)


def _dense(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return mxfp4.decode(blocks, scales).to(dtype).transpose(1, 2).contiguous()


def _with_changed_bytes(base: Any, change: Callable[[Tensor, Tensor], Bytes]) -> Any:
    """Change the bytes of packed experts while they compute."""

    def before(module: Any, inputs: Any) -> None:
        module.kept = {name: module.get_buffer(name) for name, _ in module.named_buffers()}
        for name in PROJECTIONS:
            parts = change(module.kept[f"{name}_blocks"], module.kept[f"{name}_scales"])
            for kind, part in zip(("blocks", "scales"), parts, strict=True):
                setattr(module, f"{name}_{kind}", part)

    def after(module: Any, inputs: Any, output: Any) -> None:
        for name, part in module.__dict__.pop("kept").items():
            setattr(module, name, part)

    for module in [it for it in base.modules() if "down_proj_blocks" in dict(it.named_buffers(recurse=False))]:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)
    return base


def _one_code_wrong(blocks: Tensor, scales: Tensor) -> Bytes:
    """Read code 7, which stands for 6, as code 6, which stands for 4."""
    low, high = blocks & 0x0F, blocks >> 4
    low, high = (torch.where(part == 7, torch.full_like(part, 6), part) for part in (low, high))
    return low | high << 4, scales


RULE = Rule(
    code="QNT203",
    name="mxfp4-decoded-wrong",
    stage="twin",
    severity="error",
    sources=(
        "fix 1",
        "failure mode F1",
        "https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
    ),
    requires=("QNT201",),
    check=check,
    faults=(
        Fault("nibbles-swapped", "the high nibble is read first", _decoding(lambda b, s: (b >> 4 | b << 4, s))),
        Fault("bias-128", "the exponent's bias is 128 instead of 127", _decoding(lambda b, s: (b, s - 1))),
        Fault("sign-lost", "negative codes are read as positive", _decoding(lambda b, s: (b & 0x77, s))),
        Fault("code-wrong", "6 is read as 4", _decoding(_one_code_wrong)),
    ),
)
