"""From blocks to bytes: range reads, checks, decoding along the chain, in parallel.

A job is a block (or a group of jointly coded ones) of the wanted step. It first fills its place
with the predecessor's bytes, if its codec needs them, by jobs of the step below over the same
range; so a chain is decoded range by range, in memory that stays in cache, and no byte is read
for a range that a later step stores in full.

Jobs are run in batches, by the place of their blocks in the packs, many at a time. What the blocks
of a batch, those of the steps below included, have close together is read by one request first. On
a disk a thread runs a stretch of batches in a row, since the kernel reads ahead of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from asymcheck.codecs.base import Column, max_payload_nbytes
from asymcheck.codecs.raw import RawCodec
from asymcheck.errors import CodecError, CorruptionError, ObjectNotFoundError, ShortReadError
from asymcheck.index import BoxIndex, StepIndex, StoredBlock
from asymcheck.spans import Range, Reach, Span, Spans, reach_of
from asymcheck.state import ShardSpec, dtype_of
from asymcheck.stores.base import Store

Bytes = NDArray[np.uint8]
_STRETCHES = 4  # for each thread at least, so that all end at about the same time


class Want(msgspec.Struct, frozen=True, eq=False):
    """Elements [start, stop) of a stored box, wanted in `out` (contiguous bytes)."""

    path: str
    shard: ShardSpec
    start: int
    stop: int
    out: Bytes


class _Place(msgspec.Struct, frozen=True, eq=False):
    """Where a block is decoded to: straight into what was wanted, or beside it."""

    stored: StoredBlock
    view: Bytes
    copies: tuple[tuple[Bytes, Bytes], ...]


_Job = list[_Place]
"""Blocks that decode together."""
_Read = Mapping[Range, memoryview]
"""Stored bytes that were read together with others."""


@dataclass(slots=True)
class _Batch:
    """Jobs that one thread runs, and what is read for them beforehand.

    `nbytes` are those of all blocks; `spans` hold most twice as many as a batch should have,
    since the chain below a single block may be long. What is in none is read when it is needed.
    """

    spans: Spans
    jobs: list[_Job] = field(default_factory=list[_Job])
    nbytes: int = 0

    def add(self, job: _Job, blocks: Iterable[StoredBlock]) -> None:
        """One more job, and all blocks that it reads, those of the steps below included."""
        reach = self.spans.reach
        self.jobs.append(job)
        for stored in blocks:
            block = stored.block
            self.nbytes += block.nbytes
            alone = block.nbytes >= reach.alone_nbytes
            if not alone and self.spans.nbytes + block.nbytes <= 2 * reach.span_nbytes:
                self.spans.add(block.key, block.offset, block.nbytes)

    @property
    def is_full(self) -> bool:
        return max(self.nbytes, self.spans.nbytes) >= self.spans.reach.span_nbytes


class ChainReader:
    """Reads ranges of a step given the indices of its chain, target first.

    Where requests travel through a network as many are under way at once as the store serves.
    Host memory beside the `out`s: up to twice the store's `range_nbytes` for each thread there,
    2 MiB elsewhere.

    Args:
        store: where the packs are.
        chain: as `index.load_chain` gives it.
        threads: batches of blocks that are read and decoded at once.
    """

    def __init__(self, store: Store, chain: Sequence[StepIndex], threads: int) -> None:
        self._store = store
        self._chain = chain
        self._threads = threads
        self._reach = reach_of(store)
        self._requests = store.guarantees.concurrency

    def read(self, wants: Sequence[Want]) -> None:
        """Fill every `out`.

        Every block is checked before it is used and again after decoding; on an error the
        contents of the `out`s are undefined.

        Raises:
            CorruptionError: naming step, leaf, object and offset.
            StoreError: the store failed otherwise.
        """
        jobs = self._jobs(0, wants)
        jobs.sort(key=_location)
        batches = list(self._batches(jobs, self._reach))
        with self._request_pool() as requests:
            if self._threads == 1 or len(batches) < 2:
                self._run_stretch(batches, requests)
            else:
                self._run_all(batches, requests)

    def _request_pool(self) -> AbstractContextManager[ThreadPoolExecutor | None]:
        """Threads that read the spans of a batch at once, where that takes a journey each."""
        if self._requests is None:
            return nullcontext()
        return ThreadPoolExecutor(self._requests, "asymcheck-request")

    def _run_all(self, batches: Sequence[_Batch], requests: ThreadPoolExecutor | None) -> None:
        with ThreadPoolExecutor(self._threads, "asymcheck-restore") as pool:
            stretches = _stretches(batches, self._reach.stretch_nbytes, self._threads)
            futures = [pool.submit(self._run_stretch, s, requests) for s in stretches]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _batches(self, jobs: Sequence[_Job], reach: Reach) -> Iterator[_Batch]:
        batch = _Batch(Spans(reach))
        for job in jobs:
            blocks: dict[int, StoredBlock] = {}
            for place in job:
                self._add_with_bases(0, place.stored, blocks)
            batch.add(job, blocks.values())
            if batch.is_full:
                yield batch
                batch = _Batch(Spans(reach))
        if batch.jobs:
            yield batch

    def _add_with_bases(
        self, level: int, stored: StoredBlock, found: dict[int, StoredBlock]
    ) -> None:
        """Add a block, and all that it needs of the steps below, by identity."""
        if id(stored) in found:
            return
        found[id(stored)] = stored
        if not stored.codec.needs_base or level + 1 == len(self._chain):
            return
        below = self._chain[level + 1]
        leaf = below.leaves.get(stored.box.leaf.path)
        box = None if leaf is None else leaf.boxes.get(stored.box.shard)
        if box is None:
            return  # which is found out when it is needed
        for base in box.overlapping(stored.block.start, stored.block.stop):
            for member in below.groups[base.group] if base.codec.joint else (base,):
                self._add_with_bases(level + 1, member, found)

    def _run_stretch(self, stretch: Sequence[_Batch], requests: ThreadPoolExecutor | None) -> None:
        for batch in stretch:
            self._run_batch(batch, requests)

    def _run_batch(self, batch: _Batch, requests: ThreadPoolExecutor | None) -> None:
        read = self._read(batch.spans, requests)
        for job in batch.jobs:
            self._run(0, job, read)

    def _read(self, spans: Spans, requests: ThreadPoolExecutor | None) -> _Read:
        if len(spans.of_range) < 2:
            return {}
        every = spans.all()
        if requests is None or len(every) < 2:
            found = {span: self._read_span(span) for span in every}
        else:
            found = dict(zip(every, requests.map(self._read_span, every), strict=True))
        return {
            (key, offset, nbytes): data[offset - span.start :][:nbytes]
            for (key, offset, nbytes), span in spans.of_range.items()
            if (data := found[span]) is not None
        }

    def _read_span(self, span: Span) -> memoryview | None:
        """None if the object is not long enough: its blocks, one by one, tell which is missing."""
        data = np.empty(span.stop - span.start, np.uint8)
        try:
            self._store.get_range(span.key, span.start, data.data)
        except (ObjectNotFoundError, ShortReadError):
            return None
        return data.data

    def _jobs(self, level: int, wants: Sequence[Want]) -> list[_Job]:
        """The blocks that the wants touch, those that decode together in one job."""
        step = self._chain[level]
        single: list[_Job] = []
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

    def _run(self, level: int, job: _Job, read: _Read) -> None:
        if job[0].stored.codec.needs_base:
            self._fill_with_base(level, job, read)
        try:
            self._decode(job, read)
        except (ObjectNotFoundError, ShortReadError, CodecError) as error:
            raise self._corrupt(level, job[0].stored, str(error.message)) from error
        except CorruptionError as error:
            error.step = self._chain[level].step
            raise
        for place in job:
            for target, source in place.copies:
                np.copyto(target, source)

    def _fill_with_base(self, level: int, job: _Job, read: _Read) -> None:
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
            self._run(level + 1, base_job, read)

    def _decode(self, job: _Job, read: _Read) -> None:
        codec = job[0].stored.codec
        if isinstance(codec, RawCodec):
            for place in job:
                self._fetch(place.stored, place.view, read)
            return
        payloads = [self._payload(place.stored, read) for place in job]
        columns = [_column(place, codec.needs_base) for place in job]
        codec.decode(columns, payloads)
        for place in job:
            check_digest(place.stored, place.view, place.stored.block.raw, "decoded")

    def _payload(self, stored: StoredBlock, read: _Read) -> memoryview:
        # The manifest's length is bounded by its pack's, which is a declared size: check it
        # against what a codec may write for so many elements before allocating.
        decoded = stored.block.count * stored.box.leaf.itemsize
        if stored.block.nbytes > max_payload_nbytes(decoded):
            raise CodecError(
                f"a payload of {stored.block.nbytes} bytes for {decoded} decoded ones is absurd"
            )
        block = stored.block
        payload = read.get((block.key, block.offset, block.nbytes))
        if payload is None:
            payload = np.empty(block.nbytes, np.uint8).data
            self._store.get_range(block.key, block.offset, payload)
        check_digest(stored, payload, block.digest, "stored")
        return payload

    def _fetch(self, stored: StoredBlock, out: Bytes, read: _Read) -> None:
        """A raw block, into its place."""
        block = stored.block
        if out.nbytes != block.nbytes:
            raise CodecError(f"the block has {block.nbytes} bytes where {out.nbytes} are needed")
        data = read.get((block.key, block.offset, block.nbytes))
        if data is None:
            self._store.get_range(block.key, block.offset, out.data)
        else:
            out.data[:] = data
        check_digest(stored, out, block.digest, "stored")

    def _corrupt(self, level: int, stored: StoredBlock, message: str) -> CorruptionError:
        return CorruptionError(
            f"a block cannot be read: {message}",
            step=self._chain[level].step,
            leaf=stored.box.leaf.path,
            object=stored.block.key,
            offset=stored.block.offset,
        )


def _stretches(
    batches: Sequence[_Batch], max_nbytes: int, threads: int
) -> Iterator[Sequence[_Batch]]:
    """Batches in a row, as many as one thread runs: a few for each thread, none too long."""
    nbytes = min(max_nbytes, sum(b.nbytes for b in batches) // (threads * _STRETCHES))
    begin, length = 0, 0
    for end, batch in enumerate(batches, 1):
        length += batch.nbytes
        if length >= nbytes or end == len(batches):
            yield batches[begin:end]
            begin, length = end, 0


def _location(job: _Job) -> tuple[str, int]:
    block = job[0].stored.block
    return block.key, block.offset


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


def check_digest(stored: StoredBlock, data: Bytes | memoryview, expected: str, which: str) -> None:
    """`CorruptionError` unless the stored or decoded bytes of a block have this XXH3-128."""
    found = xxhash.xxh3_128_hexdigest(data if isinstance(data, memoryview) else data.data)
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
