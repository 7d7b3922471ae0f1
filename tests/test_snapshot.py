"""Capturing (I3): what is committed is what stood at the update, whatever training does since."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from memory_store import MemoryStore
from states import same, training_state

from asymcheck import Always, AsymCheck, AsymCheckNaive, AsymCheckS, Checkpointer, Never
from asymcheck.errors import CaptureTimeoutError, SaveFailedError
from asymcheck.partition import Phase, Window
from asymcheck.snapshot import Capture
from asymcheck.state import ArraySource, LeafSpec, ShardSpec, StateView, numpy_view
from asymcheck.strategy import Strategy
from asymcheck.threads import run_at_low_priority

WINDOWS = [
    Window(Phase.FORWARD, 0, 1.0),
    Window(Phase.FORWARD, 1, 0.5),
    Window(Phase.BACKWARD, 0, 3.0),
    Window(Phase.BACKWARD, 1, 2.0),
]
SMALL = 1 << 20  # the least max_host_bytes


@dataclass(frozen=True)
class WatchedSource:
    """A source that tells when and by whom it is read."""

    source: ArraySource
    reading: Callable[[str, int], None]

    leaf = property(lambda self: self.source.leaf)
    shard = property(lambda self: self.source.shard)
    group = property(lambda self: self.source.group)
    owned = property(lambda self: self.source.owned)

    def read_into(self, start: int, count: int, out: np.ndarray) -> None:
        self.reading(threading.current_thread().name, out.nbytes)
        self.source.read_into(start, count, out)

    def check_unchanged(self) -> None:
        self.source.check_unchanged()


def watched(state: Any, reading: Callable[[str, int], None]) -> StateView:
    view = numpy_view(state)
    sources = tuple(WatchedSource(s, reading) for s in view.sources if isinstance(s, ArraySource))
    return StateView(view.structure, sources, view.aliases)


@dataclass
class Watch:
    """What was read in the background; whether that was allowed at the time."""

    open: bool = False
    background_nbytes: int = 0
    foreground_nbytes: int = 0
    violations: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, thread: str, nbytes: int) -> None:
        with self.changed:
            if thread == "asymcheck-capture":
                self.background_nbytes += nbytes
                self.violations += not self.open
            else:
                self.foreground_nbytes += nbytes
            self.changed.notify_all()

    def await_background(self, nbytes: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.background_nbytes >= nbytes, 30)

    def allow(self, allowed: bool) -> None:
        with self.changed:
            self.open = allowed


def quiet(capture: Capture) -> None:
    """Wait until the unit at hand is copied."""
    with capture._state:
        assert capture._state.wait_for(lambda: capture._copying == 0, 30)


@pytest.fixture
def checkpointer(store: MemoryStore) -> Iterator[Checkpointer]:
    with Checkpointer(store, strategy="asymcheck-naive") as made:
        yield made


def overwrite(state: Any, rng: np.random.Generator) -> None:
    """What an optimizer does, only worse: every array gets other bytes, in place."""
    if isinstance(state, np.ndarray):
        state.reshape(-1).view(np.uint8)[:] = rng.integers(0, 256, state.nbytes, np.uint8)
    elif isinstance(state, dict):
        for item in state.values():
            overwrite(item, rng)


def copied(state: Any) -> Any:
    return {k: copied(v) for k, v in state.items()} if isinstance(state, dict) else np.copy(state)


STRATEGIES = [
    AsymCheckNaive(),
    AsymCheckS(policy=Always("plane")),
    AsymCheck(policy=Always("delta")),
    AsymCheck(policy=Never()),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.name}-{s.policy}")
def test_an_adversary_overwrites_everything_at_once(store: MemoryStore, strategy: Strategy) -> None:
    """Windows open and close at random, memory is short, and the update follows the barrier."""
    rng, chance = np.random.default_rng(0), random.Random(0)
    state = {
        kind: {"w": np.zeros((100, 40), np.float32), "b": np.zeros(3)}
        for kind in ("params", "exp_avg", "exp_avg_sq")
    }
    state["other"] = {"large": np.zeros(70_000, np.uint16), "tiny": np.zeros((), np.int8)}
    checkpoints = Checkpointer(store, strategy=strategy, max_host_bytes=SMALL, encode_threads=3)
    expected: list[Any] = []
    for step in range(40):
        overwrite(state, rng)
        expected.append(copied(state))
        capture = checkpoints.begin(step, numpy_view(state), windows=WINDOWS)
        stop = threading.Event()

        def windows(capture: Capture = capture, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                capture.enter_window(chance.randrange(len(WINDOWS)))
                if chance.random() < 0.7:
                    capture.leave_window()
                if chance.random() < 0.3:
                    stop.wait(0.001 * chance.random())

        opener = threading.Thread(target=windows)
        opener.start()
        if chance.random() < 0.8:
            stop.wait(0.003 * chance.random())  # training computes
        capture.finish()
        overwrite(state, rng)
        stop.set()
        opener.join()
        assert checkpoints.host_nbytes <= SMALL
    checkpoints.wait()
    for step, want in enumerate(expected):
        assert same(checkpoints.restore(step), want), step
    copies = [e for e in checkpoints.trace.events() if e.track == "copy"]
    assert any("(barrier)" in e.label for e in copies)
    assert any("(barrier)" not in e.label for e in copies)
    checkpoints.close()


def test_nothing_is_copied_in_the_background_outside_of_windows(
    checkpointer: Checkpointer,
) -> None:
    watch = Watch()
    state = training_state(1, 300_000)
    chance = random.Random(1)
    for step in range(10):
        capture = checkpointer.begin(step, watched(state, watch), windows=WINDOWS)
        for ordinal in range(len(WINDOWS)):
            before = watch.background_nbytes
            watch.allow(True)
            capture.enter_window(ordinal)
            if chance.random() < 0.5:
                watch.await_background(before + 1)
            capture.leave_window()
            quiet(capture)
            watch.allow(False)
            if chance.random() < 0.3:
                with watch.changed:
                    watch.changed.wait(0.005)
        capture.finish()
    assert watch.violations == 0
    assert watch.background_nbytes > 0


def test_a_window_moves_its_partitions_and_those_before(checkpointer: Checkpointer) -> None:
    watch = Watch(open=True)
    state = training_state(2, 100_000)
    capture = checkpointer.begin(0, watched(state, watch), windows=WINDOWS)
    places = checkpointer._plan.partitions
    nbytes = [place.nbytes for place in places]
    assert [place.ordinal for place in places] == [0, 1, 2, 3]
    capture.enter_window(0)
    watch.await_background(nbytes[0])
    capture.leave_window()
    capture.enter_window(2)
    watch.await_background(sum(nbytes[:3]))
    quiet(capture)
    assert watch.background_nbytes == sum(nbytes[:3])
    capture.finish()
    assert watch.foreground_nbytes == nbytes[3]
    capture.pending.wait()
    stats = checkpointer_stats(checkpointer, 0)
    assert stats["in_window_nbytes"] == sum(nbytes[:3])
    assert stats["raw_nbytes"] == sum(nbytes)
    assert stats["stall_s"] == pytest.approx(capture.pending.stall_s, abs=1e-5)
    assert nbytes[0] < nbytes[2]  # a third of the idle time, a third of the bytes
    assert nbytes[0] / sum(nbytes) == pytest.approx(1 / 6.5, abs=0.01)


def checkpointer_stats(checkpointer: Checkpointer, step: int) -> dict[str, Any]:
    return checkpointer.restore_with(lambda c: c.chain[0].manifests[0].stats, step)


def test_an_earlier_window_may_open_again(checkpointer: Checkpointer) -> None:
    """Gradient accumulation: the windows of the second pass move what is left."""
    watch = Watch(open=True)
    capture = checkpointer.begin(0, watched(training_state(3), watch), windows=WINDOWS)
    capture.enter_window(3)
    capture.leave_window()
    quiet(capture)
    capture.enter_window(0)
    watch.await_background(checkpointer._plan.nbytes)
    assert capture.finish() >= 0.0
    assert watch.foreground_nbytes == 0
    capture.pending.wait()


def test_finishing_twice_changes_nothing(checkpointer: Checkpointer) -> None:
    state = training_state(4)
    want = copied(state)
    capture = checkpointer.begin(0, numpy_view(state), windows=WINDOWS)
    assert capture.finish() > 0
    stall_s = capture.pending.stall_s
    overwrite(state, np.random.default_rng(0))
    assert capture.finish() == 0.0
    assert capture.pending.stall_s == stall_s
    capture.enter_window(0)
    capture.leave_window()
    capture.pending.wait()
    assert same(copied(checkpointer.restore(0)), want)


def test_adapters_add_to_the_stall(checkpointer: Checkpointer) -> None:
    capture = checkpointer.begin(3, numpy_view({"a": np.zeros(5)}))
    before = capture.pending.stall_s
    capture.add_stall(5.0)
    capture.finish()
    capture.pending.wait()
    assert capture.step == capture.pending.step == 3
    assert capture.pending.stall_s >= before + 5.0
    assert checkpointer_stats(checkpointer, 3)["stall_s"] >= 5.0


# -- what goes wrong ---------------------------------------------------------------------------


def failing_source(error: BaseException, *, at: int) -> Callable[[str, int], None]:
    reads = [0]

    def reading(thread: str, nbytes: int) -> None:
        reads[0] += 1
        if reads[0] == at:
            raise error

    return reading


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("in_window", [True, False])
def test_a_source_that_cannot_be_read_fails_the_save(
    store: MemoryStore, at: int, in_window: bool
) -> None:
    error = RuntimeError("CUDA error")
    with Checkpointer(store, strategy="asymcheck-naive") as checkpointer:
        state = training_state(5, 20_000)
        view = watched(state, failing_source(error, at=at))
        capture = checkpointer.begin(0, view, windows=WINDOWS)
        if in_window:
            capture.enter_window(3)
        capture.finish()
        with pytest.raises(SaveFailedError, match="CUDA error") as raised:
            capture.pending.wait()
        assert raised.value.__cause__ is error
        assert checkpointer.steps() == []
        checkpointer.save(1, state)
        checkpointer.wait()
        assert same(checkpointer.restore(), state)
        assert checkpointer._pipeline is not None
        assert checkpointer._pipeline.capture_pool.used_nbytes == 0


def interrupt() -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["copying", "waiting for memory", "waiting for the thread"])
def test_an_interrupt_gives_the_step_up(
    store: MemoryStore, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the barrier: training may go on and change the state."""
    state = training_state(6, 20_000)
    checkpointer = Checkpointer(store, strategy="asymcheck-naive")
    checkpointer.save(0, state).wait()
    reading = failing_source(KeyboardInterrupt(), at=3 if where == "copying" else -1)
    capture = checkpointer.begin(1, watched(state, reading), windows=WINDOWS)
    if where == "waiting for memory":
        assert checkpointer._pipeline is not None
        pool = checkpointer._pipeline.capture_pool

        monkeypatch.setattr(pool, "acquire", interrupt)
    if where == "waiting for the thread":
        monkeypatch.setattr(capture._state, "wait_for", lambda predicate: interrupt())
    with pytest.raises(KeyboardInterrupt):
        capture.finish()
    monkeypatch.undo()
    overwrite(state, np.random.default_rng(0))
    with pytest.raises(SaveFailedError, match="KeyboardInterrupt"):
        checkpointer.close()
    assert [key for key in store.objects if key.startswith("commits/")] == [
        "commits/0000000000000000.json"
    ]
    assert store.keys("0000000000000001-") == []


