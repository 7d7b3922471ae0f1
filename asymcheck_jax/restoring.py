"""A checkpoint as JAX arrays: every process reads the boxes that its devices hold, and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import numpy as np
from numpy.typing import NDArray

from asymcheck import tree
from asymcheck.errors import StateMismatchError
from asymcheck.reader import Checkpoint, Destination
from asymcheck.state import DTYPES, LeafSpec, ShardSpec, dtype_of
from asymcheck_jax.sources import box_of
from asymcheck_jax.trees import (
    PRNG_KEY,
    is_array,
    is_prng_key,
    leaves_by_path,
    prng_impl,
    values_by_path,
)

_SMALL_NBYTES = 1024
_XLA_ALIGNMENT = 64
_NUMBER = bool | int | float
_Place = Callable[[], Any]  # makes a leaf when its bytes are read


@dataclass
class _Reading:
    """Boxes to be read together, each once, and what is made of them."""

    destinations: list[Destination] = field(default_factory=list[Destination])
    places: dict[str, _Place] = field(default_factory=dict[str, _Place])

    def box(self, spec: LeafSpec, box: ShardSpec) -> NDArray[Any]:
        dtype = dtype_of(spec.dtype)
        memory = _aligned(box.size * dtype.itemsize)
        self.destinations.append(Destination(spec.path, box, memory))
        return memory.view(dtype).reshape(box.shape)


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    """Fresh memory aligned as XLA's own, which JAX on the CPU takes over without a copy."""
    memory = np.empty(nbytes + _XLA_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _XLA_ALIGNMENT
    return memory[start : start + nbytes]


def restore_tree(checkpoint: Checkpoint) -> Any:
    """The state as it was saved, custom nodes as dictionaries, arrays on the default device.

    Arrays that JAX would narrow (float64, int64 without `jax_enable_x64`) stay NumPy arrays.
    """
    state = checkpoint.state()
    return with_keys(jax.tree_util.tree_map(_on_device, state))


def _on_device(value: Any) -> Any:
    held = isinstance(value, np.ndarray) and _is_held(value.dtype)
    return jax.numpy.asarray(value) if held else value


def _is_held(dtype: np.dtype[Any]) -> bool:
    """Whether JAX keeps a dtype as it is."""
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def with_keys(state: Any) -> Any:
    """The stored form of random keys as keys."""
    return _mapped(state, lambda leaf: leaf, _wrapped)


def _wrapped(stored: Any) -> jax.Array:
    return jax.random.wrap_key_data(stored["data"], impl=stored["impl"])


def _mapped(node: Any, leaf: Callable[[Any], Any], key: Callable[[Any], Any]) -> Any:
    """A nested state with `leaf(value)` for every value, and `key(stored)` for a random key."""
    if isinstance(node, dict):
        members = cast("dict[Any, Any]", node)
        if set(members) == {PRNG_KEY}:
            return key(members[PRNG_KEY])
        return type(members)({k: _mapped(child, leaf, key) for k, child in members.items()})
    if isinstance(node, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", node)
        return type(items)(_mapped(item, leaf, key) for item in items)
    return leaf(node)


def restore_into(checkpoint: Checkpoint, target: Any, *, cast_dtypes: bool = False) -> Any:
    """The state in the structure, with the types, dtypes and shardings of `target`.

    Args:
        checkpoint: an open one.
        target: a pytree whose leaves are arrays, `jax.ShapeDtypeStruct` (with or without a
            sharding), other things with shape and dtype, or Python values.
        cast_dtypes: convert to the target's dtypes where they differ.

    Raises:
        StateMismatchError: paths, shapes or (without `cast_dtypes`) dtypes differ; all
            differences are listed.
        CorruptionError: stored bytes are wrong.
        StoreError: the store failed.
    """
    wanted, rebuild = leaves_by_path(target)
    reading = _Reading()
    arrays = {path: array for path in wanted if (array := _stored_path(checkpoint, path, wanted))}
    values = values_by_path(checkpoint.structure, _small_leaf(checkpoint, set(arrays.values())))
    problems = [f"{path} is not in the checkpoint" for path in wanted if path not in values]
    problems += [f"{path} is not in the target" for path in values if path not in wanted]
    for path, leaf in wanted.items():
        if path in arrays:
            spec = checkpoint.leaves[arrays[path]]
            problems += _place_array(reading, path, leaf, spec, values[path], cast_dtypes)
        elif path in values:
            problems += _place_value(reading, path, leaf, values[path], cast_dtypes)
    if problems:
        raise StateMismatchError(
            "the target differs from the checkpoint: " + "; ".join(problems),
            step=checkpoint.step,
            hint="Restore without a target to see what is stored, or pass cast=True for dtypes",
        )
    checkpoint.read_into(reading.destinations)
    return rebuild({path: make() for path, make in reading.places.items()})


def _stored_path(checkpoint: Checkpoint, path: str, wanted: Mapping[str, Any]) -> str | None:
    """The leaf of the checkpoint that a leaf of the target is read from, if that is an array."""
    leaf = wanted[path]
    if is_prng_key(leaf):
        path = f"{path}/{PRNG_KEY}/data"
    elif not _shaped(leaf):
        return None
    path = checkpoint.aliases.get(path, path)
    return path if path in checkpoint.leaves else None


def _shaped(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _small_leaf(checkpoint: Checkpoint, apart: set[str]) -> Callable[[str], NDArray[Any]]:
    """Reads a leaf that belongs into a structure; no large one that is read shard by shard."""

    def read(path: str) -> NDArray[Any]:
        large = checkpoint[path].nbytes > _SMALL_NBYTES
        return np.empty(0, np.uint8) if large and path in apart else checkpoint[path][...]

    return read


def _place_array(
    reading: _Reading, path: str, leaf: Any, spec: LeafSpec, value: Any, cast_dtypes: bool
) -> list[str]:
    """Arrange for an array of the target to be read; what does not fit."""
    if is_prng_key(leaf):
        return _place_keys(reading, path, leaf, spec, value)
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    stored = f"{path} is {spec.dtype}{list(spec.shape)} in the checkpoint"
    problem = f"{stored} and {dtype.name}{list(shape)} in the target"
    if shape != spec.shape or (dtype != DTYPES[spec.dtype] and not cast_dtypes):
        return [problem]
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None:
        if not _is_held(dtype):
            return [f"{path} is {dtype.name}, which JAX narrows without jax_enable_x64"]
        reading.places[path] = _sharded(reading, spec, dtype, sharding)
        return []
    array = reading.box(spec, ShardSpec.whole(shape))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        reading.places[path] = lambda: _on_device(array.astype(dtype, copy=False))
    elif is_array(leaf):
        reading.places[path] = lambda: array.astype(dtype, copy=False)
    else:  # a NumPy scalar, or whatever else has shape and dtype
        reading.places[path] = lambda: array.astype(dtype, copy=False)[()]
    return []


def _sharded(reading: _Reading, spec: LeafSpec, dtype: np.dtype[Any], sharding: Any) -> _Place:
    """An array in a sharding: each box that this process needs is read once, for all copies."""
    boxes: dict[ShardSpec, NDArray[Any]] = {}
    placed: list[tuple[Any, ShardSpec]] = []
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        box = box_of(index, spec.shape)
        if box not in boxes:
            boxes[box] = reading.box(spec, box)
        placed.append((device, box))
    memory = getattr(sharding, "memory_kind", None)

    def make() -> jax.Array:
        parts = [
            jax.device_put(
                boxes[box].astype(dtype, copy=False),
                jax.sharding.SingleDeviceSharding(device, memory_kind=memory),
            )
            for device, box in placed
        ]
        return jax.make_array_from_single_device_arrays(spec.shape, sharding, parts)

    return make


def _place_keys(reading: _Reading, path: str, leaf: Any, spec: LeafSpec, value: Any) -> list[str]:
    """Arrange for random keys to be read; every process reads them all, for they are few."""
    impl = value["impl"]
    if impl != prng_impl(leaf.dtype) or spec.shape[: len(leaf.shape)] != tuple(leaf.shape):
        return [
            f"{path} is keys of {impl}{list(spec.shape[:-1])} in the checkpoint and of "
            f"{prng_impl(leaf.dtype)}{list(leaf.shape)} in the target"
        ]
    data = reading.box(spec, ShardSpec.whole(spec.shape))
    sharding = getattr(leaf, "sharding", None)

    def wrapped(index: Any) -> jax.Array:
        return jax.random.wrap_key_data(jax.numpy.asarray(data[index]), impl=impl)

    def make() -> jax.Array:
        if sharding is None:
            return wrapped(())
        return jax.make_array_from_callback(leaf.shape, sharding, wrapped)

    reading.places[path] = make
    return []


def _place_value(
    reading: _Reading, path: str, leaf: Any, value: Any, cast_dtypes: bool
) -> list[str]:
    """A leaf where either side is a Python value; numbers and 0-d arrays stand for each other."""
    if _shaped(leaf):
        return _place_number(reading, path, leaf, value, cast_dtypes)
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, np.generic) and not isinstance(leaf, np.generic):
        value = value.item()
    if cast_dtypes and isinstance(value, _NUMBER) and isinstance(leaf, bool | int | float):
        value = type(leaf)(value)
    if type(value) is not type(leaf):
        kinds = f"a {type(value).__name__} in the checkpoint and a {type(leaf).__name__}"
        return [f"{path} is {kinds} in the target"]
    reading.places[path] = lambda: value
    return []


def _place_number(
    reading: _Reading, path: str, leaf: Any, value: Any, cast_dtypes: bool
) -> list[str]:
    """A Python number where the target has an array: exact unless a cast was asked for."""
    fits = isinstance(value, bool | int | float | complex) and tuple(leaf.shape) == ()
    array = np.asarray(value).astype(leaf.dtype) if fits and not is_prng_key(leaf) else None
    if array is None or (array.item() != value and not cast_dtypes):
        found = f"the {type(value).__name__} {value!r}"[:60]
        return [f"{path} is {found} in the checkpoint and {leaf.dtype}{list(leaf.shape)} here"]
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None:
        reading.places[path] = lambda: jax.device_put(array, sharding)
    elif isinstance(leaf, jax.ShapeDtypeStruct):
        reading.places[path] = lambda: _on_device(array)
    else:
        reading.places[path] = lambda: array if is_array(leaf) else array[()]
    return []


class _Leaf:
    """A stored leaf that is read only if the structure makes bytes or a scalar of it."""

    def __init__(self, checkpoint: Checkpoint, path: str) -> None:
        self._stored = checkpoint[path]

    def __bytes__(self) -> bytes:
        return self._stored[...].tobytes()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self._stored[...], dtype)

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self._stored.shape, self._stored.dtype)


def stored_shapes(checkpoint: Checkpoint) -> Any:
    """The state with a `jax.ShapeDtypeStruct` for every array and random key; none is read."""
    state = tree.unflatten(checkpoint.structure, lambda path: _Leaf(checkpoint, path))
    return _mapped(state, lambda v: v.struct if isinstance(v, _Leaf) else v, _key_struct)


def _key_struct(stored: Any) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0, impl=stored["impl"]))
    return jax.ShapeDtypeStruct(stored["data"].struct.shape[:-1], key.dtype)
