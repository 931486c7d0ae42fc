"""Golden cases of the reference implementation: read them, pack their chunks, fill a module's parameters by the rule."""

import json
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from d2l.base.segments import Segments

OUTPUTS = 5e-5  # tolerances, relative to the largest value of the reference
GRADIENTS = 5e-4
BFLOAT16 = 2e-2


@dataclass(frozen=True)
class Case:
    """One golden case: `meta` is its JSON, `tensors` are named `in.*`, `out.*` and `grad.*`."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def seed(self) -> int:
        return self.meta["seed"]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]


READ: dict[str, int] = {}  # cases in each file that a test has read, by the file's name


def load_case(shared: Path, name: str) -> Case:
    return Case(_read(shared, name), load_file(shared / "golden" / "reference" / f"{name}.safetensors"))


def data_cases(shared: Path, name: str) -> list[dict[str, Any]]:
    """The cases of `data_NAME.json`."""
    cases: list[dict[str, Any]] = _read(shared, f"data_{name}")["cases"]
    READ[f"data_{name}"] = len(cases)
    return cases


def init_stats(shared: Path) -> dict[str, Any]:
    return _read(shared, "init_stats")


def account(shared: Path) -> str:
    """How many cases were read, in one line, and which files were not."""
    files = {path.stem for path in (shared / "golden" / "reference").glob("*.json")}
    whole = {name for name in READ if name.startswith(("e2e_", "generate_", "checkpoint_"))}
    component = sum(READ[name] for name in READ.keys() - whole)
    rest = f"; never read: {', '.join(sorted(files - READ.keys()))}" if files - READ.keys() else ""
    return f"golden: {component} component cases and {len(whole)} end-to-end cases, in {len(READ)} of {len(files)} files{rest}"


def _read(shared: Path, name: str) -> dict[str, Any]:
    READ[name] = 1
    values: dict[str, Any] = json.loads((shared / "golden" / "reference" / f"{name}.json").read_text())
    return values


def case_names(shared: Path, prefix: str) -> set[str]:
    """Every case whose file name begins with `prefix`, so that a test can demand that its table is complete."""
    return {path.stem for path in (shared / "golden" / "reference").glob(f"{prefix}*.safetensors")}


def fill(key: str, seed: int, shape: tuple[int, ...], scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """float32 from an integer hash of the key, the seed and the place: exact on every platform (golden README)."""
    low = 0xFFFFFFFF
    x = torch.arange(prod(shape), dtype=torch.int64) * 2654435761 + (
        zlib.crc32(key.encode()) ^ (seed * 0x9E3779B1 & low)
    )
    x = x & low
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    x = x ^ (x >> 16)
    unit = ((x >> 8).double() * 2.0**-23 - 1.0).float()
    return (unit * scale + offset).reshape(shape)


def packed_chunks(case: Case) -> tuple[Tensor, Segments]:
    """Features of a case's chunks in one row, `[1, L, T, F]` or `[1, T, F]`, and the chunks.

    Where the case has a right-padded row for each chunk, the padding is left out; gradients reach `in.ctx_features`.
    """
    features = case["in.ctx_features"]
    if case.meta["mode"] == "packed":
        return features, Segments.from_position_ids(case["in.ctx_position_ids"])
    mask = case["in.ctx_attn_mask"]
    assert (mask.int().diff(dim=1) <= 0).all(), "chunks must be padded on the right"
    lengths = tuple(mask.sum(1).tolist())
    packed = torch.cat([row[..., :length, :] for row, length in zip(features, lengths, strict=True)], dim=-2)
    return packed[None], Segments(lengths)


@torch.no_grad()
def fill_parameters(module: nn.Module, rules: dict[str, dict[str, Any]], seed: int, prefix: str = "") -> None:
    """Fills every parameter by its rule; a parameter without a rule, or a rule without a parameter, is an error."""
    parameters = dict(module.named_parameters())
    assert {prefix + name for name in parameters} == set(rules)
    for name, parameter in parameters.items():
        rule = rules[prefix + name]
        assert list(parameter.shape) == rule["shape"], name
        parameter.copy_(fill(prefix + name, seed, tuple(rule["shape"]), rule["scale"], rule["offset"]))


def probe_loss(outputs: list[Tensor], seed: int, step: int = 1) -> Tensor:
    """The scalar whose gradients the cases hold: every output times a fixed random tensor."""
    terms = [(x.float() * fill("probe", seed + i * step, tuple(x.shape))).sum() for i, x in enumerate(outputs)]
    return torch.stack(terms).sum()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Equal shapes, and an absolute error of at most `tolerance` times the largest expected value."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_gradients(module: nn.Module, case: Case) -> int:
    """Compares the stored head and norm of each parameter's gradient; returns how many parameters were compared."""
    names = [key.removeprefix("grad.").removesuffix(".l2") for key in case.tensors if key.endswith(".l2")]
    for name in names:
        grad = module.get_parameter(name).grad
        assert grad is not None, name
        head, norm = case[f"grad.{name}.head"], case[f"grad.{name}.l2"]
        assert_close(grad.flatten()[: head.numel()], head, GRADIENTS, f"gradient of {name}")
        assert_close(grad.norm()[None], norm, GRADIENTS, f"gradient norm of {name}")
    return len(names)
