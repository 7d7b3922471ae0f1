"""Where chains end: by their cost, never far from the best length, for all writers at once."""

from __future__ import annotations

import itertools
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore
from states import same
from test_strategies import GivenCosts
from writers import Writers, split_view

import asymcheck
from asymcheck.attempt import PendingSave
from asymcheck.chains import MAX_LENGTH, RESTORES_PER_STEP, BaseSchedule, ChainCost
from asymcheck.commit import MAX_CHAIN, commit_key, read_commit, read_manifests
from asymcheck.cost import CostModel
from asymcheck.errors import StoreError
from asymcheck.manifest import Blocks, Manifest, Pack
from asymcheck.policy import Always
from asymcheck.strategies import AsymCheck

RAW = 1 << 30


def writing_at(bytes_per_s: float) -> CostModel:
    line = {"alpha_s": 0.0, "beta_s_per_byte": 1 / bytes_per_s}
    return CostModel.from_json({"costs": {"write": line}, "ratios": []})


def length_of(base: float, increment: float, cost: CostModel) -> int:
    """Steps of a chain until a base is due; sizes are parts of the raw state."""
    chain = ChainCost()
    chain.add(RAW, int(base * RAW), is_base=True, cost=cost)
    length = 1
    while not chain.is_over_after(0):
        chain.add(RAW, int(increment * RAW), is_base=False, cost=cost)
        length += 1
        assert length <= MAX_LENGTH + 2
    return length


def mean_cost_s(length: int, base: float, increment: float, cost: CostModel) -> float:
    """Of a step, with chains of that many."""
    s_per_byte, decode_s = cost.line("write").beta_s_per_byte, RAW / 1.5e9
    spent_s = restore_s = 0.0
    for i in range(length):
        moved_s = s_per_byte * RAW * (increment if i else base)
        restore_s += moved_s + decode_s
        spent_s += moved_s + RESTORES_PER_STEP * restore_s
    return spent_s / length


@given(st.floats(0.4, 1.0), st.floats(0.01, 0.9), st.floats(1e7, 5e9))
def test_within_a_tenth_of_the_best_length(base: float, ratio: float, bytes_per_s: float) -> None:
    increment, cost = base * ratio, writing_at(bytes_per_s)
    lengths = range(2, MAX_LENGTH + 2)
    best_s = min(mean_cost_s(n, base, increment, cost) for n in lengths)
    chosen = length_of(base, increment, cost)
    assert mean_cost_s(chosen, base, increment, cost) <= 1.1 * best_s


