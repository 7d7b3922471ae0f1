"""The life of a run: save, fail, resume, fall back, discard, close, within the bounds given."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_store import MemoryStore
from states import drifted, same, training_state
from test_buffers import Waits
from test_snapshot import SMALL
from test_strategies import GivenCosts, slow_store_costs

from asymcheck import Always, AsymCheck, Checkpointer, CostModel, Never, open_checkpoint
from asymcheck.codecs import TopKCodec
from asymcheck.commit import commit_key, read_commit
from asymcheck.errors import (
    CheckpointNotFoundError,
    ClosedError,
    CorruptionError,
    SaveFailedError,
    StateMismatchError,
    StepExistsError,
    StoreError,
    StorePermissionError,
    StoreUnavailableError,
    UnsupportedStateError,
)
from asymcheck.idle import IdleProfile
from asymcheck.index import load_index
from asymcheck.inspection.fidelity import step_fidelity
from asymcheck.pack import PackBuilder
from asymcheck.partition import Phase, Window
from asymcheck.policy import Decision, PolicyRequest
from asymcheck.state import numpy_view

DELTA = AsymCheck(policy=Always("delta"))


def opened(store: Any, **options: Any) -> Checkpointer:
    return Checkpointer(store, **{"cost_model": CostModel(), "max_chain": 10, **options})


# -- saving and restoring ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "path", "url"])
def test_a_run_and_its_resumption(kind: str, tmp_path: Path, memory_url: str) -> None:
    url: Any = {"memory": memory_url, "path": tmp_path / "a", "url": (tmp_path / "a").as_uri()}[
        kind
    ]
    states = [training_state(0)]
    with Checkpointer(url) as checkpointer:
        assert checkpointer.latest_step() is None and checkpointer.steps() == []
        for step in range(3):
            pending = checkpointer.save(step, states[-1], metadata={"epoch": step})
            assert pending.step == step
            states.append(drifted(states[-1], step))
        checkpointer.wait()
        assert pending.done() and checkpointer.latest_step() == 2
    with Checkpointer(url) as checkpointer:
        state = checkpointer.restore()
        assert same(state, states[2])
        assert same(checkpointer.restore(1), states[1])
        for step in range(3, 5):
            state = drifted(state, step - 1)
            checkpointer.save(step, state)
    with open_checkpoint(url) as checkpoint:
        assert checkpoint.step == 4
        assert same(checkpoint.state(), drifted(states[3], 3))


def test_saving_returns_when_every_byte_is_captured(store: MemoryStore) -> None:
    state = {"w": np.arange(1000.0)}
    with opened(store) as checkpointer:
        checkpointer.save(0, {}).wait()
        with store.hold("put", ".pack") as held:
            pending = checkpointer.save(1, state)
            state["w"][:] = -1  # training goes on at once
            held.await_calls()
            assert not pending.done()
            with pytest.raises(TimeoutError, match="not durable after"):
                pending.wait(0.01)
            with pytest.raises(TimeoutError, match="step 1 is not durable"):
                checkpointer.wait(0.01)
            assert checkpointer.steps() == [0]
        checkpointer.wait()
        assert np.array_equal(checkpointer.restore()["w"], np.arange(1000.0))


def test_several_saves_in_flight_are_committed_in_order(store: MemoryStore) -> None:
    state = training_state(1)
    with opened(store, strategy=DELTA) as checkpointer:
        with store.hold("put", ".pack") as held:
            saves = [checkpointer.save(step, drifted(state, step)) for step in range(6)]
            held.await_calls(2)
            assert not any(save.done() for save in saves)
        checkpointer.wait()
        assert all(save.done() for save in saves)
        published = store.called("put_if_absent", "commits/")
        assert published == [commit_key(step) for step in range(6)]
        for step in range(6):
            assert same(checkpointer.restore(step), drifted(state, step))


def test_small_and_empty_states(store: MemoryStore) -> None:
    for step, state in enumerate([{}, {"a": {}}, {"a": np.empty((0, 3))}, {"n": 1, "b": b""}, 3.5]):
        with opened(store) as checkpointer:
            checkpointer.save(step, state)
        assert same(opened(store).restore(), state)


def test_fills_a_target_in_place_or_lists_what_differs(store: MemoryStore) -> None:
    state = training_state(2)
    with opened(store) as checkpointer:
        checkpointer.save(0, state)
        checkpointer.wait()
        target = drifted(training_state(3), 0)
        weights = target["params"]["h.w"]
        filled = checkpointer.restore(target=target)
        assert filled["params"]["h.w"] is weights
        assert same(filled, state)
        target["params"]["more"] = np.zeros(2)
        target["half"]["h.w"] = np.zeros(3)
        before = target["params"]["h.w"].copy()
        target["params"]["h.w"][:] = before = before + 1
        with pytest.raises(StateMismatchError) as raised:
            checkpointer.restore(target=target)
        assert "params/more is not in the checkpoint" in str(raised.value)
        assert "half/h.w is bfloat16[3000]" in str(raised.value)
        assert np.array_equal(target["params"]["h.w"], before)


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": (1, 2)},
        {1: 2},
        {"a": float("nan")},
        {"a": object()},
        {"a": b"x"},
        {"a": "\ud83d\ude00"},
    ],
    ids=["tuple", "number as a name", "nan", "object", "bytes", "surrogates"],
)
def test_metadata_come_back_as_they_are_or_are_refused(store: MemoryStore, metadata: Any) -> None:
    good = {"epoch": 3, "nested": {"x": [1, None, 2.5, "é"]}, "big": 2**80}
    with opened(store) as checkpointer:
        with pytest.raises(UnsupportedStateError, match="metadata") as raised:
            checkpointer.save(1, {}, metadata=metadata)
        assert raised.value.step == 1
        checkpointer.save(1, {}, metadata=good).wait()
        assert checkpointer.restore_with(lambda c: c.metadata) == good


def test_what_cannot_be_saved_leaves_no_trace(store: MemoryStore) -> None:
    with opened(store) as checkpointer:
        with pytest.raises(UnsupportedStateError) as raised:
            checkpointer.save(0, {"params": {"w": np.zeros(2), "f": lambda: 0}})
        assert raised.value.leaf == "params/f"
        for step in (-1, 2**53):
            with pytest.raises(ValueError, match="step"):
                checkpointer.save(step, {})
        assert store.objects == {}
        checkpointer.save(0, {"a": 1}).wait()


# -- steps -------------------------------------------------------------------------------------


def test_a_committed_step_is_never_overwritten(store: MemoryStore) -> None:
    with opened(store) as checkpointer:
        checkpointer.save(5, {"a": 1}).wait()
        for _ in range(2):
            with pytest.raises(StepExistsError, match="discard_after") as raised:
                checkpointer.save(5, {"a": 2})
            assert raised.value.step == 5
        checkpointer.save(6, {"a": 6})
    with opened(store) as checkpointer:
        with pytest.raises(StepExistsError):
            checkpointer.save(6, {"a": 2})
        assert checkpointer.restore(5) == {"a": 1}


def test_the_same_step_twice_in_flight(store: MemoryStore) -> None:
    checkpointer = opened(store)
    with store.hold("put_if_absent", "commits/") as held:
        first = checkpointer.save(3, {"a": 1})
        held.await_calls()
        second = checkpointer.save(3, {"a": 2})
    first.wait()
    with pytest.raises(SaveFailedError) as raised:
        second.wait()
    assert isinstance(raised.value.__cause__, StepExistsError)
    checkpointer.close()
    assert opened(store).restore() == {"a": 1}


def test_steps_may_go_backwards(store: MemoryStore) -> None:
    """Never with an increment to a later step."""
    state = training_state(4)
    with opened(store, strategy=DELTA) as checkpointer:
        for step in (10, 11, 4, 5, 7, 6):
            checkpointer.save(step, drifted(state, step))
        checkpointer.wait()
        parents = {s: read_commit(store, s)[0].parent for s in checkpointer.steps()}
        assert {s: p and p.step for s, p in parents.items()} == {
            10: None, 11: 10, 4: None, 5: 4, 7: 5, 6: None,
        }  # fmt: skip
        for step in (10, 11, 4, 5, 7, 6):
            assert same(checkpointer.restore(step), drifted(state, step))


def test_discarding_later_steps(store: MemoryStore) -> None:
    state = training_state(5)
    with opened(store, strategy=DELTA) as checkpointer:
        for step in range(6):
            checkpointer.save(step, drifted(state, step))
        assert checkpointer.discard_after(2) == [3, 4, 5]
        assert checkpointer.steps() == [0, 1, 2]
        assert checkpointer.discard_after(2) == []
        checkpointer.save(3, state).wait()
        checkpointer.save(4, state).wait()
        assert same(checkpointer.restore(3), state)
    assert {int(key.split("/")[1][:16]) for key in store.keys("data/")} == {0, 1, 2, 3, 4}


def test_nothing_builds_on_a_discarded_step(store: MemoryStore) -> None:
    """The next step is later than the one discarded, whose bytes the reference still holds."""
    state = training_state(6)
    with opened(store, strategy=DELTA) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state)
        assert checkpointer.discard_after(2) == [3]
        checkpointer.save(4, drifted(state, 1)).wait()
        assert same(checkpointer.restore(4), drifted(state, 1))
        assert read_commit(store, 4)[0].parent is None


def test_a_chain_is_begun_when_asked_for(store: MemoryStore) -> None:
    state = training_state(6)
    with opened(store, strategy=DELTA) as checkpointer:
        for step in range(5):
            if step == 3:
                checkpointer.start_chain()
            checkpointer.save(step, drifted(state, step))
        checkpointer.wait()
        assert same(checkpointer.restore(4), drifted(state, 4))
    assert [read_commit(store, s)[0].depth for s in range(5)] == [0, 1, 2, 0, 1]


# -- falling back ------------------------------------------------------------------------------


def damage(store: MemoryStore, step: int) -> None:
    for key in store.keys(f"data/{step:016d}"):
        if key.endswith(".pack"):
            store.objects[key] = bytes(len(store.objects[key]))


def test_falls_back_to_the_newest_step_that_is_whole(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    state = training_state(7)
    with opened(store, max_chain=0) as checkpointer:
        for step in range(5):
            checkpointer.save(step, drifted(state, step))
    damage(store, 4)
    store.objects[commit_key(3)] = b"torn"
    with opened(store) as checkpointer:
        assert same(checkpointer.restore(), drifted(state, 2))
        assert "step 4 cannot be restored" in caplog.text
        assert "step 3 cannot be restored" in caplog.text
        for step in (3, 4):
            with pytest.raises(CorruptionError):
                checkpointer.restore(step)
        assert checkpointer.steps() == [0, 1, 2, 3, 4]  # reading changes nothing
        target = drifted(state, 9)
        assert same(checkpointer.restore(target=target), drifted(state, 2))


def test_damaged_steps_give_way_when_training_commits_again(store: MemoryStore) -> None:
    state = training_state(8)
    with opened(store, max_chain=0) as checkpointer:
        for step in range(4):
            checkpointer.save(step, state)
    damage(store, 3)
    store.objects[commit_key(2)] = b"torn"
    with opened(store) as checkpointer:
        checkpointer.restore()
        checkpointer.save(2, drifted(state, 2)).wait()
        assert checkpointer.steps() == [0, 1, 2]
        checkpointer.save(3, drifted(state, 3)).wait()
        assert same(checkpointer.restore(), drifted(state, 3))
    assert len(store.keys("damaged/")) == 2


def test_nothing_builds_on_a_damaged_step_that_was_passed_over(store: MemoryStore) -> None:
    """It was saved last, by the same process, whose reference still holds its bytes."""
    state = training_state(8)
    with opened(store, strategy=DELTA) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, drifted(state, step)).wait()
        damage(store, 2)
        assert same(checkpointer.restore(), drifted(state, 1))
        checkpointer.save(3, drifted(state, 3)).wait()
        assert checkpointer.steps() == [1, 3]
        assert same(checkpointer.restore(3), drifted(state, 3))


def test_there_is_nothing_to_restore(store: MemoryStore) -> None:
    checkpointer = opened(store)
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint"):
        checkpointer.restore()
    with pytest.raises(CheckpointNotFoundError, match="no such step"):
        checkpointer.restore(7)
    checkpointer.close()
    assert store.objects == {}


# -- errors ------------------------------------------------------------------------------------


def test_a_failed_save_surfaces_at_the_next_call_once(store: MemoryStore) -> None:
    checkpointer = opened(store)
    checkpointer.save(0, {"w": np.zeros(9)}).wait()
    with store.failing("put", ".pack", StoreError("no room")):
        pending = checkpointer.save(1, {"w": np.zeros(9)})
        pending._attempt.finished.wait(30)
    with pytest.raises(SaveFailedError, match="no room") as raised:
        checkpointer.save(2, {"w": np.zeros(9)})
    assert raised.value.step == 1 and isinstance(raised.value.__cause__, StoreError)
    checkpointer.save(2, {"w": np.ones(9)})
    checkpointer.close()
    assert checkpointer.steps() == [0, 2]


def test_what_was_reported_is_not_reported_again(store: MemoryStore) -> None:
    checkpointer = opened(store)
    checkpointer.save(0, {"w": np.zeros(9)}).wait()
    with store.failing("put", ".pack", StoreError("no room")):
        pending = checkpointer.save(1, {"w": np.zeros(9)})
        for _ in range(2):
            with pytest.raises(SaveFailedError):
                pending.wait(30)
    checkpointer.wait()
    checkpointer.close()


def test_training_goes_on_if_chosen(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    with opened(store, on_error="warn") as checkpointer:
        checkpointer.save(0, {"w": np.zeros(9)}).wait()
        with store.failing("put", ".pack", StoreError("no room")):
            for step in (1, 2):
                checkpointer.save(step, {"w": np.zeros(9)})
            checkpointer.wait()
        checkpointer.save(3, {"w": np.zeros(9)})
    assert checkpointer.steps() == [0, 3]
    failures = [r for r in caplog.records if "no room" in r.getMessage()]
    assert len(failures) == 2 and all(r.levelno == logging.ERROR for r in failures)


def test_a_save_that_hangs_and_fails_surfaces_although_it_hangs(store: MemoryStore) -> None:
    """Its memory never comes back, so it is never finished: the next call tells all the same."""
    checkpointer = opened(
        store, strategy="asymcheck-naive", max_host_bytes=SMALL, stall_timeout_s=0.01
    )
    with store.hold("put", ".pack") as held:
        hung = checkpointer.save(0, {"w": np.zeros(SMALL, np.uint8)})
        held.await_calls()
        with pytest.raises(SaveFailedError, match="no host memory became free"):
            checkpointer.save(1, {"w": np.zeros(10)})
        assert not hung.done()
    hung._attempt.finished.wait(30)
    checkpointer.save(2, {"w": np.zeros(10)}).wait(30)
    checkpointer.close()
    assert checkpointer.steps() == [2]


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_store_that_fails_from_the_start(
    store: MemoryStore, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"w": np.zeros(5)}
    with Checkpointer(store, on_error=on_error) as checkpointer:
        for operation in ("list", "put"):
            with store.failing(operation, "", StorePermissionError("read-only")):
                if on_error == "raise":
                    with pytest.raises(StorePermissionError, match="read-only"):
                        checkpointer.save(0, state)
                else:
                    checkpointer.save(0, state)
                    checkpointer.wait(30)
        checkpointer.save(1, state).wait(30)
        assert checkpointer.steps() == [1]
    if on_error == "warn":
        assert caplog.text.count("the checkpoint was not saved: StorePermissionError") == 2


def test_closed_means_closed(store: MemoryStore) -> None:
    checkpointer = opened(store)
    checkpointer.save(0, {"a": 1})
    checkpointer.close()
    checkpointer.close()
    for use in (
        lambda: checkpointer.save(1, {}),
        lambda: checkpointer.begin(1, numpy_view({})),
        checkpointer.wait,
        lambda: checkpointer.discard_after(0),
        checkpointer.raise_errors,
    ):
        with pytest.raises(ClosedError):
            use()
    assert checkpointer.steps() == [0]


def test_closing_tells_what_failed_and_leaves_nothing_behind(store: MemoryStore) -> None:
    threads = threading.active_count()
    checkpointer = opened(store)
    checkpointer.save(0, {"w": np.zeros(9)}).wait()
    with store.failing("put", ".pack", StoreError("no room")):
        pending = checkpointer.save(1, {"w": np.zeros(9)})
        pending._attempt.finished.wait(30)
    with pytest.raises(SaveFailedError):
        checkpointer.close()
    assert threading.active_count() == threads
    assert store.keys("runs/") == [] and store.keys("0000000000000001-") == []


def test_closing_gives_up_a_store_that_hangs(store: MemoryStore) -> None:
    checkpointer = opened(store)
    checkpointer.save(0, {"w": np.zeros(9)}).wait()
    with store.hold("put", "0000000000000001-") as held:
        checkpointer.save(1, {"w": np.zeros(9)})
        held.await_calls()
        deletes = len(store.called("delete", "runs/"))
        with pytest.raises(TimeoutError, match="the store hangs or is slow"):
            checkpointer.close(0.01)
        assert len(store.called("delete", "runs/")) == deletes  # the store is not asked again
    assert checkpointer.steps()[0] == 0


def test_an_unfinished_capture_is_finished_at_close(store: MemoryStore) -> None:
    state = training_state(9)
    with opened(store) as checkpointer:
        checkpointer.begin(0, numpy_view(state), windows=[Window(Phase.FORWARD, 0, 1.0)])
    assert same(opened(store).restore(), state)


def test_the_next_step_finishes_the_one_before(store: MemoryStore) -> None:
    state = training_state(10)
    with opened(store) as checkpointer:
        first = checkpointer.begin(0, numpy_view(state))
        second = checkpointer.begin(1, numpy_view(state))
        assert first.finish() == 0.0
        second.finish()
    assert checkpointer.steps() == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_host_bytes": SMALL - 1}, "max_host_bytes"),
        ({"max_chain": -1}, "max_chain"),
        ({"max_chain": 257}, "max_chain"),
        ({"on_error": "ignore"}, "on_error"),
        ({"writer": 1}, "writer 1"),
        ({"writer": -1, "writers": 2}, "writer -1"),
        ({"writers": 2}, "run_id"),
        ({"run_id": ""}, "run_id"),
        ({"run_id": "Run"}, "run_id"),
        ({"run_id": "a/b"}, "run_id"),
        ({"run_id": "x" * 33}, "run_id"),
        ({"max_to_keep": 0}, "max_to_keep"),
        ({"strategy": "other"}, "unknown strategy"),
    ],
)
def test_arguments_out_of_range(store: MemoryStore, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpointer(store, **options)


@pytest.mark.parametrize("run_id", ["x" * 32, "0", "123456", "a1"])
def test_any_run_id_of_the_format_can_be_read_back(store: MemoryStore, run_id: str) -> None:
    with opened(store, run_id=run_id) as checkpointer:
        checkpointer.save(0, {"a": 1})
    assert opened(store).restore() == {"a": 1}


# -- memory and chains -------------------------------------------------------------------------


def test_chains_are_as_long_as_allowed(store: MemoryStore) -> None:
    state = training_state(11)
    with opened(store, strategy=DELTA, max_chain=3) as checkpointer:
        for step in range(10):
            checkpointer.save(step, drifted(state, step))
    assert [read_commit(store, s)[0].depth for s in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    store = MemoryStore()
    with opened(store, strategy=DELTA, max_chain=0) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state)
        assert checkpointer._increments.reference is None
    assert [read_commit(store, s)[0].depth for s in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("refused", range(1, 5))
def test_what_cannot_be_saved_makes_no_chain_longer(store: MemoryStore, refused: int) -> None:
    state = training_state(11)
    with opened(store, strategy=DELTA, max_chain=2) as checkpointer:
        for step in range(8):
            if step == refused:
                with pytest.raises(UnsupportedStateError):
                    checkpointer.save(step, {"f": lambda: 0})
            checkpointer.save(step, drifted(state, step))
    depths = [read_commit(store, s)[0].depth for s in range(8)]
    assert max(depths) == 2 and depths[refused] == 0


def test_a_changed_state_begins_a_chain(store: MemoryStore) -> None:
    state = training_state(12)
    grown = {**state, "new": {"w": np.ones(10)}}
    with opened(store, strategy=DELTA, max_chain=10) as checkpointer:
        for step, each in enumerate([state, state, grown, grown, grown, state]):
            checkpointer.save(step, each).wait()
        for step, each in enumerate([state, state, grown, grown, grown, state]):
            assert same(checkpointer.restore(step), each)
    assert [read_commit(store, s)[0].depth for s in range(6)] == [0, 1, 0, 1, 2, 0]


def test_a_reference_that_does_not_fit_is_said_once_and_everything_stored_in_full(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"params": {"w": np.zeros(SMALL // 2, np.uint8)}}
    with opened(store, strategy=DELTA, max_host_bytes=SMALL) as checkpointer:
        for step in range(4):
            state["params"]["w"] += 1
            checkpointer.save(step, state)
        checkpointer.wait()
        assert checkpointer._increments.reference is None
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "every step is stored in full" in warnings[0]
    assert [read_commit(store, s)[0].depth for s in range(4)] == [0, 0, 0, 0]
    assert same(opened(store).restore(), state)


def test_memory_stays_within_the_bound(store: MemoryStore) -> None:
    """Slow puts, a reference, a state that changes its shape: never more than allowed."""
    bound = 8 << 20
    allocated = [0]

    def allocate(nbytes: int) -> np.ndarray:
        allocated[0] += nbytes
        return np.zeros(nbytes, np.uint8)

    state = {k: {"w": np.zeros(60_000, np.float32)} for k in ("params", "exp_avg")}
    seen: list[int] = []
    with opened(
        store, strategy=DELTA, max_host_bytes=bound, allocate=allocate, max_chain=50
    ) as checkpointer:
        store.hook = lambda operation, key: seen.append(checkpointer.host_nbytes)
        for step in range(12):
            for leaf in state.values():
                leaf["w"] += 1
            if step == 6:
                state["params"]["extra"] = np.zeros(10_000)
            checkpointer.save(step, state)
            seen.append(checkpointer.host_nbytes)
        checkpointer.wait()
        store.hook = lambda operation, key: None
        assert checkpointer._increments.reference is not None
        assert same(checkpointer.restore(), state)
    assert 0 < max(seen) <= bound
    assert allocated[0] <= bound


class Later:
    """Wants no base at first, and increments from the n-th request on."""

    def __init__(self, after: int) -> None:
        self.asked = 0
        self._after = after

    def decide(self, request: PolicyRequest) -> Decision:
        return Decision("delta" if request.has_base else "raw", "later")

    def decide_replay(self, requests: object) -> None:
        return None

    def wants_base(self, *_: Any) -> bool:
        self.asked += 1
        return self.asked > self._after


class Fickle(Later):
    """Wants a base as long as it is told to."""

    def __init__(self) -> None:
        super().__init__(0)
        self.wants = True

    def wants_base(self, *_: Any) -> bool:
        return self.wants


def test_a_reference_that_no_longer_pays_is_let_go_with_the_chain(store: MemoryStore) -> None:
    policy, state = Fickle(), training_state(19)
    with opened(store, strategy=AsymCheck(policy=policy), max_chain=2) as checkpointer:
        for step in range(9):
            policy.wants = step < 2 or step >= 5
            checkpointer.save(step, drifted(state, step)).wait()
            held = checkpointer._increments.reference is not None
            assert held == (step in (0, 1, 2, 5, 6, 7, 8)), step
            pipeline = checkpointer._pipeline
            assert pipeline is not None
            left_nbytes = pipeline.capture_nbytes - checkpointer._increments.nbytes
            assert pipeline.capture_pool._max_nbytes == left_nbytes
        for step in range(9):
            assert same(checkpointer.restore(step), drifted(state, step))
    assert [read_commit(store, s)[0].depth for s in range(9)] == [0, 1, 2, 0, 0, 0, 0, 1, 2]


def test_the_reference_waits_for_the_memory_that_capture_uses(store: MemoryStore) -> None:
    """Nearly all buffers are in use when increments begin to pay: the bound holds all the same."""
    bound, buffer = 8 << 20, 512 << 10
    state = {"params": {"w": np.zeros(600_000, np.uint8)}}
    strategy = AsymCheck(policy=Later(2))
    checkpointer = opened(store, strategy=strategy, max_host_bytes=bound, max_chain=100)
    checkpointer.save(0, {}).wait()
    with store.hold("put", ".pack") as held, ThreadPoolExecutor(1) as other:
        checkpointer.save(1, {"x": np.zeros(7 * buffer - 1000, np.uint8)})
        held.await_calls()
        assert checkpointer._pipeline is not None
        waits = Waits(checkpointer._pipeline.capture_pool)
        save = other.submit(checkpointer.save, 2, state)
        assert waits.began.wait(30)
        assert checkpointer._increments.reference is None
        assert 7 * buffer <= checkpointer.host_nbytes <= bound
        held.release()
        save.result(30)
    for step in range(3, 8):
        state["params"]["w"] += 1
        checkpointer.save(step, state)
        assert checkpointer.host_nbytes <= bound
        checkpointer.wait()
    assert checkpointer._increments.reference is not None
    assert same(checkpointer.restore(), state)
    checkpointer.close()
    assert read_commit(store, 7)[0].depth == 4


# -- warm start --------------------------------------------------------------------------------


def test_costs_and_windows_are_known_after_a_restart(store: MemoryStore) -> None:
    windows = [Window(Phase.FORWARD, 0, 0.5), Window(Phase.BACKWARD, 0, 2.0)]
    with Checkpointer(store) as checkpointer:
        for _ in range(12):
            checkpointer.profile.observe(windows)
        checkpointer.save(0, training_state(0)).wait()
    probes = store.called("put", ".probe")
    assert len(probes) == 3 and store.keys(".probe") == []
    with Checkpointer(store) as checkpointer:
        assert checkpointer.profile.windows() == windows
        stored = load_index(store, 0).manifests[0].warm_start
        assert checkpointer.cost.to_json() == stored["cost"]
        checkpointer.save(1, training_state(0)).wait()
    assert store.called("put", ".probe") == probes  # no need to measure again


def test_the_store_is_measured_although_the_profile_was_asked_for_first(
    store: MemoryStore,
) -> None:
    with Checkpointer(store) as checkpointer:
        assert checkpointer.profile.windows() is None
        checkpointer.save(0, {"a": 1})
    assert len(store.called("put", ".probe")) == 3


@pytest.mark.parametrize(
    "warm_start",
    [{"cost": 5, "profile": {}}, {"cost": {"costs": {"x": 1}, "ratios": []}}, {"profile": [1]}],
    ids=str,
)
def test_a_warm_start_of_another_kind_is_no_obstacle(
    store: MemoryStore, warm_start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store) as checkpointer:
        checkpointer._pipeline = None
        checkpointer._warm_start = lambda: warm_start  # type: ignore[method-assign]
        checkpointer.save(0, {"a": 1})
    with Checkpointer(store) as checkpointer:
        checkpointer.save(1, {"a": 2})
    assert "no warm start" in caplog.text
    assert checkpointer.steps() == [0, 1]


def test_a_store_that_cannot_be_read_is_no_obstacle_to_a_cold_start(store: MemoryStore) -> None:
    checkpointer = Checkpointer(store)
    with store.failing("list", "commits/", StoreUnavailableError("503")):
        assert isinstance(checkpointer.profile, IdleProfile)
        assert isinstance(checkpointer.cost, CostModel)
    checkpointer.close()


# -- lossy -------------------------------------------------------------------------------------


def reconstruction_error(store: MemoryStore, truth: list[np.ndarray]) -> list[float]:
    reader = opened(store)
    return [
        float(np.abs(reader.restore(step)["params"]["w"] - w).max()) for step, w in enumerate(truth)
    ]


def test_lossy_drift_is_bounded_over_many_steps(store: MemoryStore) -> None:
    """Mistakes 7 and 8: signs are kept, and what was left out is caught up with."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(5000)
    truth: list[np.ndarray] = []
    strategy = AsymCheck(policy=Always(TopKCodec.id))
    direction = rng.standard_normal(5000)  # most drift one way: errors would add up
    with opened(store, strategy=strategy, max_chain=200) as checkpointer:
        for step in range(120):
            truth.append(w.copy())
            checkpointer.save(step, {"params": {"w": w}})
            w += 0.01 * direction
        checkpointer.wait()
    assert read_commit(store, 119)[0].depth == 119
    errors = reconstruction_error(store, truth)
    assert errors[0] == 0.0
    moved = float(np.abs(truth[-1] - truth[0]).max())
    # 1 % of the elements are brought up to date at each step, the worst first: all of them are
    # once in 100 steps, none is left further behind than that.
    assert max(errors) <= 100 * 0.01 * float(np.abs(direction).max())
    assert max(errors[100:]) <= 1.2 * max(errors[60:100]) < 0.9 * moved
    last = opened(store).restore(119)["params"]["w"]
    change, true_change = last - truth[0], truth[-1] - truth[0]
    updated = change != 0
    assert updated.sum() > 1000
    assert (np.sign(change[updated]) == np.sign(true_change[updated])).all()
    opened(store).restore_with(lambda c: c.verify())


