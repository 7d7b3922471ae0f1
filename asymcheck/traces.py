"""The trace of a run, kept in its store: one object a writer, of the last start that kept one.

No step depends on it. docs/format.md specifies it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from asymcheck.errors import (
    CorruptionError,
    ObjectNotFoundError,
    ObjectTooLongError,
    StoreError,
)
from asymcheck.manifest import MAX_WRITERS, Record
from asymcheck.records import seal, unseal
from asymcheck.stores import process_identity
from asymcheck.stores.base import Store
from asymcheck.trace import MAX_EVENTS, Event, Seconds

MAX_TRACE_NBYTES = 1 << 24

_PREFIX = "traces/"
_KEY = re.compile(r"traces/([0-9a-z]{1,32})/w([0-9]{5,6})\.json")


class StoredTrace(Record):
    """What one writer remembered at its end.

    The times of events are those of its monotonic clock, which showed `written_monotonic_s` when
    the machine's clock showed `written_unix_s`. Writers of the same `clock` share the monotonic
    one, so that their times compare as they are.
    """

    run: Annotated[str, Meta(max_length=32)]
    writer: Annotated[int, Meta(ge=0, lt=MAX_WRITERS)]
    writers: Annotated[int, Meta(ge=1, le=MAX_WRITERS)]
    clock: Annotated[str, Meta(max_length=128)]
    written_monotonic_s: Seconds
    written_unix_s: Seconds
    events: Annotated[list[Event], Meta(max_length=MAX_EVENTS)]


def store_trace(store: Store, run: str, writer: int, writers: int, events: Sequence[Event]) -> None:
    """Keep the events of a writer of `run`; writer 0 removes the traces of earlier starts.

    Raises:
        StoreError: the store failed, or the events are too long to be read again.
    """
    clock = process_identity.token().partition("-")[0]  # same boot, same PID namespace
    newest = list(events[-MAX_EVENTS:])
    trace = StoredTrace(run, writer, writers, clock, time.monotonic(), time.time(), newest)
    sealed = seal("trace", trace)
    if len(sealed) > MAX_TRACE_NBYTES:
        raise StoreError(
            "the trace is too long to be read again",
            expected=f"at most {MAX_TRACE_NBYTES} bytes",
            found=len(sealed),
        )
    store.put(f"{_PREFIX}{run}/w{writer:05d}.json", memoryview(sealed))
    if writer == 0:
        store.delete(*(key for key in _keys(store) if key.split("/")[1] != run))


def stored_traces(store: Store) -> list[StoredTrace]:
    """The traces of the last start that kept them, by writer; empty if there is none.

    Raises:
        CorruptionError, FormatError: one is damaged or malformed.
        StoreError: the store cannot be read.
    """
    found = [trace for key in _keys(store) if (trace := _read(store, key)) is not None]
    newest = max(found, key=lambda trace: trace.written_unix_s, default=None)
    traces = [trace for trace in found if newest is not None and trace.run == newest.run]
    return sorted(traces, key=lambda trace: trace.writer)


def _keys(store: Store) -> list[str]:
    return [key for key in store.list(_PREFIX) if _KEY.fullmatch(key)]


def _read(store: Store, key: str) -> StoredTrace | None:
    """The trace under a key, None if it was removed since it was listed."""
    try:
        data = store.get(key, MAX_TRACE_NBYTES)
    except ObjectNotFoundError:
        return None
    except ObjectTooLongError as error:
        raise CorruptionError("the trace cannot be whole", object=key) from error
    trace = unseal(data, "trace", StoredTrace, object=key)
    match = _KEY.fullmatch(key)
    if match is None or (trace.run, trace.writer) != (match[1], int(match[2])):
        raise CorruptionError("the trace is another writer's", object=key)
    return trace
