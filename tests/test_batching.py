import heapq
import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.batching import derive_pack_nbytes

MIB = 1 << 20


def seconds_until_durable(
    pack_nbytes: int,
    *,
    volume_nbytes: int,
    alpha_s: float,
    beta_s_per_byte: float,
    fill_s_per_byte: float,
    puts_in_flight: int,
) -> float:
    """Synthetic storage in virtual time.

    A source fills packs one after the other, each in a buffer of its own out of w + 1; w streams
    put them in order, alpha + beta * bytes each; a buffer is free again when its put has ended.
    """
    buffers_free_s = [0.0] * (puts_in_flight + 1)
    streams_free_s = [0.0] * puts_in_flight
    filled_s = ended_s = 0.0
    for begin in range(0, volume_nbytes, pack_nbytes):
        nbytes = min(pack_nbytes, volume_nbytes - begin)
        filled_s = max(filled_s, heapq.heappop(buffers_free_s)) + fill_s_per_byte * nbytes
        put_s = max(filled_s, heapq.heappop(streams_free_s)) + alpha_s + beta_s_per_byte * nbytes
        heapq.heappush(buffers_free_s, put_s)
        heapq.heappush(streams_free_s, put_s)
        ended_s = max(ended_s, put_s)
    return ended_s


def sweep(min_nbytes: int, max_nbytes: int, volume_nbytes: int, streams: int) -> Iterator[int]:
    """Pack sizes to try: geometric steps, and every small number of whole rounds."""
    size = float(min_nbytes)
    while size < max_nbytes:
        yield math.ceil(size)
        size *= 1.25
    yield max_nbytes
    for rounds in range(1, 9):
        yield min(max(math.ceil(volume_nbytes / (streams * rounds)), min_nbytes), max_nbytes)


ALPHAS_S = [0.3e-3, 3e-3, 50e-3]
BANDWIDTHS_BYTES_PER_S = [80e6, 400e6, 1.3e9]
STREAMS = [1, 4, 32]
VOLUMES_NBYTES = [10_000_000, 300_000_000, 4_000_000_000]
SOURCES_BYTES_PER_S = [math.inf, 8e9, 1e9, 0.2e9]


@pytest.mark.parametrize("alpha_s", ALPHAS_S)
@pytest.mark.parametrize("bandwidth_bytes_per_s", BANDWIDTHS_BYTES_PER_S)
@pytest.mark.parametrize("max_nbytes", [32 * MIB, 4_000_000_000])
def test_derived_size_is_near_the_best_of_a_sweep_on_synthetic_storage(
    alpha_s: float, bandwidth_bytes_per_s: float, max_nbytes: int
) -> None:
    for streams, volume_nbytes, source_bytes_per_s in itertools.product(
        STREAMS, VOLUMES_NBYTES, SOURCES_BYTES_PER_S
    ):
        min_nbytes = max(64 << 10, volume_nbytes >> 10)
        storage = {
            "volume_nbytes": volume_nbytes,
            "alpha_s": alpha_s,
            "beta_s_per_byte": 1 / bandwidth_bytes_per_s,
            "fill_s_per_byte": 1 / source_bytes_per_s,
            "puts_in_flight": streams,
        }
        derived = derive_pack_nbytes(**storage, min_nbytes=min_nbytes, max_nbytes=max_nbytes)
        sizes = set(sweep(min_nbytes, max_nbytes, volume_nbytes, streams))
        best_s = min(seconds_until_durable(size, **storage) for size in sizes)
        assert seconds_until_durable(derived, **storage) <= 1.10 * best_s, storage


@given(
    st.integers(1, 32),
    st.integers(1, 64),
    st.integers(1, 64 * MIB),
    st.floats(0, 0.05),
    st.floats(1e-10, 1e-7),
    st.floats(0, 1e-7),
)
def test_the_formula_of_the_docstring_is_the_time_of_whole_rounds(
    streams: int,
    rounds: int,
    pack_nbytes: int,
    alpha_s: float,
    beta_s_per_byte: float,
    fill_s_per_byte: float,
) -> None:
    volume_nbytes = pack_nbytes * streams * rounds
    put_s = alpha_s + beta_s_per_byte * pack_nbytes
    store_bound_s = fill_s_per_byte * volume_nbytes / rounds + rounds * put_s
    source_bound_s = fill_s_per_byte * volume_nbytes + put_s
    simulated_s = seconds_until_durable(
        pack_nbytes,
        volume_nbytes=volume_nbytes,
        alpha_s=alpha_s,
        beta_s_per_byte=beta_s_per_byte,
        fill_s_per_byte=fill_s_per_byte,
        puts_in_flight=streams,
    )
    assert simulated_s == pytest.approx(max(store_bound_s, source_bound_s))


