"""Which step is read, and from where: newest first, the nearer store first, loudly."""

from __future__ import annotations

import logging

import pytest
from memory_store import MemoryStore

from asymcheck.commit import commit_key
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    StateMismatchError,
    StoreError,
    StoreUnavailableError,
    UnsupportedVersionError,
)
from asymcheck.stores.base import Store
from asymcheck.tiers import Tiers


@pytest.fixture
def near() -> MemoryStore:
    return MemoryStore("near")


@pytest.fixture
def far() -> MemoryStore:
    return MemoryStore("far")


def steps_with(store: MemoryStore, steps: range | list[int]) -> None:
    for step in steps:
        store.objects[commit_key(step)] = b""


class Reading:
    """What `read_newest` and `read` asked for, and what they passed over.

    `bad` maps places to the error that reading raises there.
    """

    def __init__(self, bad: dict[tuple[str, int], BaseException] | None = None) -> None:
        self.bad = bad or {}
        self.asked: list[tuple[str, int]] = []
        self.damaged: list[tuple[str, int]] = []

    def read(self, store: Store, step: int) -> tuple[str, int]:
        place = (store.url.removeprefix("memory://"), step)
        self.asked.append(place)
        if place in self.bad:
            raise self.bad[place]
        return place

    def pass_over(self, store: Store, step: int, error: AsymCheckError) -> None:
        self.damaged.append((store.url.removeprefix("memory://"), step))

    def newest(self, *stores: MemoryStore) -> tuple[str, int]:
        return Tiers(*stores).read_newest(self.read, self.pass_over)

    def step(self, step: int, *stores: MemoryStore) -> tuple[str, int]:
        return Tiers(*stores).read(step, lambda store: self.read(store, step))


