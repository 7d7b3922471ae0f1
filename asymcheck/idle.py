"""When the link is idle: windows timed in every training step, averaged, followed as they drift."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Annotated

import msgspec

from asymcheck.errors import FormatError
from asymcheck.partition import Phase, Window

_MAX_IDLE_S = 1e9
_MAX_WINDOWS = 1_000_000

_Cycle = tuple[Window, ...]
_Shape = tuple[tuple[Phase, int], ...]


class _WindowRecord(msgspec.Struct, forbid_unknown_fields=True):
    phase: Phase
    index: Annotated[int, msgspec.Meta(ge=0)]
    idle_s: Annotated[float, msgspec.Meta(ge=0, le=_MAX_IDLE_S)]


class _ProfileRecord(msgspec.Struct, forbid_unknown_fields=True):
    windows: Annotated[list[_WindowRecord], msgspec.Meta(max_length=_MAX_WINDOWS)] | None


class IdleProfile:
    """The idle time to plan with, learned from measured cycles.

    A cycle is everything between two updates of the optimizer; its *shape* is the sequence of
    (phase, index) of its windows. The plan is the median over recent cycles of the most common
    shape, so that neither a slow step nor a cycle of another shape (a partial accumulation, an
    evaluation) enters it. Not for use by several threads at once.

    Args:
        warmup_cycles: cycles until there is a plan. The first is never used: it pays for
            compilation and fresh memory.
        drift_ratio: how far the recent cycles may be from the plan, as the sum over windows of
            the absolute difference of idle time, relative to the larger total.
        drift_cycles: replan only when they are further for so many cycles in a row; the new plan
            is the median of as many.

    Raises:
        ValueError: unless warmup_cycles >= 2, drift_ratio >= 0 and drift_cycles >= 1.
    """

    def __init__(
        self, warmup_cycles: int = 10, drift_ratio: float = 0.25, drift_cycles: int = 5
    ) -> None:
        if not (warmup_cycles >= 2 and drift_ratio >= 0 and drift_cycles >= 1):
            raise ValueError(
                f"impossible profile: warmup_cycles {warmup_cycles}, drift_ratio {drift_ratio}, "
                f"drift_cycles {drift_cycles}"
            )
        self._used_cycles = warmup_cycles - 1
        self._drift_ratio = drift_ratio
        self._drift_cycles = drift_cycles
        self._recent: deque[_Cycle] = deque(maxlen=max(warmup_cycles, 2 * drift_cycles))
        self._first = True
        self._plan: _Cycle | None = None
        self._drifted_cycles = 0

    @property
    def ready(self) -> bool:
        """Whether there is a plan: after the warm-up, or from the start if one was loaded."""
        return self._plan is not None

    def windows(self) -> list[Window] | None:
        """The planned windows in the order in which they occur; None during the warm-up."""
        return None if self._plan is None else list(self._plan)

    def observe(self, cycle: Sequence[Window]) -> bool:
        """Learn from a cycle, its windows in the order in which they occurred.

        Returns True if `windows()` changed, so that partitions should be planned anew. A cycle
        without windows says nothing.
        """
        if self._first:
            self._first = False
            return False
        if not cycle:
            return False
        self._recent.append(tuple(cycle))
        if self._plan is None:
            if len(self._recent) < self._used_cycles:
                return False
            return self._replan(self._common_shape()[0])
        return self._follow_shape(_shape(self._plan)) or self._follow_drift(self._plan)

    def to_json(self) -> dict[str, object]:
        """The plan as a JSON object, for a restart that need not warm up."""
        windows = [_WindowRecord(w.phase, w.index, w.idle_s) for w in self._plan or ()]
        return msgspec.to_builtins(_ProfileRecord(windows or None))

    @classmethod
    def from_json(
        cls,
        document: object,
        *,
        warmup_cycles: int = 10,
        drift_ratio: float = 0.25,
        drift_cycles: int = 5,
    ) -> IdleProfile:
        """A profile with the plan that `to_json` gave.

        Raises:
            FormatError: if `document` is anything else, has other members, or a time is
                negative, NaN or absurdly long.
        """
        try:
            record = msgspec.convert(document, _ProfileRecord)
        except msgspec.ValidationError as error:
            raise FormatError(f"malformed idle profile: {str(error)[:200]}") from error
        profile = cls(warmup_cycles, drift_ratio, drift_cycles)
        if record.windows:
            profile._plan = tuple(Window(w.phase, w.index, w.idle_s) for w in record.windows)
        return profile

    def _common_shape(self) -> tuple[_Shape, Counter[_Shape]]:
        counts = Counter(_shape(cycle) for cycle in self._recent)
        return counts.most_common(1)[0][0], counts

    def _follow_shape(self, planned: _Shape) -> bool:
        """Replan if another shape is at least twice as common as the planned one."""
        common, counts = self._common_shape()
        if counts[common] < max(self._drift_cycles, 2 * counts[planned]):
            return False
        return common != planned and self._replan(common)

    def _follow_drift(self, plan: _Cycle) -> bool:
        """Replan if the cycles of the planned shape have been too far from it for long enough."""
        if _shape(self._recent[-1]) != _shape(plan):
            return False
        recent = self._cycles_of(_shape(plan))[-self._drift_cycles :]
        if len(recent) < self._drift_cycles:
            return False
        drifted = _distance(_median_cycle(recent), plan) > self._drift_ratio
        self._drifted_cycles = self._drifted_cycles + 1 if drifted else 0
        if self._drifted_cycles < self._drift_cycles:
            return False
        return self._replan(_shape(plan), self._drift_cycles)

    def _replan(self, shape: _Shape, last_cycles: int = 0) -> bool:
        self._plan = _median_cycle(self._cycles_of(shape)[-last_cycles:])
        self._drifted_cycles = 0
        return True

    def _cycles_of(self, shape: _Shape) -> list[_Cycle]:
        return [cycle for cycle in self._recent if _shape(cycle) == shape]


def _shape(cycle: _Cycle) -> _Shape:
    return tuple((window.phase, window.index) for window in cycle)


def _median_cycle(cycles: Sequence[_Cycle]) -> _Cycle:
    """Window by window the median idle time of cycles of one shape."""
    return tuple(
        Window(windows[0].phase, windows[0].index, median(w.idle_s for w in windows))
        for windows in zip(*cycles, strict=True)
    )


def _distance(recent: _Cycle, plan: _Cycle) -> float:
    """Sum of absolute differences of idle time, relative to the larger total; 0 if both are 0."""
    difference_s = sum(abs(r.idle_s - p.idle_s) for r, p in zip(recent, plan, strict=True))
    total_s = max(sum(w.idle_s for w in recent), sum(w.idle_s for w in plan))
    return difference_s / total_s if total_s > 0 else 0.0


class WindowTimer:
    """Turns the events of a training step into the cycle's windows with their idle times.

    The idle time of a window is the time in which no communication was under way, counted from
    the end of the communication that fed the window. It ends with the first communication that
    begins after the window was closed; gaps between communications inside the window add up, and
    a communication that is under way when the window opens (a prefetch) is not idle time. Every
    moment counts for one window at most: the next window ends the one before, closed or not.
    Before the first event of a cycle and after its last window nothing counts, so that the update
    of the optimizer is in no window.

    Times come from one monotonic clock and are never subtracted in the wrong order, so that no
    idle time is negative. Communications may nest and overlap. Events may come from several
    threads.

    Args:
        clock: monotonic time in seconds. To time a device, replay its events with a clock that
            returns their times.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._communications = 0  # under way
        self._idle_since_s: float | None = None
        self._idle_s = 0.0  # of the current window, without the gap since `_idle_since_s`
        self._current: tuple[Phase, int] | None = None
        self._closed_at_s: float | None = None
        self._windows: list[Window] = []

    def open(self, phase: Phase, index: int) -> None:
        """A window opens; the one before, if still open, ends here."""
        with self._lock:
            now_s = self._clock()
            if self._current is not None:
                self._end_window(now_s)
            self._current = phase, index
            if self._idle_since_s is None and not self._communications:
                self._idle_since_s = now_s

    def close(self) -> None:
        """The window closes. Without one there is nothing to do (windows were nested)."""
        with self._lock:
            now_s = self._clock()
            if self._current is None or self._closed_at_s is not None:
                return
            self._closed_at_s = now_s
            if self._communications:
                self._end_window(now_s)

    def communication_begin(self) -> None:
        """A communication over the link begins."""
        with self._lock:
            now_s = self._clock()
            self._communications += 1
            self._end_gap(now_s)
            if self._closed_at_s is not None:
                self._end_window(now_s)

    def communication_end(self) -> None:
        """A communication ends. One that began before the timer existed is not counted."""
        with self._lock:
            now_s = self._clock()
            if self._communications == 0:
                return
            self._communications -= 1
            if self._communications == 0:
                self._idle_since_s = now_s

    def finish_cycle(self) -> list[Window]:
        """The windows since the last call, in order of opening; call it before the update.

        The last window ends where it was closed, or here.
        """
        with self._lock:
            now_s = self._clock()
            if self._current is not None:
                self._end_window(now_s if self._closed_at_s is None else self._closed_at_s)
            windows, self._windows = self._windows, []
            self._idle_since_s = None
            return windows

    def _end_gap(self, now_s: float) -> None:
        """The link stops being idle; the gap is the current window's, if there is one."""
        if self._idle_since_s is not None and self._current is not None:
            self._idle_s += max(0.0, now_s - self._idle_since_s)
        self._idle_since_s = None

    def _end_window(self, now_s: float) -> None:
        self._end_gap(now_s)
        assert self._current is not None
        self._windows.append(Window(*self._current, self._idle_s))
        self._current = None
        self._closed_at_s = None
        self._idle_s = 0.0
