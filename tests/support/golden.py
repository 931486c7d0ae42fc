"""Golden cases of the reference implementation: reading them, comparing with them, and an account of what was compared."""

import json
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
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

    name: str
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


@dataclass
class Account:
    """Which golden files were loaded, and how many of their values were compared.

    Attributes:
        compared: values that were compared, by the file's name; 0 for a file that was only loaded.
        open: files that the running test has loaded and not compared yet.
    """

    compared: Counter[str] = field(default_factory=Counter)
    open: set[str] = field(default_factory=set)

    def load(self, name: str) -> None:
        """Note that a test has loaded a file."""
        self.compared[name] += 0
        self.open.add(name)

    def compare(self, name: str, values: Any) -> None:
        """Note that these values of a file were compared: a tensor, a number, a text, or lists and mappings of them."""
        self.compared[name] += _count(values)
        self.open.discard(name)

    def close(self) -> None:
        """End a test.

        Raises:
            AssertionError: it has loaded a file and compared nothing of it.
        """
        idle, self.open = sorted(self.open), set()
        assert not idle, f"loaded and not compared: {', '.join(idle)}"

    def unread(self, shared: Path) -> list[str]:
        """Files of the folder that no test has compared."""
        files = {path.stem for path in _folder(shared).glob("*.json")}
        return sorted(name for name in files if not self.compared[name])

    def summary(self) -> str:
        """How many values of how many files were compared, in one line."""
        used = {name for name, values in self.compared.items() if values}
        whole = {name for name in used if name.startswith(("e2e_", "generate_", "checkpoint_"))}
        parts, models = (sum(self.compared[name] for name in names) for names in (used - whole, whole))
        return (
            f"golden: {parts + models:,} values compared: {parts:,} in {len(used - whole)} files of components, "
            f"{models:,} in {len(whole)} files of whole models"
        )


ACCOUNT = Account()


def load_case(shared: Path, name: str) -> Case:
    meta, tensors = _read(shared, name), load_file(_folder(shared) / f"{name}.safetensors")
    for tensor in tensors.values():
        tensor.golden_file = name  # by which `assert_close` knows what it compares with
    return Case(name, meta, tensors)


def data_cases(shared: Path, name: str) -> list[dict[str, Any]]:
    """The cases of `data_NAME.json`; a test reports what it compared by `ACCOUNT.compare`."""
    cases: list[dict[str, Any]] = _read(shared, f"data_{name}")["cases"]
    return cases


def init_stats(shared: Path) -> dict[str, Any]:
    return _read(shared, "init_stats")


def _folder(shared: Path) -> Path:
    return shared / "golden" / "reference"


def _read(shared: Path, name: str) -> dict[str, Any]:
    ACCOUNT.load(name)
    values: dict[str, Any] = json.loads((_folder(shared) / f"{name}.json").read_text())
    return values


def _count(values: Any) -> int:
    """How many numbers and texts there are in it."""
    match values:
        case Tensor():
            return values.numel()
        case Mapping():
            return sum(map(_count, values.values()))
        case list() | tuple():
            return sum(map(_count, values))
    return 1


def case_names(shared: Path, prefix: str) -> set[str]:
    """Every case whose file name begins with `prefix`, so that a test can demand that its table is complete."""
    return {path.stem for path in _folder(shared).glob(f"{prefix}*.safetensors")}


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
    if name := getattr(expected, "golden_file", None):
        ACCOUNT.compare(name, expected)


def stored_gradients(case: Case, loss: str | None = None) -> int:
    """How many parameters' gradients the file holds, of all losses or of this one."""
    return sum(key.startswith(f"grad.{loss}." if loss else "grad.") and key.endswith(".head") for key in case.tensors)


def assert_gradients(module: nn.Module, case: Case, loss: str | None = None) -> int:
    """Compare the stored head and norm of each parameter's gradient, all that the file has; returns how many parameters.

    Args:
        loss: the gradients of this loss, where a case holds those of several.
    """
    prefix = f"grad.{loss}." if loss else "grad."
    stored = {key.removeprefix(prefix) for key in case.tensors if key.startswith(prefix)}
    names = sorted(key.removesuffix(".l2") for key in stored if key.endswith(".l2"))
    rest = stored - {f"{name}.{kind}" for name in names for kind in ("head", "l2")}
    assert rest <= ({"ctx_features"} if loss is None else set()), f"stored and not compared: {sorted(rest)}"
    for name in names:
        grad = module.get_parameter(name).grad
        assert grad is not None, name
        head, norm = case[f"{prefix}{name}.head"], case[f"{prefix}{name}.l2"]
        assert_close(grad.flatten()[: head.numel()], head, GRADIENTS, f"gradient of {name}")
        assert_close(grad.norm()[None], norm, GRADIENTS, f"gradient norm of {name}")
    return len(names)
