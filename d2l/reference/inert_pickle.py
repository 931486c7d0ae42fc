"""Restricted reader of `torch.save` files: tensors from the archive, inert values for everything else.

A pickle is a program. Here it runs with a fixed vocabulary: an opcode or a global name that is not listed ends the
reading, and a listed name stands for one of the classes below, never for the object that it names elsewhere. So nothing
that the file chooses is imported, called or written to, and no tensor is made before its extent in the file is verified.
"""

import io
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from d2l.errors import CheckpointError

# Opcodes that torch.save writes in pickle protocol 2: values and containers, then those that build objects.
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

# A state dict names a storage once for every layer that shares it: 8 blocks as published. What is imported is written
# out for each, so a file of megabytes that names one storage hundreds of times would become gigabytes.
MOST_SHARED = 32
_PIECE = 2**20  # bytes that are copied out of the archive at a time


def _refuse_state(state: Any) -> None:
    """Refuse a state, as `__setstate__`: without one, BUILD would set attributes, even on a class."""
    raise pickle.UnpicklingError(f"state of type {type(state).__name__} for an object that has none")


# What opening an archive raises; the third where it needs a newer version of the format than zipfile reads.
_BAD_ARCHIVE = (OSError, ValueError, NotImplementedError, zipfile.BadZipFile)


class SavedDataclass:
    """Instance of a dataclass in the file, its fields in `values`."""

    values: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("an object whose state is not a mapping")
        self.values = state


class OrderedMapping(dict[Any, Any]):
    """OrderedDict of the file, without its attributes (torch's `_metadata`)."""

    def __setstate__(self, state: Any) -> None:
        pass


class EnumMember(NamedTuple):
    """Member of an enumeration in the file, by its value."""

    value: Any

    def __setstate__(self, state: Any) -> None:
        _refuse_state(state)


