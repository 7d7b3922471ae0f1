"""What a training state is to the core: leaves, the boxes of them that a process holds, sources."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from asymcheck import tree
from asymcheck.errors import UnsupportedStateError, UnsupportedVersionError

# fmt: off
_NUMPY_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
)
_ML_DTYPES = (
    "bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
)
# fmt: on
DTYPES: Mapping[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in _NUMPY_DTYPES},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _ML_DTYPES},
}
"""Every dtype of the format, by its name there. Elements are little-endian."""
_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}  # `dtype.name` is slow


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a dtype name; `UnsupportedVersionError` if the format has none such."""
    try:
        return DTYPES[name]
    except KeyError:
        raise UnsupportedVersionError("unknown dtype", found=name[:40]) from None


class LeafSpec(msgspec.Struct, frozen=True, gc=False):
    """A named array of the training state, with dtype name and *global* shape."""

    path: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return dtype_of(self.dtype).itemsize

    @property
    def size(self) -> int:
        """Elements; 1 for a 0-d leaf."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole leaf."""
        return self.size * self.itemsize

    @property
    def kind(self) -> str:
        """The first component of the path: `params`, `exp_avg`, ..."""
        return self.path.partition("/")[0]


MAX_KINDS = 64


def kinds_of(leaves: Sequence[LeafSpec]) -> list[str]:
    """The kind of each leaf; the empty one for all if there are too many to be kinds.

    So it is with a state of one level, where every path has a first component of its own.
    """
    kinds = [leaf.kind for leaf in leaves]
    return kinds if len(set(kinds)) <= MAX_KINDS else [""] * len(kinds)


class ShardSpec(msgspec.Struct, frozen=True, gc=False):
    """A box of a leaf's global index space: `offset[d] <= i[d] < offset[d] + shape[d]`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> ShardSpec:
        """The box that is the whole leaf."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)


class LeafSource(Protocol):
    """The part of one leaf that this process holds, and a way to read it."""

    @property
    def leaf(self) -> LeafSpec:
        """The leaf."""
        ...

    @property
    def shard(self) -> ShardSpec:
        """The box of it that this process holds, in row-major order."""
        ...

    @property
    def group(self) -> str:
        """Sources with the same group and shard shape belong to one parameter."""
        ...

    @property
    def owned(self) -> tuple[int, int]:
        """(start, count): the element range of the shard that *this* writer stores."""
        ...

    def read_into(self, start: int, count: int, out: NDArray[np.uint8]) -> None:
        """Copy elements [start, start + count) of the shard into `out` and return when done.

        Called from a background thread between an update and the next one.
        """
        ...

    def check_unchanged(self) -> None:
        """`SaveFailedError` if it was written to since its values count, as far as can be told.

        Called by the thread that trains, when everything is read: a write under way while a
        background thread reads may be seen only when it is over.
        """
        ...


@dataclass(frozen=True, slots=True)
class Update:
    """The step of an optimizer by which a parameter and its moments became what they are.

    It need not be right: codecs use it to predict, and store what the prediction missed.

    Attributes:
        rule: the optimizer's, a key of `asymcheck.codecs.rules.RULES`.
        roles: (prefix, role) of the leaves: `prefix` is a leaf's path without its group.
        numbers: the rule's hyperparameters, finite.
    """

    rule: str
    roles: tuple[tuple[str, str], ...]
    numbers: Mapping[str, float]


def role_of(update: Update, path: str, group: str) -> str | None:
    """The role of a leaf of that group, None if it has none."""
    return dict(update.roles).get(path.removesuffix(f"/{group}"))


@dataclass(frozen=True, slots=True)
class StateView:
    """A state as an adapter presents it to be saved.

    Attributes:
        structure: how the leaves make up the state (see `asymcheck.tree`).
        sources: what this writer holds: disjoint boxes of leaves.
        aliases: leaf path -> further paths of the same leaf.
        updates: group -> the update that made it of what it was one step ago, where known.
    """

    structure: tree.Node
    sources: tuple[LeafSource, ...]
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict[str, list[str]])
    updates: Mapping[str, Update] = field(default_factory=dict[str, Update])

    @property
    def owned_nbytes(self) -> int:
        """Bytes that this writer stores."""
        return sum(source.owned[1] * source.leaf.itemsize for source in self.sources)


class StateAdapter(Protocol):
    """What a framework fulfils: it can show its state, and fill it from stored leaves."""

    def view(self) -> StateView:
        """The state as it is now; called between two updates, on the training thread."""
        ...


class ArraySource(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A NumPy array (whole leaf, row-major) as a source."""

    leaf: LeafSpec
    array: NDArray[Any]
    group: str
    owned: tuple[int, int]

    @property
    def shard(self) -> ShardSpec:
        """The whole leaf."""
        return ShardSpec.whole(self.leaf.shape)

    def read_into(self, start: int, count: int, out: NDArray[np.uint8]) -> None:
        """Copy; releases the GIL for anything but tiny ranges."""
        if self.array.flags.c_contiguous:
            flat = self.array.reshape(-1)[start : start + count]
        else:
            flat = self.array.flat[start : start + count]
        np.copyto(out, flat.view(np.uint8))

    def check_unchanged(self) -> None:
        """NumPy does not tell."""


def is_array(value: object) -> bool:
    """Whether `value` is a NumPy array; masked arrays and matrices are more than that."""
    return type(value) in (np.ndarray, np.memmap)


def memory_of(value: object) -> Hashable:
    """Equal for arrays over the same memory with the same layout, which are one leaf."""
    array = cast("NDArray[Any]", value)
    if array.size == 0:
        return id(array)
    start = array.__array_interface__["data"][0]
    return (start, array.shape, array.strides, array.dtype)


def dtype_name(dtype: np.dtype[Any], path: str) -> str:
    """The format's name of a NumPy dtype; `UnsupportedStateError` for what it does not hold."""
    name = _NAME_OF_DTYPE.get(dtype)
    if name is not None:
        return name
    raise UnsupportedStateError(
        f"an array of dtype {dtype.str} ({dtype.name}) cannot be stored",
        leaf=path,
        expected="a little-endian dtype of " + ", ".join(DTYPES),
        hint="Convert it with astype; nothing was saved",
    )


def numpy_view(state: object) -> StateView:
    """A nested state of NumPy arrays as a `StateView` of one writer.

    Leaves whose paths differ only in the first component (`params/h.w`, `exp_avg/h.w`) and have
    the same shape are taken as one parameter's.
    """
    flat = tree.flatten(state, is_array, memory_of)
    sources = tuple(_array_source(path, value) for path, value in flat.leaves.items())
    return StateView(flat.structure, sources, flat.aliases)


def _array_source(path: str, value: object) -> ArraySource:
    array = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
    array = cast("NDArray[Any]", array)
    leaf = LeafSpec(path, dtype_name(array.dtype, path), array.shape)
    return ArraySource(leaf, array, path.partition("/")[2] or path, (0, leaf.size))
