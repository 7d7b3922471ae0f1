"""Strategies as compositions: every one restores every bit; each does what its name says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from memory_store import MemoryStore
from states import drifted, same, training_state

from asymcheck import (
    Always,
    AsymCheck,
    AsymCheckNaive,
    AsymCheckS,
    Checkpointer,
    CostModel,
    Never,
    Selective,
    Strategy,
    Synchronous,
)
from asymcheck.commit import commit_key, read_commit
from asymcheck.errors import SaveFailedError, StoreError
from asymcheck.index import load_index
from asymcheck.partition import Phase, Window
from asymcheck.state import numpy_view
from asymcheck.strategies import STRATEGIES, by_name

WINDOWS = [Window(Phase.FORWARD, i, 1.0) for i in range(3)]


class GivenCosts(CostModel):
    """Costs of a store that takes so many seconds a put and a byte, whatever is measured later."""

    def __init__(
        self, write_s_per_byte: float, put_s: float = 0.0, copy_s_per_byte: float = 1e-10
    ) -> None:
        super().__init__()
        for _ in range(20):
            for nbytes in (1 << 12, 1 << 20, 1 << 23):
                super().observe_write(nbytes, put_s + nbytes * write_s_per_byte, 1)
                super().observe("copy", nbytes, nbytes * copy_s_per_byte)

    def observe(self, key: str, nbytes: int, seconds: float) -> None:
        pass

    def observe_write(self, nbytes: int, seconds: float, in_flight: float) -> None:
        pass


def slow_store_costs() -> CostModel:
    return GivenCosts(1e-6)


def fast_store_costs() -> CostModel:
    return GivenCosts(1e-12)


def test_names_and_classes_agree() -> None:
    for name, make in STRATEGIES.items():
        strategy = by_name(name)
        assert strategy == make() and strategy.name == name
        assert by_name(strategy) is strategy
    assert set(STRATEGIES) == {"asymcheck", "asymcheck-s", "asymcheck-naive", "synchronous"}
    assert Checkpointer(MemoryStore()).strategy == AsymCheck()
    with pytest.raises(ValueError, match="one of asymcheck, asymcheck-s"):
        by_name("torch.save")


def test_the_three_levels() -> None:
    naive, s, so, synchronous = AsymCheckNaive(), AsymCheckS(), AsymCheck(), Synchronous()
    assert (naive.policy, s.policy, so.policy) == (Never(), Selective(), Selective())
    assert [x.windows for x in (naive, s, so, synchronous)] == [True, True, True, False]
    assert [x.batched for x in (naive, s, so, synchronous)] == [False, False, True, True]
    assert [x.blocking for x in (naive, s, so, synchronous)] == [False, False, False, True]
    with pytest.raises(FrozenInstanceError):
        so.batched = False  # type: ignore[misc]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("costs", [CostModel, slow_store_costs, fast_store_costs])
def test_every_strategy_restores_every_bit(store: MemoryStore, name: str, costs: Any) -> None:
    states = [training_state(0, 40_000)]
    with Checkpointer(store, strategy=name, cost_model=costs(), max_chain=3) as checkpointer:
        for step in range(6):
            capture = checkpointer.begin(step, numpy_view(states[-1]), windows=WINDOWS)
            capture.enter_window(1)
            capture.finish()
            states.append(drifted(states[-1], step))
        checkpointer.wait()
        for step, state in enumerate(states[:-1]):
            assert same(checkpointer.restore(step), state)


def stored_codecs(store: MemoryStore, step: int) -> set[str]:
    return {stored.codec.id for stored in load_index(store, step).blocks()}


def test_naive_stores_raw_partitions_in_packs_of_their_own(store: MemoryStore) -> None:
    state = training_state(1, 60_000)
    with Checkpointer(store, strategy="asymcheck-naive", cost_model=CostModel()) as checkpointer:
        checkpointer.begin(0, numpy_view(state), windows=WINDOWS).finish()
    assert stored_codecs(store, 0) == {"raw"}
    packs = sorted(len(store.objects[key]) for key in store.keys(".pack"))
    assert len(packs) == 3
    assert packs[-1] - packs[0] <= 100  # windows of equal idle time


def test_s_compresses_where_it_pays_in_packs_of_their_own(store: MemoryStore) -> None:
    state = training_state(2, 60_000)
    with Checkpointer(store, strategy="asymcheck-s", cost_model=slow_store_costs()) as checkpointer:
        for step in range(2):
            checkpointer.begin(step, numpy_view(state), windows=WINDOWS).finish()
            checkpointer.wait()
    assert "plane" in stored_codecs(store, 0) and "delta" in stored_codecs(store, 1)
    assert read_commit(store, 1)[0].depth == 1
    assert len(store.keys("0000000000000000-")) >= 1 + 3
    index = load_index(store, 0)
    decisions = index.manifests[0].stats["decisions"]
    assert {d["partition"] for d in decisions} == {0, 1, 2}
    assert all(d["reason"] and d["codec"] in ("raw", "plane", "delta") for d in decisions)
    assert {(d["kind"], d["dtype"]) for d in decisions} == {
        ("params", "float32"),
        ("params", "float64"),
        ("exp_avg", "float32"),
        ("exp_avg_sq", "float32"),
        ("half", "bfloat16"),
    }


def test_raw_wins_where_the_store_is_fast(store: MemoryStore) -> None:
    with Checkpointer(store, cost_model=fast_store_costs()) as checkpointer:
        for step in range(2):
            checkpointer.save(step, training_state(step))
        assert checkpointer.host_nbytes < 1 << 30  # and no reference is held for nothing
        assert checkpointer._increments.reference is None
    assert stored_codecs(store, 1) == {"raw"}


def test_batching_gathers_partitions(store: MemoryStore) -> None:
    state = training_state(3, 20_000)
    counts = {}
    for batched in (False, True):
        windows = [Window(Phase.FORWARD, i, 1.0) for i in range(16)]
        strategy = replace(AsymCheck(policy=Never()), batched=batched)
        with Checkpointer(store, strategy=strategy, cost_model=CostModel()) as checkpointer:
            checkpointer.begin(int(batched), numpy_view(state), windows=windows).finish()
        counts[batched] = len(store.keys(f"{int(batched):016d}-")) - 1
    assert counts[False] == 16 and counts[True] == 1


def test_synchronous_returns_when_the_step_is_durable(store: MemoryStore) -> None:
    with Checkpointer(store, strategy="synchronous") as checkpointer:
        for step in range(3):
            pending = checkpointer.save(step, training_state(step))
            assert pending.done()
            assert commit_key(step) in store.objects
            assert pending.stall_s > 0


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_synchronous_failures_are_told_as_chosen(
    store: MemoryStore, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, strategy="synchronous", on_error=on_error) as checkpointer:
        checkpointer.save(0, training_state(0))
        with store.failing("put", ".pack", StoreError("no room")):
            if on_error == "raise":
                with pytest.raises(SaveFailedError, match="no room"):
                    checkpointer.save(1, training_state(1))
            else:
                assert checkpointer.save(1, training_state(1)).done()
        assert "no room" in caplog.text
        checkpointer.save(2, training_state(2))
        assert checkpointer.steps() == [0, 2]


def test_a_strategy_of_ones_own(store: MemoryStore) -> None:
    mine = Strategy("mine", Always("zstd"), windows=False, batched=True, blocking=False)
    state = {"params": {"w": np.zeros(10_000)}}
    with Checkpointer(store, strategy=mine) as checkpointer:
        checkpointer.save(0, state)
        checkpointer.wait()
        assert same(checkpointer.restore(), state)
    assert stored_codecs(store, 0) == {"zstd"}