class TensorReference(NamedTuple):
    """Arguments of `torch._utils._rebuild_tensor_v2`, not verified yet: see `TorchFile.read_tensor`."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    requires_grad: Any
    hooks: Any

    def __setstate__(self, state: Any) -> None:
        _refuse_state(state)


class _Storage(NamedTuple):
    """Contiguous storage of numbers in the archive."""

    dtype: torch.dtype
    key: str
    numel: int

    def __setstate__(self, state: Any) -> None:
        _refuse_state(state)


class TorchFile:
    """Open file in torch's zip format; a context manager, which closes it.

    Args:
        path: path of the file.
        dataclasses: qualified names of dataclasses that the file may hold.
        enums: qualified names of enumerations that the file may hold.

    Attributes:
        root: the saved object; its tensors are `TensorReference`s, its dataclasses `SavedDataclass`es.

    Raises:
        CheckpointError: the file has another format, is damaged, or holds a name that is not listed.
    """

    def __init__(self, path: Path, dataclasses: Collection[str], enums: Collection[str] = ()) -> None:
        self.path = path
        self._storages: dict[str, bytearray] = {}
        self._described = 0  # bytes of the tensors that were read, each counted whole
        with ExitStack() as opened:
            try:
                self._size = path.stat().st_size
                self._archive = opened.enter_context(zipfile.ZipFile(path))
            except _BAD_ARCHIVE as error:
                raise CheckpointError(_describe_bad_archive(path, error)) from error
            self._folder = self._find_folder()
            names = dict.fromkeys(dataclasses, SavedDataclass) | dict.fromkeys(enums, EnumMember)
            self.root: Any = _load(self._read("data.pkl"), names, path)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def read_tensor(self, reference: TensorReference) -> Tensor:
        """Read a tensor, on the CPU; tensors of one storage share its memory.

        Raises:
            CheckpointError: the description is malformed, the tensor exceeds its storage in the file, or all tensors
                that were read are absurdly large together.
        """
        storage, offset, size, stride = reference[:4]
        shape_is_valid = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
        if not (isinstance(storage, _Storage) and shape_is_valid and _are_counts(offset, *size, *stride)):
            raise CheckpointError(f"{self.path}: a tensor's description is not one that torch writes")
        data = self._read_storage(storage.key)
        stored = len(data) // storage.dtype.itemsize
        numel, last = 1, offset
        for length, step in zip(size, stride, strict=True):
            numel, last = numel * length, last + (length - 1) * step
        if stored != storage.numel or numel > stored or (numel and last >= stored):
            raise CheckpointError(
                f"{self.path}: a tensor of {numel:,} values {list(size)} reaches beyond the {stored:,} that the file "
                f"holds for it (storage {storage.key}, {storage.numel:,} announced); it is damaged or was tampered with"
            )
        self._described += numel * storage.dtype.itemsize
        if self._described > MOST_SHARED * self._size:
            raise CheckpointError(
                f"{self.path}: its tensors come to more than {MOST_SHARED} times the file's {self._size:,} bytes, as they "
                f"share storages (here {storage.key}); expected a few names for one storage; it was tampered with"
            )
        if not numel:
            return torch.empty(size, dtype=storage.dtype)
        return torch.frombuffer(data, dtype=storage.dtype).as_strided(size, stride, offset)

    def _read_storage(self, key: str) -> bytearray:
        """Read a storage once, however many tensors name it.

        Raises:
            CheckpointError: it is missing, or the storages together are larger than the file.
        """
        if key not in self._storages:
            self._storages[key] = self._read(f"data/{key}")
            total = sum(map(len, self._storages.values()))
            if total > self._size:
                raise CheckpointError(
                    f"{self.path}: its storages come to {total:,} bytes, the file has {self._size:,}; they lie over each "
                    "other, which torch.save does not do"
                )
        return self._storages[key]

    def _find_folder(self) -> str:
        """Return the folder inside the archive that holds its only pickle."""
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

    def _read(self, name: str) -> bytearray:
        """Read a member of the archive, piece by piece into its place.

        Raises:
            CheckpointError: it is missing, damaged, compressed (torch compresses none) or larger than the file.
        """
        try:
            member = self._archive.getinfo(self._folder + name)
            if member.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{self.path}: {name} is compressed, which torch.save does not do")
            if member.file_size > self._size:
                raise ValueError(f"{member.file_size:,} bytes announced, the file has {self._size:,}")
            data, read = bytearray(member.file_size), 0
            with self._archive.open(member) as opened, memoryview(data) as view:
                while count := opened.readinto(view[read : read + _PIECE]):  # type: ignore[attr-defined]  # an io.BufferedIOBase
                    read += count
            if read < len(data):
                raise ValueError(f"expected {len(data):,} bytes, found {read:,}")
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{self.path}: {name} is missing or damaged: {error}; fetch the file again"
            ) from error
        return data


class _Unpickler(pickle.Unpickler):
    """Unpickler that looks up names in a table and nowhere else."""

    def __init__(self, data: bytearray, names: Mapping[str, Any], path: Path) -> None:
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
        raise pickle.UnpicklingError("a reference that is not a storage of numbers")


def _load(data: bytearray, names: Mapping[str, type], path: Path) -> Any:
    """Load a pickle with these classes, those of tensors, and no others.

    Raises:
        CheckpointError: the pickle is malformed, or holds a name that is not listed.
    """
    table: dict[str, Any] = {
        "collections.OrderedDict": OrderedMapping,
        "torch._utils._rebuild_tensor_v2": TensorReference,
        "__builtin__.set": frozenset,
        **{kind: kind for kind in _DTYPES},
        **names,
    }
    try:
        _require_known_opcodes(data)
        return _Unpickler(data, table, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a malformed pickle can raise anything
        raise CheckpointError(
            f"{path}: its pickle is malformed: {type(error).__name__}: {error!s:.200}; fetch the file again"
        ) from error


def _require_known_opcodes(data: bytearray) -> None:
    """Refuse opcodes that torch.save does not write, and memo indices that would make a table of gigabytes."""
    allowed = frozenset(_OPCODES.split())
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name not in allowed:
            raise pickle.UnpicklingError(f"opcode {opcode.name} at byte {position}")
        if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"memo place {argument} at byte {position}")


def _are_counts(*values: Any) -> bool:
    """Return whether all values are integers of 0 or more."""
    return all(type(value) is int and value >= 0 for value in values)


def _describe_bad_archive(path: Path, error: Exception) -> str:
    """Describe why a file is not a zip archive, and what it may be instead."""
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
