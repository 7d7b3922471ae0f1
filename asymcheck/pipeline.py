"""Pools and threads of a checkpointer that saves, wired together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from asymcheck.attempt import Attempt
from asymcheck.batching import derive_pack_nbytes
from asymcheck.buffers import ALIGNMENT, Allocate, BufferPool
from asymcheck.committer import Committer
from asymcheck.cost import CostModel
from asymcheck.encode import Encoder
from asymcheck.flush import FlushQueue
from asymcheck.lease import LeaseKeeper
from asymcheck.policy import CompressionPolicy
from asymcheck.snapshot import Snapshotter
from asymcheck.stores.base import Store
from asymcheck.trace import Trace

PUTS_IN_FLIGHT = 4
CODING_BUFFERS = 3
MIN_PACK_NBYTES = 1 << 20
MAX_BUFFER_NBYTES = 32 << 20


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
        trace: is told of flushes and commits.
        warm_start, before_commit, after_attempt: see `Committer`.
    """

    def __init__(
        self,
        store: Store,
        options: Options,
        *,
        policy: CompressionPolicy,
        cost: CostModel,
        trace: Trace,
        warm_start: Callable[[], Mapping[str, Any]],
        before_commit: Callable[[Attempt], None],
        after_attempt: Callable[[Attempt], None],
    ) -> None:
        host_nbytes, stall_timeout_s = options.max_host_nbytes, options.stall_timeout_s
        self.cost = cost
        self.buffer_nbytes = _buffer_nbytes(host_nbytes)
        pack_nbytes = (PUTS_IN_FLIGHT + 1) * self.buffer_nbytes
        coding_nbytes = CODING_BUFFERS * self.buffer_nbytes
        self.capture_nbytes = host_nbytes - pack_nbytes - coding_nbytes
        self.capture_pool = BufferPool(
            self.buffer_nbytes, self.capture_nbytes, stall_timeout_s, options.allocate
        )
        self.pack_pool = BufferPool(self.buffer_nbytes, pack_nbytes, stall_timeout_s)
        self.flush = FlushQueue(self._put, PUTS_IN_FLIGHT, host_nbytes)
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
            timeout_s=options.commit_timeout_s,
            before_commit=before_commit,
            after=after_attempt,
            trace=trace,
        )
        self._store = store
        self._trace = trace
        self._in_flight = 0
        self._lock = threading.Lock()

    def pack_nbytes(self, volume_nbytes: int) -> int:
        """The size of packs that drains a snapshot soonest, by what puts have cost so far.

        Rounded so that a whole number of packs, each from a page boundary on, fills a buffer.
        """
        put = self.cost.line("put")
        derived_nbytes = derive_pack_nbytes(
            volume_nbytes=max(volume_nbytes, 1),
            alpha_s=put.alpha_s,
            beta_s_per_byte=put.beta_s_per_byte,
            fill_s_per_byte=self.cost.line("copy").beta_s_per_byte,
            puts_in_flight=PUTS_IN_FLIGHT,
            max_nbytes=self.buffer_nbytes,
            min_nbytes=min(MIN_PACK_NBYTES, self.buffer_nbytes),
        )
        # A whole number of packs to a buffer: else up to half of the host memory lies idle.
        packs = max(1, round(self.buffer_nbytes / derived_nbytes))
        return max(ALIGNMENT, self.buffer_nbytes // packs // ALIGNMENT * ALIGNMENT)

    def _put(self, key: str, data: memoryview) -> None:
        with self._lock:
            self._in_flight += 1
            at_begin = self._in_flight
        begun_s = time.monotonic()
        try:
            self._store.put(key, data)
        finally:
            with self._lock:
                at_end = self._in_flight
                self._in_flight -= 1
        self.cost.observe_write(len(data), time.monotonic() - begun_s, (at_begin + at_end) / 2)
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


def _buffer_nbytes(host_nbytes: int) -> int:
    """An even share of the bound, in pages, at most 32 MiB."""
    return max(ALIGNMENT, min(MAX_BUFFER_NBYTES, host_nbytes // 16) // ALIGNMENT * ALIGNMENT)
