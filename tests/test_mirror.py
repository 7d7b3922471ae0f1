"""Mirrors: steps come to a second store behind training's back, and back from it when needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_writer import known_state, restored
from memory_store import MemoryStore
from object_urls import gs_url, s3_url
from states import drifted, same, training_state
from test_copying import DELTA, PATIENCE_S, assert_whole, await_that, chain_of, content
from test_lease import Clock
from writers import Writers

from asymcheck import Checkpointer, CostModel, open_checkpoint, open_store
from asymcheck.commit import commit_key, committed_steps
from asymcheck.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    MirrorError,
    StepExistsError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from asymcheck.inspection.copies import copy_step
from asymcheck.manifest import data_prefix
from asymcheck.mirror import Mirror
from asymcheck.retention import Retention, collect_orphans
from asymcheck.stores import LocalStore
from asymcheck.threads import LOW_PRIORITY_NICE

TESTS = Path(__file__).parent
DOWN = StoreUnavailableError("503")


@pytest.fixture
def near() -> MemoryStore:
    return MemoryStore("near")


@pytest.fixture
def far() -> MemoryStore:
    return MemoryStore("far")


def opened(near: Any, far: Any, **options: Any) -> Checkpointer:
    return Checkpointer(
        near,
        mirror=far,
        **{"strategy": DELTA, "max_chain": 2, "cost_model": CostModel(), **options},
    )


def train(checkpointer: Checkpointer, steps: range, mirrored: bool = False) -> dict[int, Any]:
    """Save those steps, each when the one before is committed (and in the mirror, if asked)."""
    states: dict[int, Any] = {}
    state = training_state(steps[0])
    for step in steps:
        state = states[step] = drifted(state, step)
        checkpointer.save(step, state).wait(PATIENCE_S)
        if mirrored:
            await_mirror(checkpointer)
    return states


def await_mirror(checkpointer: Checkpointer) -> None:
    """Return when nothing is due in the mirror."""
    mirror = checkpointer._mirror
    assert mirror is not None
    await_that(lambda: not mirror._is_busy and not mirror._is_awake)


def damage(store: MemoryStore, step: int) -> None:
    for key in store.keys(f"data/{step:016d}"):
        if key.endswith(".pack"):
            store.objects[key] = bytes(len(store.objects[key]))


# -- what comes to the mirror ------------------------------------------------------------------


def test_every_step_by_default(near: MemoryStore, far: MemoryStore) -> None:
    with opened(near, far) as checkpointer:
        states = train(checkpointer, range(1, 6), mirrored=True)
        assert committed_steps(far) == [1, 2, 3, 4, 5]
        assert content(far) == {k: v for k, v in content(near).items() if ".probe" not in k}
    assert_whole(far, states)
    assert far.keys("runs/") == near.keys("runs/") == []


def test_multiples_of_mirror_every_and_their_chains(near: MemoryStore, far: MemoryStore) -> None:
    with opened(near, far, mirror_every=4) as checkpointer:
        states = train(checkpointer, range(1, 10), mirrored=True)
    assert [chain_of(near, step) for step in (4, 8)] == [[4], [7, 8]]
    assert committed_steps(far) == [4, 7, 8]
    assert_whole(far, states)
    assert not [key for key in far.called("put") if f"{9:016d}" in key]


def test_close_finishes_what_is_due(near: MemoryStore, far: MemoryStore) -> None:
    with opened(near, far, max_chain=0) as checkpointer, far.hold("put", ".pack") as held:
        train(checkpointer, range(1, 2))
        held.await_calls()
        train(checkpointer, range(2, 3))
        checkpointer.wait(PATIENCE_S)  # not for the mirror
        assert checkpointer.steps() == [1, 2]
        assert committed_steps(far) == []
    assert committed_steps(far) == [1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("asymcheck-mirror")]


def test_retention_of_its_own(near: MemoryStore, far: MemoryStore) -> None:
    options = {"max_to_keep": 1, "mirror_max_to_keep": 2, "mirror_keep_every": 4, "max_chain": 0}
    with opened(near, far, **options) as checkpointer:
        states = train(checkpointer, range(1, 11), mirrored=True)
    assert committed_steps(far) == [4, 8, 9, 10]
    assert_whole(far, states)
    # The last removal here comes with the next commit, as step 9 was in use in the one before.
    assert set(committed_steps(near)) <= {9, 10} and 10 in committed_steps(near)
    named = {key.split("/")[1] for key in far.keys("data/")}
    assert {int(name[:16]) for name in named} == {4, 8, 9, 10}


def test_retention_keeps_chains_in_the_mirror(near: MemoryStore, far: MemoryStore) -> None:
    with opened(near, far, max_to_keep=1, mirror_max_to_keep=1) as checkpointer:
        states = train(checkpointer, range(1, 9), mirrored=True)
    assert chain_of(far, 8) == committed_steps(far) == [7, 8]
    assert_whole(far, states)


def test_what_torn_copies_left_is_collected(near: MemoryStore, far: MemoryStore) -> None:
    """Once in a run, after a first copy, which may take over some of it."""
    torn = data_prefix(1, "dead-000000") + "w00000-000000.pack"
    far.objects[torn] = b"x"
    with opened(near, far) as checkpointer:
        train(checkpointer, range(1, 2), mirrored=True)
        assert torn not in far.objects
        far.objects[torn] = b"x"
        train(checkpointer, range(2, 4), mirrored=True)
    assert torn in far.objects
    assert_whole(far)


def test_its_memory_is_part_of_the_bound(near: MemoryStore, far: MemoryStore) -> None:
    with opened(near, far, max_host_bytes=1 << 20) as checkpointer:
        train(checkpointer, range(1, 4))
        pipeline = checkpointer._pipeline
        assert pipeline is not None
        share = 4 * (1 << 20) // 16
        assert all(len(near.objects[key]) <= share // 4 for key in near.keys(".pack"))
        assert pipeline.capture_nbytes + 8 * pipeline.buffer_nbytes == (1 << 20) - share


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_it_gives_way_to_training(near: MemoryStore, far: MemoryStore) -> None:
    """The threads that copy, too, whoever begins them."""
    train_alone(near)
    nices: dict[str, int] = {}

    def look(operation: str, key: str) -> None:
        thread = threading.current_thread().name
        nices[thread] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    far.hook = look
    failures: list[BaseException] = []
    mirror = Mirror(near, far, every=1, retention=Retention(), lease_s=60.0, failed=failures.append)
    mirror.committed(1)
    assert mirror.close(PATIENCE_S) and failures == []
    nices.pop("asymcheck-lease", None)  # its first renewal is not soon
    assert nices.keys() == {"asymcheck-mirror", "asymcheck-copy-0"}
    assert min(nices.values()) >= LOW_PRIORITY_NICE


def train_alone(store: MemoryStore) -> None:
    with Checkpointer(store, cost_model=CostModel()) as checkpointer:
        checkpointer.save(1, training_state(1))


# -- a mirror that fails, hangs, comes back ----------------------------------------------------


def test_a_failing_mirror_is_told_of_and_harms_nothing(
    near: MemoryStore, far: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = opened(near, far, max_chain=0)
    with far.failing("put", ".manifest", DOWN):
        states = train(checkpointer, range(1, 2))
        await_mirror(checkpointer)
        with pytest.raises(MirrorError, match="memory://far") as raised:
            checkpointer.save(2, states[1])
    error = raised.value
    assert error.step == 1 and isinstance(error.__cause__, StoreUnavailableError)
    assert "The step is committed in memory://near" in str(error)
    assert "the mirror memory://far is not up to date" in caplog.text
    assert checkpointer.steps() == [1] and committed_steps(far) == []
    states |= train(checkpointer, range(2, 3), mirrored=True)  # raised once; tried again
    checkpointer.close()
    assert committed_steps(near) == [1, 2]
    assert committed_steps(far) == [2]
    assert_whole(far, states)


def test_with_warnings_only_training_never_hears_of_it(
    near: MemoryStore, far: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with far.failing("put", "", DOWN), opened(near, far, on_error="warn") as checkpointer:
        states = train(checkpointer, range(1, 6), mirrored=True)
    assert committed_steps(near) == [1, 2, 3, 4, 5]
    assert_whole(near, states)
    assert caplog.text.count("the mirror memory://far is not up to date") == 5
    assert far.objects == {}


def test_errors_at_the_end_are_raised_by_close(near: MemoryStore, far: MemoryStore) -> None:
    checkpointer = opened(near, far)
    with far.failing("put", ".manifest", DOWN):
        checkpointer.save(1, {"a": 1})
        with pytest.raises(MirrorError):
            checkpointer.close()
    checkpointer.close()
    assert committed_steps(near) == [1]


def test_a_mirror_that_cannot_be_tidied(near: MemoryStore, far: MemoryStore) -> None:
    checkpointer = opened(near, far, mirror_max_to_keep=1, max_chain=0)
    train(checkpointer, range(1, 2), mirrored=True)
    with far.failing("delete", "commits/", StoreError("may not delete")):
        train(checkpointer, range(2, 3), mirrored=True)
        with pytest.raises(MirrorError, match="may not delete"):
            checkpointer.wait()
    assert committed_steps(far) == [1, 2]
    train(checkpointer, range(3, 4), mirrored=True)
    checkpointer.close()
    assert committed_steps(far) == [3]


def test_a_full_mirror_is_swept(near: MemoryStore, far: MemoryStore) -> None:
    """Perhaps it is full of what torn copies left."""
    torn = data_prefix(1, "dead-000000") + "w00000-000000.pack"
    far.objects[torn] = b"x"

    def full(operation: str, key: str) -> None:
        if operation == "put" and key.startswith("data/") and torn in far.objects:
            raise StoreFullError("no room")

    far.hook = full
    checkpointer = opened(near, far)
    train(checkpointer, range(1, 2), mirrored=True)
    with pytest.raises(MirrorError, match="no room"):
        checkpointer.wait()
    train(checkpointer, range(2, 3), mirrored=True)
    checkpointer.close()
    assert committed_steps(far) == [1, 2] == chain_of(far, 2)


def test_a_mirror_that_hangs(
    near: MemoryStore, far: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """One step is being copied and one waits, with their chains; the others go as ever."""
    checkpointer = opened(near, far, max_to_keep=1, max_chain=1, mirror_every=3)
    with far.hold("put", ".pack") as held:
        states = train(checkpointer, range(1, 4))
        held.await_calls()  # on step 3
        states |= train(checkpointer, range(4, 41))
        assert set(committed_steps(near)) == {3, 39, 40}
        assert [chain_of(near, step) for step in (3, 39, 40)] == [[3], [39], [39, 40]]
        assert "does not keep up: step 6 will not be in it, but step 9" in caplog.text
        assert caplog.text.count("does not keep up") == 11
        assert checkpointer.steps() == [3, 39, 40]
    await_mirror(checkpointer)
    assert committed_steps(far) == [3, 39]
    states |= train(checkpointer, range(41, 43))
    assert committed_steps(near) == [41, 42]
    checkpointer.close()
    assert committed_steps(far) == [3, 39, 41, 42]
    assert_whole(far, states)
    assert_whole(near, states)


def test_a_chain_stays_while_it_is_copied(near: MemoryStore, far: MemoryStore) -> None:
    """Bases go first: the step itself is the last to be read, long after retention dropped it."""
    checkpointer = opened(near, far, max_to_keep=1, mirror_every=3)
    with far.hold("put_if_absent", commit_key(1)) as held:
        states = train(checkpointer, range(1, 4))
        held.await_calls()
        states |= train(checkpointer, range(4, 9))
        assert committed_steps(near) == [1, 2, 3, 4, 5, 6, 7, 8]  # 6 waits, on 4 and 5
    await_mirror(checkpointer)
    states |= train(checkpointer, range(9, 10))
    assert committed_steps(near) == [7, 8, 9]
    checkpointer.close()
    assert committed_steps(far) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert_whole(far, states)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_close_does_not_wait_longer_than_it_should(
    near: MemoryStore, far: MemoryStore, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = opened(near, far, on_error=on_error)
    with far.hold("put", ".pack") as held:
        states = train(checkpointer, range(1, 2))
        held.await_calls()
        states |= train(checkpointer, range(2, 4))
        if on_error == "raise":
            with pytest.raises(TimeoutError, match="asymcheck copy memory://near"):
                checkpointer.close(0.05)
        else:
            checkpointer.close(0.05)
    assert "'asymcheck copy memory://near'" in caplog.text
    assert_whole(near, states)
    await_that(lambda: not [t for t in threading.enumerate() if t.name == "asymcheck-mirror"])
    assert committed_steps(far) == [1]  # what waited is dropped


def test_a_process_ends_although_the_mirror_hangs(tmp_path: Path) -> None:
    code = """
