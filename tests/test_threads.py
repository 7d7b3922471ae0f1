"""Calls in parallel: results as they come, errors when nothing runs any more."""

from __future__ import annotations

import functools
import threading

import pytest

from asymcheck.threads import in_parallel


def test_results_as_they_come() -> None:
    assert sorted(in_parallel([functools.partial(pow, 2, n) for n in range(20)], 3, "test")) == [
        2**n for n in range(20)
    ]
    assert list(in_parallel([], 3, "test")) == []
    slow = threading.Event()
    results = in_parallel([slow.wait, lambda: "quick"], 2, "test")
    assert next(results) == "quick"
    slow.set()
    assert list(results) == [True]


def test_no_more_threads_than_asked_for() -> None:
    inside, most = 0, 0
    lock = threading.Lock()
    barrier = threading.Barrier(3)

    def call() -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        barrier.wait(30)
        with lock:
            inside -= 1

    list(in_parallel([call] * 9, 3, "test"))
    assert most == 3


def test_an_error_comes_when_nothing_runs_any_more() -> None:
    begun: list[int] = []
    running, failing = threading.Event(), threading.Event()

    def run() -> None:
        begun.append(0)
        running.set()
        assert failing.wait(30)
        begun.append(1)

    def fail() -> None:
        assert running.wait(30)
        threading.Timer(0.05, failing.set).start()  # after the error is known
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(in_parallel([run, fail, *[lambda: begun.append(2)] * 5], 2, "test-threads"))
    assert begun == [0, 1]
    assert not [t for t in threading.enumerate() if t.name.startswith("test-threads")]


def test_who_stops_early_waits_for_what_runs() -> None:
    release = threading.Event()
    results = in_parallel([lambda: 1, lambda: release.wait(30)], 2, "test-threads")
    assert next(results) == 1
    release.set()
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("test-threads")]
