"""Leases: the objects of a living run are left alone, those of a dead one are not."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from memory_store import MemoryStore

from asymcheck import Checkpointer
from asymcheck.errors import (
    CommitError,
    SaveFailedError,
    StoreFullError,
    StorePermissionError,
    StoreUnavailableError,
)
from asymcheck.lease import (
    Lease,
    LeaseKeeper,
    copier_number,
    live_removers,
    live_runs,
    removing,
)
from asymcheck.manifest import MAX_WRITERS
from asymcheck.records import seal, unseal
from asymcheck.retention import collect_orphans
from asymcheck.stores import process_identity

ORPHAN = "data/0000000000000005-dead-000000/w00000-000000.pack"


class Clock:
    """The time of day, which stands still unless the test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = time.time()
        monkeypatch.setattr(time, "time", lambda: self.now_s)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def keepers() -> Iterator[list[LeaseKeeper]]:
    made: list[LeaseKeeper] = []
    yield made
    for keeper in made:
        keeper.close(abandon=False)


def keeper(keepers: list[LeaseKeeper], store: MemoryStore, **options: Any) -> LeaseKeeper:
    options = {"run": "run", "writer": 0, "lease_s": 300.0, **options}
    keepers.append(LeaseKeeper(store, **options))
    return keepers[-1]


def write_lease(store: MemoryStore, process: str, expires_s: float, run: str = "dead") -> str:
    """A lease of some process, until so many seconds from now."""
    key = f"runs/{run}/w00000-00000001.json"
    store.objects[key] = seal("lease", Lease(run, process, time.time() + expires_s))
    return key


@functools.cache
def dead_process() -> str:
    """The token of a process of this machine that has ended."""
    code = "from asymcheck.stores import process_identity as p; print(p.token())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_holding_a_lease(store: MemoryStore, keepers: list[LeaseKeeper]) -> None:
    held = keeper(keepers, store, writer=3)
    with pytest.raises(CommitError, match="lease ran out"):
        held.check(time.monotonic())
    before = time.time()
    held.ensure()
    held.ensure()
    held.check(time.monotonic())
    (key,) = store.keys("runs/")
    assert key == "runs/run/w00003-00000001.json"
    lease = unseal(store.objects[key], "lease", Lease, object=key)
    assert lease.process == process_identity.token()
    assert before + 300 <= lease.expires_unix_s <= time.time() + 300
    assert live_runs(store) == {"run"}
    held.close(abandon=False)
    assert store.keys("runs/") == []
    assert live_runs(store) == set()


def test_a_lease_is_renewed_under_a_new_key(store: MemoryStore, keepers: list[LeaseKeeper]) -> None:
    keeper(keepers, store, lease_s=0.03).ensure()
    with store.hold("delete", "w00000-00000004.json") as held:
        held.await_calls()  # the fifth is there, the fourth is about to go
        assert store.keys("runs/") == [
            "runs/run/w00000-00000004.json",
            "runs/run/w00000-00000005.json",
        ]
        written = store.called("put", "runs/")
        assert written == sorted(set(written))


def test_a_suspended_run_does_not_commit(
    store: MemoryStore, keepers: list[LeaseKeeper], clock: Clock
) -> None:
    held = keeper(keepers, store)
    held.ensure()
    begun_s = time.monotonic()
    clock.advance(299)
    held.check(begun_s)
    clock.advance(1)
    with pytest.raises(CommitError, match="lease ran out"):
        held.check(begun_s)


def test_a_gap_fails_the_attempts_begun_before_it(
    store: MemoryStore, keepers: list[LeaseKeeper], clock: Clock
) -> None:
    """The lease was taken up again, but in between its packs may have been collected."""
    held = keeper(keepers, store)
    held.ensure()
    begun_s = time.monotonic()
    clock.advance(200)
    held._renew()
    held.check(begun_s)
    clock.advance(301)
    held._renew()
    with pytest.raises(CommitError, match="lease ran out"):
        held.check(begun_s)
    held.check(time.monotonic())


