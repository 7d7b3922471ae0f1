"""Committing with one writer and with several: all or nothing, the reason told, nothing lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from states import drifted, same, training_state
from test_snapshot import failing_source, watched
from writers import BoxSource, Writers, split_view

from asymcheck import Always, AsymCheck, Checkpointer
from asymcheck.commit import commit_key, read_commit, read_manifests
from asymcheck.errors import (
    CommitError,
    FormatError,
    SaveFailedError,
    StepExistsError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    UnsupportedStateError,
)
from asymcheck.index import load_index
from asymcheck.retention import collect_orphans
from asymcheck.state import LeafSource, ShardSpec, StateView, numpy_view

DELTA = AsymCheck(policy=Always("delta"))


def state_of(seed: int, writers: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return training_state(
        seed, ranks={i: {"rng": rng.bytes(5), "n": rng.random(3)} for i in range(writers)}
    )


def restored(store: Any, step: int | None = None) -> Any:
    return Checkpointer(store).restore(step)


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path, memory_url: str) -> str:
    return memory_url if request.param == "memory" else str(tmp_path)


@pytest.mark.parametrize("count", [2, 4])
def test_all_writers_make_one_step(place: str, count: int) -> None:
    state = state_of(0, count)
    states = []
    with Writers(place, count, strategy=DELTA, max_chain=10) as writers:
        for step in range(4):
            states.append(state)
            assert writers.save_state(step, state, metadata={"epoch": step}) == [None] * count
            state = {
                **drifted({**state, "ranks": {}}, step),
                "ranks": state_of(step, count)["ranks"],
            }
        assert writers.each[1].steps() == [0, 1, 2, 3]
    reader = Checkpointer(place)
    for step in range(4):
        assert same(reader.restore(step), states[step])
    index = reader.restore_with(lambda c: c.chain[0], 3)
    assert len(index.manifests) == count and index.record.depth == 3
    assert index.metadata == {"epoch": 3}
    assert all(m.metadata == {} for m in index.manifests[1:])


def test_each_byte_is_stored_once(store: MemoryStore) -> None:
    state = state_of(1, 3)
    with Writers(store, 3, strategy="asymcheck-naive") as writers:
        writers.save_state(0, state)
    index = load_index(store, 0)
    stored = sum(pack.nbytes for m in index.manifests for pack in m.packs)
    assert stored == sum(leaf.spec.nbytes for leaf in index.leaves.values())
    assert all(sum(p.nbytes for p in m.packs) > stored / 4 for m in index.manifests)
    assert sum(len(data) for key, data in store.objects.items() if key.endswith(".pack")) == stored


def test_writers_hold_boxes_of_leaves(store: MemoryStore) -> None:
    whole = np.random.default_rng(2).random((6, 10))
    boxes = [ShardSpec((0, 0), (6, 4)), ShardSpec((0, 4), (2, 6)), ShardSpec((2, 4), (4, 6))]
    with Writers(store, 3) as writers:
        saved = writers.save(
            0, lambda i: StateView({"leaf": "w"}, (BoxSource("w", whole, boxes[i]),))
        )
        assert saved == [None] * 3
    assert same(restored(store), whole)


# -- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_writer_fails_then_all_do_and_the_next_save_works(
    store: MemoryStore, failing: int
) -> None:
    state = state_of(3, 3)

    def view(writer: int) -> StateView:
        split = split_view(state, writer, 3)
        if writer != failing:
            return split
        reading = failing_source(RuntimeError("the GPU fell off the bus"), at=2)
        sources = watched({"params": state["params"]}, reading).sources
        return replace(split, sources=(*sources, *split.sources[2:]))

    with Writers(store, 3, commit_timeout_s=60.0) as writers:
        errors = writers.save(0, view)
        assert all(isinstance(e, SaveFailedError) for e in errors)
        assert all("the GPU fell off the bus" in str(e) for e in errors)
        assert f"writer {failing} gave the attempt up" in str(errors[1 if failing != 1 else 0]) or (
            failing != 0
        )
        assert writers.each[0].steps() == []
        left = [key for key in store.keys("data/") if not key.endswith(".abort")]
        assert left == []
        assert writers.save_state(1, state) == [None] * 3
    assert same(restored(store), state)


def test_the_reason_comes_from_the_writer_that_failed(store: MemoryStore) -> None:
    state = state_of(4)
    with Writers(store, 2) as writers:
        with store.failing("put", "w00001-000000.pack", StoreError("quota exceeded")):
            first, second = writers.save_state(0, state)
        assert "writer 1 gave the attempt up: quota exceeded" in str(first)
        assert isinstance(first.__cause__, CommitError)
        assert "quota exceeded" in str(second) and second.__cause__.message == "quota exceeded"


def without_last(source: LeafSource) -> LeafSource:
    start, count = source.owned
    return msgspec.structs.replace(source, owned=(start, max(count - 1, 0)))


def test_what_nobody_covers_is_not_committed(store: MemoryStore) -> None:
    state = state_of(5)

    def view(writer: int) -> StateView:
        split = split_view(state, writer, 2)
        if writer == 0:
            return split
        short = [without_last(source) for source in split.sources]
        return replace(split, sources=tuple(short))

    with Writers(store, 2) as writers:
        errors = writers.save(0, view)
        assert "missing" in str(errors[0]) and isinstance(errors[0].__cause__, FormatError)
        assert "writer 0 gave the attempt up" in str(errors[1])
        assert writers.each[0].steps() == []
        assert writers.save_state(0, state) == [None, None]


def test_writers_of_different_states_do_not_commit(store: MemoryStore) -> None:
    with Writers(store, 2) as writers:
        errors = writers.save(0, lambda i: split_view({"a": np.zeros(4), "lr": 0.1 + i}, i, 2))
        assert all("different structures" in str(e) for e in errors)


def test_a_writer_that_never_comes_is_not_waited_for_for_ever(store: MemoryStore) -> None:
    state = state_of(6)
    with Writers(store, 2, commit_timeout_s=0.1) as writers:
        pending = writers.begin(0, 0, split_view(state, 0, 2))
        with pytest.raises(SaveFailedError, match="writer 1 did not publish its manifest in time"):
            pending.wait(30)
    with Writers(store, 2, run_id="other", commit_timeout_s=0.1) as writers:
        pending = writers.begin(1, 0, split_view(state, 1, 2))
        with pytest.raises(SaveFailedError, match="writer 0 did not commit in time"):
            pending.wait(30)
    assert restored_steps(store) == []


def restored_steps(store: Any) -> list[int]:
    return Checkpointer(store).steps()


def test_a_late_record_finds_everything_it_names(store: MemoryStore) -> None:
    """Writer 1 gives up waiting; then writer 0, which has its manifest, commits."""
    state = state_of(7)
    with Writers(store, 2, each={1: {"commit_timeout_s": 0.1}}) as writers:
        with store.hold("put_if_absent", "commits/") as held:
            first = writers.begin(0, 0, split_view(state, 0, 2))
            second = writers.begin(1, 0, split_view(state, 1, 2))
            held.await_calls()
            with pytest.raises(SaveFailedError, match="did not commit in time"):
                second.wait(30)
        first.wait(30)
        assert same(restored(store), state)
        assert writers.save_state(1, state) == [None, None]
    assert same(restored(store), state)


def lose_the_answer(store: MemoryStore, part: str) -> None:
    """The next put_if_absent of such a key is done, and reported as failed."""

    def put_if_absent(key: str, data: memoryview) -> bool:
        done = original(key, data)
        if part in key:
            store.put_if_absent = original  # type: ignore[method-assign]
            raise StoreError("connection reset")
        return done

    original = store.put_if_absent
    store.put_if_absent = put_if_absent  # type: ignore[method-assign]


@pytest.mark.parametrize("count", [1, 2])
def test_a_record_that_stands_although_the_store_said_no(store: MemoryStore, count: int) -> None:
    state = state_of(8)
    with Writers(store, count) as writers:
        lose_the_answer(store, "commits/")
        errors = writers.save_state(0, state)
        assert "connection reset" in str(errors[0])
        assert errors[1:] == [None] * (count - 1)
        assert same(
            restored(store, 0), {**state, "ranks": {0: state["ranks"][0]}} if count == 1 else state
        )
        assert writers.save_state(1, state) == [None] * count
        restored(store, 0)


def test_writers_that_disagree_about_a_step_come_together_again(store: MemoryStore) -> None:
    """Writer 1 knows that it stands and builds on it, writer 0 does not; the next is a base."""
    state = state_of(8)
    with Writers(store, 2, strategy=DELTA) as writers:
        assert writers.save_state(0, state) == [None, None]
        lose_the_answer(store, "commits/")
        first, second = writers.save_state(1, state)
        assert "connection reset" in str(first) and second is None
        first, second = writers.save_state(2, state)
        assert "build on a step that was not committed before" in str(first)
        assert "writer 0 gave the attempt up" in str(second)
        for step in (3, 4):
            assert writers.save_state(step, state) == [None, None]
    reader = Checkpointer(store)
    assert reader.steps() == [0, 1, 3, 4]
    for step in reader.steps():
        assert same(reader.restore(step), state)


@pytest.mark.parametrize("error", [StoreFullError("disk full"), StorePermissionError("no")])
@pytest.mark.parametrize("count", [1, 2])
def test_a_record_that_the_store_refused_leaves_nothing_behind(
    store: MemoryStore, error: StoreError, count: int
) -> None:
    state = state_of(8)
    with Writers(store, count) as writers:
        assert writers.save_state(0, state) == [None] * count
        before = store.keys("data/")
        with store.failing("put_if_absent", "commits/", error):
            errors = writers.save_state(1, state)
        assert all(error.message in str(e) for e in errors)
        assert [key for key in store.keys("data/") if not key.endswith(".abort")] == before
        assert writers.save_state(1, state) == [None] * count


def test_a_manifest_that_stands_although_the_store_said_no(store: MemoryStore) -> None:
    """Writer 0 commits with it, so writer 1 leaves what it names."""
    state = state_of(9)
    put = store.put

    def lose(key: str, data: memoryview) -> None:
        put(key, data)
        if key.endswith("w00001.manifest"):
            raise StoreError("connection reset")

    with Writers(store, 2) as writers:
        store.put = lose  # type: ignore[method-assign]
        with store.hold("put_if_absent", "w00001.abort"):
            saves = [writers.begin(i, 0, split_view(state, i, 2)) for i in range(2)]
            saves[0].wait(30)
        with pytest.raises(SaveFailedError, match="connection reset"):
            saves[1].wait(30)
        store.put = put  # type: ignore[method-assign]
        assert same(restored(store), state)


def test_a_failed_step_is_built_on_by_nobody(store: MemoryStore) -> None:
    """Increments in flight on a step that fails, fail; the next one is a base again."""
    state = training_state(10)
    with Checkpointer(store, strategy=DELTA, on_error="warn") as checkpointer:
        checkpointer.save(0, state).wait()
        with store.hold("put", "0000000000000001-") as held:
            first = checkpointer.save(1, state)
            held.await_calls()
            others = [checkpointer.save(step, state) for step in (2, 3)]
            store.hook = fail_puts("0000000000000001-", store.hook)
            held.release()
            with pytest.raises(SaveFailedError, match="no room"):
                first.wait(30)
            for pending in others:
                with pytest.raises(SaveFailedError, match="increment to one that failed"):
                    pending.wait(30)
        checkpointer.save(4, state).wait()
        checkpointer.save(5, drifted(state, 1)).wait()
        checkpointer.wait()
        depths = [read_commit(store, step)[0].depth for step in checkpointer.steps()]
        assert (checkpointer.steps(), depths[:2]) == ([0, 4, 5], [0, 0])
        assert same(checkpointer.restore(), drifted(state, 1))


def fail_puts(part: str, before: Any) -> Any:
    def hook(operation: str, key: str) -> None:
        before(operation, key)
        if operation == "put" and part in key:
            raise StoreError("no room")

    return hook


def test_after_a_failure_a_base_is_due_at_once(store: MemoryStore) -> None:
    """Not only when the chain ends: no step is built on those that are going to fail."""
    state = training_state(11)
    with Checkpointer(store, strategy=DELTA, max_chain=200, on_error="warn") as checkpointer:
        checkpointer.save(0, state).wait()
        with store.hold("put", "0000000000000001-") as held:
            doomed = [checkpointer.save(step, state) for step in range(1, 6)]
            held.await_calls()
            store.hook = fail_puts("0000000000000001-", store.hook)
        assert doomed[0]._attempt.finished.wait(30)
        later = [checkpointer.save(step, state) for step in range(6, 12)]
        for pending in later:
            pending.wait(30)
        assert checkpointer.steps() == [0, *range(6, 12)]


@pytest.mark.parametrize("error", [StoreError("delete is forbidden"), RuntimeError("bug")])
def test_the_committer_survives_a_clean_up_that_fails(store: MemoryStore, error: Exception) -> None:
    state = training_state(12)
    with Checkpointer(store) as checkpointer:
        checkpointer.save(0, state).wait(30)
        with (
            store.failing("put", ".manifest", StoreError("no")),
            store.failing("delete", "data/", error),
            pytest.raises(SaveFailedError) as raised,
        ):
            checkpointer.save(1, state).wait(30)
        notes = raised.value.__cause__.__notes__  # type: ignore[union-attr]
        assert notes == [f"and cleaning up failed: {error}"]
        checkpointer.save(2, state).wait(30)
        assert checkpointer.steps() == [0, 2]


@pytest.mark.parametrize("part", [".pack", ".manifest", "commits/"])
def test_a_failed_save_leaves_nothing_behind(store: MemoryStore, part: str) -> None:
    state = training_state(13)
    with Checkpointer(store, strategy="asymcheck-naive") as checkpointer:
        checkpointer.save(0, state).wait()
        before = store.keys("data/")
        operation = "put" if part != "commits/" else "list"
        with store.failing("put", part, StoreError("disk full")):
            if operation == "list":
                store.objects[commit_key(1)] = b"somebody else's"
            pending = checkpointer.save(1, state)
            with pytest.raises(SaveFailedError):
                pending.wait(30)
        assert store.keys("data/") == before


def test_two_runs_race_for_a_step(store: MemoryStore) -> None:
    """Exactly one wins; the other one's objects are gone and its next save works."""
    states = [training_state(seed) for seed in (14, 15)]
    runs = [Checkpointer(store) for _ in states]
    for run in runs:
        run.save(0 if run is runs[0] else 1, states[0]).wait()
    together = threading.Barrier(2, timeout=30)
    store.hook = lambda op, key: op == "put_if_absent" and key == commit_key(7) and together.wait()
    pending = [run.save(7, state) for run, state in zip(runs, states, strict=True)]
    errors: list[Any] = []
    for save in pending:
        try:
            save.wait(30)
            errors.append(None)
        except SaveFailedError as error:
            errors.append(error.__cause__)
    store.hook = lambda op, key: None
    assert sorted(type(e).__name__ for e in errors) == ["NoneType", "StepExistsError"]
    winner = errors.index(None)
    assert same(restored(store, 7), states[winner])
    record, _ = read_commit(store, 7)
    assert all(record.attempt in key for key in store.keys("data/0000000000000007"))
    runs[1 - winner].save(8, states[1 - winner]).wait()
    for run in runs:
        run.close()


