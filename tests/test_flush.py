"""The queue on the way to the store: bounded in bytes, parallel, and true about what is done."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore

from asymcheck.errors import ClosedError, StoreError
from asymcheck.flush import FlushQueue


class Log:
    """What happened, in order; `done` callbacks that write into it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self.errors: dict[str, BaseException | None] = {}

    def add(self, what: str, key: str) -> None:
        with self._lock:
            self.events.append((what, key))

    def done(self, key: str):
        def note(error: BaseException | None) -> None:
            with self._lock:
                assert key not in self.errors, "done was called twice"
                self.errors[key] = error
            self.add("done", key)

        return note


def blob(nbytes: int, fill: int = 1) -> memoryview:
    return memoryview(bytes([fill]) * nbytes)


def test_puts_everything_and_flush_is_a_barrier(store: MemoryStore) -> None:
    log, queue = Log(), FlushQueue(store.put, 3, 100)
    for i in range(40):
        queue.submit(f"k{i}", blob(1 + i, i), log.done(f"k{i}"))
    assert queue.flush()
    assert store.objects == {f"k{i}": bytes([i]) * (1 + i) for i in range(40)}
    assert set(log.errors.values()) == {None} and len(log.errors) == 40
    assert queue.close()


@settings(max_examples=15)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=40), st.integers(1, 4))
def test_the_bound_holds_under_threads(sizes: list[int], puts_in_flight: int) -> None:
    bound = 200
    log = Log()
    waiting = threading.Lock()
    nbytes = {"submitting or queued": 0}

    def put(key: str, data: memoryview) -> None:
        assert queue._queued_nbytes <= bound
        with waiting:
            nbytes["submitting or queued"] -= len(data)

    queue = FlushQueue(put, puts_in_flight, bound)

    def submit(i: int) -> None:
        with waiting:
            nbytes["submitting or queued"] += sizes[i]
        queue.submit(f"k{i}", blob(sizes[i]), log.done(f"k{i}"))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(submit, range(len(sizes))))
    assert queue.flush()
    assert nbytes == {"submitting or queued": 0}
    assert log.errors == {f"k{i}": None for i in range(len(sizes))}
    assert queue.close()


def test_submitting_waits_for_room(store: MemoryStore) -> None:
    log, queue = Log(), FlushQueue(store.put, 2, 100)
    with store.hold("put", "first") as held, ThreadPoolExecutor(1) as threads:
        queue.submit("first", blob(60), log.done("first"))
        held.await_calls()
        second = threads.submit(queue.submit, "second", blob(60), log.done("second"))
        second.add_done_callback(lambda _: log.add("submitted", "second"))
        assert not second.done()
        held.release()
        second.result(30)
    assert queue.flush()
    assert log.events.index(("done", "first")) < log.events.index(("submitted", "second"))
    assert queue.close()


def test_an_object_larger_than_the_bound_goes_alone(store: MemoryStore) -> None:
    log, queue = Log(), FlushQueue(store.put, 2, 10)
    queue.submit("large", blob(1000), log.done("large"))
    queue.submit("small", blob(1), log.done("small"))
    queue.submit("large2", blob(1000), log.done("large2"))
    assert queue.flush()
    assert len(store.objects) == 3
    assert queue.close()


def test_several_puts_at_once() -> None:
    together = threading.Barrier(4, timeout=30)
    log, queue = Log(), FlushQueue(lambda key, data: together.wait() and None, 4, 1000)
    for i in range(4):
        queue.submit(f"k{i}", blob(10), log.done(f"k{i}"))
    assert queue.flush(30)
    assert set(log.errors.values()) == {None}
    assert queue.close()


def test_threads_are_started_as_there_is_work_for_them(store: MemoryStore) -> None:
    before = threading.active_count()
    log, queue = Log(), FlushQueue(store.put, 32, 1000)
    assert threading.active_count() == before
    for i in range(10):  # one after the other: one thread is enough
        queue.submit(f"k{i}", blob(10), log.done(f"k{i}"))
        assert queue.flush(30)
    assert threading.active_count() == before + 1
    with store.hold("put", "held") as held:
        for i in range(3):
            queue.submit(f"held{i}", blob(10), log.done(f"held{i}"))
            held.await_calls(i + 1)
            assert threading.active_count() == before + i + 1
    assert queue.close()
    assert threading.active_count() == before


