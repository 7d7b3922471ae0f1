"""Pools and threads of a checkpointer that saves, wired together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from asymcheck.attempt import Attempt
from asymcheck.batching import Batching, derive_batching
from asymcheck.buffers import ALIGNMENT, Allocate, BufferPool
from asymcheck.chains import BaseSchedule
from asymcheck.commit import CommitRecord
from asymcheck.committer import Committer
from asymcheck.cost import CostModel
from asymcheck.encode import Encoder
from asymcheck.flush import FlushQueue
from asymcheck.lease import LeaseKeeper
from asymcheck.plan import BLOCK_NBYTES, Plan
from asymcheck.policy import CompressionPolicy
from asymcheck.puts import InFlight
from asymcheck.snapshot import Snapshotter
from asymcheck.stores.base import Store
from asymcheck.trace import Trace

FEW_PUTS = 4
"""At a time: they keep a disk busy, more only cost processor time."""
MANY_PUTS = 32
"""At a time, at most, where each is a journey over a network."""

CODING_BUFFERS = 3
MIN_ROUND_NBYTES = 4 << 20
MIN_BLOCK_NBYTES = 64 << 10
MAX_BUFFER_NBYTES = 32 << 20
_BLOCKS_IN_A_PACK = 8  # of the smallest packs: the more, the less they differ in size
_MARGIN = 1.05  # of the volume that is expected
_PATIENCE_S = 20.0
"""So long may the puts in flight take if they share a link that one of them fills, which may show
only when they do: a store that waits for longer than that may give them up."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the parts want to know of a `Checkpointer`'s arguments; see there."""

    max_host_nbytes: int
    run_id: str
    writer: int
    stall_timeout_s: float
    commit_timeout_s: float
    lease_s: float
    encode_threads: int
    allocate: Allocate