def derive(**changes: float) -> int:
    arguments: dict[str, float] = {
        "volume_nbytes": 1_000_000_000,
        "alpha_s": 1e-3,
        "beta_s_per_byte": 1e-9,
        "fill_s_per_byte": 1e-10,
        "puts_in_flight": 4,
        "max_nbytes": 10**9,
        "min_nbytes": 1,
        "slack": 0.0,
    }
    return derive_pack_nbytes(**(arguments | changes))  # type: ignore[arg-type]


def test_bytes_that_are_there_at_once_are_spread_over_the_streams() -> None:
    assert derive(fill_s_per_byte=0.0) == 250_000_000
    assert derive(fill_s_per_byte=0.0, volume_nbytes=1_000_000_001) == 250_000_001
    # 50 ms a request, 80 MB/s a stream, 32 streams: about 4 MiB were measured best for 128 MiB.
    cloud = {"alpha_s": 50e-3, "beta_s_per_byte": 1 / 80e6, "fill_s_per_byte": 1e-10}
    assert derive(**cloud, puts_in_flight=32, volume_nbytes=128 * MIB) == 4 * MIB


def test_a_store_bound_run_balances_puts_against_filling() -> None:
    # sqrt(gamma * V / alpha) = sqrt(0.1 s / 1 ms) = 10 rounds
    assert derive() == 25_000_000


def test_a_source_bound_run_takes_the_smallest_packs_that_keep_up() -> None:
    # V * (gamma - beta / w) / alpha = 1 s / 10 ms = 100 rounds
    assert derive(fill_s_per_byte=1.25e-9, alpha_s=10e-3) == 2_500_000


def test_puts_that_cost_only_bandwidth_give_the_smallest_packs() -> None:
    assert derive(alpha_s=0.0, min_nbytes=4096) == pytest.approx(4096, abs=1)


def test_slack_is_spent_on_fewer_packs_and_no_more_than_allowed() -> None:
    # store-bound: gamma * V / r + r * alpha + beta * V / w = 0.1 / r + r * 1 ms + 250 ms
    assert derive(slack=0.0) == 25_000_000  # 10 rounds, 270 ms
    assert derive(slack=0.005) == math.ceil(250_000_000 / 7)  # 271.3 ms; 6 rounds take 272.7
    assert derive(slack=0.03) == 50_000_000  # 275 ms; 4 rounds take 279
    assert derive(slack=10.0) == 250_000_000


def test_more_costly_puts_give_larger_packs() -> None:
    sizes = [derive(alpha_s=alpha_s) for alpha_s in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert sizes == sorted(set(sizes))


COSTS = st.one_of(st.just(0.0), st.floats(1e-12, 10.0))


@given(
    st.integers(1, 10**13),
    COSTS,
    COSTS,
    COSTS,
    st.integers(1, 128),
    st.integers(1, 1 << 32),
    st.integers(0, 1 << 32),
)
def test_the_size_is_within_its_bounds_and_uses_all_streams(
    volume_nbytes: int,
    alpha_s: float,
    beta_s_per_byte: float,
    fill_s_per_byte: float,
    puts_in_flight: int,
    min_nbytes: int,
    room_nbytes: int,
) -> None:
    size = derive_pack_nbytes(
        volume_nbytes=volume_nbytes,
        alpha_s=alpha_s,
        beta_s_per_byte=beta_s_per_byte,
        fill_s_per_byte=fill_s_per_byte,
        puts_in_flight=puts_in_flight,
        min_nbytes=min_nbytes,
        max_nbytes=min_nbytes + room_nbytes,
    )
    assert min_nbytes <= size <= min_nbytes + room_nbytes
    assert size <= max(min_nbytes, -(-volume_nbytes // puts_in_flight))


@pytest.mark.parametrize(
    "changes",
    [
        {"volume_nbytes": 0},
        {"puts_in_flight": 0},
        {"alpha_s": -1e-3},
        {"beta_s_per_byte": math.nan},
        {"fill_s_per_byte": math.inf},
        {"min_nbytes": 0},
        {"min_nbytes": 10, "max_nbytes": 9},
    ],
)
def test_impossible_arguments_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"cost|nothing|no pack"):
        derive(**changes)
