"""What is removed: never what a kept step needs, newest first, records before data."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore
from states import drifted, same, training_state
from writers import Writers

from asymcheck import Always, AsymCheck, Checkpointer, Never
from asymcheck.commit import commit_key
from asymcheck.errors import CorruptionError, StoreError, StorePermissionError
from asymcheck.retention import Committed, Retention, remove_step, survey


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], dict[int, int | None]]:
    """Steps, and the one that each decodes from; some have a damaged record."""
    steps = sorted(draw(st.sets(st.integers(0, 60), max_size=25)))
    parents: dict[int, int | None] = {}
    for i, step in enumerate(steps):
        if draw(st.integers(0, 7)) == 0:
            continue  # damaged
        chain = i > 0 and draw(st.integers(0, 3)) > 0
        parents[step] = draw(st.sampled_from(steps[max(0, i - 3) : i])) if chain else None
    return steps, parents


def needs(step: int, parents: dict[int, int | None]) -> set[int]:
    found = {step}
    while (parent := parents.get(step)) is not None:
        found.add(parent)
        step = parent
    return found


RETENTIONS = st.builds(Retention, st.none() | st.integers(1, 6), st.none() | st.integers(1, 10))


@given(histories(), RETENTIONS, st.data())
def test_never_removes_what_a_kept_step_needs(
    history: tuple[list[int], dict[int, int | None]], retention: Retention, data: st.DataObject
) -> None:
    steps, parents = history
    in_use = data.draw(st.lists(st.sampled_from(steps), max_size=2)) if steps else []
    removed = retention.to_remove(steps, parents, in_use)
    kept = set(steps) - set(removed)
    assert removed == sorted(removed, reverse=True)
    assert set(removed) <= set(steps) and len(set(removed)) == len(removed)
    readable = sorted(parents)
    wanted = set(readable) if retention.max_to_keep is None else set()
    if retention.max_to_keep is not None:
        wanted |= set(readable[-retention.max_to_keep :]) | (set(in_use) & set(readable))
        if retention.keep_every is not None:
            wanted |= {s for s in readable if s % retention.keep_every == 0}
    needed = set().union(*(needs(s, parents) for s in wanted)) if wanted else set()
    assert needed & set(steps) <= kept
    for step in kept & set(readable):
        if retention.max_to_keep is not None:
            assert step in needed  # and nothing else is kept
    for step in set(removed) - set(readable):  # damaged
        assert all(step < s for s in needed)


@given(histories(), RETENTIONS)
def test_a_crash_while_removing_leaves_no_step_without_its_base(
    history: tuple[list[int], dict[int, int | None]], retention: Retention
) -> None:
    steps, parents = history
    left = set(steps)
    for step in retention.to_remove(steps, parents):
        left.remove(step)
        for other in left & set(parents):
            base = parents[other]
            assert base is None or base in left or base not in steps


@given(histories(), RETENTIONS)
def test_what_is_left_is_stable(
    history: tuple[list[int], dict[int, int | None]], retention: Retention
) -> None:
    steps, parents = history
    left = [s for s in steps if s not in retention.to_remove(steps, parents)]
    assert retention.to_remove(left, {s: parents[s] for s in left if s in parents}) == []


@pytest.mark.parametrize("bad", [0, -1])
def test_refuses_impossible_numbers(bad: int) -> None:
    for name in ("max_to_keep", "keep_every"):
        with pytest.raises(ValueError, match=name):
            Retention(**{name: bad})


def saved(store: Any, steps: range | list[int], **options: Any) -> dict[int, Any]:
    """Save those steps, each a little later; what was saved."""
    states: dict[int, Any] = {}
    state = training_state(0, 500)
    with Checkpointer(store, **options) as checkpointer:
        for step in steps:
            state = drifted(state, step)
            states[step] = state
            checkpointer.save(step, state).wait(30)
        checkpointer.wait()
    return states


def test_keeps_the_newest_and_multiples(store: MemoryStore) -> None:
    states = saved(store, range(1, 21), max_to_keep=3, keep_every=7, max_chain=0)
    checkpointer = Checkpointer(store)
    assert checkpointer.steps() == [7, 14, 18, 19, 20]
    for step in checkpointer.steps():
        assert same(checkpointer.restore(step), states[step])
    attempts = {c.attempt for c in survey(store).values()}
    assert all(any(str(a) in key for a in attempts) for key in store.keys("data/"))


def test_keeps_the_chains_of_what_it_keeps(store: MemoryStore) -> None:
    strategy = AsymCheck(policy=Always("delta"))
    states = saved(store, range(12), max_to_keep=2, max_chain=4, strategy=strategy)
    checkpointer = Checkpointer(store)
    assert checkpointer.steps() == [10, 11]  # 10 is a base
    states |= saved(store, range(12, 14), max_to_keep=2, max_chain=4, strategy=strategy)
    for step in checkpointer.steps():
        assert same(checkpointer.restore(step), states[step])
    store2 = MemoryStore()
    states = saved(store2, range(9), max_to_keep=1, max_chain=4, strategy=strategy)
    checkpointer = Checkpointer(store2)
    assert checkpointer.steps() == [5, 6, 7, 8]
    assert same(checkpointer.restore(), states[8])


def test_a_run_that_begins_again_at_lower_steps_keeps_what_it_builds_on(
    store: MemoryStore,
) -> None:
    """Step 100 counts as the newest; yet step 2 may build on step 1, and is kept by number."""
    saved(store, [100], max_to_keep=1)
    states = saved(
        store,
        range(1, 9),
        max_to_keep=1,
        keep_every=4,
        strategy=AsymCheck(policy=Always("delta")),
    )
    checkpointer = Checkpointer(store)
    assert {4, 8, 100} <= set(checkpointer.steps())
    for step in (4, 8):
        assert same(checkpointer.restore(step), states[step])


def test_removes_the_record_before_the_data(store: MemoryStore) -> None:
    saved(store, range(3), max_to_keep=1, max_chain=0)
    deleted = [key for key in store.called("delete") if key.startswith(("commits/", "data/"))]
    for step in (0, 1):
        ours = [key for key in deleted if f"{step:016d}" in key and ".probe" not in key]
        assert ours[0] == commit_key(step) and len(ours) >= 3


def test_damaged_old_steps_go_with_time(store: MemoryStore) -> None:
    saved(store, range(3), max_chain=0)
    store.objects[commit_key(1)] = b"damaged"
    assert survey(store)[1] == Committed(1, None, None)
    saved(store, range(3, 6), max_to_keep=3, max_chain=0)
    assert Checkpointer(store).steps() == [3, 4, 5]


def test_a_clean_up_that_fails_is_reported_and_not_the_end(store: MemoryStore) -> None:
    error = StorePermissionError("deleting is not allowed")
    checkpointer = Checkpointer(store, max_to_keep=1, max_chain=0)
    checkpointer.save(0, {"w": np.zeros(3)}).wait(30)
    with store.failing("delete", "commits/", error):
        checkpointer.save(1, {"w": np.zeros(3)}).wait(30)
        with pytest.raises(StorePermissionError):
            checkpointer.wait()
    checkpointer.save(2, {"w": np.zeros(3)}).wait(30)
    checkpointer.close()
    assert Checkpointer(store).steps() == [2]


def test_the_first_sweep_may_fail_too(store: MemoryStore) -> None:
    store.objects["data/0000000000000001-dead-000000/w00000-000000.pack"] = b""
    checkpointer = Checkpointer(store)
    with store.failing("delete", "dead", StoreError("no")):
        checkpointer.save(0, {"w": np.zeros(3)}).wait(30)
    with pytest.raises(StoreError, match="no"):
        checkpointer.close()
    assert checkpointer.steps() == [0]


def test_what_another_writer_builds_on_is_kept(store: MemoryStore) -> None:
    """Writer 0, which removes steps, stores everything in full; writer 1 stores increments."""
    full = {0: {"strategy": AsymCheck(policy=Never())}}
    delta = AsymCheck(policy=Always("delta"))
    state = training_state(0)
    with Writers(store, 2, strategy=delta, max_to_keep=1, max_chain=2, each=full) as writers:
        for step in range(5):
            state = drifted(state, step)
            assert writers.save_state(step, state) == [None, None]
            assert same(Checkpointer(store).restore(), {**state, "ranks": {}})
    assert list(survey(store)) == [3, 4]


def test_removing_a_step_twice_is_no_error(store: MemoryStore) -> None:
    saved(store, range(2))
    committed = survey(store)[0]
    remove_step(store, committed)
    remove_step(store, committed)
    assert list(survey(store)) == [1]


def test_steps_removed_by_others_are_no_error(store: MemoryStore) -> None:
    saved(store, range(3), max_chain=0)
    listing = store.list("commits/")
    del store.objects[commit_key(1)]
    store.list = lambda prefix: listing  # type: ignore[method-assign]
    assert list(survey(store)) == [0, 2]


def test_a_lost_base_costs_only_the_steps_on_it(store: MemoryStore) -> None:
    strategy = AsymCheck(policy=Always("delta"))
    states = saved(store, range(9), max_chain=2, strategy=strategy)
    for key in store.keys("0000000000000003-"):
        if key.endswith(".pack"):
            store.objects[key] = b"\0" * len(store.objects[key])
    reader = Checkpointer(store)
    for step in (3, 4, 5):
        with pytest.raises(CorruptionError):
            reader.restore(step)
    for step in (0, 1, 2, 6, 7, 8):
        assert same(reader.restore(step), states[step])


def test_records_are_read_side_by_side_where_requests_take_long():
    store = MemoryStore()
    with Checkpointer(store, max_chain=0, max_host_bytes=8 << 20) as checkpointer:
        for step in range(6):
            checkpointer.save(step, {"w": np.arange(10)})
    alone = survey(store)
    together = threading.Barrier(3, timeout=30)  # broken unless three reads are under way at once
    store.guarantees = replace(store.guarantees, concurrency=3)
    store.hook = lambda operation, key: together.wait() if operation == "get" else None
    assert survey(store) == alone and [*alone] == list(range(6))