def test_memory_that_cannot_be_had_fails_the_save_not_training(store: MemoryStore) -> None:
    def allocate(nbytes: int) -> np.ndarray:
        raise MemoryError("pinned memory is exhausted")

    with Checkpointer(store, strategy="asymcheck-naive", allocate=allocate) as checkpointer:
        for step in range(2):
            capture = checkpointer.begin(step, numpy_view(training_state(7)), windows=WINDOWS)
            capture.enter_window(3)  # the thread in the background meets it first, or we do
            capture.finish()
            with pytest.raises(SaveFailedError, match="pinned memory is exhausted"):
                capture.pending.wait()


def test_a_hanging_store_stops_training_once(store: MemoryStore) -> None:
    state = {"w": np.zeros(SMALL, np.uint8)}
    checkpointer = Checkpointer(
        store,
        strategy="asymcheck-naive",
        max_host_bytes=SMALL,
        stall_timeout_s=0.05,
        on_error="warn",
    )
    with store.hold("put", ".pack") as held:
        pending = checkpointer.save(0, state)
        held.await_calls(4)
        assert not pending.done()
        waits: list[float | None] = []
        assert checkpointer._pipeline is not None
        pool = checkpointer._pipeline.capture_pool
        wait = pool.condition.wait
        pool.condition.wait = lambda timeout=None: waits.append(timeout) or wait(timeout)
        for step in range(1, 5):
            checkpointer.save(step, state)
        assert waits == []  # hopeless: nobody waits again
    with pytest.raises(SaveFailedError) as raised:
        pending.wait(30)
    assert isinstance(raised.value.__cause__, CaptureTimeoutError)
    checkpointer.wait()
    assert pool.used_nbytes == 0
    checkpointer.save(9, {"w": np.ones(1000)}).wait()
    assert checkpointer.steps() == [9]
    checkpointer.close()


