"""Background threads: they give way to training, and a process that ends leaves them behind."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue
from typing import TypeVar

LOW_PRIORITY_NICE = 10

T = TypeVar("T")


def run_at_low_priority() -> None:
    """Lower the calling thread's scheduling priority where the system does so for one thread.

    Linux does; elsewhere `setpriority` would change the whole process, so nothing happens. A
    process that is nicer already stays so: raising the priority again takes rights.
    """
    if os.uname().sysname == "Linux":
        thread = threading.get_native_id()
        if os.getpriority(os.PRIO_PROCESS, thread) < LOW_PRIORITY_NICE:
            os.setpriority(os.PRIO_PROCESS, thread, LOW_PRIORITY_NICE)


def in_parallel(calls: Sequence[Callable[[], T]], threads: int, name: str) -> Generator[T]:
    """Results of calls as they come, at most `threads` running at a time.

    An error is raised when the calls that run beside it have ended; no more are begun. Unlike
    those of a `ThreadPoolExecutor`, threads that hang do not keep the process from ending.
    """
    todo = deque(calls)
    done: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                call = todo.popleft()
            except IndexError:
                return
            try:
                done.put((call(), None))
            except BaseException as error:
                todo.clear()
                done.put((None, error))

    workers = [
        threading.Thread(target=work, name=f"{name}-{i}", daemon=True)
        for i in range(min(threads, len(calls)))
    ]
    for worker in workers:
        worker.start()
    try:
        for _ in calls:
            result, error = done.get()
            if error is not None:
                raise error
            yield result  # pyright: ignore[reportReturnType]
    finally:
        todo.clear()
        for worker in workers:
            worker.join()
