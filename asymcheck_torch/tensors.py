"""Tensors as the core sees them: dtype names, identity, bytes, and sources to capture from."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from asymcheck.errors import SaveFailedError, UnsupportedStateError
from asymcheck.state import DTYPES, ArraySource, LeafSpec, ShardSpec, memory_of
from asymcheck.state import dtype_name as array_dtype_name
from asymcheck_torch.parts import Part
from asymcheck_torch.sharding_types import is_dtensor

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)
}
"""The dtypes that the format and torch share, by their name in the format."""
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_UNKNOWN_TO_NUMPY = {torch.bfloat16: torch.int16} | {
    dtype: torch.uint8 for name, dtype in TORCH_DTYPES.items() if name.startswith("float8")
}


def torch_dtype(name: str, path: str) -> torch.dtype:
    """The torch dtype of a leaf; `UnsupportedStateError` where torch has none."""
    try:
        return TORCH_DTYPES[name]
    except KeyError:
        raise UnsupportedStateError(
            "torch has no such dtype", leaf=path, found=name, hint="Read it with open_checkpoint()"
        ) from None


def is_array(value: object) -> bool:
    """Whether `value` is a tensor, a part of one, or a NumPy array."""
    return isinstance(value, torch.Tensor | Part | np.ndarray)


def identity(value: object) -> Hashable:
    """Equal for tensors (or arrays) over the same memory with the same layout: one leaf."""
    if isinstance(value, Part):
        return value.key
    if is_dtensor(value):
        return id(value), value.to_local().data_ptr()
    if not isinstance(value, torch.Tensor):
        return memory_of(value)
    if value.layout != torch.strided or is_traceable_wrapper_subclass(value) or not value.numel():
        return id(value)
    return (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)


def _problem(tensor: torch.Tensor) -> str | None:
    """What a tensor is that cannot be stored; None if it can."""
    if is_traceable_wrapper_subclass(tensor):
        return f"a {type(tensor).__name__} (sharded or wrapped tensor)"
    if is_lazy(tensor):
        return "a lazy parameter without a shape"
    if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        return f"a {tensor.layout} tensor on {tensor.device.type}"
    return None if tensor.dtype in _NAMES else f"a tensor of {tensor.dtype}"


def check_storable(tensor: torch.Tensor, path: str) -> str:
    """The dtype name of a tensor that can be stored; `UnsupportedStateError` for others."""
    problem = _problem(tensor)
    if problem is None:
        return _NAMES[tensor.dtype]
    raise UnsupportedStateError(
        f"{problem} cannot be stored",
        leaf=path,
        expected="a dense CPU or CUDA tensor of " + ", ".join(TORCH_DTYPES),
        hint="Nothing was saved",
    )


def byte_view(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous CPU tensor, as flat bytes (shared, writable)."""
    return _flat(tensor.detach()).view(torch.uint8).numpy()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as one dimension of stride 1 (`view` keeps odd strides of length 1)."""
    return tensor.as_strided((tensor.numel(),), (1,))


def tensor_of(array: NDArray[Any], path: str = "") -> torch.Tensor:
    """A tensor over the memory of a contiguous array; `UnsupportedStateError` without a dtype."""
    dtype = torch_dtype(array_dtype_name(array.dtype, path), path)
    flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return flat.view(dtype).view(array.shape)


def _dense_rows(tensor: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """Rows [first, stop) of a strided tensor, row-major; on the CPU without OpenMP's threads."""
    rows = tensor[first:stop]
    if tensor.device.type != "cpu":
        return rows.contiguous()
    bits = rows.view(_UNKNOWN_TO_NUMPY.get(rows.dtype, rows.dtype))
    return torch.from_numpy(np.ascontiguousarray(bits.numpy())).view(rows.dtype)


