"""What happened when: windows, communication, copies, flushes, commits; for people who wonder."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from msgspec import Meta

MAX_EVENTS = 20_000
TRACKS = ("window", "communication", "copy", "stall", "flush", "commit")

Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]


class Event(NamedTuple):
    """Something that took from `begin_s` to `end_s` on the process's monotonic clock.

    `track` is one of `TRACKS`; `label` says more. A window is a stretch without communication:
    one that is interrupted is several events of the same label.
    """

    track: str
    label: str
    step: Count
    begin_s: Seconds
    end_s: Seconds
    nbytes: Count = 0


class Trace:
    """The last `capacity` events of a run, in memory."""

    def __init__(self, capacity: int = MAX_EVENTS) -> None:
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


def lanes(events: Sequence[Event]) -> list[int]:
    """For each event, by time of their begin, the first lane in which nothing else is going on."""
    ends: list[float] = []
    chosen: list[int] = []
    for event in events:
        free = next((i for i, end in enumerate(ends) if end <= event.begin_s), len(ends))
        ends[free : free + 1] = [event.end_s]
        chosen.append(free)
    return chosen