def test_how_many_at_a_time_can_be_changed(store: MemoryStore) -> None:
    log, queue = Log(), FlushQueue(store.put, 1, 1000)
    with store.hold("put", "k") as held:
        for i in range(8):
            queue.submit(f"k{i}", blob(10), log.done(f"k{i}"))
        held.await_calls(1)
        queue.allow(4)
        queue.submit("k8", blob(10), log.done("k8"))
        held.await_calls(4)
        queue.allow(2)
        queue.submit("k9", blob(10), log.done("k9"))
        assert not queue.flush(0.05)
        assert held.waiting == 4 and queue.puts_in_flight == 2
    assert queue.close()
    assert log.errors == {f"k{i}": None for i in range(10)}


@settings(max_examples=25)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 3))
def test_never_more_at_a_time_than_allowed_and_in_order(widths: list[int], jobs: int) -> None:
    """The width falls only while nothing is under way, so every moment has one bound."""
    lock, running, begun = threading.Lock(), [0], []

    def put(key: str, data: memoryview) -> None:
        with lock:
            running[0] += 1
            assert running[0] <= queue.puts_in_flight
            begun.append(key)
        with lock:
            running[0] -= 1

    log, queue = Log(), FlushQueue(put, 1, 10_000)
    keys = [f"{width}-{i}-{j}" for i, width in enumerate(widths) for j in range(jobs * width)]
    for i, width in enumerate(widths):
        assert queue.flush(30)
        queue.allow(width)
        for key in (key for key in keys if key.split("-")[1] == str(i)):
            queue.submit(key, blob(1), log.done(key))
    assert queue.close()
    assert log.errors == dict.fromkeys(keys)
    if set(widths) == {1}:
        assert begun == keys


def test_one_at_a_time_is_in_order(store: MemoryStore) -> None:
    log, queue = Log(), FlushQueue(store.put, 1, 1000)
    keys = [f"k{i:03}" for i in range(50)]
    for key in keys:
        queue.submit(key, blob(1), log.done(key))
    assert queue.close()
    assert store.called("put") == keys


def test_errors_are_delivered_and_do_not_stop_the_rest(store: MemoryStore) -> None:
    log, queue = Log(), FlushQueue(store.put, 2, 1000)
    error = StoreError("no")
    with store.failing("put", "bad", error):
        for key in ("a", "bad1", "b", "bad2", "c"):
            queue.submit(key, blob(5), log.done(key))
        assert queue.flush()
    assert log.errors == {"a": None, "b": None, "c": None, "bad1": error, "bad2": error}
    assert sorted(store.objects) == ["a", "b", "c"]
    assert queue.close()


def test_even_a_dying_interpreter_is_delivered(store: MemoryStore) -> None:
    log, queue = Log(), FlushQueue(store.put, 1, 1000)
    with store.failing("put", "bad", SystemExit(3)):
        queue.submit("bad", blob(5), log.done("bad"))
        assert queue.flush()
    queue.submit("good", blob(5), log.done("good"))
    assert queue.flush()
    assert isinstance(log.errors["bad"], SystemExit) and log.errors["good"] is None
    assert queue.close()


def test_flush_tells_when_the_store_takes_too_long(store: MemoryStore) -> None:
    log, queue = Log(), FlushQueue(store.put, 1, 1000)
    assert queue.flush(0.0)
    with store.hold("put", "slow") as held:
        queue.submit("slow", blob(5), log.done("slow"))
        held.await_calls()
        assert not queue.flush(0.01)
        assert log.errors == {}
        held.release()
        assert queue.flush(30)
    assert log.errors == {"slow": None}
    assert queue.close()


def test_closing_finishes_and_ends_the_threads(store: MemoryStore) -> None:
    before = threading.active_count()
    log, queue = Log(), FlushQueue(store.put, 3, 1000)
    for i in range(20):
        queue.submit(f"k{i}", blob(10), log.done(f"k{i}"))
    assert queue.close()
    assert len(log.errors) == 20
    assert threading.active_count() == before
    with pytest.raises(ClosedError) as raised:
        queue.submit("late", blob(1), log.done("late"))
    assert raised.value.object == "late"
    assert "late" not in log.errors


def test_closing_does_not_wait_for_ever(store: MemoryStore) -> None:
    log, queue = Log(), FlushQueue(store.put, 1, 10)
    with store.hold("put", "stuck") as held, ThreadPoolExecutor(1) as threads:
        queue.submit("stuck", blob(10), log.done("stuck"))
        held.await_calls()
        waiting = threads.submit(queue.submit, "behind", blob(10), log.done("behind"))
        assert not queue.close(0.01)
        with pytest.raises(ClosedError):
            waiting.result(30)
        assert "behind" not in log.errors
        held.release()
    assert queue.flush(30)
