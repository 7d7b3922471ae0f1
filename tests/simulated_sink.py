"""A store in virtual time: what draining a checkpoint into it takes, and each of its puts."""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

from asymcheck.batching import Batching


@dataclass(frozen=True)
class Sink:
    """Every put waits `latency_s`, then its bytes flow, each stream and all together limited."""

    latency_s: float
    stream_bytes_per_s: float = math.inf
    link_bytes_per_s: float = math.inf

    def bytes_per_s(self, flowing: int) -> float:
        """The rate of each of so many streams."""
        return min(self.stream_bytes_per_s, self.link_bytes_per_s / max(flowing, 1), 1e12)


@dataclass(frozen=True)
class Put:
    """What one put took, and how many were in flight meanwhile on average."""

    nbytes: int
    seconds: float
    in_flight: float


@dataclass(frozen=True)
class Drained:
    """A checkpoint that is durable."""

    seconds: float
    puts: list[Put]


def drain(sink: Sink, batching: Batching, volume_nbytes: int, fill_s_per_byte: float) -> Drained:
    """Fill packs one after the other, in w + 1 buffers, and put them in order, w at a time."""
    return _Drain(sink, batching, volume_nbytes, fill_s_per_byte).run()


class _Drain:
    def __init__(
        self, sink: Sink, batching: Batching, volume_nbytes: int, fill_s_per_byte: float
    ) -> None:
        self._sink = sink
        self._width = batching.puts_in_flight
        whole, rest = divmod(volume_nbytes, batching.pack_nbytes)
        self._unfilled = deque([batching.pack_nbytes] * whole + [rest] * (rest > 0))
        self._fill_s_per_byte = fill_s_per_byte
        self._filled_s: float | None = None  # when the pack at hand is full
        self._full: deque[int] = deque()
        self._waiting: list[tuple[float, int]] = []  # (when its bytes start to flow, put)
        self._flowing: list[tuple[float, int]] = []  # (bytes of a stream when it has ended, put)
        self._flowed_nbytes = 0.0  # of a stream that was there from the start
        self._now_s = self._sum_s = 0.0
        self._begun: dict[int, tuple[int, float, float]] = {}
        self._puts: list[Put] = []

    def run(self) -> Drained:
        number = 0
        while self._unfilled or self._full or self._begun:
            if self._may_fill:
                self._filled_s = self._now_s + self._fill_s_per_byte * self._unfilled[0]
            while self._full and len(self._begun) < self._width:
                self._begun[number] = self._full.popleft(), self._now_s, self._sum_s
                heapq.heappush(self._waiting, (self._now_s + self._sink.latency_s, number))
                number += 1
            self._advance()
        return Drained(self._now_s, self._puts)

    @property
    def _may_fill(self) -> bool:
        used = len(self._full) + len(self._begun)
        return bool(self._unfilled) and self._filled_s is None and used < self._width + 1

    def _advance(self) -> None:
        """To the next event."""
        rate = self._sink.bytes_per_s(len(self._flowing))
        left = self._flowing[0][0] - self._flowed_nbytes if self._flowing else math.inf
        events = [
            (self._now_s + max(left, 0.0) / rate, self._end_put),
            (self._waiting[0][0] if self._waiting else math.inf, self._begin_flow),
            (math.inf if self._filled_s is None else self._filled_s, self._end_fill),
        ]
        at_s, happen = min(events, key=lambda event: event[0])
        passed_s = at_s - self._now_s
        self._sum_s += passed_s * len(self._begun)
        self._flowed_nbytes += passed_s * rate if self._flowing else 0.0
        self._now_s = at_s
        happen()

    def _begin_flow(self) -> None:
        _, number = heapq.heappop(self._waiting)
        nbytes = self._begun[number][0]
        heapq.heappush(self._flowing, (self._flowed_nbytes + nbytes, number))

    def _end_put(self) -> None:
        self._flowed_nbytes, number = heapq.heappop(self._flowing)
        nbytes, begun_s, begun_sum_s = self._begun.pop(number)
        seconds = self._now_s - begun_s
        in_flight = (self._sum_s - begun_sum_s) / seconds if seconds else 1.0
        self._puts.append(Put(nbytes, seconds, in_flight))

    def _end_fill(self) -> None:
        self._full.append(self._unfilled.popleft())
        self._filled_s = None
