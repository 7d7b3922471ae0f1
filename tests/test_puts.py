"""What puts cost beside each other, and how many are."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.linear import Line
from asymcheck.puts import STREAMS, InFlight, PutCost

MIB = 1 << 20
PRIOR = Line(1e-3, 1e-9)
ALONE = Line(50e-3, 1 / 80e6)
SIZES_NBYTES = [64 << 10, MIB, 4 * MIB, 16 * MIB]


def observe(
    cost: PutCost, streams: int, in_flight: list[float], count: int, noise: float = 0.0
) -> None:
    """Puts of a store with so many streams, of all sizes and numbers in flight in turn."""
    rng = random.Random(0)
    for nbytes, number in itertools.islice(
        itertools.cycle(itertools.product(SIZES_NBYTES, in_flight)), count
    ):
        seconds = ALONE.seconds(nbytes * max(1.0, number / streams))
        cost.observe(nbytes, seconds * rng.lognormvariate(0, noise), number)


@pytest.mark.parametrize("streams", STREAMS)
def test_the_streams_of_a_store_are_found(streams: int) -> None:
    cost = PutCost(PRIOR)
    observe(cost, streams, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32], 200)
    next_step = STREAMS[min(STREAMS.index(streams) + 1, len(STREAMS) - 1)]
    assert streams <= cost.streams <= next_step
    for nbytes in SIZES_NBYTES:
        assert cost.line.seconds(nbytes) == pytest.approx(ALONE.seconds(nbytes), rel=0.1)


@pytest.mark.parametrize("streams", [1, 4, 32])
def test_noise_does_not_hide_them(streams: int) -> None:
    cost = PutCost(PRIOR)
    observe(cost, streams, [1, 2, 4, 8, 16, 32], 300, noise=0.3)
    assert streams / 2 <= cost.streams <= streams * 2


def test_what_was_never_tried_is_taken_to_cost_nothing() -> None:
    cost = PutCost(PRIOR)
    assert (cost.streams, cost.line) == (32, PRIOR)
    observe(cost, 4, [1, 2, 3, 4], 500)
    assert cost.streams == 32


def test_what_was_tried_is_hardly_forgotten_by_puts_that_say_nothing_about_it() -> None:
    cost = PutCost(PRIOR)
    observe(cost, 4, [1], 4)
    observe(cost, 4, [32], 40)
    assert cost.streams in (4, 6)
    observe(cost, 4, [1, 2, 3, 4], 300)
    assert cost.streams in (4, 6)
    observe(cost, 4, [1, 2, 3, 4], 3000)
    assert cost.streams == 32  # to be tried again


def test_a_store_that_has_changed_is_seen() -> None:
    cost = PutCost(PRIOR)
    observe(cost, 1, [1, 2, 4, 32], 200)
    assert cost.streams == 1
    observe(cost, 32, [1, 2, 4], 2000)
    assert cost.streams == 32
    observe(cost, 2, [1, 2, 4, 32], 400)
    assert cost.streams == 2


def test_what_another_model_found_is_believed_until_there_is_evidence() -> None:
    cost = PutCost(ALONE, 3)
    assert (cost.streams, cost.line) == (3, ALONE)
    observe(cost, 32, [1, 2, 3, 8], 200)
    assert cost.streams == 32


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**13), st.one_of(st.just(0.0), st.floats(0, 1e6)), st.floats(1, 100)
        ),
        max_size=60,
    )
)
def test_whatever_is_measured_it_stays_a_cost(samples: list[tuple[int, float, float]]) -> None:
    cost = PutCost(PRIOR)
    for sample in samples:
        cost.observe(*sample)
        assert cost.streams in STREAMS
        assert math.isfinite(cost.line.seconds(10**13)) and cost.line.alpha_s >= 0


@pytest.mark.parametrize(("nbytes", "seconds"), [(-1, 1.0), (1, -1e-9), (1, math.nan)])
def test_impossible_samples_are_refused(nbytes: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="measured cost"):
        PutCost(PRIOR).observe(nbytes, seconds, 1)


def test_how_many_are_in_flight_on_average() -> None:
    now_s = [100.0]
    meter = InFlight(lambda: now_s[0])
    first = meter.begin()
    now_s[0] = 101.0
    second = meter.begin()
    now_s[0] = 104.0
    third = meter.begin()
    assert meter.end(third) == (0.0, 1.0)  # over at once: alone, as far as it can tell
    assert meter.end(second) == (3.0, 2.0)
    now_s[0] = 105.0
    assert meter.end(first) == (5.0, (1 + 3 * 2 + 1) / 5)
    now_s[0] = 200.0
    alone = meter.begin()
    now_s[0] = 201.0
    assert meter.end(alone) == (1.0, 1.0)