# -- one store ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [CorruptionError, FormatError, CheckpointNotFoundError])
def test_falls_back_loudly(
    near: MemoryStore, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    steps_with(near, range(5))
    reading = Reading({("near", step): error(f"no {step}") for step in (3, 4)})
    with caplog.at_level(logging.ERROR):
        assert reading.newest(near) == ("near", 2)
    assert [step for _, step in reading.asked] == [4, 3, 2]
    assert reading.damaged == [("near", 4), ("near", 3)]
    assert "step 4 cannot be restored" in caplog.text and "no 3" in caplog.text


def test_a_step_that_is_removed_while_it_is_read(near: MemoryStore) -> None:
    """The writer goes on, and its retention with it: there is a newer step."""
    steps_with(near, range(3))

    class Removing(Reading):
        def read(self, store: Store, step: int) -> tuple[str, int]:
            if step == 2:
                near.put(commit_key(3), memoryview(b""))
                for old in (0, 1, 2):
                    near.delete(commit_key(old))
                raise CorruptionError("no such object")
            return super().read(store, step)

    reading = Removing()
    assert reading.newest(near) == ("near", 3)
    assert reading.damaged == []


def test_none_is_good(near: MemoryStore) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint"):
        Reading().newest(near)
    steps_with(near, range(3))
    reading = Reading({("near", step): CorruptionError(f"torn {step}") for step in range(3)})
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint is whole") as raised:
        reading.newest(near)
    assert "torn 2" in str(raised.value.__cause__)
    assert near.url in str(raised.value.hint)


OTHER_FAILURES = [
    StoreUnavailableError("503"),
    StateMismatchError("shape"),
    UnsupportedVersionError("v9"),
    MemoryError(),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", OTHER_FAILURES, ids=lambda e: type(e).__name__)
def test_other_failures_say_nothing_about_older_steps(
    near: MemoryStore, far: MemoryStore, error: BaseException
) -> None:
    """Nor about the mirror's copy."""
    steps_with(near, range(3))
    steps_with(far, range(3))
    reading = Reading({("near", 2): error})
    for read in (lambda: reading.newest(near, far), lambda: reading.step(2, near, far)):
        with pytest.raises(type(error)):
            read()
    assert reading.asked == [("near", 2)] * 2


# -- with a mirror -----------------------------------------------------------------------------


def test_the_newest_of_both(
    near: MemoryStore, far: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    steps_with(near, [1, 2, 5])
    steps_with(far, [2, 4])
    assert Tiers(near, far).steps() == [1, 2, 4, 5]
    assert Reading().newest(near, far) == ("near", 5)
    assert caplog.text == ""
    steps_with(far, [7])
    assert Reading().newest(near, far) == ("far", 7)
    assert "step 7 is read from the mirror memory://far" in caplog.text


def test_the_mirrors_copy_before_any_older_step(
    near: MemoryStore, far: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    steps_with(near, range(4))
    steps_with(far, [2, 3])
    torn = CorruptionError("torn")
    reading = Reading({("near", 3): torn})
    assert reading.newest(near, far) == ("far", 3)
    assert reading.damaged == [("near", 3)]
    assert "step 3 cannot be restored from memory://near" in caplog.text
    reading = Reading({("near", 3): torn, ("far", 3): torn, ("near", 2): torn})
    assert reading.newest(near, far) == ("far", 2)
    assert reading.asked == [("near", 3), ("far", 3), ("near", 2), ("far", 2)]
    assert reading.damaged == reading.asked[:3]


def test_a_lost_disk(near: MemoryStore, far: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    steps_with(far, [3])
    assert Tiers(near, far).steps() == [3]
    assert Reading().newest(near, far) == ("far", 3)
    gone = Reading({("near", 3): CheckpointNotFoundError("gone")})
    assert gone.step(3, near, far) == ("far", 3)
    assert caplog.text.count("from the mirror memory://far") == 2


def test_a_step_by_its_number(near: MemoryStore, far: MemoryStore) -> None:
    """Never another step; of its copies the first that is whole."""
    gone, torn = CheckpointNotFoundError("gone"), CorruptionError("torn")
    for near_error, far_error, expected in (
        (None, None, ("near", 3)),
        (torn, None, ("far", 3)),
        (gone, None, ("far", 3)),
    ):
        bad = {("near", 3): near_error, ("far", 3): far_error}
        assert Reading({k: v for k, v in bad.items() if v}).step(3, near, far) == expected
    for near_error, far_error, error in (
        (gone, gone, CheckpointNotFoundError),
        (gone, torn, CorruptionError),
        (torn, gone, CorruptionError),
        (torn, StoreUnavailableError("503"), StoreUnavailableError),
    ):
        with pytest.raises(error):
            Reading({("near", 3): near_error, ("far", 3): far_error}).step(3, near, far)


def test_a_mirror_that_cannot_be_reached(
    near: MemoryStore, far: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs nothing where there are steps without it; where there are none it is an error."""
    steps_with(near, [1, 2])
    steps_with(far, [1, 2, 3])
    with far.failing("list", "", StoreUnavailableError("no route")):
        assert Tiers(near, far).steps() == [1, 2]
        assert "no route" in caplog.text
        assert Reading().newest(near, far) == ("near", 2)
        torn = Reading({("near", step): CorruptionError("torn") for step in (1, 2)})
        with pytest.raises(StoreUnavailableError):
            torn.newest(near, far)
        near.objects.clear()
        for ask in (Tiers(near, far).steps, lambda: Reading().newest(near, far)):
            with pytest.raises(StoreUnavailableError):
                ask()


def test_a_mirror_that_fails_while_its_newer_step_is_read(
    near: MemoryStore, far: MemoryStore
) -> None:
    """An older step would silently undo the newer one."""
    steps_with(near, [1])
    steps_with(far, [2])
    with pytest.raises(StoreUnavailableError):
        Reading({("far", 2): StoreUnavailableError("reset")}).newest(near, far)


def test_the_runs_own_store_must_answer(near: MemoryStore, far: MemoryStore) -> None:
    steps_with(far, [1])
    with near.failing("list", "", StoreError("EIO")), pytest.raises(StoreError, match="EIO"):
        Reading().newest(near, far)
