"""Host memory: bounded whatever happens, reused, and given up on when the store hangs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asymcheck.buffers import ALIGNMENT, Buffer, BufferPool, page_aligned
from asymcheck.errors import CaptureTimeoutError, ClosedError

SIZE = ALIGNMENT


def plain(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes, np.uint8)


class PoolMachine(RuleBasedStateMachine):
    """A pool that never waits, against a model that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.max_buffers = 5
        self.pool = BufferPool(SIZE, self.max_buffers * SIZE, 0.0, plain)
        self.held: list[tuple[Buffer, int]] = []
        self.stamp = 0
        self.most = 0

    @rule()
    def acquire(self) -> None:
        if len({id(b) for b, _ in self.held}) >= self.max_buffers:
            with pytest.raises(CaptureTimeoutError):
                self.pool.acquire()
            return
        buffer = self.pool.acquire()
        self.stamp = (self.stamp + 1) % 251
        buffer.data[:] = self.stamp
        self.held.append((buffer, self.stamp))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        buffer, stamp = data.draw(st.sampled_from(self.held))
        buffer.hold()
        self.held.append((buffer, stamp))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        buffer, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        buffer.release()

    @rule(buffers=st.integers(0, 6))
    def limit(self, buffers: int) -> None:
        self.max_buffers = buffers
        self.pool.limit(buffers * SIZE + 17)

    @invariant()
    def counts_are_right(self) -> None:
        used = len({id(buffer) for buffer, _ in self.held})
        assert self.pool.used_nbytes == used * SIZE
        assert self.pool.allocated_nbytes <= max(self.max_buffers, used) * SIZE

    @invariant()
    def nobody_else_has_a_held_buffer(self) -> None:
        assert all((buffer.data == stamp).all() for buffer, stamp in self.held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_threads_never_exceed_the_bound_nor_share() -> None:
    allocated: list[np.ndarray] = []

    def allocate(nbytes: int) -> np.ndarray:
        allocated.append(plain(nbytes))
        return allocated[-1]

    pool = BufferPool(SIZE, 3 * SIZE + SIZE // 2, 60.0, allocate)

    together = threading.Barrier(3, timeout=30)

    def work(worker: int) -> None:
        for turn in range(100):
            buffer = pool.acquire()
            assert pool.used_nbytes <= 3 * SIZE
            buffer.data[:] = worker
            if worker < 3 and turn == 0:
                together.wait()
            buffer.hold()
            buffer.release()
            if turn % 7 == 0:
                threading.Event().wait(0)  # lets the others in
            assert (buffer.data == worker).all()
            buffer.release()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert (pool.used_nbytes, pool.allocated_nbytes) == (0, 3 * SIZE)
    assert len(allocated) == 3


def test_used_memory_is_used_again() -> None:
    allocations: list[int] = []
    pool = BufferPool(SIZE, 10 * SIZE, 0.0, lambda n: (allocations.append(n), plain(n))[1])
    for _ in range(100):
        first, second = pool.acquire(), pool.acquire()
        first.release()
        second.release()
    assert allocations == [SIZE, SIZE]


class Waits:
    """Notes when a pool's condition is waited for."""

    def __init__(self, pool: BufferPool) -> None:
        self.began = threading.Event()
        self.count = 0
        self._wait = pool.condition.wait
        pool.condition.wait = self  # type: ignore[method-assign]

    def __call__(self, timeout: float | None = None) -> bool:
        self.count += 1
        self.began.set()
        return self._wait(timeout)


def test_waits_for_a_buffer_to_come_back() -> None:
    pool = BufferPool(SIZE, SIZE, 60.0, plain)
    waits = Waits(pool)
    first = pool.acquire()
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(pool.acquire)
        assert waits.began.wait(30)
        first.release()
        assert second.result(30).data is first.data


def test_a_store_that_hangs_holds_up_training_once() -> None:
    pool = BufferPool(SIZE, SIZE, 0.01, plain)
    waits = Waits(pool)
    buffer = pool.acquire()
    with pytest.raises(CaptureTimeoutError, match="no host memory became free") as raised:
        pool.acquire()
    assert raised.value.hint is not None
    assert waits.count > 0
    waits.count = 0
    for _ in range(3):
        with pytest.raises(CaptureTimeoutError):
            pool.acquire()
    assert waits.count == 0
    buffer.release()
    pool.acquire()
    with pytest.raises(CaptureTimeoutError):
        pool.acquire()
    assert waits.count > 0  # all had come back: it had hope again


def test_hope_comes_back_with_the_store_not_with_what_was_given_up() -> None:
    pool = BufferPool(SIZE, 2 * SIZE, 0.01, plain)
    waits = Waits(pool)
    _stuck, given_up = pool.acquire(), pool.acquire()
    for progress, waited in ((False, False), (True, True)):
        with pytest.raises(CaptureTimeoutError):
            pool.acquire()
        given_up.release()
        given_up = pool.acquire()
        if progress:
            pool.note_progress()
        waits.count = 0
        with pytest.raises(CaptureTimeoutError):
            pool.acquire()
        assert (waits.count > 0) == waited


def test_closing_wakes_who_waits() -> None:
    pool = BufferPool(SIZE, SIZE, 60.0, plain)
    waits = Waits(pool)
    buffer = pool.acquire()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.acquire)
        assert waits.began.wait(30)
        pool.close()
        with pytest.raises(ClosedError):
            waiting.result(30)
    with pytest.raises(ClosedError):
        pool.acquire()
    buffer.release()
    with pytest.raises(ClosedError):
        pool.acquire()


def test_closing_forgets_free_memory() -> None:
    pool = BufferPool(SIZE, 2 * SIZE, 0.0, plain)
    pool.acquire().release()
    pool.close()
    assert pool.allocated_nbytes == 0


def test_a_lower_bound_is_reached_as_buffers_come_back() -> None:
    pool = BufferPool(SIZE, 4 * SIZE, 0.0, plain)
    buffers = [pool.acquire() for _ in range(4)]
    buffers.pop().release()
    pool.limit(2 * SIZE)
    assert pool.allocated_nbytes == 3 * SIZE
    buffers.pop().release()
    assert pool.allocated_nbytes == 2 * SIZE
    with pytest.raises(CaptureTimeoutError):
        pool.acquire()


def test_memory_that_cannot_be_had_does_not_count() -> None:
    def refuse(nbytes: int) -> np.ndarray:
        raise MemoryError(nbytes)

    pool = BufferPool(SIZE, SIZE, 0.0, refuse)
    for _ in range(3):
        with pytest.raises(MemoryError):
            pool.acquire()
        assert pool.allocated_nbytes == 0


def test_memory_is_page_aligned_and_writable() -> None:
    for nbytes in (4096, 3 * 4096, 1 << 21):
        memory = page_aligned(nbytes)
        assert memory.nbytes == nbytes
        assert memory.ctypes.data % ALIGNMENT == 0
        memory[:] = 7
        assert memory.sum() == 7 * nbytes
