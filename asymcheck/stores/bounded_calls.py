"""Calls that may never return, made in other threads so that the caller need not wait for ever."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_Task = tuple[Callable[..., Any], tuple[Any, ...], "Future[Any]"]


class CallTimedOutError(Exception):
    """A call did not return in time. It may still go on, and do what it was told."""


class BoundedCalls:
    """Threads that are kept for the next call; one whose call hangs is left behind.

    The threads do not keep the process alive.
    """

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[queue.SimpleQueue[_Task | None]] = queue.LifoQueue()

    def call(self, timeout_s: float, function: Callable[..., T], *arguments: Any) -> T:
        """What `function(*arguments)` returns or raises.

        Raises:
            CallTimedOutError: it did neither within `timeout_s`.
        """
        outcome: Future[T] = Future()
        self._worker().put((function, arguments, outcome))
        try:
            return outcome.result(timeout_s)
        except TimeoutError:
            if outcome.done():  # it is the call's own
                raise
            raise CallTimedOutError from None

    def close(self) -> None:
        """End the threads that are idle."""
        while not self._idle.empty():
            self._idle.get().put(None)

    def _worker(self) -> queue.SimpleQueue[_Task | None]:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(tasks,), daemon=True).start()
            return tasks

    def _work(self, tasks: queue.SimpleQueue[_Task | None]) -> None:
        while (task := tasks.get()) is not None:
            function, arguments, outcome = task
            try:
                result = function(*arguments)
            except BaseException as error:  # the caller's to see, whatever it is
                outcome.set_exception(error)
            else:
                outcome.set_result(result)
            del task, function, arguments, outcome
            self._idle.put(tasks)
