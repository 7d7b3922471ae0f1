"""Opening a checkpoint for reading: lazy arrays, no framework, only the bytes asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from types import EllipsisType, TracebackType
from typing import Any, SupportsIndex, TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from asymcheck import tree
from asymcheck.commit import committed_steps
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    CorruptionError,
    StateMismatchError,
)
from asymcheck.index import LeafIndex, StepIndex, StoredBlock, load_chain
from asymcheck.manifest import Pack
from asymcheck.requests import each
from asymcheck.reshard import Overlap, overlaps, within
from asymcheck.restore import ChainReader, Want
from asymcheck.state import ArraySource, LeafSpec, ShardSpec, dtype_of, numpy_view
from asymcheck.stores import open_store
from asymcheck.stores.base import RANGE_NBYTES, Store
from asymcheck.tiers import Tiers

_BATCH_NBYTES = 64 << 20

T = TypeVar("T")
Index = SupportsIndex | slice | EllipsisType | tuple[Any, ...]


def default_threads(store: Store) -> int:
    """Blocks read and decoded at once: enough to keep a disk and the cores busy, or a network.

    Of a store with longer ranges so many fewer that the memory is the same.
    """
    guarantees = store.guarantees
    if guarantees.concurrency is None:
        return min(16, 2 * (os.cpu_count() or 1))
    return max(1, guarantees.concurrency * RANGE_NBYTES // guarantees.range_nbytes)


class Destination(msgspec.Struct, frozen=True, eq=False):
    """A box of a leaf, wanted in `out`: its bytes in row-major order (contiguous uint8)."""

    path: str
    shard: ShardSpec
    out: NDArray[np.uint8]


def whole(path: str, array: NDArray[Any]) -> Destination:
    """A whole leaf, wanted in a contiguous array."""
    return Destination(path, ShardSpec.whole(array.shape), array.reshape(-1).view(np.uint8))


class LazyArray:
    """A leaf that is read when it is indexed.

    Basic indexing only (integers, slices, `...`); the result is a NumPy array (a NumPy scalar if
    no dimension is left), of an ml_dtypes dtype for bfloat16 and float8. Whole blocks are read
    and checked; of a row of a large array only the blocks that hold it.
    """

    def __init__(self, checkpoint: Checkpoint, spec: LeafSpec) -> None:
        self._checkpoint = checkpoint
        self._spec = spec

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's global shape."""
        return self._spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The leaf's dtype."""
        return dtype_of(self._spec.dtype)

    @property
    def nbytes(self) -> int:
        """Decoded bytes of the whole leaf."""
        return self._spec.nbytes

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self._spec.shape)

    def __getitem__(self, index: Index) -> Any:
        box, residual = _box_of(self._spec, index)
        array = np.empty(box.shape, self.dtype)
        flat = array.reshape(-1).view(np.uint8)
        self._checkpoint.read_into([Destination(self._spec.path, box, flat)])
        return array[residual]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a lazy array is read into fresh memory: copy=False cannot be had")
        whole = np.asarray(self[...])
        return whole if dtype is None else whole.astype(dtype)

    def __repr__(self) -> str:
        return f"<LazyArray {self._spec.path!r} {self._spec.dtype}{list(self._spec.shape)}>"