def _bytes_of_range(tensor: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Elements [start, start + count) in row-major order as flat bytes; no copy if contiguous."""
    if not tensor.is_contiguous():
        row = tensor.numel() // tensor.shape[0]
        first, stop = start // row, -(-(start + count) // row)
        tensor, start = _dense_rows(tensor, first, stop), start - first * row
    return _flat(tensor)[start : start + count].view(torch.uint8)


@dataclass(slots=True)
class TensorSource:
    """A CPU tensor as a source; reads its memory, releases the GIL to copy.

    It holds the elements of the shard from `first` on.

    From `renew` until all is read nobody may write to the tensor. Whoever does so through torch
    (but not through `.data` or NumPy) is found out: a snapshot is right or is not.
    """

    leaf: LeafSpec
    shard: ShardSpec
    group: str
    owned: tuple[int, int]
    tensor: torch.Tensor
    first: int
    version: int = field(init=False)
    memory: NDArray[np.uint8] | None = field(init=False)

    def __post_init__(self) -> None:
        self.renew()
        dense = self.tensor.device.type == "cpu" and self.tensor.is_contiguous()
        self.memory = byte_view(self.tensor) if dense else None

    def renew(self) -> None:
        """The values that count are those of now."""
        self.version = _version(self.tensor)

    def read_into(self, start: int, count: int, out: NDArray[np.uint8]) -> None:
        """Copy elements [start, start + count) in row-major order."""
        start -= self.first
        if self.memory is not None:
            begin = start * self.leaf.itemsize
            np.copyto(out, self.memory[begin : begin + len(out)])
        else:
            np.copyto(out, _bytes_of_range(self.tensor, start, count).numpy())

    def check_unchanged(self) -> None:
        """`SaveFailedError` if there was a write to the tensor since `renew`.

        Torch counts a write when it is over, so a thread that reads meanwhile does not see it.
        """
        if _version(self.tensor) != self.version:
            raise SaveFailedError(
                "the tensor was changed while it was being captured",
                leaf=self.leaf.path,
                hint="From the forward pass to the next step() only attached optimizers may "
                "change parameters and optimizer state: whoever else does calls barrier() before",
            )


def _version(tensor: torch.Tensor) -> int:
    """Counts the writes to a tensor's memory (inference tensors do not)."""
    return 0 if tensor.is_inference() else tensor._version


class DeviceClock:
    """The stream of a CUDA device that copies run on, and the moment from which values stand."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.ready = torch.cuda.Event()
        self._device = device

    def restart(self) -> None:
        """Values stand after all work issued so far on the device's current stream."""
        self.ready.record(torch.cuda.current_stream(self._device))


@dataclass(slots=True)
class CudaSource(TensorSource):
    """A CUDA tensor as a source: copied on a side stream once its values stand.

    Asynchronous on the device where `out` is pinned; `read_into` returns when the copy is done.
    """

    clock: DeviceClock

    def read_into(self, start: int, count: int, out: NDArray[np.uint8]) -> None:
        """Copy elements [start, start + count) in row-major order to the host."""
        stream = self.clock.stream
        with torch.cuda.stream(stream):
            stream.wait_event(self.clock.ready)
            data = _bytes_of_range(self.tensor, start - self.first, count)
            torch.from_numpy(out).copy_(data, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        copied.synchronize()


class DeviceClocks:
    """One clock for every CUDA device in use."""

    def __init__(self) -> None:
        self._clocks: dict[torch.device, DeviceClock] = {}

    def of(self, device: torch.device) -> DeviceClock:
        """The clock of a device."""
        if device not in self._clocks:
            self._clocks[device] = DeviceClock(device)
        return self._clocks[device]

    def restart(self) -> None:
        """On all devices values are taken as they stand now."""
        for clock in self._clocks.values():
            clock.restart()


def size_of(value: object) -> int:
    """Elements of an array or of `bytes`."""
    return len(value) if isinstance(value, bytes) else cast("NDArray[Any]", value).size


def array_source(path: str, value: object, group: str, owned: tuple[int, int]) -> ArraySource:
    """An array or `bytes` of a flattened state as a source.

    Raises:
        UnsupportedStateError: the array cannot be stored; names its path.
    """
    if isinstance(value, bytes):
        value = np.frombuffer(value, np.uint8)
    array = cast("NDArray[Any]", value)
    spec = LeafSpec(path, array_dtype_name(array.dtype, path), array.shape)
    return ArraySource(spec, array, group, owned)


def tensor_source(
    path: str, part: Part, group: str, owned: tuple[int, int], clocks: DeviceClocks
) -> TensorSource:
    """A tensor of a flattened state, or what this rank holds of it, as a source.

    Raises:
        UnsupportedStateError: the tensor cannot be stored; names its path.
    """
    spec = LeafSpec(path, check_storable(part.tensor, path), part.shape)
    place = (spec, part.shard, group, owned, part.tensor.detach(), part.start)
    if part.tensor.device.type == "cuda":
        return CudaSource(*place, clocks.of(part.tensor.device))
    return TensorSource(*place)


class SteadyCopies:
    """Copies of tensors that training may change in the forward pass, in memory that is reused.

    A copy is overwritten when the same tensor is copied for the next snapshot, which begins only
    after the barrier of this one. Tensors over the same memory share one copy.
    """

    def __init__(self) -> None:
        self._previous: dict[Hashable, torch.Tensor] = {}
        self._current: dict[Hashable, torch.Tensor] = {}

    def restart(self) -> None:
        """A new snapshot begins: its copies may take the memory of the previous one's."""
        self._previous, self._current = self._current, {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A private, row-major copy on the same device.

        What cannot be stored is passed on, to be refused with its path.
        """
        if _problem(tensor) is not None:
            return tensor
        key = identity(tensor)
        if key not in self._current:
            copy = self._previous.get(key)
            if copy is None or tensor.numel() == 0:
                copy = torch.empty_like(tensor.detach(), memory_format=torch.contiguous_format)
            self._current[key] = copy.copy_(tensor.detach())
        return self._current[key]


def cuda_devices(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """The CUDA devices in use, each once, in order of their index."""
    found = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    return sorted(found, key=lambda device: device.index)


def pinned(nbytes: int) -> NDArray[np.uint8]:
    """Page-locked host memory (CUDA aligns it to pages), which devices copy into directly."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
