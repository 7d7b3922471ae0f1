"""How many puts of which size: near the best of a sweep, on stores in virtual time."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_sink import Sink, drain

from asymcheck.batching import Batching, derive_batching
from asymcheck.linear import Line
from asymcheck.puts import PutCost

MIB = 1 << 20
MAX_PACK = 32 * MIB
PRIOR = Line(1e-3, 1 / 0.95e9)  # a local disk


def derive(**changes: float) -> Batching:
    arguments: dict[str, float] = {
        "volume_nbytes": 1_000_000_000,
        "alpha_s": 1e-3,
        "beta_s_per_byte": 1e-9,
        "streams": 32,
        "fill_s_per_byte": 1e-10,
        "min_puts": 4,
        "max_puts": 4,
        "max_pack_nbytes": 10**9,
        "memory_nbytes": 10**12,
        "min_round_nbytes": 1,
        "slack": 0.0,
    }
    return derive_batching(**(arguments | changes))  # type: ignore[arg-type]


def size(**changes: float) -> int:
    """Of packs, 4 at a time."""
    return derive(**changes).pack_nbytes


# -- the sizes of packs, the number of puts being given --------------------------------------


def sizes(min_nbytes: int, max_nbytes: int, volume_nbytes: int, puts: int) -> Iterator[int]:
    """Pack sizes to try: geometric steps, and every small number of whole rounds."""
    nbytes = float(min_nbytes)
    while nbytes < max_nbytes:
        yield math.ceil(nbytes)
        nbytes *= 1.5
    yield max_nbytes
    for rounds in range(1, 9):
        yield min(max(math.ceil(volume_nbytes / (puts * rounds)), min_nbytes), max_nbytes)


ALPHAS_S = [0.3e-3, 3e-3, 50e-3]
BANDWIDTHS_BYTES_PER_S = [80e6, 400e6, 1.3e9]
PUTS = [1, 4, 32]
VOLUMES_NBYTES = [10_000_000, 300_000_000, 4_000_000_000]
SOURCES_BYTES_PER_S = [math.inf, 8e9, 1e9, 0.2e9]


@pytest.mark.parametrize("alpha_s", ALPHAS_S)
@pytest.mark.parametrize("bandwidth_bytes_per_s", BANDWIDTHS_BYTES_PER_S)
@pytest.mark.parametrize("max_nbytes", [32 * MIB, 4_000_000_000])
def test_of_given_costs_the_derived_size_is_near_the_best(
    alpha_s: float, bandwidth_bytes_per_s: float, max_nbytes: int
) -> None:
    sink = Sink(alpha_s, bandwidth_bytes_per_s)
    for puts, volume_nbytes, source_bytes_per_s in itertools.product(
        PUTS, VOLUMES_NBYTES, SOURCES_BYTES_PER_S
    ):
        min_nbytes = max(64 << 10, volume_nbytes >> 10)
        fill_s_per_byte = 1 / source_bytes_per_s
        derived = derive(
            volume_nbytes=volume_nbytes,
            alpha_s=alpha_s,
            beta_s_per_byte=1 / bandwidth_bytes_per_s,
            fill_s_per_byte=fill_s_per_byte,
            min_puts=puts,
            max_puts=puts,
            max_pack_nbytes=max_nbytes,
            min_round_nbytes=puts * min_nbytes,
            slack=0.03,
        )
        tried = set(sizes(min_nbytes, max_nbytes, volume_nbytes, puts)) | {derived.pack_nbytes}
        taken_s = {
            nbytes: drain(sink, Batching(puts, nbytes), volume_nbytes, fill_s_per_byte).seconds
            for nbytes in tried
        }
        assert taken_s[derived.pack_nbytes] <= 1.10 * min(taken_s.values()), derived


@given(
    st.integers(1, 32),
    st.integers(1, 64),
    st.integers(1, 64 * MIB),
    st.floats(0, 0.05),
    st.floats(1e-10, 1e-7),
    st.floats(0, 1e-7),
)
def test_the_formula_of_the_docstring_is_the_time_of_whole_rounds(
    puts: int,
    rounds: int,
    pack_nbytes: int,
    alpha_s: float,
    beta_s_per_byte: float,
    fill_s_per_byte: float,
) -> None:
    volume_nbytes = pack_nbytes * puts * rounds
    put_s = alpha_s + beta_s_per_byte * pack_nbytes
    store_bound_s = fill_s_per_byte * volume_nbytes / rounds + rounds * put_s
    source_bound_s = fill_s_per_byte * volume_nbytes + put_s
    sink, batching = Sink(alpha_s, 1 / beta_s_per_byte), Batching(puts, pack_nbytes)
    simulated_s = drain(sink, batching, volume_nbytes, fill_s_per_byte).seconds
    assert simulated_s == pytest.approx(max(store_bound_s, source_bound_s))


def test_bytes_that_are_there_at_once_are_spread_over_the_puts() -> None:
    assert size(fill_s_per_byte=0.0) == 250_000_000
    assert size(fill_s_per_byte=0.0, volume_nbytes=1_000_000_001) == 250_000_001
    # 50 ms a request, 80 MB/s a stream, 32 puts: about 4 MiB were measured best for 128 MiB.
    cloud = {"alpha_s": 50e-3, "beta_s_per_byte": 1 / 80e6, "min_puts": 32, "max_puts": 32}
    assert size(**cloud, volume_nbytes=128 * MIB) == 4 * MIB


def test_a_store_bound_run_balances_puts_against_filling() -> None:
    # sqrt(gamma * V / alpha) = sqrt(0.1 s / 1 ms) = 10 rounds
    assert size() == 25_000_000


def test_a_source_bound_run_takes_the_smallest_packs_that_keep_up() -> None:
    # V * (gamma - beta / w) / alpha = 1 s / 10 ms = 100 rounds
    assert size(fill_s_per_byte=1.25e-9, alpha_s=10e-3) == 2_500_000


def test_puts_that_cost_only_bandwidth_give_the_smallest_packs() -> None:
    assert size(alpha_s=0.0, min_round_nbytes=4 * 4096) == pytest.approx(4096, abs=1)


def test_slack_is_spent_on_fewer_packs_and_no_more_than_allowed() -> None:
    # store-bound: gamma * V / r + r * alpha + beta * V / w = 0.1 / r + r * 1 ms + 250 ms
    assert size(slack=0.0) == 25_000_000  # 10 rounds, 270 ms
    assert size(slack=0.005) == math.ceil(250_000_000 / 7)  # 271.3 ms; 6 rounds take 272.7
    assert size(slack=0.03) == 50_000_000  # 275 ms; 4 rounds take 279
    assert size(slack=10.0) == 250_000_000


def test_more_costly_puts_give_larger_packs() -> None:
    found = [size(alpha_s=alpha_s) for alpha_s in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert found == sorted(set(found))


# -- the number of puts ----------------------------------------------------------------------


FAR = {"alpha_s": 50e-3, "beta_s_per_byte": 1 / 80e6, "max_puts": 32}


def test_streams_of_their_own_are_all_used() -> None:
    assert derive(**FAR, volume_nbytes=128 * MIB) == Batching(32, 4 * MIB)
    assert derive(**FAR, volume_nbytes=128 * MIB, slack=0.03).puts_in_flight in range(28, 32)


def test_a_link_that_few_can_fill_is_left_to_them() -> None:
    link = FAR | {"beta_s_per_byte": 1e-7, "fill_s_per_byte": 0.0, "slack": 0.03}
    for streams in (1, 2, 3, 4):
        assert derive(**link, streams=streams) == Batching(4, 250_000_000)
    assert derive(**link, streams=6).puts_in_flight == 6
    assert derive(**link, streams=12).puts_in_flight == 12


def test_where_puts_cost_little_few_are_enough() -> None:
    disk = {"alpha_s": 1e-3, "beta_s_per_byte": 1e-9, "streams": 2, "max_puts": 32, "slack": 0.03}
    assert derive(**disk).puts_in_flight == 4


def test_packs_in_flight_and_the_one_that_fills_fit_into_memory() -> None:
    much = FAR | {"fill_s_per_byte": 0.0, "volume_nbytes": 10**11}
    for memory_nbytes in (64 * MIB, 256 * MIB, 10**9):
        batching = derive(**much, memory_nbytes=memory_nbytes)
        needed_nbytes = (batching.puts_in_flight + 1) * batching.pack_nbytes
        assert 0.9 * memory_nbytes < needed_nbytes <= memory_nbytes


def test_little_is_not_cut_into_crumbs() -> None:
    bound = {"min_round_nbytes": 4 * MIB, "slack": 0.03}
    assert derive(**bound, volume_nbytes=1) == Batching(4, MIB)
    small = derive(**FAR | bound, volume_nbytes=MIB)
    assert small.puts_in_flight * small.pack_nbytes >= 4 * MIB


COSTS = st.one_of(st.just(0.0), st.floats(1e-12, 10.0))


@given(
    volume_nbytes=st.integers(1, 10**13),
    alpha_s=COSTS,
    beta_s_per_byte=COSTS,
    fill_s_per_byte=COSTS,
    streams=st.integers(1, 32),
    min_puts=st.integers(1, 8),
    more_puts=st.integers(0, 40),
    max_pack_nbytes=st.integers(1, 1 << 32),
    pack_room_nbytes=st.integers(1, 1 << 32),
    min_round_nbytes=st.integers(1, 1 << 32),
)
def test_bounds_hold_whatever_the_costs(
    min_puts: int, more_puts: int, pack_room_nbytes: int, **arguments: float
) -> None:
    max_puts = min_puts + more_puts
    memory_nbytes = (max_puts + 1) * pack_room_nbytes
    bounds = {"min_puts": min_puts, "max_puts": max_puts, "memory_nbytes": memory_nbytes}
    batching = derive(**bounds, **arguments, slack=0.03)
    assert min_puts <= batching.puts_in_flight <= max_puts
    room = memory_nbytes // (batching.puts_in_flight + 1)
    assert 1 <= batching.pack_nbytes <= min(arguments["max_pack_nbytes"], room)
    least_nbytes = max(arguments["volume_nbytes"], arguments["min_round_nbytes"])
    assert batching.pack_nbytes <= -(-least_nbytes // batching.puts_in_flight)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_puts": 0},
        {"min_puts": 5},
        {"alpha_s": -1e-3},
        {"beta_s_per_byte": math.nan},
        {"fill_s_per_byte": math.inf},
        {"min_round_nbytes": 0},
        {"max_pack_nbytes": 0},
        {"memory_nbytes": 4},
    ],
)
def test_impossible_arguments_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"cost|no pack"):
        derive(**changes)


# -- costs measured, batching derived, again and again ---------------------------------------

SINKS = {
    "50 ms, streams of 80 MB/s": Sink(50e-3, 80e6),
    "50 ms, streams of 80 MB/s on a link of 1.25 GB/s": Sink(50e-3, 80e6, 1.25e9),
    "50 ms, streams of 80 MB/s on a link of 400 MB/s": Sink(50e-3, 80e6, 400e6),
    "50 ms, a link of 1 GB/s": Sink(50e-3, link_bytes_per_s=1e9),
    "50 ms, a link of 100 MB/s": Sink(50e-3, link_bytes_per_s=100e6),
    "10 ms, streams of 100 MB/s": Sink(10e-3, 100e6),
    "no latency, a link of 1 GB/s": Sink(0.0, link_bytes_per_s=1e9),
}
DISK = Sink(0.5e-3, 1.1e9, 1.25e9)
VOLUMES = [4 * MIB, 64 * MIB, 512 * MIB, 1_500_000_000]
COPY_S_PER_BYTE = 1 / 8e9


def learned(sink: Sink, volume_nbytes: int, *, max_puts: int, noise: float) -> Iterator[Batching]:
    """The batching of every checkpoint of a run, each derived from what puts have cost so far."""
    cost, rng = PutCost(PRIOR), random.Random(0)
    for nbytes in (4096, MIB, 8 * MIB):
        probe_s = sink.latency_s + nbytes / sink.bytes_per_s(1)
        cost.observe(nbytes, probe_s * rng.lognormvariate(0, noise), 1)
    while True:
        batching = derive(
            volume_nbytes=volume_nbytes,
            alpha_s=cost.line.alpha_s,
            beta_s_per_byte=cost.line.beta_s_per_byte,
            streams=cost.streams,
            fill_s_per_byte=COPY_S_PER_BYTE,
            min_puts=4,
            max_puts=max_puts,
            max_pack_nbytes=MAX_PACK,
            memory_nbytes=memory_nbytes(max_puts),
            min_round_nbytes=4 * MIB,
            slack=0.03,
        )
        yield batching
        for put in drain(sink, batching, volume_nbytes, COPY_S_PER_BYTE).puts:
            cost.observe(put.nbytes, put.seconds * rng.lognormvariate(0, noise), put.in_flight)


def memory_nbytes(max_puts: int) -> int:
    """As the pipeline shares 4 GiB out."""
    return min(max_puts + 1, 17) * MAX_PACK


def all_batchings(volume_nbytes: int, max_puts: int) -> Iterator[Batching]:
    for puts in (1, 4, 8, 16, 24, 32):
        if puts <= max_puts:
            room = min(MAX_PACK, memory_nbytes(max_puts) // (puts + 1))
            least = max(64 << 10, volume_nbytes >> 8)
            for nbytes in set(sizes(min(least, room), room, volume_nbytes, puts)):
                yield Batching(puts, nbytes)


@pytest.mark.parametrize("volume_nbytes", VOLUMES)
@pytest.mark.parametrize("sink", [*SINKS.values(), DISK], ids=[*SINKS, "a disk"])
def test_what_is_derived_from_measured_puts_is_near_the_best_of_a_sweep(
    sink: Sink, volume_nbytes: int
) -> None:
    max_puts = 4 if sink is DISK else 32
    best_s = min(
        drain(sink, batching, volume_nbytes, COPY_S_PER_BYTE).seconds
        for batching in all_batchings(volume_nbytes, max_puts)
    )
    for noise in (0.0, 0.3):
        run = learned(sink, volume_nbytes, max_puts=max_puts, noise=noise)
        for number, batching in zip(range(8), run, strict=False):
            taken_s = drain(sink, batching, volume_nbytes, COPY_S_PER_BYTE).seconds
            assert taken_s <= 1.10 * best_s, (number, noise, batching)


def test_the_number_of_puts_follows_the_kind_of_the_store() -> None:
    """As many as there are streams, few where they share a link; and that is not forgotten."""

    def tenth(name: str, volume_nbytes: int = 512 * MIB) -> int:
        run = learned(SINKS[name], volume_nbytes, max_puts=32, noise=0.0)
        return next(itertools.islice(run, 9, None)).puts_in_flight

    assert tenth("50 ms, streams of 80 MB/s") >= 28
    assert tenth("50 ms, streams of 80 MB/s", 4 * MIB) >= 12
    assert tenth("50 ms, a link of 100 MB/s") == 4
    assert tenth("no latency, a link of 1 GB/s") == 4
