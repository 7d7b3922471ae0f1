"""A file of `torch.save` read without torch: an inert pickle, and tensors when they are asked for.

It is a zip archive of uncompressed members: `data.pkl` says what the objects are and where in
which member `data/KEY` the elements of a tensor lie.
"""

from __future__ import annotations

import math
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asymcheck.errors import SourceError
from asymcheck.state import dtype_of
from asymcheck_torch.inert_pickle import MAX_NBYTES, Member, Names, Record, Size, glimpse, read
from asymcheck_torch.tensors import TORCH_DTYPES

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
}


class DType(str):
    """The name of a dtype, where the pickle has a dtype and no string."""

    __slots__ = ()


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. Comes from the pickle: nothing of it is checked before it is read.

    Attributes:
        storage: the member of the archive that holds the elements.
        dtype: its name.
        offset, shape, stride: in elements.
    """

    storage: Any
    dtype: Any
    offset: Any
    shape: Any
    stride: Any


@dataclass(frozen=True)
class _Storage:
    """A member of the archive, its dtype, and how many elements it should have."""

    key: Any
    dtype: Any
    length: Any


_NOTHING_READ: tuple[_Storage | None, NDArray[np.uint8]] = None, np.empty(0, np.uint8)


class _Rebuilt(Record):
    """Stands for torch's functions that make a tensor of a storage."""

    def __new__(cls, *args: Any) -> Any:
        storage, offset, shape, stride, _requires_grad, _hooks, *rest = args
        dtype = rest[0] if cls.kind.endswith("_v3") else storage.dtype
        return Tensor(storage, dtype, offset, shape, stride)


class _Wrapped(Record):
    """Stands for the functions that make a parameter of a tensor, or give it attributes."""

    def __new__(cls, *args: Any) -> Any:
        inner = args[0]
        if isinstance(inner, type) and issubclass(inner, Record):
            inner = inner(*args[2])
        if not isinstance(inner, Tensor):
            raise SourceError("not a tensor", expected=cls.kind, found=type(inner).__name__)
        return inner


NAMES: Names = MappingProxyType(
    {
        **{f"torch.{name}": DType(name) for name in TORCH_DTYPES},
        **{f"torch.{name}Storage": DType(dtype) for name, dtype in _STORAGES.items()},
        "torch.storage.UntypedStorage": DType("uint8"),
        "torch._utils._rebuild_tensor_v2": _Rebuilt,
        "torch._utils._rebuild_tensor_v3": _Rebuilt,
        "torch._utils._rebuild_parameter": _Wrapped,
        "torch._tensor._rebuild_from_type_v2": _Wrapped,
        "torch.Tensor": Record,
        "torch.nn.parameter.Parameter": Record,
        "torch.Size": Size,
        "collections.OrderedDict": OrderedDict,
        "builtins.getattr": Member,
        "__builtin__.getattr": Member,  # as protocol 2 names it
    }
)


