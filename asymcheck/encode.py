"""From captured bytes to blocks in packs: digests, codecs, and the reference kept up to date.

Runs of units arrive in the order of capture. They are coded by a few threads (unless they are
stored as they are) and packed by one, in that order, so that the same snapshot, schedule and
decisions give the same packs.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from asymcheck.attempt import Attempt
from asymcheck.buffers import Buffer, BufferPool
from asymcheck.codecs import codec_by_name, warm_up
from asymcheck.codecs.base import Codec, Column
from asymcheck.codecs.kernels import COMPILING
from asymcheck.codecs.replay import ReplayCodec
from asymcheck.cost import CostModel
from asymcheck.flush import FlushQueue
from asymcheck.pack import OpenPack, PackBuilder, Slot
from asymcheck.plan import Unit
from asymcheck.policy import CompressionPolicy, Never, PolicyRequest
from asymcheck.reference import Reference
from asymcheck.state import dtype_of
from asymcheck.threads import run_at_low_priority

Payload = bytes | memoryview
_NOWHERE: NDArray[np.uint8] = np.empty(0, np.uint8)

MIN_CAPTURE_BUFFERS = 6
"""What one run, at most a buffer long, can need at once: its raw columns end a pack in one buffer
and make up packs in three more at most, none of which is sent before the run is captured; and a
buffer with columns to be coded is held until there is another. With fewer, `place` waits in vain.
"""


class CapturedColumn(msgspec.Struct, eq=False, gc=False):
    """One source of a unit: where its bytes are captured to, and how they will be coded.

    `group` is the number of the unit, in the plan.
    """

    unit: Unit
    group: int
    source: int
    codec: Codec
    view: NDArray[np.uint8]
    slot: Slot | None  # a place in a pack already, if the bytes are stored as they are


@dataclass(slots=True)
class CapturedRun:
    """Units with room for their bytes; who has copied them says so by `note_captured`."""

    attempt: Attempt
    partition: int
    columns: list[CapturedColumn]
    staging: Buffer | None
    coding: range  # the bytes to be coded, counted over all runs
    _news: threading.Condition  # of all runs
    _is_captured: bool = False

    def note_captured(self) -> None:
        """The bytes are there, or the attempt has failed."""
        with self._news:
            self._is_captured = True
            self._news.notify_all()

    def await_captured(self) -> None:
        """Wait for `note_captured`."""
        with self._news:
            self._news.wait_for(lambda: self._is_captured)


class _Coded(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A column after coding; `payload` None if its bytes already lie in a pack."""

    column: CapturedColumn
    codec: Codec
    payload: Payload | None
    digest: str
    raw: str


