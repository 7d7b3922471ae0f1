"""The queue of packs on their way to the store: bounded in bytes, several puts at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from asymcheck.errors import ClosedError
from asymcheck.threads import run_at_low_priority

Put = Callable[[str, memoryview], None]
Done = Callable[[BaseException | None], None]


@dataclass(frozen=True, slots=True)
class _Job:
    key: str
    data: memoryview
    done: Done


class FlushQueue:
    """Puts objects in the background.

    `submit` blocks while more than `max_queued_nbytes` wait or are under way (an object larger
    than that goes alone), which is how a slow store holds back what feeds it.

    Threads are started when there is work for them, and kept.

    Args:
        put: makes one object durable, or raises.
        puts_in_flight: puts at a time, at most.
        max_queued_nbytes: the bound.
    """

    def __init__(self, put: Put, puts_in_flight: int, max_queued_nbytes: int) -> None:
        self._put = put
        self._puts_in_flight = puts_in_flight
        self._max_queued_nbytes = max_queued_nbytes
        self._condition = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._queued_nbytes = 0
        self._unfinished = 0  # queued or under way
        self._under_way = 0
        self._closed = False
        self._threads: list[threading.Thread] = []

    @property
    def puts_in_flight(self) -> int:
        """Puts at a time, at most."""
        return self._puts_in_flight

    def allow(self, puts_in_flight: int) -> None:
        """So many puts at a time from now on; those under way go on."""
        with self._condition:
            self._puts_in_flight = puts_in_flight
            self._condition.notify_all()

    def submit(self, key: str, data: memoryview, done: Done) -> None:
        """Queue an object. `done(error or None)` is called from another thread, exactly once.

        `data` must stay unchanged until then.

        Raises:
            ClosedError: the queue was closed; `done` is not called.
            RuntimeError: the system has no more threads; as above.
        """
        with self._condition:
            while self._unfinished and self._queued_nbytes + len(data) > self._max_queued_nbytes:
                if self._closed:
                    break
                self._condition.wait()
            if self._closed:
                raise ClosedError("the checkpointer was closed", object=key)
            self._staff(self._unfinished + 1)
            self._jobs.append(_Job(key, data, done))
            self._queued_nbytes += len(data)
            self._unfinished += 1
            self._condition.notify_all()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything submitted before is done; False if that takes too long."""
        with self._condition:
            return self._condition.wait_for(lambda: self._unfinished == 0, timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish what is queued, end the threads; False if the store did not let us in time."""
        finished = self.flush(timeout_s)
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if finished:
            for thread in self._threads:
                thread.join()
        return finished

    def _staff(self, jobs: int) -> None:
        """Start the threads that are missing for so many; called with `_condition` held."""
        while len(self._threads) < min(jobs, self._puts_in_flight):
            name = f"asymcheck-flush-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        run_at_low_priority()
        while (job := self._take()) is not None:
            error: BaseException | None = None
            try:
                self._put(job.key, job.data)
            except BaseException as caught:
                error = caught
            try:
                job.done(error)
            finally:
                self._finish(job)

    def _take(self) -> _Job | None:
        with self._condition:
            self._condition.wait_for(self._may_take_or_end)
            if not self._jobs:
                return None
            self._under_way += 1
            return self._jobs.popleft()

    def _may_take_or_end(self) -> bool:
        if self._jobs:
            return self._under_way < self._puts_in_flight
        return self._closed

    def _finish(self, job: _Job) -> None:
        with self._condition:
            self._queued_nbytes -= len(job.data)
            self._unfinished -= 1
            self._under_way -= 1
            self._condition.notify_all()