def test_sources_may_be_boxes_of_a_larger_leaf(store: MemoryStore) -> None:
    """A view of one shard whose leaf is covered by nobody else is not committed."""

    @dataclass(frozen=True)
    class Half:
        leaf = LeafSpec("w", "float32", (8,))
        shard = ShardSpec((0,), (4,))
        group = "w"
        owned = (0, 4)

        def read_into(self, start: int, count: int, out: np.ndarray) -> None:
            out[:] = 1

        def check_unchanged(self) -> None:
            pass

    with Checkpointer(store) as checkpointer:
        capture = checkpointer.begin(0, StateView({"leaf": "w"}, (Half(),)))
        capture.finish()
        with pytest.raises(SaveFailedError, match="cover it exactly once"):
            capture.pending.wait()
        assert checkpointer.steps() == []


@pytest.mark.parametrize("raised", [SaveFailedError("it was changed", leaf="w"), KeyError("w")])
def test_nothing_is_committed_of_a_state_that_turns_out_to_have_changed(
    store: MemoryStore, raised: Exception
) -> None:
    class Changing(ArraySource):
        read = False

        def read_into(self, start: int, count: int, out: np.ndarray) -> None:
            super().read_into(start, count, out)
            Changing.read = True

        def check_unchanged(self) -> None:
            assert Changing.read  # it is of no use before
            raise raised

    view = numpy_view({"w": np.zeros(100)})
    (source,) = view.sources
    assert isinstance(source, ArraySource)
    changing = Changing(source.leaf, source.array, source.group, source.owned)
    with Checkpointer(store) as checkpointer:
        capture = checkpointer.begin(3, replace(view, sources=(changing,)))
        capture.finish()
        with pytest.raises(SaveFailedError) as caught:
            checkpointer.wait()
        assert raised in (caught.value, caught.value.__cause__)
        assert checkpointer.steps() == []
        checkpointer.save(4, {"w": np.zeros(100)}).wait()
        assert checkpointer.steps() == [4]


def names(threads: Sequence[threading.Thread]) -> set[str]:
    return {t.name for t in threads if t.name.startswith("asymcheck")}


def test_no_thread_outlives_its_checkpointer(store: MemoryStore) -> None:
    before = names(threading.enumerate())
    with Checkpointer(store) as checkpointer:
        checkpointer.save(0, training_state(0))
        assert {"asymcheck-capture", "asymcheck-commit", "asymcheck-pack"} <= names(
            threading.enumerate()
        )
    assert names(threading.enumerate()) == before


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="priorities of threads are Linux's")
@pytest.mark.parametrize(("nice", "becomes"), [(0, [10]), (9, [10]), (10, []), (15, [])])
def test_threads_only_become_nicer(
    monkeypatch: pytest.MonkeyPatch, nice: int, becomes: list[int]
) -> None:
    """A process that is nicer already may not raise its priority again."""
    set_to: list[int] = []
    monkeypatch.setattr(os, "getpriority", lambda which, who: nice)
    monkeypatch.setattr(os, "setpriority", lambda which, who, to: set_to.append(to))
    run_at_low_priority()
    assert set_to == becomes
