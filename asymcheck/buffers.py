"""Host memory for snapshots: page-aligned, reused, bounded."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from asymcheck.errors import CaptureTimeoutError, ClosedError

ALIGNMENT = 4096
Allocate = Callable[[int], NDArray[np.uint8]]


def page_aligned(nbytes: int) -> NDArray[np.uint8]:
    """Fresh page-aligned memory, in huge pages where the system has them.

    It is private, since shared memory seldom gets huge pages, and child processes do not inherit
    it: else every page that is written after a fork would be copied and kept twice.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            memory.madvise(getattr(mmap, advice))
    return np.frombuffer(memory, np.uint8)


class Buffer:
    """A piece of a pool's memory, in use until as many `release` calls as holds were taken."""

    def __init__(self, pool: BufferPool, data: NDArray[np.uint8]) -> None:
        self._pool = pool
        self._holds = 1
        self.data = data

    def hold(self) -> None:
        """Take one more hold."""
        with self._pool.condition:
            self._holds += 1

    def release(self) -> None:
        """Give one hold back; the last one returns the memory to the pool."""
        with self._pool.condition:
            self._holds -= 1
            if self._holds == 0:
                self._pool.take_back(self.data)


class BufferPool:
    """Buffers of equal size, allocated when first needed, then reused for ever.

    Touching fresh memory costs several times what copying into used memory costs, so buffers
    are never returned to the system before `close`.

    Args:
        buffer_nbytes: the size of every buffer, a multiple of 4096.
        max_nbytes: the bound on the sum of all buffers.
        timeout_s: how long `acquire` waits for a buffer before it gives up. After it gave up
            once, it does not wait again until the store has moved (`note_progress`) or all
            buffers have come back: a store that hangs stops training once, not at every step.
        allocate: gives page-aligned memory, pinned where a device copies into it.
    """

    def __init__(
        self,
        buffer_nbytes: int,
        max_nbytes: int,
        timeout_s: float,
        allocate: Allocate = page_aligned,
    ) -> None:
        self.buffer_nbytes = buffer_nbytes
        self.condition = threading.Condition()
        self._max_nbytes = max_nbytes
        self._timeout_s = timeout_s
        self._allocate = allocate
        self._free: list[NDArray[np.uint8]] = []
        self._allocated_nbytes = 0
        self._hopeless = False
        self._closed = False

    @property
    def allocated_nbytes(self) -> int:
        """All memory this pool holds, in use or not: its peak so far."""
        return self._allocated_nbytes

    @property
    def used_nbytes(self) -> int:
        """Memory in use now."""
        with self.condition:
            return self._allocated_nbytes - len(self._free) * self.buffer_nbytes

    def limit(self, max_nbytes: int) -> None:
        """Change the bound: buffers above it are given up as they come back."""
        with self.condition:
            self._max_nbytes = max_nbytes
            self._trim()
            self.condition.notify_all()

    def acquire(self) -> Buffer:
        """A buffer; blocks while all are in use.

        Raises:
            CaptureTimeoutError: none came back in time.
            ClosedError: the pool was closed meanwhile.
            MemoryError: the system has none left.
        """
        deadline = time.monotonic() + self._timeout_s
        with self.condition:
            while not self._free and self._allocated_nbytes + self.buffer_nbytes > self._max_nbytes:
                self._wait(deadline)
            if self._closed:
                raise ClosedError("the checkpointer was closed")
            if self._free:
                return Buffer(self, self._free.pop())
            self._allocated_nbytes += self.buffer_nbytes
        try:
            return Buffer(self, self._allocate(self.buffer_nbytes))
        except BaseException:
            with self.condition:
                self._allocated_nbytes -= self.buffer_nbytes
                self.condition.notify_all()
            raise

    def _wait(self, deadline: float) -> None:
        remaining_s = 0.0 if self._hopeless else deadline - time.monotonic()
        if self._closed:
            raise ClosedError("the checkpointer was closed")
        if remaining_s <= 0:
            self._hopeless = True
            raise CaptureTimeoutError(
                f"no host memory became free within {self._timeout_s:g} s",
                expected=f"a buffer of {self.buffer_nbytes} bytes within {self._max_nbytes}",
                found="all waiting to be written",
                hint="The store hangs or is much slower than training: look at it, save less "
                "often (every_steps) or raise max_host_bytes",
            )
        self.condition.wait(remaining_s)

    def take_back(self, data: NDArray[np.uint8]) -> None:
        """Called by `Buffer.release` with `condition` held."""
        self._free.append(data)
        if len(self._free) * self.buffer_nbytes >= self._allocated_nbytes:
            self._hopeless = False
        self._trim()
        self.condition.notify_all()

    def note_progress(self) -> None:
        """The store has taken an object: waiting for it makes sense."""
        with self.condition:
            self._hopeless = False

    def _trim(self) -> None:
        while self._free and self._allocated_nbytes > self._max_nbytes:
            self._free.pop()
            self._allocated_nbytes -= self.buffer_nbytes

    def close(self) -> None:
        """Wake whoever waits with `ClosedError` and forget the free buffers."""
        with self.condition:
            self._closed = True
            self._allocated_nbytes -= len(self._free) * self.buffer_nbytes
            self._free.clear()
            self.condition.notify_all()