def test_the_reader_returns_the_reconstruction_exactly(store: MemoryStore) -> None:
    """What is read equals what the next difference is taken to, kept elements are exact."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal(1000).astype(np.float32)
    with opened(store, strategy=AsymCheck(policy=Always("topk"))) as checkpointer:
        checkpointer.save(0, {"params": {"w": w}}).wait()
        before = w.copy()
        w[rng.permutation(1000)[:10]] += np.linspace(1, 2, 10, dtype=np.float32)
        w[0] += np.float32(1e-3)
        checkpointer.save(1, {"params": {"w": w}}).wait()
        read = checkpointer.restore(1)["params"]["w"]
        reference = checkpointer._increments.reference
        assert reference is not None
        assert reference._bytes.tobytes() == read.tobytes()
        kept = np.abs(w - before) >= 1
        assert np.array_equal(read[kept], w[kept]) and kept.sum() >= 9
        assert np.array_equal(
            read[~kept & (np.arange(1000) > 0)], before[~kept & (np.arange(1000) > 0)]
        )


def test_weights_and_moments_by_excp_stay_within_what_is_stated(store: MemoryStore) -> None:
    """Twenty steps on end: what a reader gets is as far from the truth as stated, and no drift."""
    rng = np.random.default_rng(2)
    w, m = rng.normal(0, 0.02, 20_000), rng.normal(0.3, 0.23, 20_000)  # most weights drift
    truth: list[dict[str, np.ndarray]] = []
    with opened(store, strategy=AsymCheck(policy=Always("excp")), max_chain=200) as checkpointer:
        for step in range(20):
            m = 0.9 * m + 0.1 * rng.normal(0.3, 1, m.size)
            w = w - 1e-4 * m
            arrays = {"params": w, "exp_avg": m, "exp_avg_sq": m**2}
            truth.append({kind: a.astype(np.float32) for kind, a in arrays.items()})
            state = {kind: {"w": array} for kind, array in truth[-1].items()}
            checkpointer.save(step, state)
        checkpointer.wait()
    rms: list[float] = []
    for step in range(1, 20):
        fidelity = step_fidelity(store, load_index(store, step))
        assert fidelity is not None and fidelity.exact_leaves == 0
        stated = {leaf.leaf: leaf.absolute for leaf in fidelity.lossy}
        read = opened(store).restore(step)
        for kind, true in truth[step].items():
            error = np.abs(read[kind]["w"].astype(np.float64) - true)
            assert stated[f"{kind}/w"] == error.max()
        rms.append(float(np.sqrt(np.mean((read["params"]["w"] - truth[step]["params"]) ** 2))))
    moved = float(np.sqrt(np.mean((truth[-1]["params"] - truth[0]["params"]) ** 2)))
    assert max(rms[10:]) < 1.5 * max(rms[:10]) < 0.02 * moved


def test_lossless_is_the_default() -> None:
    for strategy in ("asymcheck", "asymcheck-s", "asymcheck-naive", "synchronous"):
        store = MemoryStore()
        state = training_state(0, 30_000)
        with Checkpointer(store, strategy=strategy, cost_model=slow_store_costs()) as checkpointer:
            for step in range(3):
                checkpointer.save(step, drifted(state, step))
            checkpointer.wait()
            assert same(checkpointer.restore(2), drifted(state, 2))
        assert not any(b.codec.lossy for s in range(3) for b in load_index(store, s).blocks())


# -- what is recorded --------------------------------------------------------------------------


def test_records_what_happened(store: MemoryStore) -> None:
    state = training_state(13, 30_000)
    with opened(store, strategy=AsymCheck(policy=Never())) as checkpointer:
        pending = checkpointer.save(0, state)
        checkpointer.wait()
        stats = load_index(store, 0).manifests[0].stats
        stored = sum(len(store.objects[key]) for key in store.keys(".pack"))
        assert stats["raw_nbytes"] == stats["stored_nbytes"] == stored
        assert stats["durable_after_s"] > 0 and pending.stall_s > 0
        assert {d["codec"] for d in stats["decisions"]} == {"raw"}
        events = checkpointer.trace.events()
    tracks = [event.track for event in events]
    assert {"copy", "stall", "flush", "commit"} <= set(tracks)
    assert sum(e.nbytes for e in events if e.track == "copy") == stored
    assert sum(e.nbytes for e in events if e.track == "flush") == stored
    assert all(e.begin_s <= e.end_s and e.step == 0 for e in events)


def test_packs_are_derived_from_the_costs() -> None:
    """Where puts are cheap there are many packs, where each costs seconds there are few."""
    state = {"params": {f"w{i}": np.zeros(100_000, np.uint8) for i in range(200)}}
    counts: list[int] = []
    for put_s in (1e-5, 10.0):
        costs = GivenCosts(4e-7, put_s, copy_s_per_byte=1e-7)
        store = MemoryStore()
        with opened(store, strategy=AsymCheck(policy=Never()), cost_model=costs) as checkpointer:
            checkpointer.save(0, state)
        counts.append(len(store.keys(".pack")))
    assert counts[1] in (4, 5) and counts[0] >= 15


@pytest.mark.parametrize("put_s", [0.0, 1e-5, 1e-3, 0.1, 10.0])
def test_a_whole_number_of_packs_fills_a_buffer(store: MemoryStore, put_s: float) -> None:
    costs = GivenCosts(1e-9, put_s, copy_s_per_byte=1e-8)
    with opened(store, cost_model=costs, max_host_bytes=512 << 20) as checkpointer:
        checkpointer.save(0, {})
        pipeline, made = checkpointer._pipeline, checkpointer._plan
        assert pipeline is not None and made is not None
        for volume_nbytes in (1, 10**6, 40 << 20, 3 * 10**8, 1 << 34):
            plan = replace(made, nbytes=volume_nbytes)
            target = pipeline.batching(plan, has_base=False).pack_nbytes
            assert 0 < target <= pipeline.buffer_nbytes
            packs = pipeline.buffer_nbytes // target
            builder = PackBuilder(pipeline.capture_pool, target)
            slots = [builder.reserve(target)[0] for _ in range(packs)]
            assert len({id(slot.pack.buffer) for slot in slots}) == 1
            for slot in slots:
                slot.pack.release()
            builder.close()


@dataclass
class Slow:
    """Puts take their time, so that several saves are under way."""

    turns: int = 0

    def __call__(self, operation: str, key: str) -> None:
        self.turns += operation == "put" and key.endswith(".pack")


def test_many_steps_in_little_memory(store: MemoryStore) -> None:
    store.hook = Slow()
    state = training_state(14, 20_000)
    with opened(store, strategy=DELTA, max_host_bytes=2 << 20, max_to_keep=5) as checkpointer:
        for step in range(60):
            state = drifted(state, step)
            checkpointer.save(step, state)
        checkpointer.wait()
        assert same(checkpointer.restore(), state)
        assert checkpointer.host_nbytes <= 2 << 20
        assert len(checkpointer.steps()) <= 5 + 10
    assert store.hook.turns >= 60
