"""What happened when: windows, copies, flushes, commits; for plots and for people who wonder."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import NamedTuple


class Event(NamedTuple):
    """Something that took from `begin_s` to `end_s` on the monotonic clock.

    `track` is one of "window", "copy", "encode", "flush", "commit", "stall"; `label` says more.
    """

    track: str
    label: str
    step: int
    begin_s: float
    end_s: float
    nbytes: int = 0


class Trace:
    """The last `capacity` events of a run, in memory."""

    def __init__(self, capacity: int = 20_000) -> None:
        self._events: deque[Event] = deque(maxlen=capacity)
        self._lock = threading.Lock()

    def add(self, track: str, label: str, step: int, begin_s: float, nbytes: int = 0) -> None:
        """Record an event that ends now."""
        event = Event(track, label, step, begin_s, time.monotonic(), nbytes)
        with self._lock:
            self._events.append(event)

    def events(self) -> list[Event]:
        """All events that are still remembered, by time of their end."""
        with self._lock:
            return list(self._events)