def test_a_checkpointer_that_was_suspended_fails_the_step_and_recovers(
    store: MemoryStore, clock: Clock
) -> None:
    with Checkpointer(store, lease_s=600.0) as checkpointer:
        checkpointer.save(0, {"w": np.zeros(3)}).wait()
        with store.hold("put", "0000000000000001-") as held:
            pending = checkpointer.save(1, {"w": np.ones(3)})
            held.await_calls()
            clock.advance(601)
        with pytest.raises(SaveFailedError, match="lease ran out"):
            pending.wait(30)
        assert checkpointer._pipeline is not None
        checkpointer._pipeline.lease._renew()
        checkpointer.save(2, {"w": np.ones(3)}).wait(30)
        assert checkpointer.steps() == [0, 2]


def test_a_store_that_fails_now_and_then_does_not_end_the_lease(
    store: MemoryStore, keepers: list[LeaseKeeper], clock: Clock
) -> None:
    held = keeper(keepers, store, lease_s=0.03)
    held.ensure()
    with (
        store.hold("put", "w00000-00000002") as tried,
        store.failing("put", "runs/", StoreUnavailableError("503")),
    ):
        tried.await_calls()
    with store.hold("delete", "w00000-00000001") as renewed:
        renewed.await_calls()
    held.check(time.monotonic())


def test_the_first_lease_must_be_had(store: MemoryStore, keepers: list[LeaseKeeper]) -> None:
    held = keeper(keepers, store)
    with (
        store.failing("put", "runs/", StoreUnavailableError("503")),
        pytest.raises(StoreUnavailableError),
    ):
        held.ensure()
    held.ensure()
    held.check(time.monotonic())


def test_closing_is_best_effort_and_does_not_wait_when_told(
    store: MemoryStore, keepers: list[LeaseKeeper]
) -> None:
    for abandon in (False, True):
        held = keeper(keepers, store)
        held.ensure()
        with store.failing("delete", "runs/", StoreUnavailableError("503")):
            held.close(abandon=abandon)
        assert len(store.called("delete", "runs/")) == 0


# -- who is alive ------------------------------------------------------------------------------


def test_a_dead_process_of_this_machine_is_known_at_once(store: MemoryStore) -> None:
    key = write_lease(store, dead_process(), expires_s=1e6)
    assert live_runs(store) == set()
    assert key not in store.objects


def test_a_living_process_of_this_machine_never_expires(store: MemoryStore) -> None:
    key = write_lease(store, process_identity.token(), expires_s=-1e6)
    assert live_runs(store) == {"dead"}
    assert key in store.objects


def test_other_machines_are_believed_until_their_time(store: MemoryStore, clock: Clock) -> None:
    key = write_lease(store, "0123456789abcdef-17-4711", expires_s=60)
    assert live_runs(store) == {"dead"}
    clock.advance(61)
    assert live_runs(store) == set()
    assert key not in store.objects


def test_one_living_writer_keeps_the_run_alive(store: MemoryStore) -> None:
    write_lease(store, dead_process(), expires_s=60)
    store.objects["runs/dead/w00001-00000009.json"] = seal(
        "lease", Lease("dead", process_identity.token(), 0.0)
    )
    assert live_runs(store) == {"dead"}


@pytest.mark.parametrize("content", [b"", b"garbage", b"x" * 5000, seal("lease", {"v": 2})])
def test_a_lease_that_cannot_be_read_is_taken_for_a_living_one(
    store: MemoryStore, content: bytes
) -> None:
    key = write_lease(store, "x", expires_s=0)
    store.objects[key] = content
    assert live_runs(store) == {"dead"}
    assert key in store.objects


def test_a_lease_replaced_this_moment_is_a_living_one(store: MemoryStore) -> None:
    key = write_lease(store, dead_process(), expires_s=60)
    store.hook = lambda op, k: op == "get" and store.objects.pop(key, None)
    assert live_runs(store) == {"dead"}


def test_other_objects_are_no_leases(store: MemoryStore) -> None:
    store.objects["runs/readme"] = store.objects["runs/UPPER/w00000-00000001.json"] = b""
    assert live_runs(store) == set()
    assert len(store.objects) == 2


# -- copiers and removers ----------------------------------------------------------------------


def test_a_copier_keeps_its_run_alive_and_removes_nothing(
    store: MemoryStore, keepers: list[LeaseKeeper]
) -> None:
    numbers = {copier_number() for _ in range(1000)}
    assert len(numbers) > 990
    assert all(MAX_WRITERS <= number < 10**6 for number in numbers)
    keeper(keepers, store, run="copied", writer=min(numbers)).ensure()
    assert live_runs(store) == {"copied"}
    assert live_removers(store) == set()
    keeper(keepers, store, run="copied", writer=MAX_WRITERS - 1).ensure()
    assert live_removers(store) == {"copied"}


