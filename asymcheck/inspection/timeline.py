"""`asymcheck stats --trace`: the traces of all ranks on one time line, and what windows moved.

Written in the Trace Event Format ("JSON Object Format", "X" and "M" events), which Perfetto and
chrome://tracing read: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymcheck.errors import StoreError
from asymcheck.inspection.text import ratio, size
from asymcheck.trace import TRACKS, Event, lanes
from asymcheck.traces import StoredTrace

_Span = tuple[float, float]


@dataclass(frozen=True)
class TraceSummary:
    """What the kept traces show.

    `captured_nbytes` were copied, all ranks together; `in_window_nbytes` of them in windows, while
    no communication was under way and training did not wait for them. `machines` counts the clocks.
    """

    run: str
    ranks: int
    ranks_of_run: int
    machines: int
    events: int
    first_step: int | None
    last_step: int | None
    captured_nbytes: int
    in_window_nbytes: int

    def text(self) -> Iterator[str]:
        """One line, and one of warning where clocks differ."""
        yield (
            f"trace of steps {self.first_step} to {self.last_step}, "
            f"{self.ranks} of {self.ranks_of_run} ranks: "
            f"{ratio(self.in_window_nbytes, self.captured_nbytes)} of {size(self.captured_nbytes)} "
            "copied in windows"
        )
        if self.machines > 1:
            yield f"{self.machines} machines: their time lines are aligned by their wall clocks"


def summarise_traces(
    traces: Sequence[StoredTrace], only_step: int | None = None
) -> TraceSummary | None:
    """The figures of a run's traces (of one step, or of all), None if there are none."""
    if not traces:
        return None
    moved = [window_nbytes(trace.events, only_step) for trace in traces]
    steps = [event.step for trace in traces for event in _of_step(trace.events, only_step)]
    return TraceSummary(
        traces[0].run,
        len(traces),
        traces[0].writers,
        len({trace.clock for trace in traces}),
        len(steps),
        min(steps, default=None),
        max(steps, default=None),
        captured_nbytes=sum(captured for _, captured in moved),
        in_window_nbytes=sum(inside for inside, _ in moved),
    )


# -- bytes moved in windows --------------------------------------------------------------------


def window_nbytes(events: Sequence[Event], only_step: int | None = None) -> tuple[int, int]:
    """Bytes copied in windows, and all bytes copied, by the events of one process.

    A copy counts in proportion to the time that it spent in windows, while no communication was
    under way and training did not wait: what is copied at the barrier before an update, or during
    a communication, is outside.
    """
    idle = _without(
        _merged(_spans(events, "window")),
        _merged([*_spans(events, "communication"), *_spans(events, "stall")]),
    )
    ends = [end_s for _, end_s in idle]
    copies = [event for event in _of_step(events, only_step) if event.track == "copy"]
    inside = sum(event.nbytes * _share(event, idle, ends) for event in copies)
    return round(inside), sum(event.nbytes for event in copies)


def _of_step(events: Iterable[Event], step: int | None) -> Iterator[Event]:
    return (event for event in events if step is None or event.step == step)


def _spans(events: Iterable[Event], track: str) -> list[_Span]:
    return [(event.begin_s, event.end_s) for event in events if event.track == track]


def _merged(spans: Iterable[_Span]) -> list[_Span]:
    """The same time as spans that neither touch nor overlap, ascending."""
    merged: list[_Span] = []
    for begin_s, end_s in sorted(spans):
        if merged and begin_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_s))
        else:
            merged.append((begin_s, end_s))
    return merged


def _without(spans: Sequence[_Span], others: Sequence[_Span]) -> list[_Span]:
    """The time of `spans` that is not in `others`; both as from `_merged`."""
    rest: list[_Span] = []
    ends = [end_s for _, end_s in others]
    for begin_s, end_s in spans:
        for other in others[bisect_right(ends, begin_s) :]:
            if other[0] >= end_s:
                break
            if begin_s < other[0]:
                rest.append((begin_s, other[0]))
            begin_s = other[1]
        if begin_s < end_s:
            rest.append((begin_s, end_s))
    return rest


def _share(event: Event, spans: Sequence[_Span], ends: Sequence[float]) -> float:
    """The part of an event's time that is in `spans`; `ends` are theirs."""
    first = bisect_right(ends, event.begin_s)
    if event.end_s <= event.begin_s:
        return float(first < len(spans) and spans[first][0] <= event.begin_s)
    inside_s = 0.0
    for begin_s, end_s in spans[first:]:
        if begin_s >= event.end_s:
            break
        inside_s += min(end_s, event.end_s) - max(begin_s, event.begin_s)
    return inside_s / (event.end_s - event.begin_s)


# -- Chrome's format ---------------------------------------------------------------------------


def write_chrome_trace(
    traces: Sequence[StoredTrace], path: str | os.PathLike[str], only_step: int | None = None
) -> None:
    """Write `chrome_trace(traces)` to a file.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(chrome_trace(traces, only_step)), encoding="ascii")
    except OSError as error:
        raise StoreError(f"cannot write {os.fspath(path)}: {error}") from error


def chrome_trace(traces: Sequence[StoredTrace], only_step: int | None = None) -> dict[str, Any]:
    """The events of all ranks as one document: a process per rank, a thread per track and lane.

    Times are microseconds since the first event. Ranks of one machine share its monotonic clock;
    several machines are aligned by their wall clocks, so as well as those agree.
    """
    to_wall_s = {t.clock: t.written_unix_s - t.written_monotonic_s for t in reversed(traces)}
    first = traces[0].clock if traces else ""
    moved = [
        _moved(_of_step(trace.events, only_step), to_wall_s[trace.clock] - to_wall_s[first])
        for trace in traces
    ]
    origin_s = min((event.begin_s for events in moved for event in events), default=0.0)
    found: list[dict[str, Any]] = []
    for trace, events in zip(traces, moved, strict=True):
        found += _rank_events(trace.writer, _moved(events, -origin_s))
    return {"traceEvents": found, "displayTimeUnit": "ms", "otherData": {"clocks": len(to_wall_s)}}


def _moved(events: Iterable[Event], by_s: float) -> list[Event]:
    return [e._replace(begin_s=e.begin_s + by_s, end_s=e.end_s + by_s) for e in events]


def _rank_events(rank: int, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", rank, name=f"rank {rank}")
    yield _metadata("process_sort_index", rank, sort_index=rank)
    others = sorted({event.track for event in events} - set(TRACKS))
    thread = 0
    for track in (*TRACKS, *others):
        on_track = sorted((e for e in events if e.track == track), key=lambda e: e.begin_s)
        lane_of = lanes(on_track)
        for lane in range(max(lane_of, default=-1) + 1):
            name = track if lane == 0 else f"{track} {lane + 1}"
            yield _metadata("thread_name", rank, thread + lane, name=name)
            yield _metadata("thread_sort_index", rank, thread + lane, sort_index=thread + lane)
        for event, lane in zip(on_track, lane_of, strict=True):
            yield _complete(event, rank, thread + lane)
        thread += max(lane_of, default=-1) + 1


def _metadata(kind: str, rank: int, thread: int = 0, **arguments: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": arguments}


def _complete(event: Event, rank: int, thread: int) -> dict[str, Any]:
    begin_ns, end_ns = round(event.begin_s * 1e9), round(event.end_s * 1e9)
    return {
        "ph": "X",
        "name": event.label,
        "cat": event.track,
        "pid": rank,
        "tid": thread,
        "ts": begin_ns / 1e3,
        "dur": max(0, end_ns - begin_ns) / 1e3,
        "args": {"step": event.step, "nbytes": event.nbytes},
    }
