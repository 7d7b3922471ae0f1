"""JAX arrays as the core sees them: the shards that this process stores, and their bytes."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from asymcheck import tree
from asymcheck.errors import UnsupportedStateError
from asymcheck.state import (
    ArraySource,
    LeafSource,
    LeafSpec,
    ShardSpec,
    StateView,
    Update,
    dtype_name,
)
from asymcheck_jax.recording import RECORDED
from asymcheck_jax.trees import is_array, plain
from asymcheck_jax.updates import OptimizerUpdate, step_in, updates_of

_MEMBERS = frozenset({"params", "mu", "nu", "trace", "ema", "m", "v", RECORDED})


@dataclass(slots=True)
class DeviceShard:
    """One shard of an array on an accelerator as a source.

    `start` asks for the copy to the host; `fetch` or the first read waits for it. The array must
    not be donated before.
    """

    leaf: LeafSpec
    shard: ShardSpec
    group: str
    owned: tuple[int, int]
    data: jax.Array
    _host: NDArray[np.uint8] | None = field(default=None, init=False)
    _read: int = field(default=0, init=False)  # elements so far, by any thread
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def start(self) -> None:
        """Ask for the copy to the host; returns at once."""
        self.data.copy_to_host_async()

    def fetch(self) -> NDArray[np.uint8]:
        """Wait for the copy to the host; from then on the array may be donated."""
        host = self._host
        if host is None:
            host = self._host = _bytes_of(np.asarray(self.data))
        return host

    def read_into(self, start: int, count: int, out: NDArray[np.uint8]) -> None:
        """Copy elements [start, start + count) of the shard into `out`."""
        begin = start * self.leaf.itemsize
        np.copyto(out, self.fetch()[begin : begin + len(out)])
        with self._lock:
            self._read += count
            if self._read == self.owned[1]:
                self._host = None

    def check_unchanged(self) -> None:
        """Arrays of JAX do not change."""


@dataclass(slots=True)
class HostShard:
    """One shard of an array in host memory (JAX on the CPU) as a source.

    Holding a view of an array's memory keeps JAX from giving that memory to anybody else: an
    array that is donated meanwhile is copied instead, by JAX.
    """

    leaf: LeafSpec
    shard: ShardSpec
    group: str
    owned: tuple[int, int]
    memory: NDArray[np.uint8]

    def read_into(self, start: int, count: int, out: NDArray[np.uint8]) -> None:
        """Copy elements [start, start + count) of the shard into `out`."""
        begin = start * self.leaf.itemsize
        np.copyto(out, self.memory[begin : begin + len(out)])

    def check_unchanged(self) -> None:
        """Arrays of JAX do not change."""


def view_of(state: Any, process: int, update: OptimizerUpdate | None = None) -> StateView:
    """A pytree as a `StateView`: of every array the shards that this process has to store.

    Of the copies of a shard the one numbered 0 is stored, so each byte once over all processes.
    What is no `jax.Array` is the same on all processes, and process 0 stores it; NumPy arrays are
    copied, since they may change at any time. `update` is what the state was made by.

    Raises:
        UnsupportedStateError: something cannot be stored; names its path.
    """
    flat = tree.flatten(plain(state), is_array, _identity)
    sources: list[LeafSource] = []
    for path, value in flat.leaves.items():
        if isinstance(value, jax.Array):
            sources += _shards(path, value)
            continue
        source = _host_array(path, value)  # on all processes: all refuse what cannot be stored
        if process == 0:
            sources.append(source)
    stored = {source.leaf.path for source in sources}
    aliases = {path: others for path, others in flat.aliases.items() if path in stored}
    structure = flat.structure
    if process != 0 and isinstance(structure, dict) and "dict" in structure:
        structure = {"dict": []}  # Python values may differ: those of process 0 count
    updates: dict[str, Update] = {}
    if update is not None:
        updates = updates_of(sources, update, step_in(flat.leaves))
    return StateView(structure, tuple(sources), aliases, updates)


def _identity(value: object) -> Hashable:
    """Equal for what is stored once; of several processes each sees other NumPy arrays as one."""
    if isinstance(value, jax.Array) or jax.process_count() == 1:
        return id(value)
    return object()


def _shards(path: str, array: jax.Array) -> list[LeafSource]:
    if jax.process_count() > 1 and array.is_fully_addressable:
        raise UnsupportedStateError(
            "with several processes an array of one process only cannot be stored",
            leaf=path,
            found=str(array.sharding)[:120],
            hint="Give it a sharding over all devices, or pass a NumPy array or a number",
        )
    leaf = LeafSpec(path, dtype_name(np.dtype(array.dtype), path), array.shape)
    group = _group(path)
    found: list[LeafSource] = []
    for part in array.addressable_shards:
        if part.replica_id != 0:
            continue
        box = box_of(part.index, array.shape)
        place = (leaf, box, group, (0, box.size))
        if part.device.platform == "cpu":
            found.append(HostShard(*place, _bytes_of(np.asarray(part.data))))
        else:
            found.append(DeviceShard(*place, part.data))
    return found


def _host_array(path: str, value: Any) -> ArraySource:
    array = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.array(value)
    leaf = LeafSpec(path, dtype_name(array.dtype, path), array.shape)
    return ArraySource(leaf, array, _group(path), (0, leaf.size))


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> ShardSpec:
    """The box that an index of slices selects in an array of that shape."""
    ranges = [part.indices(n) for part, n in zip(index, shape, strict=True)]
    return ShardSpec(
        tuple(start for start, _, _ in ranges), tuple(stop - start for start, stop, _ in ranges)
    )


def _group(path: str) -> str:
    """What moves together: a parameter and its moments, as optax and Flax name them."""
    names = path.split("/")
    cut = max((i for i, name in enumerate(names) if name in _MEMBERS), default=-1)
    return "/".join(names[cut + 1 :]) or path
