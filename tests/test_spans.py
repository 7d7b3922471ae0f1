"""Ranges that lie close together are in one span, and every range is in one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore, RemoteStore

from asymcheck.reader import default_threads
from asymcheck.spans import Reach, Spans, reach_of
from asymcheck.stores.base import RANGE_NBYTES

REACH = Reach(gap_nbytes=10, alone_nbytes=50, span_nbytes=100, stretch_nbytes=0)
Places = list[tuple[str, int, int]]


def cut(*ranges: tuple[str, int, int], reach: Reach = REACH) -> Places:
    """The spans (key, start, stop) of ranges (key, offset, length)."""
    spans = Spans(reach)
    for key, offset, nbytes in ranges:
        spans.add(key, offset, nbytes)
    return [(span.key, span.start, span.stop) for span in spans.all()]


@pytest.mark.parametrize(
    ("ranges", "spans"),
    [
        ([("a", 0, 5), ("a", 5, 5)], [("a", 0, 10)]),
        ([("a", 0, 5), ("a", 15, 5)], [("a", 0, 20)]),
        ([("a", 0, 5), ("a", 16, 5)], [("a", 0, 5), ("a", 16, 21)]),
        ([("a", 0, 5), ("b", 5, 5)], [("a", 0, 5), ("b", 5, 10)]),
        ([("a", 0, 5), ("b", 0, 5), ("a", 5, 5)], [("a", 0, 10), ("b", 0, 5)]),
        ([("a", 0, 60), ("a", 60, 40)], [("a", 0, 100)]),
        ([("a", 0, 60), ("a", 60, 41)], [("a", 0, 60), ("a", 60, 101)]),
        ([("a", 0, 500)], [("a", 0, 500)]),
        ([("a", 20, 5), ("a", 0, 5)], [("a", 20, 25), ("a", 0, 5)]),
        ([("a", 0, 20), ("a", 5, 5), ("a", 0, 20)], [("a", 0, 20)]),
        ([("a", 7, 0), ("a", 7, 3)], [("a", 7, 10)]),
    ],
)
def test_what_is_read_together(ranges: Places, spans: Places) -> None:
    assert cut(*ranges) == spans


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 300), st.integers(0, 120)), max_size=30
    ),
    st.integers(0, 50),
    st.integers(1, 200),
)
def test_every_range_is_in_its_span_and_no_span_is_too_long(
    ranges: Places, gap_nbytes: int, span_nbytes: int
) -> None:
    spans = Spans(replace(REACH, gap_nbytes=gap_nbytes, span_nbytes=span_nbytes))
    for place in ranges:
        spans.add(*place)
    for key, offset, nbytes in ranges:
        span = spans.of_range[key, offset, nbytes]
        assert span.key == key and span.start <= offset and offset + nbytes <= span.stop
    every = spans.all()
    longest = max((nbytes for _, _, nbytes in ranges), default=0)
    assert all(span.stop - span.start <= max(span_nbytes, longest) for span in every)
    assert spans.nbytes == sum(span.stop - span.start for span in every)
    assert {id(span) for span in spans.of_range.values()} == {id(span) for span in every}


def test_requests_reach_further_where_they_are_journeys() -> None:
    here, far = reach_of(MemoryStore()), reach_of(RemoteStore())
    assert here.gap_nbytes < far.gap_nbytes and here.span_nbytes < far.span_nbytes
    assert here.alone_nbytes < 1 << 20 < far.alone_nbytes
    assert here.stretch_nbytes > here.span_nbytes and far.stretch_nbytes < far.span_nbytes


def test_longer_ranges_are_fewer_at_a_time() -> None:
    store = RemoteStore(concurrency=12)
    assert reach_of(store).span_nbytes == RANGE_NBYTES
    assert default_threads(store) == 12
    store.guarantees = replace(store.guarantees, range_nbytes=4 * RANGE_NBYTES)
    assert reach_of(store).span_nbytes == 4 * RANGE_NBYTES
    assert default_threads(store) == 3
    store.guarantees = replace(store.guarantees, range_nbytes=20 * RANGE_NBYTES)
    assert default_threads(store) == 1