import sys, time
from asymcheck import Checkpointer
from asymcheck.stores import LocalStore

class Hanging(LocalStore):
    def put(self, key, data):
        if key.endswith(".pack"):
            print("hangs", flush=True)
            time.sleep(1000)
        super().put(key, data)

checkpointer = Checkpointer(sys.argv[1], mirror=Hanging(sys.argv[2]), on_error="warn")
checkpointer.save(1, {"a": b"x" * 100})
checkpointer.close(1.0)
print("closed", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "near", tmp_path / "far"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "hangs\nclosed\n"), done.stderr
    assert committed_steps(LocalStore(tmp_path / "near")) == [1]


def test_a_damaged_step_does_not_come_to_the_mirror(near: MemoryStore, far: MemoryStore) -> None:
    """And that it is damaged is known before it is needed."""
    checkpointer = opened(near, far, max_chain=0)

    def spoil(operation: str, key: str) -> None:
        if operation == "has_length" and f"{1:016d}" in key:
            damage(near, 1)

    near.hook = spoil
    checkpointer.save(1, training_state(1))
    with pytest.raises(MirrorError) as raised:
        checkpointer.close()
    assert isinstance(raised.value.__cause__, CorruptionError)
    assert committed_steps(far) == []


def test_a_copy_is_not_committed_when_its_lease_ran_out(
    near: MemoryStore, far: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was suspended for longer than others leave its objects alone."""
    checkpointer = opened(near, far, lease_s=600.0, max_chain=0)
    clock = Clock(monkeypatch)
    with far.hold("put", ".manifest") as held:
        train(checkpointer, range(1, 2))
        held.await_calls()
        clock.advance(601)
        assert collect_orphans(far) == []  # of this machine: its process is seen to live
    await_mirror(checkpointer)
    with pytest.raises(MirrorError, match="lease ran out"):
        checkpointer.wait()
    assert checkpointer._pipeline is not None
    checkpointer._pipeline.lease._renew()
    train(checkpointer, range(2, 3), mirrored=True)
    checkpointer.close()
    assert committed_steps(far) == [2]


# -- restoring ---------------------------------------------------------------------------------


@pytest.fixture(params=["file", "gs", "s3"])
def far_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a mirror may be; for object stores on a server of the tests."""
    if request.param == "gs":
        return gs_url(request.getfixturevalue("gcs_server"))
    if request.param == "s3":
        return s3_url(request.getfixturevalue("s3_server"))
    return (tmp_path / "far").as_uri()


def test_a_lost_disk(tmp_path: Path, far_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left of the run's own store; training goes on, bit for bit."""
    near, far = tmp_path / "near", far_url
    with opened(near, far) as checkpointer:
        states = train(checkpointer, range(1, 5), mirrored=True)
    shutil.rmtree(near)
    with opened(near, far) as checkpointer:
        assert checkpointer.steps() == [1, 2, 3, 4] and checkpointer.latest_step() == 4
        state = checkpointer.restore()
        assert same(state, states[4])
        assert "step 4 is read from the mirror " in caplog.text
        assert same(checkpointer.restore(2), states[2])
        for step in (5, 6):
            state = states[step] = drifted(state, step)
            checkpointer.save(step, state).wait(PATIENCE_S)
            await_mirror(checkpointer)
        assert checkpointer.steps() == [1, 2, 3, 4, 5, 6]
    assert committed_steps(LocalStore(near)) == [5, 6]
    assert chain_of(LocalStore(near), 6) == [5, 6]
    with closing(open_store(far)) as mirror:
        assert committed_steps(mirror) == [1, 2, 3, 4, 5, 6]
        assert_whole(mirror, states)
        assert mirror.list("runs/") == []
    assert_whole(LocalStore(near), states)
    caplog.clear()
    with opened(near, far) as checkpointer:
        assert same(checkpointer.restore(), states[6])
    assert caplog.text == ""


def test_the_mirrors_copy_of_a_damaged_step(
    near: MemoryStore, far: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes before any older step; the damaged one gives way when training commits again."""
    with opened(near, far, max_chain=0) as checkpointer:
        states = train(checkpointer, range(1, 4), mirrored=True)
    damage(near, 3)
    with opened(near, far, max_chain=0) as checkpointer:
        assert same(checkpointer.restore(), states[3])
        assert same(checkpointer.restore(3), states[3])
        assert "step 3 cannot be restored from memory://near" in caplog.text
        target = drifted(states[3], 1)
        assert same(checkpointer.restore(target=target), states[3])
        assert same(target["params"], states[3]["params"])
        states |= train(checkpointer, range(4, 5), mirrored=True)
        assert committed_steps(near) == [1, 2, 4]
        assert committed_steps(far) == [1, 2, 3, 4]
    assert len(near.keys("damaged/")) == 1 and far.keys("damaged/") == []


def test_both_copies_are_damaged(near: MemoryStore, far: MemoryStore) -> None:
    """An older step is restored, and both give way: else the number could not come again."""
    with opened(near, far, max_chain=0) as checkpointer:
        states = train(checkpointer, range(1, 4), mirrored=True)
    damage(near, 3)
    damage(far, 3)
    with opened(near, far, max_chain=0, mirror_every=3) as checkpointer:
        with pytest.raises(CorruptionError):
            checkpointer.restore(3)
        assert same(checkpointer.restore(), states[2])
        assert committed_steps(far) == [1, 2, 3]  # reading changes nothing
        states |= train(checkpointer, range(3, 4), mirrored=True)
        assert same(checkpointer.restore(), states[3])
    assert committed_steps(near) == committed_steps(far) == [1, 2, 3]
    assert len(near.keys("damaged/")) == len(far.keys("damaged/")) == 1
    assert_whole(far, states)


def test_damaged_steps_of_the_mirror_give_way_at_once(near: MemoryStore, far: MemoryStore) -> None:
    """Whether or not the next step is due: a restart must not find them. Tried until it is done."""
    with opened(near, far, max_chain=0) as checkpointer:
        train(checkpointer, range(1, 4), mirrored=True)
    near.objects.clear()
    damage(far, 3)
    checkpointer = opened(near, far, mirror_every=100)
    checkpointer.restore()
    with far.failing("delete", "commits/", DOWN):
        train(checkpointer, range(4, 5), mirrored=True)
        with pytest.raises(MirrorError, match="503"):
            checkpointer.wait()
    assert committed_steps(far) == [1, 2, 3]
    train(checkpointer, range(5, 6), mirrored=True)
    assert committed_steps(far) == [1, 2]
    checkpointer.close()


def test_a_damaged_step_is_healed_from_the_mirror(near: MemoryStore, far: MemoryStore) -> None:
    """Its bytes lie there still, under the same keys and of the right length: all are sent."""
    with opened(near, far, max_chain=0) as checkpointer:
        states = train(checkpointer, range(1, 4), mirrored=True)
    damage(near, 3)
    with opened(near, far, max_chain=0) as checkpointer:
        checkpointer.restore()
        states |= train(checkpointer, range(4, 5))
    assert committed_steps(near) == [1, 2, 4]
    assert near.keys(f"data/{3:016d}") != []
    assert copy_step(far, near, 3).good
    assert committed_steps(near) == [1, 2, 3, 4]
    assert_whole(near, states)


def test_nothing_builds_on_a_damaged_step_that_the_mirror_has_whole(
    near: MemoryStore, far: MemoryStore
) -> None:
    """The process that saved it goes on: its next step is stored in full."""
    with opened(near, far) as checkpointer:
        states = train(checkpointer, range(1, 3), mirrored=True)
        damage(near, 2)
        assert same(checkpointer.restore(), states[2])
        states |= train(checkpointer, range(3, 4), mirrored=True)
        assert committed_steps(near) == [1, 3]
        assert chain_of(near, 3) == [3]
    assert_whole(near, states)
    assert_whole(far, states)


def test_nothing_builds_on_a_step_that_is_gone(near: MemoryStore, far: MemoryStore) -> None:
    """The disk is lost while the process lives."""
    with opened(near, far, mirror_every=2) as checkpointer:
        states = train(checkpointer, range(1, 4), mirrored=True)
        near.objects.clear()
        assert same(checkpointer.restore(), states[2])
        states |= train(checkpointer, range(4, 6), mirrored=True)
    assert chain_of(near, 5) == committed_steps(near) == [4, 5]
    assert_whole(near, states)
    assert_whole(far, states)


def test_a_mirror_that_cannot_be_reached_when_training_begins(
    near: MemoryStore, far: MemoryStore
) -> None:
    with opened(near, far) as checkpointer:
        states = train(checkpointer, range(1, 3), mirrored=True)
    with far.failing("list", "", DOWN):
        with opened(near, far) as checkpointer:
            assert same(checkpointer.restore(), states[2])
        with (
            opened(MemoryStore("new disk"), far) as checkpointer,
            pytest.raises(StoreUnavailableError),
        ):
            checkpointer.restore()
    with opened(MemoryStore("new disk"), MemoryStore("new mirror")) as checkpointer:
        with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint"):
            checkpointer.restore()
        assert checkpointer.steps() == []


def test_commit_records_of_both(near: MemoryStore, far: MemoryStore) -> None:
    with opened(near, far) as checkpointer:
        train(checkpointer, range(1, 3), mirrored=True)
        record = checkpointer.commit_record(2)
        del near.objects[commit_key(2)]
        assert checkpointer.commit_record(2) == record
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.commit_record(3)


# -- going back --------------------------------------------------------------------------------


def test_discarding_later_steps_in_both(near: MemoryStore, far: MemoryStore) -> None:
    with opened(near, far, max_to_keep=2, max_chain=0) as checkpointer:
        states = train(checkpointer, range(1, 7), mirrored=True)
        assert checkpointer.discard_after(3) == [4, 5, 6]
        assert committed_steps(far) == [1, 2, 3] and committed_steps(near) == []
        assert same(checkpointer.restore(), states[3])
        states |= train(checkpointer, range(4, 7), mirrored=True)
    assert committed_steps(far) == [1, 2, 3, 4, 5, 6]
    assert_whole(far, states)


def test_what_is_being_copied_is_discarded_too(near: MemoryStore, far: MemoryStore) -> None:
    with opened(near, far, max_chain=0) as checkpointer:
        train(checkpointer, range(1, 2), mirrored=True)
        with far.hold("put_if_absent", commit_key(2)) as held:
            train(checkpointer, range(2, 3))
            held.await_calls()
            train(checkpointer, range(3, 4))
            discarding = threading.Thread(target=checkpointer.discard_after, args=(1,))
            discarding.start()
            mirror = checkpointer._mirror
            assert mirror is not None
            await_that(lambda: mirror.in_use == [2])  # what waited is dropped
            discarding.join(0.2)
            assert discarding.is_alive() and committed_steps(near) == [1, 2, 3]
        discarding.join(PATIENCE_S)
        await_mirror(checkpointer)
        assert committed_steps(near) == committed_steps(far) == [1]
        assert checkpointer.steps() == [1]


def test_a_mirror_that_cannot_discard(near: MemoryStore, far: MemoryStore) -> None:
    """Then nothing is discarded here: else a restart would take the mirror's later steps."""
    with opened(near, far) as checkpointer:
        train(checkpointer, range(1, 4), mirrored=True)
        with far.failing("delete", "commits/", DOWN), pytest.raises(StoreUnavailableError):
            checkpointer.discard_after(1)
        assert committed_steps(near) == [1, 2, 3]
        assert checkpointer.discard_after(1) == [2, 3]


def test_going_back_without_discarding(near: MemoryStore, far: MemoryStore) -> None:
    """The mirror's steps are as untouchable as the run's own, and it says what is the matter."""
    with opened(near, far, max_to_keep=1, max_chain=0) as checkpointer:
        states = train(checkpointer, range(1, 4), mirrored=True)
    near.objects.clear()
    with opened(near, far, max_chain=0) as checkpointer:
        assert same(checkpointer.restore(2), states[2])
        checkpointer.save(3, {"another": 3}).wait(PATIENCE_S)
        await_mirror(checkpointer)
        with pytest.raises(MirrorError, match="another step of that number") as raised:
            checkpointer.wait()
        assert isinstance(raised.value.__cause__, StepExistsError)
        assert "memory://near" in str(raised.value) and "memory://far" in str(raised.value)
        checkpointer.save(4, {"another": 4}).wait(PATIENCE_S)
        await_mirror(checkpointer)
    assert committed_steps(near) == [3, 4] and committed_steps(far) == [1, 2, 3, 4]
    with opened(near, far) as checkpointer:
        assert checkpointer.restore() == {"another": 4}


def test_a_step_that_is_copied_stays_beside_later_ones(near: MemoryStore, far: MemoryStore) -> None:
    """It is the newest of this training, whatever its number."""
    with opened(near, far) as checkpointer:
        train(checkpointer, range(100, 101), mirrored=True)
    near.objects.clear()
    with opened(near, far, mirror_max_to_keep=1) as checkpointer:
        states = train(checkpointer, range(5, 8), mirrored=True)
    assert committed_steps(far) == [5, 6, 7, 100]
    assert same(Checkpointer(far).restore(7), states[7])


# -- several places, several writers -----------------------------------------------------------


def test_a_mirror_is_another_place(near: MemoryStore, tmp_path: Path) -> None:
    for mirror in (near, MemoryStore(near.url.removeprefix("memory://"))):
        with pytest.raises(StoreError, match="the same place"):
            opened(near, mirror)
    for every in (0, -1):
        with pytest.raises(ValueError, match="mirror_every"):
            opened(near, tmp_path, mirror_every=every)
    with pytest.raises(ValueError, match="max_to_keep"):
        opened(near, tmp_path, mirror_max_to_keep=0)
    with pytest.raises(StoreError, match="unknown kind"):
        opened(near, "ftp://x")


def test_a_mirror_that_is_the_run_itself_by_another_url_removes_nothing(
    near: MemoryStore, far: MemoryStore
) -> None:
    far.objects = near.objects
    checkpointer = opened(near, far, mirror_max_to_keep=1, max_chain=0)
    for step in range(1, 4):
        states = train(checkpointer, range(step, step + 1), mirrored=True)
        with pytest.raises(MirrorError, match="the same place"):
            checkpointer.wait()
    checkpointer.close()
    assert committed_steps(near) == [1, 2, 3]
    assert_whole(near)
    assert states.keys() == {3}


def test_of_several_writers_the_first_copies_everything(
    near: MemoryStore, far: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = training_state(2)
    with Writers(
        near, 3, mirror=far, strategy=DELTA, max_chain=2, cost_model=CostModel()
    ) as writers:
        for step in range(1, 5):
            assert writers.save_state(step, drifted(state, step)) == [None] * 3
            await_mirror(writers.each[0])
        for other in writers.each[1:]:
            assert other._mirror is not None and other._mirror._thread is None
    assert committed_steps(far) == [1, 2, 3, 4]
    assert_whole(far)
    near.objects.clear()
    with Writers(near, 2, mirror=far, run_id="again") as writers:
        for each in writers.all(lambda writer: writers.each[writer].restore()):
            assert same(each, {**drifted(state, 4), "ranks": {}})


# -- a process that is killed ------------------------------------------------------------------

VICTIM = """
import sys
sys.path.insert(0, TESTS)
from kill_writer import *

with Checkpointer(
    sys.argv[1],
    mirror=sys.argv[2],
    strategy=STRATEGIES["delta"],
    max_host_bytes=8 << 20,
    max_to_keep=2,
    mirror_max_to_keep=3,
    max_chain=3,
    cost_model=CostModel(),
) as checkpointer:
    first = 0
    try:
        step, of = restored(checkpointer.restore())
        say("restored", step, of)
        first = step + 1
    except CheckpointNotFoundError:
        say("nothing")
    for step in itertools.count(first):
        checkpointer.save(step, known_state(step, int(sys.argv[3]))).wait()
        say("durable", step)
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_while_it_mirrors(tmp_path: Path, seed: int) -> None:
    """Then the disk is lost: the mirror has whole steps, and training goes on from the newest."""
    near, far = tmp_path / "near", tmp_path / "far"
    body = VICTIM.replace("TESTS", repr(str(TESTS)))
    chance = np.random.default_rng(seed)
    newest = -1
    for life in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", body, near, far, str(life)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline().split()
        assert first == (["restored", str(newest), str(life - 1)] if life else ["nothing"])
        await_that(lambda last=newest: max(committed_steps(LocalStore(far)), default=-1) > last)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        durable = [int(line.split()[1]) for line in process.stdout if line.endswith("\n")]
        errors = process.stderr.read()
        assert process.wait() == -signal.SIGKILL, errors
        assert "Error" not in errors, errors
        shutil.rmtree(near)
        steps = committed_steps(LocalStore(far))
        assert steps and newest < steps[-1] <= durable[-1] + 1
        for step in steps:
            with open_checkpoint(far, step) as checkpoint:
                checkpoint.verify()
                assert restored(checkpoint.state())[0] == step
        newest = steps[-1]
    with Checkpointer(near, mirror=far) as checkpointer:
        assert restored(checkpointer.restore()) == (newest, 2)
        checkpointer.save(newest + 1, known_state(newest + 1, 3))
    left = LocalStore(far)
    kept = {str(key).split("/")[1] for key in left.list("data/")}
    assert len(kept) == len(committed_steps(left)), "what torn copies left was not collected"
    assert left.list("runs/") == []
    assert list((far / ".tmp").iterdir()) == []


SLOW = """
import sys
sys.path.insert(0, TESTS)
from kill_writer import *
from asymcheck.stores import LocalStore

class Slow(LocalStore):
    def put(self, key, data):
        if key.endswith(".manifest") and f"{2:016d}" in key:
            say("torn")
            sys.stdin.readline()
        super().put(key, data)

with Checkpointer(
    sys.argv[1], mirror=Slow(sys.argv[2]), strategy=STRATEGIES["delta"], cost_model=CostModel()
) as checkpointer:
    for step in (1, 2):
        checkpointer.save(step, known_state(step, 0)).wait()
        while checkpointer._mirror._is_busy and step == 1:
            pass
"""


def test_killed_in_the_middle_of_a_copy(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.replace("TESTS", repr(str(TESTS))), near, far],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "torn\n"
    process.kill()
    process.communicate()
    torn = list(far.glob(f"data/{2:016d}-*/*.pack"))
    assert torn != [] and committed_steps(LocalStore(far)) == [1]
    shutil.rmtree(near)
    with Checkpointer(near, mirror=far) as checkpointer:
        assert restored(checkpointer.restore()) == (1, 0)
        checkpointer.save(2, known_state(2, 1)).wait()
    with open_checkpoint(far) as checkpoint:
        assert restored(checkpoint.state()) == (2, 1)
    assert not any(path.exists() for path in torn)


def test_a_torn_copy_is_taken_over(near: MemoryStore, far: MemoryStore) -> None:
    """A copy that ended before its commit record is finished by the next, packs and all."""
    checkpointer = opened(near, far, mirror_every=1, max_chain=1)
    with far.failing("put_if_absent", "commits/", DOWN):
        states = train(checkpointer, range(1, 2), mirrored=True)
        with pytest.raises(MirrorError):
            checkpointer.wait()
    packs = far.keys(".pack")
    assert packs != [] and committed_steps(far) == []
    far.calls.clear()
    states |= train(checkpointer, range(2, 3), mirrored=True)
    checkpointer.close()
    assert chain_of(far, 2) == [1, 2]
    assert not set(packs) & set(far.called("put"))
    assert_whole(far, states)
