"""Tools to test and measure with on one machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import Work
from torch.futures import Future

from asymcheck_torch.collectives import Collective, Interception, StandInWork


@contextmanager
def slow_collectives(latency_s: float, bytes_per_s: float | None = None) -> Iterator[None]:
    """Make every collective of this process take longer, as over a slow link.

    Between processes of one machine a collective is a copy in memory, which burns a core and is
    over at once. Here each one takes what it takes, but at least `latency_s` plus the time that
    its bytes need at `bytes_per_s` (see `Collective.nbytes`; None: no time). One link carries one
    collective's bytes at a time, in the order of issue; latencies overlap. The added time is
    slept: who waits for the collective waits longer, asynchronous ones overlap with what their
    caller does, and no core is busy. Values and errors stay what they are.

    Use it on every rank, around the training loop. What is observed (`observe_collectives`), also
    by an attached checkpointer, includes the added time. For the CPU (gloo): on CUDA the host
    sleeps, not the stream. Sends and receives between two ranks stay as they are.

    Args:
        latency_s: added to each collective.
        bytes_per_s: speed of the link.

    Raises:
        ValueError: latency_s is negative, or bytes_per_s is not positive.
    """
    if latency_s < 0 or (bytes_per_s is not None and bytes_per_s <= 0):
        raise ValueError(f"no such link: latency_s {latency_s}, bytes_per_s {bytes_per_s}")
    with Interception(_Link(latency_s, bytes_per_s).carry, innermost=True):
        yield


class _Link:
    def __init__(self, latency_s: float, bytes_per_s: float | None) -> None:
        self._latency_s = latency_s
        self._s_per_byte = 0.0 if bytes_per_s is None else 1 / bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def carry(self, collective: Collective, issue: Callable[[], Work]) -> Work:
        with self._lock:
            begin_s = max(time.monotonic(), self._free_s)
            self._free_s = begin_s + collective.nbytes * self._s_per_byte
            arrives_s = self._free_s + self._latency_s
        return _Transfer(issue(), arrives_s)


class _Transfer(StandInWork):
    """A collective's work that is done when the collective is, and not before it arrives."""

    def __init__(self, work: Work, arrives_s: float) -> None:
        super().__init__(work)
        self._arrives_s = arrives_s

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when it has arrived; raises what the collective raises."""
        done = super().wait(timeout)
        time.sleep(_seconds_until(self._arrives_s))
        return done

    def is_completed(self) -> bool:
        """Whether it has arrived."""
        return super().is_completed() and _seconds_until(self._arrives_s) == 0

    def get_future(self) -> Future[Any]:
        """What has the collective's value, or error, when it arrives."""
        return _delayed(super().get_future(), self._arrives_s)


def _seconds_until(time_s: float) -> float:
    return max(0.0, time_s - time.monotonic())


def _delayed(future: Future[Any], until_s: float) -> Future[Any]:
    delayed: Future[Any] = Future()

    def arrive() -> None:
        try:
            value = future.value()
        except Exception as error:
            delayed.set_exception(error)
        else:
            delayed.set_result(value)

    def wait_in_background(_: Future[Any]) -> None:
        timer = threading.Timer(_seconds_until(until_s), arrive)
        timer.daemon = True
        timer.start()

    future.add_done_callback(wait_in_background)
    return delayed
