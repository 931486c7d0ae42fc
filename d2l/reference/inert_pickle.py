"""Reads files of `torch.save` without executing them: tensors out of the archive, an inert value for all else.

A pickle is a program. This one runs with a vocabulary of its own: an opcode or a global name that is not listed ends
the reading, and a listed name stands for one of the classes below, never for what it names elsewhere. So nothing that
the file chooses is imported, called or written to, and no tensor exists before its place in the file was verified.
"""

import io
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from d2l.errors import CheckpointError

# What torch.save writes in its pickle protocol, 2: values and containers, then what builds objects out of them.
_OPCODES = """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT
    GLOBAL BINPERSID REDUCE NEWOBJ BUILD
"""
_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
}


def _refuse_state(state: Any) -> None:
    """For `__setstate__`: without one, BUILD would write attributes, on a class even, which all its users share."""
    raise pickle.UnpicklingError(f"state of type {type(state).__name__} for an object that has none")


class SavedDataclass:
    """An object of a dataclass: its fields as `values`."""

    values: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("an object whose state is no mapping")
        self.values = state


class OrderedMapping(dict[Any, Any]):
    """An OrderedDict; attributes set on it (torch's `_metadata`) are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class EnumMember(NamedTuple):
    """A member of an enumeration, by its value."""

    value: Any

    def __setstate__(self, state: Any) -> None:
        _refuse_state(state)


class TensorReference(NamedTuple):
    """The arguments of `torch._utils._rebuild_tensor_v2`, not yet verified: see `TorchFile.tensor`."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    requires_grad: Any
    hooks: Any

    def __setstate__(self, state: Any) -> None:
        _refuse_state(state)


class _Storage(NamedTuple):
    """A run of numbers in the archive."""

    dtype: torch.dtype
    key: str
    numel: int

    def __setstate__(self, state: Any) -> None:
        _refuse_state(state)


class TorchFile:
    """A file in torch's zip format, closed with the `with` block.

    Args:
        path: the file.
        records: qualified names of dataclasses that it may hold.
        enums: qualified names of enumerations that it may hold.

    Attributes:
        root: what was saved; tensors are `TensorReference`s in it, dataclasses `SavedDataclass`s.

    Raises:
        CheckpointError: the file is in another format or damaged, or holds something that is not listed.
    """

    def __init__(self, path: Path, records: Collection[str], enums: Collection[str] = ()) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise CheckpointError(_not_an_archive(path, error)) from error
        try:
            self._folder = self._find_folder()
            names = dict.fromkeys(records, SavedDataclass) | dict.fromkeys(enums, EnumMember)
            self.root: Any = _load(self._read("data.pkl"), names, path)
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def tensor(self, reference: TensorReference) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            CheckpointError: it reaches beyond what the file holds.
        """
        storage, offset, size, stride = reference[:4]
        shape_is_valid = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
        if not (isinstance(storage, _Storage) and shape_is_valid and _are_counts(offset, *size, *stride)):
            raise CheckpointError(f"{self.path}: a tensor's description is not one that torch writes")
        data = self._read(f"data/{storage.key}")
        stored = len(data) // storage.dtype.itemsize
        numel, last = 1, offset
        for length, step in zip(size, stride, strict=True):
            numel, last = numel * length, last + (length - 1) * step
        if stored != storage.numel or numel > stored or (numel and last >= stored):
            raise CheckpointError(
                f"{self.path}: a tensor of {numel:,} values {list(size)} reaches beyond the {stored:,} that the file "
                f"holds for it (storage {storage.key}, {storage.numel:,} announced); it is damaged or was tampered with"
            )
        if not numel:
            return torch.empty(size, dtype=storage.dtype)
        return torch.frombuffer(bytearray(data), dtype=storage.dtype).as_strided(size, stride, offset)

    def _find_folder(self) -> str:
        """The folder inside the archive, by its one pickle."""
        names = self._archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{self.path}: expected an archive of torch.save with one data.pkl, found {len(pickles)}"
            )
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names:
            self._folder = folder
            order = self._read("byteorder").decode("ascii", "replace")
            if order != sys.byteorder:
                raise CheckpointError(
                    f"{self.path}: numbers in {order!r} byte order, this machine's is {sys.byteorder}"
                )
        return folder

    def _read(self, name: str) -> bytes:
        """A member of the archive; torch compresses none, so none is larger than the file."""
        try:
            member = self._archive.getinfo(self._folder + name)
            if member.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{self.path}: {name} is compressed, which torch.save does not do")
            return self._archive.read(member)
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.path}: {name} is missing or damaged: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Looks names up in a table and nowhere else."""

    def __init__(self, data: bytes, names: Mapping[str, Any], path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._names, self._path = names, path

    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        if qualified not in self._names:
            raise CheckpointError(
                f"{self._path}: its pickle asks for {qualified}, which is no part of such a file; it was not imported, "
                f"and nothing was run. Do not load this file by other means unless you trust who made it"
            )
        return self._names[qualified]

    def persistent_load(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", str(kind), str(key), str(), int(numel)) if kind in _DTYPES and key.isdecimal():
                return _Storage(_DTYPES[kind], key, numel)
        raise pickle.UnpicklingError("a reference that is no storage of numbers")


def _load(data: bytes, names: Mapping[str, type], path: Path) -> Any:
    """Run a pickle with these classes, those of tensors, and no others."""
    table: dict[str, Any] = {
        "collections.OrderedDict": OrderedMapping,
        "torch._utils._rebuild_tensor_v2": TensorReference,
        "__builtin__.set": frozenset,
        **{kind: kind for kind in _DTYPES},
        **names,
    }
    try:
        _screen(data)
        return _Unpickler(data, table, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # what a malformed pickle raises is not bounded
        raise CheckpointError(f"{path}: its pickle is malformed: {type(error).__name__}: {error!s:.200}") from error


def _screen(data: bytes) -> None:
    """Refuse opcodes that torch.save does not write, and memo places that would make a table of gigabytes."""
    allowed = frozenset(_OPCODES.split())
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name not in allowed:
            raise pickle.UnpicklingError(f"opcode {opcode.name} at byte {position}")
        if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"memo place {argument} at byte {position}")


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _not_an_archive(path: Path, error: Exception) -> str:
    """Why a file is no zip archive, in terms of what it may be instead."""
    if path.is_dir():
        return f"{path} is a folder: pass the pytorch_model.bin in it"
    if isinstance(error, OSError):
        return f"cannot read {path}: {error.strerror or error}"
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"PK"):
        return f"{path}: the archive is cut off or damaged ({error}): fetch the file again"
    if start.startswith(b"\x80"):
        return (
            f"{path}: expected an archive of torch.save, found a bare pickle, which nothing was read of; it may be of torch "
            f"before 1.6. Only if you trust who made it, load it with torch and save it again"
        )
    return f"{path}: expected an archive of torch.save, such as the pytorch_model.bin of the reference; {error}"