def _box_of(spec: LeafSpec, index: Index) -> tuple[ShardSpec, tuple[Any, ...]]:
    """The smallest box that an index touches, and the index that remains within it."""
    items = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
    rank = len(spec.shape)
    ellipses = [position for position, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    if not ellipses:
        items = (*items, Ellipsis)
    split = ellipses[0] if ellipses else len(items) - 1
    missing = rank - (len(items) - 1)
    if missing < 0:
        raise IndexError(f"too many indices for leaf {spec.path!r} of {rank} dimensions")
    items = items[:split] + (slice(None),) * missing + items[split + 1 :]
    parts = [_range_of(item, n) for item, n in zip(items, spec.shape, strict=True)]
    box = ShardSpec(tuple(p[0] for p in parts), tuple(p[1] for p in parts))
    return box, tuple(p[2] for p in parts)


def _range_of(item: Any, length: int) -> tuple[int, int, Any]:
    """(offset, length, residual index) of one dimension."""
    if isinstance(item, slice):
        indices = range(length)[item]
        if len(indices) == 0:
            return 0, 0, slice(None)
        low, high = min(indices[0], indices[-1]), max(indices[0], indices[-1])
        backwards = indices.step < 0
        return (
            low,
            high - low + 1,
            slice(None, None, indices.step) if backwards else slice(0, None, indices.step),
        )
    if not hasattr(item, "__index__") or isinstance(item, (bool, np.bool_)):
        kind = type(cast("object", item)).__name__
        raise TypeError(
            f"a lazy array takes integers, slices and '...', not {kind}; read it with [...] first"
        )
    position = item.__index__()
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of bounds for a dimension of {length}")
    return position % length, 1, 0


class Checkpoint(Mapping[str, LazyArray]):
    """One committed step, open for reading: a mapping from leaf path to `LazyArray`.

    Metadata were checked when it was opened; bytes are checked as they are read. Usable from
    several threads. Paths of tied leaves all work as keys; iteration gives each leaf once.
    """

    def __init__(self, store: Store, chain: list[StepIndex], threads: int) -> None:
        self._store = store
        self._chain = chain
        self._reader = ChainReader(store, chain, threads)
        index = chain[0]
        self.leaves: Mapping[str, LeafSpec] = {p: leaf.spec for p, leaf in index.leaves.items()}
        self.aliases: Mapping[str, str] = {
            alias: path for path, leaf in index.leaves.items() for alias in leaf.aliases
        }

    @property
    def step(self) -> int:
        """The step."""
        return self._chain[0].step

    @property
    def url(self) -> str:
        """Where it is read from."""
        return self._store.url

    @property
    def metadata(self) -> dict[str, Any]:
        """What was passed to `save` as metadata."""
        return self._chain[0].metadata

    @property
    def structure(self) -> tree.Node:
        """How the leaves make up the state; see `asymcheck.tree`."""
        return self._chain[0].structure

    @property
    def chain(self) -> list[StepIndex]:
        """The indices of this step and of those that it decodes from."""
        return self._chain

    def __getitem__(self, path: str) -> LazyArray:
        return LazyArray(self, self._leaf(path).spec)

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def _leaf(self, path: str) -> LeafIndex:
        return self._chain[0].leaves[self.aliases.get(path, path)]

    def read_into(self, destinations: Iterable[Destination]) -> None:
        """Fill boxes of leaves, in parallel, straight into the memory given.

        On an error the contents of the destinations are undefined.

        Raises:
            CorruptionError: stored bytes are missing or wrong.
            StoreError: the store failed otherwise.
        """
        wants: list[Want] = []
        moves: list[Callable[[], None]] = []
        for destination in destinations:
            leaf, shard = self._leaf(destination.path), destination.shard
            if shard in leaf.boxes:
                wants.append(Want(leaf.spec.path, shard, 0, shard.size, destination.out))
                continue
            wants.extend(
                _want(leaf.spec, destination, overlap, moves)
                for overlap in overlaps(shard, list(leaf.boxes))
            )
        self._reader.read(wants)
        for move in moves:
            move()

    def state(self) -> Any:
        """The whole state as it was saved, with NumPy arrays; tied leaves are one array."""
        arrays = {
            path: np.empty(spec.shape, dtype_of(spec.dtype)) for path, spec in self.leaves.items()
        }
        self.read_into(whole(path, array) for path, array in arrays.items())
        return tree.unflatten(self.structure, arrays.__getitem__)

    def verify(self) -> None:
        """Read and check every byte that this step needs, its whole chain included.

        Raises:
            CorruptionError: naming the first leaf, object and offset that is wrong.
        """
        packs = [
            (index.step, pack) for index in self._chain for m in index.manifests for pack in m.packs
        ]
        each(self._store, lambda place: self._verify_length(*place), packs)
        for batch in _batches(self._chain[0].blocks_by_group()):
            self._reader.read([_whole_block(stored) for stored in batch])

    def _verify_length(self, step: int, pack: Pack) -> None:
        if not self._store.has_length(pack.key, pack.nbytes):
            raise CorruptionError(
                "a pack is missing or has another length",
                step=step,
                object=pack.key,
                expected=f"{pack.nbytes} bytes",
            )

    def close(self) -> None:
        """Release the store."""
        self._store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _batches(blocks: Iterable[StoredBlock]) -> Iterator[list[StoredBlock]]:
    """Blocks that are decoded together when nobody wants to keep the bytes."""
    batch: list[StoredBlock] = []
    nbytes = 0
    for stored in blocks:
        batch.append(stored)
        nbytes += stored.nbytes
        if nbytes >= _BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
    yield batch


def _whole_block(stored: StoredBlock) -> Want:
    block, box = stored.block, stored.box
    out = np.empty(stored.nbytes, np.uint8)
    return Want(box.leaf.path, box.shard, block.start, block.stop, out)


def _want(
    spec: LeafSpec, destination: Destination, overlap: Overlap, moves: list[Callable[[], None]]
) -> Want:
    """What to read for an overlap: in place where it is the whole box, else beside and moved."""
    if overlap.rows == destination.shard:
        return Want(spec.path, overlap.stored, overlap.start, overlap.stop, destination.out)
    rows = np.empty(overlap.rows.shape, dtype_of(spec.dtype))
    target = destination.out.view(rows.dtype).reshape(destination.shard.shape)

    def move() -> None:
        target[within(overlap.part, destination.shard)] = rows[within(overlap.part, overlap.rows)]

    moves.append(move)
    return Want(
        spec.path, overlap.stored, overlap.start, overlap.stop, rows.reshape(-1).view(np.uint8)
    )


def open_step(store: Store, step: int, threads: int | None = None) -> Checkpoint:
    """Open a step of a store by number; see `open_checkpoint` for the errors."""
    return Checkpoint(store, load_chain(store, step), threads or default_threads(store))


def open_checkpoint(url: str | os.PathLike[str], step: int | None = None) -> Checkpoint:
    """Open a step for reading; needs no framework and never writes.

    Args:
        url: the run: a path or a URL.
        step: which step; None for the newest whose metadata are whole (older ones are passed
            over with an error in the log).

    Raises:
        CheckpointNotFoundError: there is no such step, or none at all.
        CorruptionError, FormatError: the step asked for is damaged or malformed.
        StoreError: the store cannot be read.
    """
    store = open_store(url)
    try:
        if step is not None:
            return _open_or_list(store, step)
        return Tiers(store).read_newest(open_step, _pass_over)
    except BaseException:
        with suppress(Exception):
            store.close()
        raise


def read_step(url: str | os.PathLike[str], step: int | None, read: Callable[[Checkpoint], T]) -> T:
    """`read(checkpoint)` for a step, which may raise what it finds damaged; for adapters.

    Args:
        url: the run: a path or a URL.
        step: which step; None for the newest good one: `read` is called again for an older one
            when it raises `CorruptionError` or `FormatError`.
        read: what to make of it.

    Raises:
        CheckpointNotFoundError: there is no such step, or none that is whole.
        CorruptionError, FormatError: the step asked for by number is damaged.
        StoreError: the store failed.
    """
    with closing(open_store(url)) as store:
        if step is not None:
            return read(open_step(store, step))
        return Tiers(store).read_newest(
            lambda store, step: read(open_step(store, step)), _pass_over
        )


def _pass_over(_store: Store, _step: int, _error: AsymCheckError) -> None:
    """The log tells of the damage."""


def _open_or_list(store: Store, step: int) -> Checkpoint:
    try:
        return open_step(store, step)
    except CheckpointNotFoundError as error:
        steps = committed_steps(store)
        shown = ", ".join(map(str, steps[-8:])) or "none"
        error.hint = f"Committed steps of {store.url}: {'..., ' if len(steps) > 8 else ''}{shown}"
        raise


def fill_target(checkpoint: Checkpoint, target: object) -> Any:
    """Fill a state of NumPy arrays in place from a checkpoint, and return it.

    Arrays are filled; everything else (scalars, strings, bytes) is replaced in the state that
    is returned.

    Raises:
        StateMismatchError: paths, shapes or dtypes differ; nothing was changed.
    """
    sources = [cast("ArraySource", source) for source in numpy_view(target).sources]
    arrays = {s.leaf.path: _array_to_fill(s, checkpoint.leaves) for s in sources}
    wanted = {p: LeafSpec(p, array.dtype.name, array.shape) for p, array in arrays.items()}
    problems = mismatches(checkpoint.leaves, wanted)
    if problems:
        raise StateMismatchError(
            "the target differs from the checkpoint: " + "; ".join(problems), step=checkpoint.step
        )
    buffers = {p: a if _fillable(a) else np.empty(a.shape, a.dtype) for p, a in arrays.items()}
    checkpoint.read_into(whole(path, array) for path, array in buffers.items())
    for path, array in arrays.items():
        if buffers[path] is not array and array.flags.writeable:
            np.copyto(array, buffers[path])
            buffers[path] = array
    return tree.unflatten(checkpoint.structure, buffers.__getitem__)


def _array_to_fill(source: ArraySource, stored: Mapping[str, LeafSpec]) -> NDArray[Any]:
    """The target's array; in place of bytes, which are replaced, one of the stored length."""
    spec = stored.get(source.leaf.path)
    if isinstance(source.array.base, bytes) and spec is not None and len(spec.shape) == 1:
        return np.empty(spec.shape, np.uint8)
    return source.array


def _fillable(array: NDArray[Any]) -> bool:
    return array.flags.c_contiguous and array.flags.writeable


def mismatches(stored: Mapping[str, LeafSpec], wanted: Mapping[str, LeafSpec]) -> list[str]:
    """Every difference between two sets of leaves, in words."""
    problems = [f"{path} is not in the checkpoint" for path in wanted if path not in stored]
    problems += [f"{path} is not in the target" for path in stored if path not in wanted]
    for path, spec in wanted.items():
        other = stored.get(path)
        if other is not None and other != spec:
            problems.append(
                f"{path} is {other.dtype}{list(other.shape)} in the checkpoint and "
                f"{spec.dtype}{list(spec.shape)} in the target"
            )
    return problems
