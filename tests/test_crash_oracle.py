"""Schedules of random deaths; and that the same schedules find what is broken on purpose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from crash_oracle import Schedule, Violation
from simulated_filesystem import SimulatedFilesystem
from writers_oracle import Connection, WritersSchedule

from asymcheck.committer import Committer
from asymcheck.errors import AsymCheckError
from asymcheck.retention import Retention
from asymcheck.stores import Store

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

BATCH = 50
SLOW_S = 0.03


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Failures are logged loudly, as they should be; here they are the point."""
    with caplog.at_level("CRITICAL"):
        yield


def run(schedules: Iterator[Schedule] | Iterator[WritersSchedule]) -> None:
    for schedule in schedules:
        schedule.run()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("asymcheck")]


# One writer over a disk that loses, tears and reorders what was not synced


@pytest.mark.parametrize("batch", range(20))
def test_a_run_that_dies_again_and_again(batch: int):
    run(Schedule(seed) for seed in range(batch * BATCH, (batch + 1) * BATCH))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", range(40))
def test_a_run_that_dies_again_and_again_for_long(batch: int):
    run(Schedule(10_000 + seed) for seed in range(batch * 500, (batch + 1) * 500))


# Several writers over an object store


@pytest.mark.parametrize("batch", range(8))
def test_writers_that_die(batch: int):
    slow_s = SLOW_S if batch % 4 == 3 else 0.0
    run(WritersSchedule(s, slow_s=slow_s) for s in range(batch * 20, (batch + 1) * 20))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", range(20))
def test_writers_that_die_for_long(batch: int):
    slow_s = SLOW_S if batch % 2 else 0.0
    run(WritersSchedule(10_000 + s, slow_s=slow_s) for s in range(batch * 100, (batch + 1) * 100))


# What is broken on purpose is found


def broken(schedules: Iterator[Schedule] | Iterator[WritersSchedule]) -> str:
    """The violation that is found first, of a promise and not of the test's own workings."""
    for schedule in schedules:
        try:
            schedule.run()
        except Violation as violation:
            assert isinstance(violation.__cause__, Violation | AsymCheckError)
            return str(violation)
    raise AssertionError("nothing was found")


class NoSync(SimulatedFilesystem):
    """Data are never synced."""

    def sync(self, fd: int) -> None:
        pass


class NoDirectorySync(SimulatedFilesystem):
    """Names are never synced."""

    def sync_directory(self, path: Any) -> None:
        pass


class EarlyAnswers:
    """A store that answers before a pack is stored, so that records come before what they name."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._late: list[tuple[str, memoryview]] = []
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, data: memoryview) -> None:
        if not key.endswith(".pack"):
            return self._store.put(key, data)
        with self._lock:
            self._late.append((key, memoryview(bytes(data))))
            late, self._late = (self._late, []) if len(self._late) == 3 else ([], self._late)
        for earlier in late:
            self._store.put(*earlier)
        return None


def test_finds_that_data_are_not_synced():
    assert broken(Schedule(seed, NoSync) for seed in range(50))


def test_finds_that_names_are_not_synced():
    assert broken(Schedule(seed, NoDirectorySync) for seed in range(50))


def test_finds_records_that_come_before_the_packs():
    assert broken(Schedule(seed, wrap=EarlyAnswers) for seed in range(50))


def test_finds_that_retention_removes_a_base(monkeypatch: pytest.MonkeyPatch):
    def newest_only(
        self: Retention, steps: list[int], _parents: object, _in_use: object = ()
    ) -> list[int]:
        kept = self.max_to_keep
        return [] if kept is None else sorted(sorted(steps)[:-kept], reverse=True)

    monkeypatch.setattr(Retention, "to_remove", newest_only)
    assert "decodes from is gone" in broken(Schedule(seed) for seed in range(50))


def test_finds_that_orphans_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("asymcheck.checkpointer.collect_orphans", lambda _store: [])
    assert "left over" in broken(Schedule(seed) for seed in range(50))


class EarlyConnection(Connection):
    """Answers before a pack is stored, which it is with the next pack but one."""

    def _put(self, key: str, data: bytes, *, only_if_absent: bool) -> bool:
        if not key.endswith(".pack"):
            return super()._put(key, data, only_if_absent=only_if_absent)
        self._call()
        with self._cloud.lock:
            own = [request for request in self._cloud.under_way if request[0] is self]
            for request in own[:-1]:
                self._cloud.under_way.remove(request)
                self._cloud.objects[request[1]] = request[2]
            self._cloud.under_way.append((self, key, data, False))
        return True


def test_finds_a_commit_that_does_not_wait_for_the_packs_of_all_writers():
    assert broken(WritersSchedule(seed, EarlyConnection) for seed in range(50))


def test_finds_a_writer_that_takes_back_what_may_be_committed(monkeypatch: pytest.MonkeyPatch):
    give_up: Callable[..., None] = Committer._give_up

    def hasty(self: Committer, attempt: Any) -> None:
        attempt.published = False
        give_up(self, attempt)

    monkeypatch.setattr(Committer, "_give_up", hasty)
    schedules = (WritersSchedule(seed, slow_s=0.2) for seed in range(100))
    assert broken(schedules)
