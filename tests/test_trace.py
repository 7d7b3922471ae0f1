"""The trace: kept in the run, joined over ranks, written for Chrome, and what windows moved."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore
from sample_run import write_run

from asymcheck import Checkpointer
from asymcheck.errors import CorruptionError, FormatError, StoreError
from asymcheck.inspection.timeline import (
    chrome_trace,
    summarise_traces,
    window_nbytes,
    write_chrome_trace,
)
from asymcheck.records import seal
from asymcheck.trace import MAX_EVENTS, TRACKS, Event, Trace, lanes
from asymcheck.traces import MAX_TRACE_NBYTES, StoredTrace, store_trace, stored_traces

Call = Callable[..., tuple[int, str, str]]
STATE = {"params": {"w": np.arange(64.0)}}


def event(track: str, begin_s: float, end_s: float, nbytes: int = 0, step: int = 1) -> Event:
    return Event(track, track, step, begin_s, end_s, nbytes)


def stored(writer: int, events: list[Event], **changes: Any) -> StoredTrace:
    members = {"run": "r", "writers": 2, "clock": "m", "unix": 1e9, "monotonic": 0.0, **changes}
    return StoredTrace(
        members["run"],
        writer,
        members["writers"],
        members["clock"],
        members["monotonic"],
        members["unix"],
        events,
    )


def save(store: MemoryStore, step: int, **options: Any) -> None:
    with Checkpointer(store, **options) as checkpointer:
        checkpointer.save(step, STATE)


# -- in memory ---------------------------------------------------------------------------------


def test_a_trace_forgets_the_oldest() -> None:
    trace = Trace(capacity=3)
    for step in range(5):
        trace.add("commit", f"step {step}", step, 0.0)
    assert [e.step for e in trace.events()] == [2, 3, 4]


def test_lanes_hold_one_thing_at_a_time() -> None:
    events = [event("flush", *span) for span in ((0, 4), (1, 2), (2, 3), (4, 5))]
    assert lanes(events) == [0, 1, 1, 0]


# -- in the store ------------------------------------------------------------------------------


def test_a_trace_is_kept_when_asked_for(store: MemoryStore) -> None:
    save(store, 1)
    assert store.list("traces/") == []
    save(store, 2, run_id="second", keep_trace=True)
    assert store.list("traces/") == ["traces/second/w00000.json"]
    (trace,) = stored_traces(store)
    assert (trace.writer, trace.writers) == (0, 1)
    assert {"copy", "stall", "flush", "commit"} == {e.track for e in trace.events}
    assert {e.step for e in trace.events} == {2}
    assert all(e.begin_s <= e.end_s <= trace.written_monotonic_s for e in trace.events)


def test_the_last_start_replaces_the_traces_of_earlier_ones(store: MemoryStore) -> None:
    save(store, 1, run_id="first", keep_trace=True)
    save(store, 2, run_id="second", keep_trace=True)
    assert store.list("traces/") == ["traces/second/w00000.json"]


def test_writers_keep_one_each(store: MemoryStore) -> None:
    store_trace(store, "old", 5, 6, [event("copy", 0, 1)])
    for writer in (1, 0):
        store_trace(store, "new", writer, 2, [event("copy", writer, 9)])
    assert len(store.list("traces/")) == 2
    assert [t.writer for t in stored_traces(store)] == [0, 1]


def test_of_two_starts_the_newer_counts(store: MemoryStore) -> None:
    """Writer 1 of a start that died before its writer 0 did, beside a whole older one."""
    store_trace(store, "a", 0, 1, [])
    store_trace(store, "b", 1, 2, [event("copy", 0, 1)])
    assert [(t.run, t.writer) for t in stored_traces(store)] == [("b", 1)]


def test_only_so_many_events_are_kept(store: MemoryStore) -> None:
    events = [event("copy", i, i + 1, step=i) for i in range(MAX_EVENTS + 7)]
    store_trace(store, "r", 0, 1, events)
    (trace,) = stored_traces(store)
    assert trace.events == events[7:]
    store.delete(*store.list("traces/"))
    with pytest.raises(StoreError, match="too long"):
        store_trace(store, "r", 0, 1, [Event("copy", "x" * MAX_TRACE_NBYTES, 0, 0.0, 1.0)])
    assert stored_traces(store) == []


def test_a_store_that_refuses_the_trace_harms_no_checkpoint(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(operation: str, key: str) -> None:
        if key.startswith("traces/"):
            raise StoreError("no traces here")

    store.hook = refuse
    save(store, 1, keep_trace=True)
    assert "the trace of this run is not kept: no traces here" in caplog.text
    with Checkpointer(store) as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore()["params"]["w"], STATE["params"]["w"])


def test_nothing_is_kept_of_a_run_that_saved_nothing(store: MemoryStore) -> None:
    Checkpointer(store, keep_trace=True).close()
    assert store.list("") == []


def test_collection_and_retention_leave_traces_alone(store: MemoryStore) -> None:
    save(store, 1, keep_trace=True, run_id="first")
    for step in (2, 3):
        save(store, step, max_to_keep=1)
    assert store.list("traces/") == ["traces/first/w00000.json"]
    assert store.list("commits/") == [f"commits/{3:016d}.json"]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", CorruptionError, "no sealed trace"),
        (b"x" * (MAX_TRACE_NBYTES + 1), CorruptionError, "cannot be whole"),
        (seal("trace", stored(1, [])), CorruptionError, "another writer's"),
        (seal("trace", {"run": "r"}), FormatError, "malformed"),
        *(
            (seal("trace", stored(0, [Event("copy", "x", *members)])), FormatError, "malformed")
            for members in ((1, 1e300, 2.0, 3), (1, 1.0, -2.0, 3), (1, 1.0, 2.0, 10**400))
        ),
    ],
)
def test_damaged_traces(
    store: MemoryStore, data: bytes, error: type[Exception], message: str
) -> None:
    store.objects["traces/r/w00000.json"] = data
    with pytest.raises(error, match=message) as caught:
        stored_traces(store)
    assert "traces/r/w00000.json" in str(caught.value)


def test_other_keys_are_no_traces(store: MemoryStore) -> None:
    store.objects["traces/r/note.txt"] = b"mine"
    assert stored_traces(store) == []
    save(store, 1, keep_trace=True)
    assert store.objects["traces/r/note.txt"] == b"mine"


# -- bytes moved in windows --------------------------------------------------------------------


COPY = event("copy", 2, 4, 100)


@pytest.mark.parametrize(
    ("others", "inside"),
    [
        ([], 0),
        ([event("window", 0, 10)], 100),
        ([event("window", 2, 4)], 100),
        ([event("window", 3, 5)], 50),
        ([event("window", 5, 9)], 0),
        ([event("window", 0, 2.5), event("window", 3, 9)], 75),
        ([event("window", 0, 10), event("communication", 3, 4)], 50),
        ([event("window", 0, 10), event("communication", 4, 5)], 100),
        ([event("window", 0, 10), event("communication", 1, 3), event("stall", 2.5, 9)], 0),
        ([event("communication", 2, 4), event("stall", 2, 4)], 0),
    ],
)
def test_bytes_in_windows(others: list[Event], inside: int) -> None:
    assert window_nbytes([COPY, *others]) == (inside, 100)


SPANS = st.tuples(st.integers(0, 12), st.integers(0, 5)).map(lambda s: (s[0], s[0] + s[1]))
EVENTS = st.lists(st.tuples(st.sampled_from(["window", "communication", "stall", "copy"]), SPANS))


@given(EVENTS)
def test_bytes_in_windows_are_those_of_each_moment(drawn: list[tuple[str, Any]]) -> None:
    events = [event(track, *span, nbytes=60) for track, span in drawn]
    inside = 0.0
    for copy in (e for e in events if e.track == "copy"):
        half_seconds = range(int(copy.begin_s), int(copy.end_s))
        times = [s + 0.5 for s in half_seconds]
        good = sum(is_idle(events, time_s) for time_s in times)
        if times:
            inside += copy.nbytes * good / len(times)
    lasting = [e for e in events if e.track != "copy" or e.end_s > e.begin_s]
    assert window_nbytes(lasting)[0] == round(inside)


def is_idle(events: list[Event], time_s: float) -> bool:
    under_way = {e.track for e in events if e.begin_s <= time_s < e.end_s}
    return "window" in under_way and not under_way & {"communication", "stall"}


def test_copies_without_duration_and_of_other_steps() -> None:
    window = event("window", 0, 4)
    instant, outside = event("copy", 2, 2, 7), event("copy", 9, 9, 5)
    assert window_nbytes([window, instant, outside]) == (7, 12)
    assert window_nbytes([window, instant, outside._replace(step=2)], 2) == (0, 5)


def test_the_figure_of_a_run() -> None:
    half = [event("window", 0, 1, step=4), event("copy", 0, 2, 100, step=4)]
    whole = [event("window", 0, 2, step=5), event("copy", 0, 2, 300, step=5)]
    summary = summarise_traces([stored(0, half), stored(1, whole)])
    assert summary is not None
    assert (summary.in_window_nbytes, summary.captured_nbytes) == (350, 400)
    assert (summary.first_step, summary.last_step, summary.events) == (4, 5, 4)
    (line,) = summary.text()
    assert "steps 4 to 5, 2 of 2 ranks: 87.5 % of 400 B" in line
    assert summarise_traces([]) is None


# -- Chrome's format ---------------------------------------------------------------------------


def threads(document: dict[str, Any]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The complete events by rank and name of the thread."""
    found = document["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    by_thread = defaultdict(list)
    for each in found:
        if each["ph"] == "X":
            by_thread[each["pid"], names[each["pid"], each["tid"]]].append(each)
    return dict(by_thread)


def test_chrome_trace() -> None:
    first = [
        Event("window", "forward 0", 7, 100.0, 100.5),
        Event("communication", "all_reduce", 7, 100.5, 100.75, 4096),
        Event("copy", "partition 0", 7, 100.125, 100.25, 1024),
    ]
    second = [Event("window", "forward 0", 7, 100.25, 100.5)]
    document = json.loads(json.dumps(chrome_trace([stored(0, first), stored(1, second)])))
    assert threads(document) == {
        (0, "window"): [complete("forward 0", "window", 0, 0, 0.0, 500_000.0, 0)],
        (0, "communication"): [
            complete("all_reduce", "communication", 0, 1, 500_000.0, 250_000.0, 4096)
        ],
        (0, "copy"): [complete("partition 0", "copy", 0, 2, 125_000.0, 125_000.0, 1024)],
        (1, "window"): [complete("forward 0", "window", 1, 0, 250_000.0, 250_000.0, 0)],
    }
    processes = [e for e in document["traceEvents"] if e["name"] == "process_name"]
    assert [(p["pid"], p["args"]["name"]) for p in processes] == [(0, "rank 0"), (1, "rank 1")]


def complete(
    name: str, track: str, rank: int, thread: int, ts: float, dur: float, nbytes: int
) -> dict[str, Any]:
    arguments = {"step": 7, "nbytes": nbytes}
    place = {"pid": rank, "tid": thread, "ts": ts, "dur": dur}
    return {"ph": "X", "name": name, "cat": track, "args": arguments, **place}


@given(EVENTS)
def test_a_thread_does_one_thing_at_a_time(drawn: list[tuple[str, Any]]) -> None:
    """A viewer draws events of one thread that overlap wrongly, or drops them."""
    events = [event(track, begin_s / 3, end_s / 3) for track, (begin_s, end_s) in drawn]
    shown = threads(chrome_trace([stored(0, events)]))
    assert sum(map(len, shown.values())) == len(events)
    for on_thread in shown.values():
        on_thread.sort(key=lambda e: e["ts"])
        for one, other in itertools.pairwise(on_thread):
            assert round((one["ts"] + one["dur"]) * 1e3) <= round(other["ts"] * 1e3)


def test_machines_are_aligned_by_their_wall_clocks() -> None:
    """Each machine counts monotonic time from its own boot."""
    here = {"clock": "here", "unix": 1000.0}
    traces = [
        stored(0, [event("copy", 5, 6)], monotonic=10.0, **here),
        stored(1, [event("copy", 6, 7)], monotonic=10.5, **here),  # its reading is not needed
        stored(2, [event("copy", 505, 506)], clock="there", unix=1000.0, monotonic=510.0),
    ]
    begins = {key[0]: found[0]["ts"] for key, found in threads(chrome_trace(traces)).items()}
    assert begins == {0: 0.0, 1: 1e6, 2: 0.0}
    summary = summarise_traces(traces)
    assert summary is not None
    assert "2 machines" in [*summary.text()][1]


def test_unknown_tracks_and_odd_labels_are_shown() -> None:
    odd = Event("of a later version", '"\n</script>é', 1, 2.0, 1.0)
    document = chrome_trace([stored(0, [odd])])
    ((_, name),) = threads(document)
    assert name == "of a later version"
    assert json.loads(json.dumps(document)) == document
    assert "of a later version" not in TRACKS


def test_a_trace_of_nothing(tmp_path: Path) -> None:
    write_chrome_trace([], tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["traceEvents"] == []
    with pytest.raises(StoreError, match="cannot write"):
        write_chrome_trace([], tmp_path / "no" / "x.json")


# -- the command -------------------------------------------------------------------------------


def test_stats_shows_and_writes_the_trace(call: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=(10, 20), keep_trace=True)
    file = tmp_path / "out.json"
    code, out, err = call("stats", tmp_path / "run", f"--trace={file}")
    assert (code, err) == (0, "")
    assert "trace of steps 10 to 20, 1 of 1 ranks: 0.0 % of" in out
    shown = threads(json.loads(file.read_text()))
    assert {(0, "copy"), (0, "commit"), (0, "stall"), (0, "flush")} <= shown.keys()
    code, out, _ = call("stats", tmp_path / "run", "--step=20", "--json", f"--trace={file}")
    summary = json.loads(out)["trace"]
    assert (summary["first_step"], summary["last_step"], summary["ranks"]) == (20, 20, 1)
    shown = threads(json.loads(file.read_text()))
    assert {e["args"]["step"] for found in shown.values() for e in found} == {20}


def test_stats_of_a_run_without_a_trace(call: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=(10,))
    code, out, err = call("stats", tmp_path / "run", f"--trace={tmp_path}/out.json")
    assert (code, out) == (2, "")
    assert "keep_trace=True" in err
    assert json.loads(call("stats", tmp_path / "run", "--json")[1])["trace"] is None
    assert not (tmp_path / "out.json").exists()


def test_stats_of_a_damaged_trace(call: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=(10,), keep_trace=True, run_id="r")
    (tmp_path / "run/traces/r/w00000.json").write_bytes(b"torn")
    code, _, err = call("stats", tmp_path / "run")
    assert code == 1
    assert "traces/r/w00000.json" in err


def test_a_trace_that_cannot_be_written(call: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=(10,), keep_trace=True)
    code, _, err = call("stats", tmp_path / "run", f"--trace={tmp_path}/no/out.json")
    assert code == 3
    assert "cannot write" in err


def test_gc_and_verify_do_not_mind_traces(call: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=(10,), keep_trace=True)
    assert call("verify", tmp_path / "run")[0] == 0
    code, out, _ = call("gc", tmp_path / "run", "--json")
    assert (code, json.loads(out)["objects"]) == (0, [])
    assert len(list((tmp_path / "run/traces").glob("*/*.json"))) == 1
