"""From blocks to bytes: range reads, checks, decoding along the chain, in parallel.

A job is a block (or a group of jointly coded ones) of the wanted step. It first fills its place
with the predecessor's bytes, if its codec needs them, by jobs of the step below over the same
range; so a chain is decoded range by range, in memory that stays in cache, and no byte is read
for a range that a later step stores in full.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from asymcheck.codecs.base import Column
from asymcheck.codecs.raw import RawCodec
from asymcheck.commit import committed_steps
from asymcheck.errors import (
    CheckpointNotFoundError,
    CodecError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    ShortReadError,
    UnsupportedVersionError,
)
from asymcheck.index import BoxIndex, StepIndex, StoredBlock
from asymcheck.state import ShardSpec, dtype_of
from asymcheck.stores.base import Store

T = TypeVar("T")
Bytes = NDArray[np.uint8]
_log = logging.getLogger("asymcheck")


@dataclass(frozen=True, slots=True)
class Want:
    """Elements [start, stop) of a stored box, wanted in `out` (contiguous bytes)."""

    path: str
    shard: ShardSpec
    start: int
    stop: int
    out: Bytes


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a block is decoded to: straight into what was wanted, or beside it."""

    stored: StoredBlock
    view: Bytes
    copies: tuple[tuple[Bytes, Bytes], ...]


class ChainReader:
    """Reads ranges of a step given the indices of its chain, target first.

    Args:
        store: where the packs are.
        chain: as `index.load_chain` gives it.
        threads: blocks that are read and decoded at once.
    """

    def __init__(self, store: Store, chain: Sequence[StepIndex], threads: int) -> None:
        self._store = store
        self._chain = chain
        self._threads = threads

    def read(self, wants: Sequence[Want]) -> None:
        """Fill every `out`.

        Every block is checked before it is used and again after decoding; on an error the
        contents of the `out`s are undefined.

        Raises:
            CorruptionError: naming step, leaf, object and offset.
            StoreError: the store failed otherwise.
        """
        jobs = self._jobs(0, wants)
        if self._threads == 1 or len(jobs) < 2:
            for job in jobs:
                self._run(0, job)
            return
        with ThreadPoolExecutor(self._threads, "asymcheck-restore") as pool:
            futures = [pool.submit(self._run, 0, job) for job in jobs]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _jobs(self, level: int, wants: Sequence[Want]) -> list[list[_Place]]:
        """The blocks that the wants touch, those that decode together in one job."""
        step = self._chain[level]
        single: list[list[_Place]] = []
        joint: dict[tuple[int, int], list[tuple[Want, StoredBlock]]] = {}
        for want in wants:
            for stored in _box(step, want).overlapping(want.start, want.stop):
                if stored.codec.joint:
                    joint.setdefault(stored.group, []).append((want, stored))
                else:
                    single.append([_place(stored, [want])])
        for group, touched in joint.items():
            single.append(
                [
                    _place(member, [want for want, stored in touched if stored is member])
                    for member in step.groups[group]
                ]
            )
        return single

    def _run(self, level: int, job: list[_Place]) -> None:
        if job[0].stored.codec.needs_base:
            self._fill_with_base(level, job)
        try:
            self._decode(job)
        except (ObjectNotFoundError, ShortReadError, CodecError) as error:
            raise self._corrupt(level, job[0].stored, str(error.message)) from error
        except CorruptionError as error:
            error.step = self._chain[level].step
            raise
        for place in job:
            for target, source in place.copies:
                np.copyto(target, source)

    def _fill_with_base(self, level: int, job: list[_Place]) -> None:
        if level + 1 == len(self._chain):
            raise self._corrupt(level, job[0].stored, "the block needs a base, and there is none")
        wants = [
            Want(
                place.stored.box.leaf.path,
                place.stored.box.shard,
                place.stored.block.start,
                place.stored.block.stop,
                place.view,
            )
            for place in job
        ]
        for base_job in self._jobs(level + 1, wants):
            self._run(level + 1, base_job)

    def _decode(self, job: list[_Place]) -> None:
        codec = job[0].stored.codec
        if isinstance(codec, RawCodec):
            for place in job:
                self._fetch(place.stored, place.view)
            return
        payloads = [self._payload(place.stored) for place in job]
        columns = [_column(place, codec.needs_base) for place in job]
        codec.decode(columns, payloads)
        for place in job:
            _check_digest(place.stored, place.view, place.stored.block.raw, "decoded")

    def _payload(self, stored: StoredBlock) -> memoryview:
        # The manifest's length is bounded by its pack's, which is a declared size: check it
        # against what a codec may write for so many elements before allocating.
        decoded = stored.block.count * stored.box.leaf.itemsize
        if stored.block.nbytes > 2 * decoded + 4096:
            raise CodecError(
                f"a payload of {stored.block.nbytes} bytes for {decoded} decoded ones is absurd"
            )
        payload = np.empty(stored.block.nbytes, np.uint8)
        self._fetch(stored, payload)
        return payload.data

    def _fetch(self, stored: StoredBlock, out: Bytes) -> None:
        block = stored.block
        if out.nbytes != block.nbytes:
            raise CodecError(f"the block has {block.nbytes} bytes where {out.nbytes} are needed")
        self._store.get_range(block.key, block.offset, out.data)
        _check_digest(stored, out, block.digest, "stored")

    def _corrupt(self, level: int, stored: StoredBlock, message: str) -> CorruptionError:
        return CorruptionError(
            f"a block cannot be read: {message}",
            step=self._chain[level].step,
            leaf=stored.box.leaf.path,
            object=stored.block.key,
            offset=stored.block.offset,
        )