def test_nothing_is_committed_that_a_reader_would_refuse(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(store) as checkpointer:
        monkeypatch.setattr("asymcheck.manifest.MAX_MANIFEST_NBYTES", 1000)
        with pytest.raises(SaveFailedError, match="manifest is too long"):
            checkpointer.save(0, training_state(16)).wait(30)
        monkeypatch.undo()
        assert checkpointer.steps() == []
        checkpointer.save(0, training_state(16)).wait(30)


def test_a_step_with_a_block_lost_is_not_committed(store: MemoryStore) -> None:
    """Neither the first time nor when the same plan has been committed before."""
    state = training_state(16)
    with Checkpointer(store, strategy="asymcheck-naive", on_error="warn") as checkpointer:
        for step in range(4):
            with store.hold("put", ".pack") as held:
                pending = checkpointer.save(step, state)
                held.await_calls()
                assert pending._attempt.encoded.wait(30)
                if step % 2 == 0:
                    pending._attempt.block_packs.pop(1)
            pending._attempt.finished.wait(30)
        assert checkpointer.steps() == [1, 3]
        assert same(checkpointer.restore(), state)


def test_manifests_are_durable_before_the_record(store: MemoryStore) -> None:
    with Writers(store, 2) as writers:
        writers.save_state(0, state_of(17))
    order = [key for name, key in store.calls if name in ("put", "put_if_absent")]
    published = order.index(commit_key(0))
    record, _ = read_commit(store, 0)
    named = [ref.key for ref in record.manifests]
    named += [pack.key for m in read_manifests(store, record) for pack in m.packs]
    assert all(order.index(key) < published for key in named)
    puts = [key for key in order if key.startswith(("data/", "commits/"))]
    assert len(puts) == len(set(puts))  # no key is written twice


# -- a writer that cannot begin ----------------------------------------------------------------


UNFIT: dict[str, Callable[[Checkpointer, int], object]] = {
    "state": lambda c, step: c.save(step, {"f": lambda: 0}),
    "metadata": lambda c, step: c.save(step, {}, metadata={"at": (1, 2)}),
    "plan": lambda c, step: c.begin(step, twice_the_same_leaf()),
    "adapter": lambda c, step: refuse(c, step),
}


def twice_the_same_leaf() -> StateView:
    (source,) = numpy_view({"w": np.zeros(3)}).sources
    return StateView({"dict": []}, (source, source))


def refuse(checkpointer: Checkpointer, step: int) -> None:
    with checkpointer.viewing(step):
        raise UnsupportedStateError("no view of this", step=step)


def save_unless_unfit(writers: Writers, step: int, state: Any, unfit: str, who: set[int]) -> Any:
    """Save on all, but for those who cannot; what each has to say."""
    count = len(writers.each)

    def work(writer: int) -> None:
        if writer in who:
            UNFIT[unfit](writers.each[writer], step)
        else:
            writers.begin(writer, step, split_view(state, writer, count)).wait(60)

    return writers.all(work)


@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("first", [0, 2])
def test_others_learn_at_once_that_a_writer_cannot_begin(
    store: MemoryStore, unfit: str, failing: int, first: int
) -> None:
    """At the first save and later; the next is saved by all."""
    state = state_of(22)
    with Writers(store, 2, strategy=DELTA, commit_timeout_s=600.0) as writers:
        for step in range(first):
            assert writers.save_state(step, state) == [None, None]
        errors = save_unless_unfit(writers, first, state, unfit, {failing})
        assert isinstance(errors[failing], UnsupportedStateError)
        other = errors[1 - failing].__cause__
        assert isinstance(other, CommitError) and errors[failing].message in other.message
        assert f"writer {failing} gave the attempt up" in other.message
        for step in (first + 1, first + 2):
            assert writers.save_state(step, state) == [None, None]
        assert writers.all(lambda i: writers.each[i].wait()) == [
            None,
            None,
        ]  # nothing is said twice
    assert restored_steps(store) == [*range(first), first + 1, first + 2]
    assert same(restored(store), state)
    assert [read_commit(store, first + i)[0].depth for i in (1, 2)] == [0, 1]


@given(
    st.lists(st.sets(st.integers(0, 2)), min_size=1, max_size=8),
    st.sampled_from(sorted(UNFIT)),
    st.sampled_from([None, 0]),
)
@settings(max_examples=25)
def test_a_step_is_there_if_all_can_save_it(
    plan: list[set[int]], unfit: str, max_chain: int | None
) -> None:
    """Whoever cannot, and however often: attempts of the writers match."""
    store, state = MemoryStore(), state_of(23, 3)
    options: dict[str, Any] = {"strategy": DELTA, "max_chain": max_chain, "on_error": "warn"}
    with Writers(store, 3, commit_timeout_s=600.0, **options) as writers:
        for step, who in enumerate(plan):
            errors = save_unless_unfit(writers, step, state, unfit, who)
            assert [error is None for error in errors] == [not who] * 3
        assert writers.save_state(len(plan), state) == [None] * 3
    for step in range(len(plan) + 1):
        if step == len(plan) or not plan[step]:
            assert same(restored(store, step), state)
    assert restored_steps(store) == [s for s, who in enumerate([*plan, set()]) if not who]


def test_a_writer_that_raises_for_an_earlier_step_counts_this_one(store: MemoryStore) -> None:
    """Both know that step 0 has failed, one of them has still to say so."""
    state = state_of(24)
    with Writers(store, 2, commit_timeout_s=600.0) as writers:
        with store.failing("put", "w00001-000000.pack", StoreError("no room")):
            saves = [writers.begin(i, 0, split_view(state, i, 2)) for i in range(2)]
            assert all(save._attempt.finished.wait(30) for save in saves)
        with pytest.raises(SaveFailedError):
            saves[0].wait()
        errors = writers.save_state(1, state)
        assert isinstance(errors[1], SaveFailedError) and errors[1].step == 0
        assert "writer 1 gave the attempt up" in str(errors[0])
        assert writers.save_state(2, state) == [None, None]
    assert restored_steps(store) == [2]


def test_a_step_that_exists_on_one_writer_counts_on_both(store: MemoryStore) -> None:
    state = state_of(25)
    with Writers(store, 2, commit_timeout_s=600.0) as writers:
        assert writers.save_state(0, state) == [None, None]
        del writers.each[1]._known[0]
        errors = writers.save_state(0, state)
        assert isinstance(errors[0], StepExistsError)
        assert "writer 0 gave the attempt up" in str(errors[1])
        assert writers.save_state(1, state) == [None, None]
    assert same(restored(store, 0), state)


def test_a_save_that_is_still_encoded_is_waited_for_after_a_refusal(store: MemoryStore) -> None:
    """Its increments are taken to the reference, which the next save is going to overwrite."""
    states = [state_of(26)]
    for step in range(1, 5):
        states.append(drifted({**states[0], "ranks": {}}, step) | {"ranks": states[0]["ranks"]})
    with Writers(store, 2, strategy=DELTA, on_error="warn") as writers:
        assert writers.save_state(0, states[0]) == [None, None]
        views = [[split_view(state, i, 2) for i in range(2)] for state in states]
        first = writers.each[1].begin(1, views[1][1])  # not all of it is captured
        with pytest.raises(UnsupportedStateError):
            refuse(writers.each[1], 2)
        third = writers.each[1].begin(3, views[3][1])
        encoded = first.pending._attempt.encoded
        assert third.pending._attempt.predecessor_encoded is encoded
        for step in (1, 2, 3):
            writers.begin(0, step, views[step][0])
        writers.all(lambda i: writers.each[i].wait())
        assert writers.save_state(4, states[4]) == [None, None]
    assert {0, 1, 4} <= set(restored_steps(store)) <= {0, 1, 3, 4}
    for step in restored_steps(store):
        assert same(restored(store, step), states[step])


def test_nobody_speaks_under_a_name_that_was_used_before(store: MemoryStore) -> None:
    """An abort would be taken for one of that run, which may be alive."""
    state = state_of(27)
    with Writers(store, 2, run_id="job1") as writers:
        writers.save_state(0, state)
    with Writers(store, 2, run_id="job1") as writers:
        for unfit in UNFIT:
            errors = save_unless_unfit(writers, 0, state, unfit, {0, 1})
            assert all("could not be told" in str(e.__notes__) for e in errors)
    assert store.keys(".abort") == []


# -- starting again ----------------------------------------------------------------------------


def test_a_damaged_step_gives_way_although_others_see_its_record(store: MemoryStore) -> None:
    """Resumed one step earlier, all writers save it again; they wait for the new record."""
    state = state_of(18)
    with Writers(store, 2) as writers:
        writers.save_state(4, state)
        writers.save_state(5, state)
    store.objects[store.keys("0000000000000005-run-000001/w00001-000000.pack")[0]] = b""
    again = drifted({"params": state["params"]}, 1)
    with Writers(store, 2, run_id="again") as writers:
        restores = writers.all(lambda i: writers.each[i].restore()["step"])
        assert restores == [state["step"]] * 2
        assert writers.save_state(5, again) == [None, None]
    assert same(restored(store, 5), {**again, "ranks": {}})
    assert same(restored(store, 4), state)
    assert len(store.keys("damaged/")) == 1


def test_a_run_id_is_used_once(store: MemoryStore) -> None:
    state = state_of(19)
    with Writers(store, 2, run_id="job1") as writers:
        writers.save_state(0, state)
    with Writers(store, 2, run_id="job1") as writers:
        errors = writers.save_state(1, state)
        assert all(isinstance(e, CommitError) and "used before" in str(e) for e in errors)
    with Writers(store, 2, run_id="job2") as writers:
        assert writers.save_state(1, state) == [None, None]


def test_orphans_of_a_failed_run_are_collected_by_the_next(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(20)
    with caplog.at_level(logging.CRITICAL):
        with Writers(store, 2, commit_timeout_s=0.05) as writers:
            writers.begin(0, 3, split_view(state, 0, 2))
        assert store.keys(".abort") != []
        with Checkpointer(store) as checkpointer:
            checkpointer.save(4, state).wait()
    record, _ = read_commit(store, 4)
    assert all(record.attempt in key for key in store.keys("data/"))
    assert collect_orphans(store) == []


def test_a_step_taken_meanwhile_is_never_overwritten(store: MemoryStore) -> None:
    state = state_of(21)
    with Writers(store, 2) as writers:
        writers.save_state(0, state)
        with Checkpointer(store) as other:
            other.save(1, training_state(1)).wait()
        errors = writers.save_state(1, state)
        assert isinstance(errors[0].__cause__, StepExistsError)
        assert "writer 0 gave the attempt up" in str(errors[1])
    assert same(restored(store, 1), training_state(1))