def test_small_increments_make_long_chains_and_large_ones_short() -> None:
    cost = writing_at(1e8)
    lengths = [length_of(0.8, part, cost) for part in (0.02, 0.1, 0.3, 0.7)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2 * lengths[-1]
    assert length_of(0.8, 0.0, writing_at(1e6)) == MAX_LENGTH + 1


def test_a_chain_that_is_known_late_ends_where_it_should() -> None:
    """What is still to come is taken into account: the base is due as if nothing had been."""
    cost = writing_at(1e8)
    for more in range(8):
        chain = ChainCost()
        chain.add(RAW, RAW, is_base=True, cost=cost)
        assert not chain.is_over_after(more)  # an increment may cost next to nothing
        length = 1
        while not chain.is_over_after(more):
            chain.add(RAW, RAW // 10, is_base=False, cost=cost)
            length += 1
        assert length + more == max(length_of(1.0, 0.1, cost), 2 + more)


# -- one writer --------------------------------------------------------------------------------


STRATEGY = AsymCheck(policy=Always("delta"))
W = np.random.default_rng(0).normal(0, 1, 100_000).astype(np.float32).view(np.uint32)


def state_of(step: int) -> dict[str, Any]:
    return {"params": {"w": W + np.uint32(step)}}


def depths(url: Path, steps: int, **options: Any) -> list[int]:
    """The place in its chain of every step of a run."""
    with asymcheck.Checkpointer(url, strategy=STRATEGY, **options) as checkpointer:
        for step in range(steps):
            checkpointer.save(step, state_of(step)).wait()
    found = []
    for step in range(steps):
        with asymcheck.open_checkpoint(url, step) as checkpoint:
            found.append(len(checkpoint.chain) - 1)
            assert checkpoint.chain[0].record.base_at is None  # nobody else has to know
    return found


def test_bases_come_by_cost_unless_a_length_is_given(tmp_path: Path) -> None:
    assert depths(tmp_path / "given", 7, max_chain=2) == [0, 1, 2, 0, 1, 2, 0]
    by_cost = depths(tmp_path / "cost", 60, cost_model=slow())
    assert by_cost[0] == 0 and max(by_cost) >= 3
    assert by_cost.count(0) >= 2
    assert all(b == a + 1 or b == 0 for a, b in pairwise(by_cost))


def slow() -> CostModel:
    return GivenCosts(1e-9)


@pytest.mark.parametrize("max_chain", [-1, 257])
def test_lengths_out_of_range_are_refused(max_chain: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_chain"):
        asymcheck.Checkpointer(tmp_path, max_chain=max_chain)


# -- several writers: who knows what, and when -------------------------------------------------


def manifests_of(writers: int, stored_nbytes: int) -> list[Manifest]:
    """As far as they tell what a step costs; writer 0 has next to nothing of it."""
    return [
        Manifest(
            step=0,
            attempt="run-000000",
            writer=writer,
            writers=writers,
            base_step=None,
            structure=None,
            leaves=[],
            shards=[],
            codecs=[],
            packs=[Pack("x", stored_nbytes // 2), Pack("y", stored_nbytes // 2)]
            if writer == writers - 1
            else [],
            blocks=Blocks(),
            stats={"raw_nbytes": RAW if writer == writers - 1 else 1},
        )
        for writer in range(writers)
    ]


class Run:
    """Attempts, each committed when `lag` more have begun, and heard of `heard` more later.

    Attributes:
        bases: for each writer, the numbers at which it began a base.
        depth: of each attempt that was committed.
    """

    def __init__(self, writers: int, lag: int, heard: int, increment: float) -> None:
        self.schedules = [BaseSchedule(None, writers) for _ in range(writers)]
        self.bases: list[list[int]] = [[] for _ in self.schedules]
        self.depth: list[int] = []
        self._lag, self._heard, self._increment = lag, heard, increment
        self._told: dict[int, int] = {}

    def begin(self, number: int) -> None:
        for schedule, bases in zip(self.schedules, self.bases, strict=True):
            if schedule.begin(number):
                bases.append(number)
        if number >= self._lag:
            self._commit(number - self._lag)
        heard = self._told.get(number - self._lag - self._heard)
        for schedule in self.schedules[1:]:
            if heard is not None:
                schedule.hear(heard)

    def _commit(self, number: int) -> None:
        writers = len(self.schedules)
        is_base = all(number in bases for bases in self.bases)
        self.depth.append(0 if is_base else self.depth[-1] + 1)
        stored = manifests_of(writers, int(RAW * (1.0 if is_base else self._increment)))
        told = self.schedules[0].announce(number, stored, is_base, writing_at(1e8))
        if told is not None:
            assert writers > 1
            self._told[number] = told
            self.schedules[0].hear(told)


@given(st.integers(1, 4), st.integers(0, 6), st.floats(0.0, 0.5), st.data())
def test_all_writers_begin_a_chain_at_the_same_attempt(
    writers: int, lag: int, increment: float, data: st.DataObject
) -> None:
    """If each hears of it before more attempts begin than while it was stored, and one."""
    run = Run(writers, lag, data.draw(st.integers(0, lag + 1)), increment)
    for number in range(200):
        run.begin(number)
    assert all(bases == run.bases[0] for bases in run.bases)
    assert len(run.bases[0]) > 2
    assert max(run.depth) <= MAX_LENGTH
    best = length_of(1.0, increment, writing_at(1e8))
    starts = run.bases[0]
    notice = lag if writers == 1 else 2 * lag + 1
    assert all(b - a == max(best, 2 + notice) for a, b in pairwise(starts))


@given(st.integers(2, 4), st.integers(0, 4))
def test_who_always_hears_too_late_is_bound_all_the_same(writers: int, lag: int) -> None:
    run = Run(writers, lag, lag + 2, 0.0)
    for number in range(2 * (MAX_CHAIN + 1)):
        run.begin(number)
    assert max(run.depth) == MAX_CHAIN
    assert run.bases[1] == [0, MAX_CHAIN + 1]
    assert len(run.bases[0]) > 4  # announced again and again


@pytest.mark.parametrize("max_chain", [0, 3, MAX_CHAIN])
def test_fixed_lengths_need_no_words(max_chain: int) -> None:
    schedule = BaseSchedule(max_chain, 2)
    for number in range(600):
        assert schedule.begin(number) == (number % (max_chain + 1) == 0)
        told = schedule.announce(number, manifests_of(2, RAW), number % 2 == 0, writing_at(1e3))
        assert told is None


# -- several writers over a store --------------------------------------------------------------


def writers_of(store: MemoryStore, count: int) -> Writers:
    return Writers(store, count, strategy=STRATEGY, each={0: {"cost_model": slow()}})


def in_full(store: MemoryStore, step: int) -> list[bool]:
    """Which writers stored the step in full; it must be restored as it was."""
    record, _ = read_commit(store, step)
    alone = [manifest.base_step is None for manifest in read_manifests(store, record)]
    assert (record.depth == 0) == all(alone)
    assert same(asymcheck.Checkpointer(store).restore(step), {**state_of(step), "ranks": {}})
    return alone


def announced(store: MemoryStore) -> dict[int, int]:
    """By step (here: the attempt's number, too), the base that its record announces."""
    records = {s: read_commit(store, s)[0] for s in asymcheck.Checkpointer(store).steps()}
    assert all(
        (b"base_at" in store.objects[commit_key(s)]) == (r.base_at is not None)
        for s, r in records.items()
    )
    return {s: r.base_at for s, r in records.items() if r.base_at is not None}


@pytest.mark.parametrize("count", [2, 3])
def test_writers_agree_on_a_chain_that_ends_by_cost(store: MemoryStore, count: int) -> None:
    with writers_of(store, count) as writers:
        for step in range(40):
            assert writers.save_state(step, state_of(step)) == [None] * count
    bases = [step for step in range(40) if all(in_full(store, step))]
    assert all(not any(in_full(store, step)) for step in range(40) if step not in bases)
    told = announced(store)
    assert [0, *(number for number in told.values() if number < 40)] == bases
    assert len(bases) >= 3
    assert all(read_commit(store, number - 1)[0].depth >= 3 for number in bases[1:])


def begin(writers: Writers, step: int) -> list[PendingSave]:
    return [writers.begin(i, step, split_view(state_of(step), i, 2)) for i in range(2)]


def test_a_writer_that_learns_too_late_goes_on_with_its_chain(store: MemoryStore) -> None:
    dry = MemoryStore()
    with writers_of(dry, 2) as writers:
        while not announced(dry):
            step = len(dry.keys("commits/"))
            writers.save_state(step, state_of(step))
    ((telling, number),) = announced(dry).items()

    with writers_of(store, 2) as writers:
        for step in range(telling):
            assert writers.save_state(step, state_of(step)) == [None, None]
        with store.hold("get", commit_key(telling)) as held:  # writer 0 has no need to read it
            first, late = begin(writers, telling)
            held.await_calls()
            first.wait(30)
            assert not late.done()
            others = [begin(writers, step) for step in range(telling + 1, number + 2)]
        for save in (late, *itertools.chain(*others)):
            save.wait(30)
        assert announced(store)[telling] == number
        assert [in_full(store, step) for step in range(telling, number + 2)] == [
            [step == number, False] for step in range(telling, number + 2)
        ]
        again, step = number, number + 2
        while step < again + 2 or again == number:
            assert writers.save_state(step, state_of(step)) == [None, None]
            again = max(announced(store).values())
            step += 1
    assert in_full(store, again) == [True, True]
    assert in_full(store, again + 1) == [False, False]


def test_a_step_that_fails_ends_the_chain_of_all(store: MemoryStore) -> None:
    with writers_of(store, 2) as writers:
        for step in range(3):
            writers.save_state(step, state_of(step))
        with store.failing("put", "w00001-000000.pack", StoreError("no room")):
            assert None not in writers.save_state(3, state_of(3))
        for step in (4, 5):
            assert writers.save_state(step, state_of(step)) == [None, None]
    assert [in_full(store, s) for s in (2, 4, 5)] == [[False] * 2, [True] * 2, [False] * 2]