def _box(step: StepIndex, want: Want) -> BoxIndex:
    leaf = step.leaves.get(want.path)
    box = None if leaf is None else leaf.boxes.get(want.shard)
    if box is None:
        raise CorruptionError(
            "a base does not hold the box that an increment needs", step=step.step, leaf=want.path
        )
    if box.leaf.itemsize * (want.stop - want.start) != want.out.nbytes:
        raise CorruptionError(
            "a base has another dtype than its increment", step=step.step, leaf=want.path
        )
    return box


def _place(stored: StoredBlock, wants: Sequence[Want]) -> _Place:
    block, itemsize = stored.block, stored.box.leaf.itemsize
    for want in wants:
        if want.start <= block.start and block.stop <= want.stop:
            begin = (block.start - want.start) * itemsize
            return _Place(stored, want.out[begin : begin + block.count * itemsize], ())
    view = np.empty(block.count * itemsize, np.uint8)
    return _Place(stored, view, tuple(_copy(want, stored, view) for want in wants))


def _copy(want: Want, stored: StoredBlock, view: Bytes) -> tuple[Bytes, Bytes]:
    itemsize = stored.box.leaf.itemsize
    start, stop = max(want.start, stored.block.start), min(want.stop, stored.block.stop)
    target = want.out[(start - want.start) * itemsize : (stop - want.start) * itemsize]
    first = (start - stored.block.start) * itemsize
    return target, view[first : first + target.nbytes]


def _column(place: _Place, needs_base: bool) -> Column:
    leaf = place.stored.box.leaf
    return Column(leaf.kind, dtype_of(leaf.dtype), place.view, place.view if needs_base else None)


def _check_digest(stored: StoredBlock, data: Bytes, expected: str, which: str) -> None:
    found = xxhash.xxh3_128_hexdigest(data.data)
    if found != expected:
        raise CorruptionError(
            f"the {which} bytes of a block are not the ones that were written",
            leaf=stored.box.leaf.path,
            object=stored.block.key,
            offset=stored.block.offset,
            expected=f"xxh3-128 {expected}",
            found=found,
            hint="The object is damaged; older steps may be whole: see 'asymcheck verify'",
        )


def newest_good(
    store: Store,
    attempt: Callable[[int], T],
    damaged: Callable[[int, Exception], None],
) -> T:
    """`attempt(step)` for the newest committed step for which it does not find damage.

    Steps that turn out damaged are reported to `damaged` and to the log, and passed over; one
    that a running writer has removed meanwhile is not, since there is a newer one then. Any
    other failure (the store is unavailable, the target does not match, the step was written by a
    later version) is raised: it says nothing of damage.

    Raises:
        CheckpointNotFoundError: no committed step is good; the damage of the newest is chained.
    """
    first: Exception | None = None
    passed_over: set[int] = set()
    while steps := set(committed_steps(store)) - passed_over:
        step = max(steps)
        try:
            return attempt(step)
        except UnsupportedVersionError:
            raise  # whole, but not for this reader: an older step would silently undo newer ones
        except (CorruptionError, FormatError, CheckpointNotFoundError) as error:
            if step not in committed_steps(store):
                _log.warning("step %d was removed while it was read (max_to_keep)", step)
                continue
            _log.error("step %d cannot be restored, trying an older one: %s", step, error)
            damaged(step, error)
            passed_over.add(step)
            first = first or error
    raise CheckpointNotFoundError(
        "there is no checkpoint" if first is None else "no checkpoint is whole",
        hint=None if first is None else f"See 'asymcheck verify {store.url}'",
    ) from first