def test_a_lease_tells_where_it_is(store: MemoryStore, keepers: list[LeaseKeeper]) -> None:
    held = keeper(keepers, store)
    assert not held.is_in(store)
    held.ensure()
    assert held.is_in(store)
    assert not held.is_in(MemoryStore("other"))
    assert not keeper(keepers, store, writer=1).is_in(store)


def test_who_removes_holds_a_lease_while_it_does(store: MemoryStore) -> None:
    with removing(store):
        (run,) = live_removers(store)
        with removing(store):
            assert len(live_removers(store)) == 2
        assert live_removers(store) == {run}
    assert store.objects == {}
    with pytest.raises(ZeroDivisionError), removing(store):
        raise ZeroDivisionError
    assert store.objects == {}


def test_a_full_store_does_not_keep_anybody_from_removing(store: MemoryStore) -> None:
    store.objects[ORPHAN] = b"x"
    with store.failing("put", "runs/", StoreFullError("no room")), removing(store):
        assert collect_orphans(store) == [ORPHAN]
    error = StorePermissionError("read-only")
    with store.failing("put", "runs/", error), pytest.raises(StorePermissionError), removing(store):
        pytest.fail("it was not allowed to say so")


# -- what is collected -------------------------------------------------------------------------


def test_orphans_of_the_dead_are_collected(store: MemoryStore) -> None:
    store.objects[ORPHAN] = b"x"
    write_lease(store, dead_process(), expires_s=1e6)
    assert collect_orphans(store) == [ORPHAN]
    assert store.objects == {}


def test_orphans_without_any_lease_are_collected(store: MemoryStore) -> None:
    store.objects[ORPHAN] = b"x"
    assert collect_orphans(store) == [ORPHAN]


def test_objects_of_the_living_are_left_alone(store: MemoryStore, clock: Clock) -> None:
    store.objects[ORPHAN] = b"x"
    write_lease(store, "0123456789abcdef-17-4711", expires_s=60)
    assert collect_orphans(store) == []
    clock.advance(61)
    assert collect_orphans(store) == [ORPHAN]


def test_a_running_save_is_left_alone(store: MemoryStore) -> None:
    """Another process collects while packs are stored that no record names yet."""
    with Checkpointer(store) as checkpointer:
        checkpointer.save(0, {"w": np.zeros(3)}).wait()
        with store.hold("put", ".manifest") as held:
            pending = checkpointer.save(1, {"w": np.ones(3)})
            held.await_calls()
            assert store.keys("0000000000000001-") != []
            assert collect_orphans(store) == []
        pending.wait(30)
        assert np.array_equal(checkpointer.restore()["w"], np.ones(3))


def test_committed_between_looking_and_collecting(store: MemoryStore) -> None:
    """A run commits and ends while another one collects: its objects are named by then."""
    with Checkpointer(store) as checkpointer:
        with store.hold("put_if_absent", "commits/") as held:
            pending = checkpointer.save(0, {"w": np.zeros(3)})
            held.await_calls()
            objects = store.list("data/")
            assert objects != []
        pending.wait(30)
    listing = store.list
    store.list = lambda prefix: objects if prefix == "data/" else listing(prefix)  # type: ignore[method-assign]
    assert collect_orphans(store) == []
    assert np.array_equal(Checkpointer(store).restore()["w"], np.zeros(3))


def test_nothing_is_collected_while_a_record_is_damaged(store: MemoryStore) -> None:
    store.objects[ORPHAN] = b"x"
    store.objects["commits/0000000000000005.json"] = b"damaged: it might name the orphan"
    assert collect_orphans(store) == []
    del store.objects["commits/0000000000000005.json"]
    assert collect_orphans(store) == [ORPHAN]


def test_only_what_looks_like_an_attempt_is_collected(store: MemoryStore) -> None:
    others = ["data/readme", "data/notes/x", "other/x", ORPHAN + "/deeper"]
    for key in (*others, ORPHAN):
        store.objects[key] = b""
    assert collect_orphans(store) == [ORPHAN]
    assert sorted(store.objects) == sorted(others)