class Archive:
    """An open file of `torch.save`.

    All that it reads taken together is no larger than the file.

    Args:
        path: the file.
        names: what its pickle may refer to, besides torch's own.

    Attributes:
        path: the file.
        state: what it holds, with `Tensor` for tensors and records for other objects.

    Raises:
        SourceError: there is no such file, or it is none of `torch.save`, is damaged, or refers to
            other names; none of it was run.
    """

    def __init__(self, path: Path, names: Names) -> None:
        self.path = path
        self._members = self._read_directory()
        self._unspent = path.stat().st_size
        self._storage = _NOTHING_READ
        self._arrays: dict[Tensor, NDArray[Any]] = {}
        self._check_byte_order()
        pickled = self._member("data.pkl", MAX_NBYTES).tobytes()
        self.state = read(pickled, {**NAMES, **names}, str(path), _storage_of)

    def array(self, tensor: Tensor) -> NDArray[Any]:
        """A tensor as an array; the same one for tensors over the same memory."""
        if tensor not in self._arrays:
            self._arrays[tensor] = self._read(tensor).copy()
        return self._arrays[tensor]

    def view(self, tensor: Tensor) -> NDArray[Any]:
        """A tensor as a view of its storage, which is not kept."""
        array = self._read(tensor)
        self._storage = _NOTHING_READ
        return array

    def _read(self, tensor: Tensor) -> NDArray[Any]:
        shape, dtype = self._check(tensor)
        self._spend(math.prod(shape) * dtype.itemsize)
        if 0 in shape:
            return np.empty(shape, dtype)
        elements = self._elements(tensor.storage)
        elements = elements[: len(elements) // dtype.itemsize * dtype.itemsize].view(dtype)
        last = sum((n - 1) * step for n, step in zip(shape, tensor.stride, strict=True))
        if tensor.offset + last >= len(elements):
            raise SourceError("a tensor reaches beyond its storage", object=str(self.path))
        strides = [step * dtype.itemsize for step in tensor.stride]
        return np.lib.stride_tricks.as_strided(elements[tensor.offset :], shape, strides)

    def length(self, tensor: Tensor) -> int:
        """The length of a flat tensor, for which the file is large enough."""
        shape, dtype = self._check(tensor)
        if len(shape) != 1 or shape[0] * dtype.itemsize > self._unspent:
            raise SourceError("a flat tensor is malformed", object=str(self.path), found=shape)
        return shape[0]

    def _check(self, tensor: Tensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of a tensor, once all that the pickle says of it is possible."""
        numbers = (*tensor.shape, *tensor.stride, tensor.offset)
        is_well_formed = (
            all(type(n) is int and 0 <= n < 2**62 for n in numbers)
            and len(tensor.shape) == len(tensor.stride)
            and type(tensor.storage) is _Storage
            and tensor.dtype in TORCH_DTYPES
        )
        if not is_well_formed:
            raise SourceError("a tensor is malformed", object=str(self.path))
        return tuple(tensor.shape), dtype_of(tensor.dtype)

    def _spend(self, nbytes: int) -> None:
        if nbytes > self._unspent:
            raise SourceError("the tensors of a file are larger than it is", object=str(self.path))
        self._unspent -= nbytes

    def _elements(self, storage: _Storage) -> NDArray[np.uint8]:
        """The bytes of a storage; those of the last one are kept."""
        if self._storage[0] != storage:
            elements = self._member(f"data/{storage.key}")
            if len(elements) != storage.length * dtype_of(storage.dtype).itemsize:
                raise SourceError("a storage has another length", object=str(self.path))
            self._storage = storage, elements
        return self._storage[1]

    # -- the zip archive -------------------------------------------------------------------

    def _read_directory(self) -> dict[str, zipfile.ZipInfo]:
        """The members by their names below the archive's own."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except OSError as error:
            raise SourceError(f"cannot read {self.path}: {error.strerror}") from error
        except Exception as error:  # a malformed directory can make it raise anything
            raise SourceError(
                f"{self.path} is no file of torch.save, or is not whole", found=glimpse(error)
            ) from error
        tops = {name for name in (m.filename for m in members) if name.endswith("/data.pkl")}
        if len(tops) != 1:
            raise SourceError(f"{self.path} is no file of torch.save")
        top = tops.pop().removesuffix("data.pkl")
        return {member.filename.removeprefix(top): member for member in members}

    def _check_byte_order(self) -> None:
        order = "byteorder" in self._members and self._member("byteorder", 16).tobytes().decode()
        if order and order != sys.byteorder:
            raise SourceError(f"{self.path} was written on a machine of another byte order")

    def _member(self, name: str, max_nbytes: int | None = None) -> NDArray[np.uint8]:
        """The bytes of a member, which the archive's own checksum confirms."""
        member = self._members.get(name)
        if member is None:
            raise SourceError("the file lacks a part", object=str(self.path), expected=name[:80])
        size = self.path.stat().st_size if max_nbytes is None else max_nbytes
        if member.file_size > size or member.compress_type != zipfile.ZIP_STORED:
            raise SourceError("a part is too large, or compressed", object=str(self.path))
        out = np.empty(member.file_size, np.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(member.header_offset)
                magic, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                file.seek(sum(lengths), 1)
                whole = file.readinto(out.data) == len(out)
        except (OSError, ValueError, struct.error) as error:
            raise SourceError(f"cannot read {self.path}: {error}") from error
        if magic != b"PK\x03\x04" or not whole or zlib.crc32(out.data) != member.CRC:
            raise SourceError(f"{self.path} is damaged, or not whole", found=name[:80])
        return out


def _storage_of(pid: Any) -> _Storage:
    """What stands for a storage, by the id that torch gives it."""
    kind, dtype, key, _device, length = pid
    if kind != "storage" or not isinstance(dtype, DType):
        raise SourceError("the pickle refers to something that is no storage")
    return _Storage(key, dtype, length)
