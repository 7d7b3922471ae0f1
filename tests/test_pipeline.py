"""Puts in flight and packs, as a checkpointer uses them: derived for each store by itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from memory_store import MemoryStore, RemoteStore
from states import same
from test_strategies import GivenCosts

from asymcheck import Always, AsymCheck, Checkpointer, CostModel, Never
from asymcheck.pipeline import FEW_PUTS, MANY_PUTS, Pipeline

MIB = 1 << 20
FAR = {"write_s_per_byte": 1 / 80e6, "put_s": 50e-3}


def opened(store: MemoryStore, **options: Any) -> Checkpointer:
    options = {"cost_model": GivenCosts(**FAR), "strategy": AsymCheck(policy=Never()), **options}
    return Checkpointer(store, max_chain=3, **options)


def pipeline_of(checkpointer: Checkpointer) -> Pipeline:
    assert checkpointer._pipeline is not None
    return checkpointer._pipeline


def random_state(nbytes: int, leaves: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    size = nbytes // leaves
    return {f"w{i}": rng.integers(0, 256, size, np.uint8) for i in range(leaves)}


def in_flight_at_once(checkpointer: Checkpointer, store: MemoryStore, least: int) -> int:
    """How many puts of packs of 64 MiB come to wait in the store if none returns."""
    state = random_state(64 * MIB)
    with store.hold("put", ".pack") as held:
        checkpointer.save(0, state)
        held.await_calls(least)
        flush = pipeline_of(checkpointer).flush
        assert not flush.flush(0.05)
        waiting = held.waiting
        assert waiting <= flush.puts_in_flight
    checkpointer.wait()
    assert same(checkpointer.restore(), state)
    return waiting


@pytest.mark.parametrize(
    ("concurrency", "least", "most"), [(None, 4, 4), (2, 2, 2), (8, 8, 8), (32, 26, 32)]
)
def test_as_many_puts_as_pay_and_the_store_serves(
    concurrency: int | None, least: int, most: int
) -> None:
    store = RemoteStore(concurrency)
    with opened(store, max_host_bytes=1 << 30) as checkpointer:
        assert in_flight_at_once(checkpointer, store, least) in range(least, most + 1)


def test_a_link_that_a_few_fill_gets_no_more() -> None:
    store, costs = RemoteStore(), CostModel()
    for in_flight in (1, 32, 4, 16) * 20:
        for nbytes in (MIB, 8 * MIB):
            costs.observe_write(nbytes, 50e-3 + nbytes * 1e-8 * in_flight, in_flight)
    with opened(store, max_host_bytes=1 << 30, cost_model=costs) as checkpointer:
        assert in_flight_at_once(checkpointer, store, 2) <= 8


@pytest.mark.parametrize("concurrency", [None, 32])
@pytest.mark.parametrize("bytes_per_s", [0.3e6, 3e6, 30e6])
def test_a_slow_link_is_not_asked_for_more_than_it_carries_in_time(
    concurrency: int | None, bytes_per_s: float
) -> None:
    """A put that takes minutes because 31 others share the link would be given up."""
    costs = GivenCosts(1 / bytes_per_s, 50e-3)
    with opened(RemoteStore(concurrency), cost_model=costs) as checkpointer:
        checkpointer.save(0, {"w": np.zeros(MIB, np.uint8)}).wait()
        plan = replace(checkpointer._plan, nbytes=10**10, block_nbytes=MIB)
        batching = pipeline_of(checkpointer).batching(plan, has_base=False)
    assert batching.puts_in_flight * batching.pack_nbytes / bytes_per_s < 60


def test_only_batched_strategies_derive_it() -> None:
    store = RemoteStore()
    with opened(store, strategy="asymcheck-naive") as checkpointer:
        checkpointer.save(0, random_state(MIB, 64))
        assert pipeline_of(checkpointer).flush.puts_in_flight == FEW_PUTS


def test_blocks_are_as_fine_as_the_packs() -> None:
    """One large leaf is spread over all streams, and all packs are about equally long."""
    store = RemoteStore()
    with opened(store, max_host_bytes=1 << 30) as checkpointer:
        checkpointer.save(0, random_state(64 * MIB)).wait()
        puts = pipeline_of(checkpointer).flush.puts_in_flight
    sizes = sorted(len(store.objects[key]) for key in store.keys(".pack"))
    assert 0.8 * puts <= len(sizes) <= puts
    assert sizes[1] > 0.8 * sizes[-1]


def test_blocks_of_a_place_on_this_machine_stay_as_they_are(store: MemoryStore) -> None:
    with opened(store) as checkpointer:
        checkpointer.save(0, random_state(8 * MIB)).wait()
        assert checkpointer._plan is not None
        assert {unit.count for unit in checkpointer._plan.units} == {4 * MIB}


@pytest.mark.parametrize("codec", ["raw", "plane"])
@pytest.mark.parametrize("host_nbytes", [MIB, 16 * MIB, 600 * MIB])
def test_host_memory_is_bounded_with_all_puts_in_flight(codec: str, host_nbytes: int) -> None:
    store = RemoteStore()
    state = {"w": np.random.default_rng(0).standard_normal(5 * MIB, np.float32)}
    strategy = AsymCheck(policy=Never() if codec == "raw" else Always(codec))
    options = {"strategy": strategy, "max_host_bytes": host_nbytes}
    with opened(store, **options) as checkpointer, ThreadPoolExecutor(1) as other:
        with store.hold("put", ".pack") as held:
            save = other.submit(checkpointer.save, 0, state)
            held.await_calls(FEW_PUTS)
            assert checkpointer.host_nbytes <= host_nbytes
        save.result(60).wait(60)
        assert checkpointer.host_nbytes <= host_nbytes
        pipeline = pipeline_of(checkpointer)
        batching = pipeline.batching(checkpointer._plan, has_base=False)
        assert FEW_PUTS <= batching.puts_in_flight <= MANY_PUTS
        in_flight_nbytes = (batching.puts_in_flight + 1) * batching.pack_nbytes
        assert in_flight_nbytes <= pipeline.pack_pool._max_nbytes
        assert same(checkpointer.restore(), state)


def test_packs_are_as_large_as_what_is_stored_takes_not_what_is_captured() -> None:
    """Coded to a tenth: the next checkpoint is spread over all streams all the same."""
    store = RemoteStore()
    state = {f"w{i}": np.zeros(MIB, np.float32) for i in range(16)}
    rng = np.random.default_rng(0)
    for value in state.values():
        value[::8] = rng.standard_normal(MIB // 8)
    with opened(store, strategy=AsymCheck(policy=Always("zstd"))) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state).wait()
    first, last = (store.keys(f"{step:016d}-") for step in (0, 2))
    packs = [[len(store.objects[key]) for key in keys if ".pack" in key] for keys in (first, last)]
    assert sum(packs[0]) == sum(packs[1]) < 64 * MIB / 4
    assert len(packs[1]) > 2 * len(packs[0])
    assert len(packs[1]) <= MANY_PUTS