class Pipeline:
    """Pools and threads of a checkpointer that saves, in the order of the way of the data.

    `max_host_nbytes` is shared out: packs of coded blocks and payloads have a few buffers of their
    own, so that coding never waits for memory that only coding can free; capture has the rest.

    Args:
        store, options: where to save, and how.
        policy, cost: what decides on codecs, and what it goes by.
        bases: see `Committer`.
        trace: is told of flushes and commits.
        warm_start, before_commit, after_attempt: see `Committer`.

    Attributes:
        unbatched: what strategies without `batching` do: few puts, packs of up to a buffer.
    """

    def __init__(
        self,
        store: Store,
        options: Options,
        *,
        policy: CompressionPolicy,
        cost: CostModel,
        bases: BaseSchedule,
        trace: Trace,
        warm_start: Callable[[], Mapping[str, Any]],
        before_commit: Callable[[Attempt], None],
        after_attempt: Callable[[Attempt, CommitRecord | None], None],
    ) -> None:
        host_nbytes, stall_timeout_s = options.max_host_nbytes, options.stall_timeout_s
        self.cost = cost
        self._concurrency = store.guarantees.concurrency
        self._max_puts = min(MANY_PUTS, self._concurrency or FEW_PUTS)
        self.buffer_nbytes = buffer_nbytes(host_nbytes)
        self._pack_buffers = _pack_buffers(host_nbytes, self.buffer_nbytes, self._max_puts)
        pack_nbytes = self._pack_buffers * self.buffer_nbytes
        coding_nbytes = CODING_BUFFERS * self.buffer_nbytes
        self.capture_nbytes = host_nbytes - pack_nbytes - coding_nbytes
        self.capture_pool = BufferPool(
            self.buffer_nbytes, self.capture_nbytes, stall_timeout_s, options.allocate
        )
        self.pack_pool = BufferPool(self.buffer_nbytes, pack_nbytes, stall_timeout_s)
        self.unbatched = Batching(min(FEW_PUTS, self._max_puts), self.buffer_nbytes)
        self.flush = FlushQueue(self._put, self.unbatched.puts_in_flight, host_nbytes)
        self.encoder = Encoder(
            policy=policy,
            cost=cost,
            capture_pool=self.capture_pool,
            pack_pool=self.pack_pool,
            flush=self.flush,
            threads=options.encode_threads,
            max_coding_nbytes=coding_nbytes,
        )
        self.snapshotter = Snapshotter()
        self.lease = LeaseKeeper(store, options.run_id, options.writer, options.lease_s)
        self.committer = Committer(
            store,
            self.lease,
            warm_start=warm_start,
            bases=bases,
            cost=cost,
            timeout_s=options.commit_timeout_s,
            before_commit=before_commit,
            after=after_attempt,
            trace=trace,
        )
        self._store = store
        self._trace = trace
        self._in_flight = InFlight()

    def batching(self, plan: Plan, *, has_base: bool) -> Batching:
        """What drains a snapshot soonest, by what puts have cost and codecs have saved so far."""
        ratio = min(1.0, _MARGIN * self.cost.ratio(*_class_of_step(has_base)))
        put = self.cost.line("put")
        block_nbytes = math.ceil(ratio * plan.block_nbytes)
        flight_nbytes = self._flight_nbytes(put.beta_s_per_byte)
        few = self.unbatched.puts_in_flight
        derived = derive_batching(
            volume_nbytes=math.ceil(ratio * plan.nbytes),
            alpha_s=put.alpha_s,
            beta_s_per_byte=put.beta_s_per_byte,
            streams=self.cost.streams,
            fill_s_per_byte=self.cost.line("copy").beta_s_per_byte,
            min_puts=few,
            max_puts=max(few, min(self._max_puts, flight_nbytes // max(2 * block_nbytes, 1))),
            max_pack_nbytes=self.buffer_nbytes,
            memory_nbytes=flight_nbytes,
            min_round_nbytes=MIN_ROUND_NBYTES,
        )
        pack_nbytes = derived.pack_nbytes
        if self._concurrency is not None:
            # A pack ends where the next block does not fit; one more than planned costs a round.
            pack_nbytes += block_nbytes
        in_a_buffer = math.ceil((derived.puts_in_flight + 1) / self._pack_buffers)
        return Batching(derived.puts_in_flight, self._fitted(pack_nbytes, in_a_buffer))

    def _flight_nbytes(self, s_per_byte: float) -> int:
        """How much may be in flight: what the pool holds, and a link carries in bearable time."""
        pool_nbytes = self._pack_buffers * self.buffer_nbytes
        bearable_nbytes = max(_PATIENCE_S / max(s_per_byte, 1e-15), MIN_ROUND_NBYTES)
        return int(min(pool_nbytes, bearable_nbytes))

    def _fitted(self, pack_nbytes: int, min_packs: int) -> int:
        """About so many bytes, so that packs fill buffers to three quarters at least.

        Each begins at a page boundary; `min_packs` go into a buffer in any case.
        """
        packs = max(self.buffer_nbytes // pack_nbytes, min_packs)
        share_nbytes = max(ALIGNMENT, self.buffer_nbytes // packs // ALIGNMENT * ALIGNMENT)
        if packs * pack_nbytes < 3 / 4 * self.buffer_nbytes:
            return share_nbytes
        return min(share_nbytes, math.ceil(pack_nbytes / ALIGNMENT) * ALIGNMENT)

    def block_nbytes(self, volume_nbytes: int) -> int:
        """How long a block of a snapshot of so many bytes may be: the same for similar volumes.

        Where many puts are in flight their packs may be smaller than the blocks of a local store.
        """
        if self._concurrency is None:
            return BLOCK_NBYTES
        smallest_pack_nbytes = volume_nbytes // self._max_puts
        power = max(1, smallest_pack_nbytes // _BLOCKS_IN_A_PACK).bit_length() - 1
        return min(max(1 << power, MIN_BLOCK_NBYTES), BLOCK_NBYTES)

    def note_stored(self, attempt: Attempt) -> None:
        """An attempt is committed: as much is expected of the next of its kind."""
        sizes = attempt.plan.nbytes, attempt.stored_nbytes
        self.cost.observe_ratio(*_class_of_step(attempt.base_step is not None), *sizes)

    def _put(self, key: str, data: memoryview) -> None:
        begun = self._in_flight.begin()
        begun_s = time.monotonic()
        try:
            self._store.put(key, data)
        finally:
            seconds, in_flight = self._in_flight.end(begun)
        self.cost.observe_write(len(data), seconds, in_flight)
        step = int(key.split("/")[1].split("-")[0])
        self._trace.add("flush", key.rsplit("/", 1)[1], step, begun_s, len(data))

    def close(self, *, abandon: bool) -> None:
        """End all threads; with `abandon` those that wait for the store end if it lets them."""
        timeout_s = 0.0 if abandon else None
        self.capture_pool.close()
        self.pack_pool.close()
        self.snapshotter.close()
        self.encoder.close(abandon=abandon)
        self.flush.close(timeout_s)
        self.committer.close(timeout_s)
        self.lease.close(abandon=abandon)


def buffer_nbytes(host_nbytes: int) -> int:
    """An even share of the bound, in pages, at most 32 MiB."""
    return max(ALIGNMENT, min(MAX_BUFFER_NBYTES, host_nbytes // 16) // ALIGNMENT * ALIGNMENT)


def _pack_buffers(host_nbytes: int, buffer_nbytes: int, max_puts: int) -> int:
    """One for each put in flight and one that fills, as far as an eighth of the bound reaches."""
    affordable = host_nbytes // 8 // buffer_nbytes + 1
    return max(FEW_PUTS + 1, min(max_puts + 1, affordable))


def _class_of_step(has_base: bool) -> tuple[str, str, str]:
    """What stands for codec, kind and dtype where the ratio is that of whole steps."""
    return "step", "with a base" if has_base else "without a base", ""
