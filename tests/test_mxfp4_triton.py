"""The Triton kernel of MXFP4, run by Triton's interpreter on a CPU and compiled for GPUs that are not here."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from checks.oracles.mxfp4 import decode as decode_by_the_specification
from d2l.base import mxfp4
from d2l.base.mxfp4 import dequantize

CPU = torch.device("cpu")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the kernel, whose programs Triton's interpreter runs one after the other, chosen on a CPU too."""
    pytest.importorskip("triton", reason="triton is not installed: it has wheels for Linux on x86_64 only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "d2l.base.mxfp4_triton", raising=False)
    monkeypatch.setattr(mxfp4, "_KERNEL_DEVICES", ("cuda", "cpu"))
    mxfp4._kernel.cache_clear()
    yield importlib.import_module("d2l.base.mxfp4_triton")
    sys.modules.pop("d2l.base.mxfp4_triton")  # a kernel that a GPU compiles is made when it is imported anew
    mxfp4._kernel.cache_clear()


def every_byte_under_every_scale() -> tuple[Tensor, Tensor]:
    """[253, 256] bytes as blocks [253, 16, 16], and scales [253, 16]."""
    scales = torch.arange(253, dtype=torch.uint8).view(-1, 1).expand(-1, 16).contiguous()
    return torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(253, -1, -1).contiguous(), scales


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int16)


def random_bytes(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(253, shape, dtype=torch.uint8, generator=generator)


# Numbers


def test_every_byte_under_every_scale_is_decoded_as_the_specification_says(interpreted: ModuleType) -> None:
    """All of them, bit for bit: subnormal bfloat16 numbers under the scale bytes 0 and 1, and negative zeros."""
    decoded = interpreted.decode(*every_byte_under_every_scale())
    expected = decode_by_the_specification(*every_byte_under_every_scale())
    assert torch.equal(decoded.double(), expected)
    assert torch.equal(decoded.signbit(), expected.signbit())
    assert 0 < float(decoded.double().abs()[decoded != 0].min()) == 2.0**-128


def halves(parts: Tensor) -> Tensor:
    """Even rows, then odd rows."""
    return parts.unflatten(1, (-1, 2)).transpose(1, 2)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda parts: parts,
    "rows": lambda parts: parts[:, 4:10],
    "halves": halves,
    "rows of halves": lambda parts: halves(parts)[:, :, 1:6],
    "one expert": lambda parts: parts[1],
    "one row": lambda parts: parts[1, 2],
    "none": lambda parts: parts[:0],
    "more dimensions than the kernel has": lambda parts: parts.unflatten(1, (2, 3, -1)),
    "every second row": lambda parts: parts[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_are_decoded_in_their_own_order(view: Callable[[Tensor], Tensor], interpreted: ModuleType) -> None:
    blocks, scales = (view(part) for part in random_bytes(3, 12, 5))
    expected = mxfp4._look_up(blocks, scales, torch.bfloat16)
    assert torch.equal(bits(interpreted.decode(blocks, scales)), bits(expected))


@pytest.mark.parametrize(("first", "step"), [(1, 1), (0, 2)])
def test_columns_are_decoded_where_they_lie_or_copied(first: int, step: int, interpreted: ModuleType) -> None:
    blocks, scales = random_bytes(3, 12, 5)
    blocks, scales = halves(blocks)[:, :, :, first:4:step], halves(scales)[:, :, :, first:4:step]
    expected = mxfp4._look_up(blocks, scales, torch.bfloat16)
    assert torch.equal(bits(interpreted.decode(blocks, scales)), bits(expected))


# The choice


def test_bfloat16_is_decoded_by_the_kernel_and_other_types_by_the_table(interpreted: ModuleType) -> None:
    assert mxfp4._kernel(CPU) is interpreted.decode
    blocks, scales = random_bytes(2, 3, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mxfp4, "_look_up", lambda *arguments: pytest.fail("the table was used"))
        decoded = dequantize(blocks, scales, torch.bfloat16)
    assert torch.equal(decoded.double(), decode_by_the_specification(blocks, scales))
    assert torch.equal(dequantize(blocks, scales, torch.float32).double(), decoded.double())


def failing(*arguments: Any) -> Tensor:
    raise RuntimeError("PTX was compiled with an unsupported version\nand more")


def off_by_one_bit(blocks: Tensor, scales: Tensor) -> Tensor:
    decoded = mxfp4._look_up(blocks, scales, torch.bfloat16)
    bits(decoded)[-1, -1] ^= 1
    return decoded


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(failing, "RuntimeError: PTX was compiled with an unsupported version"), (off_by_one_bit, "other numbers")],
)
def test_a_kernel_that_fails_or_errs_is_not_used_and_said_once(
    kernel: Callable[..., Tensor], reason: str, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreted, "decode", kernel)
    blocks, scales = random_bytes(2, 3, 2)
    with pytest.warns(UserWarning, match=f"decoded by a table on cpu, .*: .*{reason}"):
        decoded = dequantize(blocks, scales, torch.bfloat16)
    assert torch.equal(decoded.double(), decode_by_the_specification(blocks, scales))
    dequantize(blocks, scales, torch.bfloat16)  # a second warning would be an error


def test_without_triton_the_table_is_used_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "d2l.base.mxfp4_triton", raising=False)
    monkeypatch.setattr(mxfp4, "_KERNEL_DEVICES", ("cpu",))
    mxfp4._kernel.cache_clear()
    blocks, scales = random_bytes(2, 3, 2)
    with pytest.warns(UserWarning, match=r"several times slower than by Triton: ModuleNotFoundError: .*triton"):
        decoded = dequantize(blocks, scales, torch.bfloat16)
    assert torch.equal(decoded.double(), decode_by_the_specification(blocks, scales))
    assert torch.equal(dequantize(blocks, scales, torch.bfloat16), decoded)
    mxfp4._kernel.cache_clear()


# Compilation


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_for_gpus_and_reads_and_writes_sixteen_bytes_at_a_time(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, as the first launch would, with the one set of arguments that every launch has."""
    compiler = pytest.importorskip("triton.compiler", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, "d2l.base.mxfp4_triton", raising=False)
    module = importlib.import_module("d2l.base.mxfp4_triton")
    pointers = {"blocks": "*u8", "scales": "*u8", "words": "*i32"}
    numbers = ("count", "groups", "middle", "inner", "outer_step", "middle_step", "inner_step")
    source = compiler.ASTSource(
        fn=module._decode,
        signature=pointers | dict.fromkeys(numbers, "i32") | {"TILE": "constexpr"},
        constexprs={"TILE": module._TILE},
        attrs={(place,): [["tt.divisibility", 16]] for place in (0, 2)},  # blocks and words; scales may lie anywhere
    )
    code = compiler.compile(source, target=GPUTarget("cuda", capability, 32)).asm
    accesses = re.findall(r"(?:ld|st)\.global[\w.]*", code["ptx"])
    assert accesses == ["ld.global.b8", "ld.global.v4.b32", *["st.global.v4.b32"] * 4]
    assert len(code["cubin"]) > 1000


@pytest.mark.gpu
def test_on_cuda_the_kernel_is_chosen_and_exact() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    blocks, scales = (halves(part.cuda()) for part in random_bytes(3, 64, 90))
    assert mxfp4._kernel(blocks.device) is not None
    assert torch.equal(
        bits(dequantize(blocks, scales, torch.bfloat16)), bits(mxfp4._look_up(blocks, scales, torch.bfloat16))
    )
