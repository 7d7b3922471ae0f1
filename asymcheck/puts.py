"""What puts cost while others are in flight: how their time grows with size and number."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from asymcheck.linear import Line, LinearCost

STREAMS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_LEARNING = 0.05
_LEAST_WEIGHT = 0.05
_NEGLIGIBLE_GAIN = 0.01
_GAIN_OF_OTHER_MODEL = 0.05


class PutCost:
    """t(b, w) = alpha + beta * b * max(1, w / streams) for a put of b bytes, w being in flight.

    So many `streams` have bandwidth of their own; more share what there is. A link that one put
    can fill is 1 stream; where a server limits each connection, and the link is far, they are
    many.

    Fitted online, in constant memory. Every number of `STREAMS` has a `LinearCost` of
    x = b * max(1, w / streams), and what it gains over that of the most streams: by how much the
    squares of its relative errors are smaller, on average. The average forgets exponentially,
    over 20 puts of which the two predict quite different things, over 400 of which they predict
    the same. Of those that gain about the most, the largest number is believed. So what was not
    tried yet is taken to cost nothing, is tried, and is known then; in the end it is tried again.

    Not for use by several threads at once.

    Args:
        prior: the cost of a put alone.
        streams: what is believed before there is evidence; one of `STREAMS`.
    """

    def __init__(self, prior: Line, streams: int = STREAMS[-1]) -> None:
        self._fits = {number: LinearCost(prior) for number in STREAMS}
        self._gains: dict[int, float] = dict.fromkeys(STREAMS, 0.0)
        if streams != STREAMS[-1]:
            self._gains[streams] = _GAIN_OF_OTHER_MODEL

    @property
    def streams(self) -> int:
        """Puts that can be in flight before they slow each other down, as far as is known."""
        least = max(self._gains.values()) - _NEGLIGIBLE_GAIN
        return max(number for number, gain in self._gains.items() if gain >= least)

    @property
    def line(self) -> Line:
        """The cost of a put alone."""
        return self._fits[self.streams].line

    def observe(self, nbytes: int, seconds: float, in_flight: float) -> None:
        """Learn that a put of `nbytes` bytes took `seconds` while `in_flight` were in flight.

        Raises:
            ValueError: for a measurement that cannot be one.
        """
        predicted_s: dict[int, float] = {}
        for streams, fit in self._fits.items():
            shared_nbytes = nbytes * max(1.0, in_flight / streams)
            predicted_s[streams] = fit.line.seconds(shared_nbytes)
            fit.observe(shared_nbytes, seconds)
        unshared_s = predicted_s[STREAMS[-1]]
        for streams in STREAMS[:-1]:
            weight = max(abs(_difference(predicted_s[streams], unshared_s)), _LEAST_WEIGHT)
            gain = (
                _difference(unshared_s, seconds) ** 2
                - _difference(predicted_s[streams], seconds) ** 2
            )
            self._gains[streams] += _LEARNING * weight * (gain - self._gains[streams])


def _difference(first_s: float, second_s: float) -> float:
    """Relative to the larger."""
    return (first_s - second_s) / max(first_s, second_s, 1e-9)


class InFlight:
    """How many of something are in flight, averaged over the life of each. Thread-safe.

    Args:
        clock: seconds that never go backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0
        self._sum_s = 0.0  # of the count over time
        self._now_s = clock()

    def begin(self) -> tuple[float, float]:
        """One more is in flight; what its `end` wants to know."""
        return self._change(1)

    def end(self, begun: tuple[float, float]) -> tuple[float, float]:
        """It no longer is; the seconds that it was, and how many were, itself included."""
        begun_s, begun_sum_s = begun
        now_s, sum_s = self._change(-1)
        seconds = now_s - begun_s
        return seconds, max(1.0, (sum_s - begun_sum_s) / seconds) if seconds > 0 else 1.0

    def _change(self, by: int) -> tuple[float, float]:
        with self._lock:
            now_s = self._clock()
            self._sum_s += self._count * (now_s - self._now_s)
            self._now_s = now_s
            self._count += by
            return now_s, self._sum_s