class _Learned:
    """What coding a run took and saved: seconds by codec, bytes by codec, kind and dtype."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.raw_nbytes: Counter[tuple[str, str, str]] = Counter()
        self.coded_nbytes: Counter[tuple[str, str, str]] = Counter()

    def tell(self, cost: CostModel) -> None:
        """As one sample each."""
        for codec, seconds in self.seconds.items():
            nbytes = sum(n for (other, _, _), n in self.raw_nbytes.items() if other == codec)
            cost.observe(f"encode:{codec}", nbytes, seconds)
        for place, nbytes in self.raw_nbytes.items():
            cost.observe_ratio(*place, nbytes, self.coded_nbytes[place])


@dataclass(frozen=True, slots=True)
class _Sealed:
    attempt: Attempt
    pack: OpenPack


@dataclass(frozen=True, slots=True)
class _Mark:
    """The end of a partition or (last) of the attempt."""

    attempt: Attempt
    last: bool


_Item = tuple[CapturedRun, Future[list[_Coded]] | None] | _Sealed | _Mark


class Encoder:
    """Places runs in host memory before capture, and turns them into packs afterwards.

    A block that a codec does not make smaller is stored as it is.

    `place`, `end_partition` and `end` are called by whoever captures, one at a time; `place` blocks
    while host memory is short.

    Args:
        policy, cost: what decides on codecs, and what is told of their costs.
        capture_pool: for captured bytes; at least `MIN_CAPTURE_BUFFERS`.
        pack_pool: for packs of coded blocks.
        flush: where packs go.
        threads: runs coded at once.
        max_coding_nbytes: bound on the raw bytes of runs that are being coded or wait, coded, to
            be packed: their payloads lie in memory beside the pools. One run always may.
    """

    def __init__(
        self,
        *,
        policy: CompressionPolicy,
        cost: CostModel,
        capture_pool: BufferPool,
        pack_pool: BufferPool,
        flush: FlushQueue,
        threads: int,
        max_coding_nbytes: int,
    ) -> None:
        self._policy = policy
        self._cost = cost
        self._capture_pool = capture_pool
        self._pack_pool = pack_pool
        self._flush = flush
        self._max_coding_nbytes = max_coding_nbytes
        self._placed_nbytes = 0  # to be coded, of all runs so far
        self._packed_nbytes = 0  # of these
        self._packing = threading.Condition()  # guards _packed_nbytes
        self._captured = threading.Condition()
        self._raw = codec_by_name("raw")
        self._codecs: dict[str, Codec] = {"raw": self._raw}
        self._items: SimpleQueue[_Item | None] = SimpleQueue()
        self._executor = ThreadPoolExecutor(threads, "asymcheck-encode", run_at_low_priority)
        self._packer = threading.Thread(target=self._pack, name="asymcheck-pack", daemon=True)
        self._coded_packs: PackBuilder | None = None
        self._reference: Reference | None = None
        self._decided: dict[tuple[str, str], Codec] = {}
        self._decided_partition = -1
        self._replays = False  # units of that partition that may be replayed
        self._replayed: dict[tuple[int, tuple[str, ...]], ReplayCodec] = {}
        self._packer.start()
        if not isinstance(policy, Never):
            self._executor.submit(warm_up)

    # -- on the side of capture ------------------------------------------------------------

    def begin(self, attempt: Attempt, reference: Reference | None) -> None:
        """Start an attempt; the one before has had its `end`."""
        self._reference = reference
        self._decided_partition = -1
        self._replayed = {}
        self._raw_packs = PackBuilder(self._capture_pool, attempt.pack_nbytes)
        self._staging = PackBuilder(self._capture_pool, self._capture_pool.buffer_nbytes)

    def place(self, attempt: Attempt, run: range) -> CapturedRun:
        """Room for the bytes of units, decided by the policy: in a pack if raw, else beside.

        Raises:
            CaptureTimeoutError, ClosedError: no memory; the attempt must be given up.
        """
        plan, partition = attempt.plan, attempt.plan.units[run.start].partition
        if partition != self._decided_partition:
            self._decide(attempt, partition)
        columns: list[CapturedColumn] = []
        coding_nbytes = 0
        sealed: list[OpenPack] = []
        try:
            for group in run:
                unit = plan.units[group]
                codecs = self._codecs_of(attempt, unit)
                for source, codec in zip(unit.sources, codecs, strict=True):
                    nbytes, slot, view = unit.count * plan.itemsizes[source], None, _NOWHERE
                    if codec is self._raw:
                        slot = self._reserve_raw(nbytes, sealed)
                        view = slot.view
                    else:
                        coding_nbytes += nbytes
                    columns.append(CapturedColumn(unit, group, source, codec, view, slot))
            staging = self._stage(coding_nbytes)
        except BaseException:
            for pack in sealed:
                pack.release()
            raise
        if staging is not None:
            _lay_out(columns, plan.itemsizes, staging)
        coding = range(self._placed_nbytes, self._placed_nbytes + coding_nbytes)
        self._placed_nbytes = coding.stop
        buffer = staging.pack.buffer if staging is not None else None
        captured = CapturedRun(attempt, partition, columns, buffer, coding, self._captured)
        coded = None
        if coding_nbytes or self._reference is not None:
            coded = self._executor.submit(self._code, captured, self._reference)
        self._items.put((captured, coded))
        for pack in sealed:  # may hold columns of this very run: sent after it, not before
            self._emit(attempt, pack)
        return captured

    def end_partition(self, attempt: Attempt) -> None:
        """Close the packs at hand (where every partition has packs of its own)."""
        self._emit(attempt, self._raw_packs.seal())
        self._items.put(_Mark(attempt, last=False))

    def end(self, attempt: Attempt) -> None:
        """Everything of the attempt was placed."""
        self._emit(attempt, self._raw_packs.close())
        if (rest := self._staging.close()) is not None:
            rest.release()
        self._items.put(_Mark(attempt, last=True))

    def close(self, *, abandon: bool = False) -> None:
        """Finish what was placed and end the threads; with `abandon` do not wait for that."""
        self._items.put(None)
        if not abandon:
            self._packer.join()
        self._executor.shutdown(wait=not abandon)

    def _decide(self, attempt: Attempt, partition: int) -> None:
        self._decided_partition = partition
        self._decided = {}
        place = attempt.plan.partitions[partition]
        has_base = attempt.base_step is not None
        replayed = [
            PolicyRequest(nbytes, kind, dtype, True, self._cost)
            for (kind, dtype), nbytes in place.replayed_by_class.items()
        ]
        replay = self._policy.decide_replay(replayed) if has_base and replayed else None
        self._replays = replay is not None
        totals = Counter(place.nbytes_by_class)
        if replay is None:
            totals.update(place.replayed_by_class)
        else:
            for request in replayed:
                attempt.decided(partition, request.kind, request.dtype, request.nbytes, replay)
        for (kind, dtype), nbytes in totals.items():
            decision = self._policy.decide(PolicyRequest(nbytes, kind, dtype, has_base, self._cost))
            self._decided[kind, dtype] = self._codec(decision.codec)
            attempt.decided(partition, kind, dtype, nbytes, decision)

    def _codecs_of(self, attempt: Attempt, unit: Unit) -> Sequence[Codec]:
        """The codec for each source of a unit."""
        plan = attempt.plan
        if not (unit.replays and self._replays):
            return [self._decided[plan.classes[source]] for source in unit.sources]
        update = attempt.updates[plan.groups[unit.sources[0]]]
        roles = tuple(plan.roles[source] for source in unit.sources)
        key = id(update), roles  # the attempt keeps the update
        if key not in self._replayed:
            self._replayed[key] = ReplayCodec(update.rule, roles, update.numbers)
        return [self._replayed[key]] * len(unit.sources)

    def _codec(self, chosen: str | Codec) -> Codec:
        if not isinstance(chosen, str):
            return self._raw if chosen.id == self._raw.id else chosen
        if chosen not in self._codecs:
            self._codecs[chosen] = codec_by_name(chosen)
        return self._codecs[chosen]

    def _stage(self, nbytes: int) -> Slot | None:
        if nbytes == 0:
            return None
        slot, full = self._staging.reserve(nbytes)
        if full is not None:
            full.release()
        slot.pack.buffer.hold()
        return slot

    def _reserve_raw(self, nbytes: int, sealed: list[OpenPack]) -> Slot:
        slot, full = self._raw_packs.reserve(nbytes)
        sealed += [full] if full is not None else []
        return slot

    def _emit(self, attempt: Attempt, pack: OpenPack | None) -> None:
        if pack is not None:
            self._items.put(_Sealed(attempt, pack))

    # -- coding ----------------------------------------------------------------------------

    def _code(self, captured: CapturedRun, reference: Reference | None) -> list[_Coded]:
        """All columns, in their order."""
        captured.await_captured()
        attempt = captured.attempt
        if attempt.error is not None:
            return []
        if reference is not None and attempt.predecessor_encoded is not None:
            attempt.predecessor_encoded.wait()  # its blocks must be in the reference first
        self._await_turn(captured.coding)
        if not captured.coding:
            return [self._store_raw(column, reference) for column in captured.columns]
        coded: dict[tuple[int, int], _Coded] = {}
        learned = _Learned()
        for codec, columns in _together(captured.columns):
            if codec is self._raw:
                found = [self._store_raw(column, reference) for column in columns]
            else:
                found = self._encode(attempt, codec, columns, reference, learned)
            coded.update(((c.column.group, c.column.source), c) for c in found)
        learned.tell(self._cost)
        return [coded[column.group, column.source] for column in captured.columns]

    def _await_turn(self, coding: range) -> None:
        """Hold back while the payloads of runs before this one take all the memory allowed.

        The oldest run that is not packed never waits, and all before it were begun before.
        """
        with self._packing:
            self._packing.wait_for(
                lambda: (
                    coding.start <= self._packed_nbytes
                    or coding.stop - self._packed_nbytes <= self._max_coding_nbytes
                )
            )

    def _encode(
        self,
        attempt: Attempt,
        codec: Codec,
        columns: Sequence[CapturedColumn],
        reference: Reference | None,
        learned: _Learned,
    ) -> list[_Coded]:
        specs = [attempt.plan.specs[c.source] for c in columns]
        old = [
            reference.view(c.unit, c.source) if reference and codec.needs_base else None
            for c in columns
        ]
        inputs = [
            Column(spec.kind, dtype_of(spec.dtype), c.view, base)
            for spec, c, base in zip(specs, columns, old, strict=True)
        ]
        begun_s = time.perf_counter() - COMPILING.spent_s  # which is paid for once
        payloads = codec.encode(inputs)
        learned.seconds[codec.id] += time.perf_counter() - COMPILING.spent_s - begun_s
        for column, payload in zip(columns, payloads, strict=True):
            place = (codec.id, *attempt.plan.classes[column.source])
            learned.raw_nbytes[place] += column.view.nbytes
            learned.coded_nbytes[place] += len(payload)
        decoded = _reconstruct(codec, inputs, payloads) if codec.lossy else [c.new for c in inputs]
        return [
            self._store_coded(codec, c, payload, new, reference)
            for c, payload, new in zip(columns, payloads, decoded, strict=True)
        ]

    def _store_coded(
        self,
        codec: Codec,
        column: CapturedColumn,
        payload: Payload,
        decoded: NDArray[np.uint8],
        reference: Reference | None,
    ) -> _Coded:
        if len(payload) >= column.view.nbytes and not codec.joint:
            return self._store_raw(column, reference)
        _refer(column, decoded, reference)
        digests = xxhash.xxh3_128_hexdigest(payload), xxhash.xxh3_128_hexdigest(decoded.data)
        return _Coded(column, codec, payload, *digests)

    def _store_raw(self, column: CapturedColumn, reference: Reference | None) -> _Coded:
        _refer(column, column.view, reference)
        payload = column.view.data if column.slot is None else None
        return _Coded(column, self._raw, payload, xxhash.xxh3_128_hexdigest(column.view.data), "")

    # -- packing ---------------------------------------------------------------------------

    def _pack(self) -> None:
        run_at_low_priority()
        while (item := self._items.get()) is not None:
            if isinstance(item, _Mark):
                self._end(item)
            elif isinstance(item, _Sealed):
                self._send(item.attempt, item.pack)
            else:
                self._add(*item)

    def _add(self, captured: CapturedRun, coded: Future[list[_Coded]] | None) -> None:
        try:
            for block in self._code(captured, None) if coded is None else coded.result():
                self._add_block(captured.attempt, block)
        except BaseException as error:
            captured.attempt.fail(error)
        finally:
            if captured.staging is not None:
                captured.staging.release()
            with self._packing:
                self._packed_nbytes = captured.coding.stop
                self._packing.notify_all()

    def _add_block(self, attempt: Attempt, coded: _Coded) -> None:
        column, slot = coded.column, coded.column.slot
        if slot is None:
            assert coded.payload is not None
            if self._coded_packs is None:
                self._coded_packs = PackBuilder(self._pack_pool, attempt.pack_nbytes)
            slot, sealed = self._coded_packs.reserve(len(coded.payload))
            if sealed is not None:
                self._send(attempt, sealed)
            slot.view[:] = np.frombuffer(coded.payload, np.uint8)
        attempt.add_block(
            column.unit, column.source, coded.codec, column.group, slot, coded.digest, coded.raw
        )

    def _end(self, mark: _Mark) -> None:
        packs = self._coded_packs
        pack = None if packs is None else packs.close() if mark.last else packs.seal()
        if pack is not None:
            self._send(mark.attempt, pack)
        if mark.last:
            self._coded_packs = None
            mark.attempt.encoded.set()
            mark.attempt.settle(None)

    def _send(self, attempt: Attempt, pack: OpenPack) -> None:
        if attempt.error is not None:
            pack.release()
            return
        pack.sequence = len(attempt.packs)
        data = pack.data
        key = attempt.add_pack(len(data))

        def done(error: BaseException | None) -> None:
            if error is None:
                self._capture_pool.note_progress()
                self._pack_pool.note_progress()
            pack.release()
            attempt.settle(error)

        try:
            self._flush.submit(key, data, done)
        except BaseException as error:
            done(error)


def _lay_out(columns: Sequence[CapturedColumn], itemsizes: Sequence[int], staging: Slot) -> None:
    """Give the columns that are to be coded their places, one behind the other."""
    begin = 0
    for column in columns:
        if column.slot is None:
            end = begin + column.unit.count * itemsizes[column.source]
            column.view = staging.view[begin:end]
            begin = end


def _refer(column: CapturedColumn, decoded: NDArray[np.uint8], reference: Reference | None) -> None:
    """Keep what a reader will have, for the next increment."""
    if reference is not None:
        np.copyto(reference.view(column.unit, column.source), decoded)


def _together(
    columns: Sequence[CapturedColumn],
) -> list[tuple[Codec, list[CapturedColumn]]]:
    """The columns of each unit that have the same codec."""
    found: list[tuple[Codec, list[CapturedColumn]]] = []
    of_unit = 0  # where in `found` the unit at hand begins
    for column in columns:
        if found and found[-1][1][0].group != column.group:
            of_unit = len(found)
        for codec, members in found[of_unit:]:
            if codec is column.codec or codec == column.codec:
                members.append(column)
                break
        else:
            found.append((column.codec, [column]))
    return found


def _reconstruct(
    codec: Codec, inputs: Sequence[Column], payloads: Sequence[Payload]
) -> list[NDArray[np.uint8]]:
    """What a reader will decode: the next difference is taken to that (error feedback)."""
    outputs = [Column(c.kind, c.dtype, np.empty_like(c.new), c.old) for c in inputs]
    codec.decode(outputs, [memoryview(p) for p in payloads])
    return [c.new for c in outputs]
