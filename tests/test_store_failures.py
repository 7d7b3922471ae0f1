"""Stores that fail, fill up, forbid and hang: what training sees, and what stays on the disk."""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_oracle import Oracle, check_everything, same
from simulated_filesystem import SimulatedFilesystem

from asymcheck import Always, Checkpointer, CostModel, Never, Strategy, Synchronous
from asymcheck.errors import (
    AsymCheckError,
    CaptureTimeoutError,
    SaveFailedError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnavailableError,
)
from asymcheck.policy import Decision, PolicyRequest
from asymcheck.reader import open_step
from asymcheck.stores import LocalStore, Store

PATIENCE_S = 30.0

DELTA = Strategy("delta", Always("delta"), windows=False, batched=True, blocking=False)
RAW = Strategy("raw", Never(), windows=False, batched=True, blocking=False)


def state(step: int, size: int = 20_000) -> Any:
    weight = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    return {"params": {"w": weight + np.float32(step * 1e-3)}, "n": np.int64(step)}


@dataclass
class StubbornStore:
    """A store of which single puts fail, and of which all calls can be made to wait.

    Attributes:
        fails: asked for every put; the error to raise, or None.
        open: while cleared, every call that is made to the store waits.
    """

    store: Store
    fails: Callable[[str], BaseException | None] = lambda key: None
    open: threading.Event = field(default_factory=threading.Event)
    puts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open.set()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)
        if not callable(method) or name == "close":
            return method

        def call(*args: Any) -> Any:
            self.open.wait()
            if name.startswith("put"):
                self.puts.append(args[0])
                if (error := self.fails(args[0])) is not None:
                    raise error
            return method(*args)

        return call


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StubbornStore]:
    stubborn = StubbornStore(LocalStore(tmp_path / "run"))
    with no_thread_left_behind():
        yield stubborn
        stubborn.fails = lambda key: None
        stubborn.open.set()


@contextmanager
def no_thread_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)  # a store that came back lets go of abandoned ones, too
        assert not thread.is_alive(), f"{thread.name} is left behind"


def checkpointer(store: Any, **options: Any) -> Checkpointer:
    options = {"strategy": DELTA, "cost_model": CostModel(), "max_host_bytes": 1 << 20} | options
    return Checkpointer(store, **options)


def restored(store: Any, step: int) -> Any:
    with open_step(store, step, threads=1) as checkpoint:
        checkpoint.verify()
        return checkpoint.state()


def objects_but(store: Any, *steps: int) -> list[str]:
    """What is stored under data/ of other steps."""
    return [k for k in store.list("data/") if int(k.split("/")[1][:16]) not in steps]


# Puts that fail

PLACES = {
    "pack": lambda key: key.endswith(".pack"),
    "manifest": lambda key: key.endswith(".manifest"),
    "commit": lambda key: key.startswith("commits/"),
}
ERRORS = [StoreFullError, StorePermissionError, StoreUnavailableError, StoreError, RuntimeError]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", ERRORS)
def test_a_put_that_fails_is_raised_and_leaves_nothing(
    store: StubbornStore, error: type[Exception], place: str
):
    with checkpointer(store) as c:
        for step in (1, 2):
            c.save(step, state(step)).wait()
        store.fails = lambda key: error("on purpose") if PLACES[place](key) else None
        pending = c.save(3, state(3))
        with pytest.raises(SaveFailedError, match="on purpose") as raised:
            pending.wait(PATIENCE_S)
        assert raised.value.step == 3
        assert type(raised.value.__cause__) is error
        assert c.steps() == [1, 2]
        if place != "commit":  # where the record may stand after all, its packs stay
            assert objects_but(store, 1, 2) == []
        store.fails = lambda key: None
        c.wait()  # reported once only
        c.save(4, state(4)).wait(PATIENCE_S)
        c.save(5, state(5)).wait(PATIENCE_S)
    for step in (1, 2, 4, 5):
        assert same(restored(store, step), state(step))


def test_the_next_call_raises_if_nobody_waits(store: StubbornStore):
    with checkpointer(store) as c:
        c.save(1, state(1)).wait()
        store.fails = lambda key: StoreFullError("on purpose")
        failed = c.save(2, state(2))
        while not failed.done():
            failed._attempt.finished.wait(PATIENCE_S)
        with pytest.raises(SaveFailedError, match="on purpose"):
            c.save(3, state(3))
        store.fails = lambda key: None
        c.save(3, state(3)).wait()
        assert c.steps() == [1, 3]


def test_close_raises_what_nobody_has_seen(store: StubbornStore):
    c = checkpointer(store)
    c.save(1, state(1)).wait()
    store.fails = lambda key: StoreFullError("on purpose")
    c.save(2, state(2))
    with pytest.raises(SaveFailedError, match="on purpose"):
        c.close()


@pytest.mark.parametrize("place", PLACES)
def test_with_warn_training_goes_on(
    store: StubbornStore, place: str, caplog: pytest.LogCaptureFixture
):
    with checkpointer(store, on_error="warn") as c:
        c.save(1, state(1)).wait()
        store.fails = lambda key: StoreFullError("on purpose") if PLACES[place](key) else None
        for step in (2, 3, 4):
            c.save(step, state(step))
        c.wait()
        assert "on purpose" in caplog.text
        assert c.steps() == [1]
        store.fails = lambda key: None
        for step in (5, 6, 7):
            c.save(step, state(step)).wait()
        assert c.steps() == [1, 5, 6, 7]
    for step in (1, 5, 6, 7):
        assert same(restored(store, step), state(step))


@pytest.mark.parametrize("strategy", [DELTA, RAW, Synchronous()])
def test_with_warn_nothing_is_raised_even_by_a_store_that_never_works(
    store: StubbornStore, strategy: Strategy, caplog: pytest.LogCaptureFixture
):
    store.fails = lambda key: StorePermissionError("on purpose")
    with checkpointer(store, strategy=strategy, on_error="warn") as c:
        for step in range(5):
            c.save(step, state(step))
        c.wait()
        assert "on purpose" in caplog.text
        store.fails = lambda key: None
        c.save(5, state(5)).wait(PATIENCE_S)
        assert c.steps() == [5]


def test_a_store_that_fails_at_the_first_save_only(store: StubbornStore):
    c = Checkpointer(store, strategy=DELTA, max_host_bytes=1 << 20)  # calibrates, too
    store.fails = lambda key: StoreUnavailableError("on purpose")
    for _ in range(3):
        with pytest.raises(StoreUnavailableError, match="on purpose"):
            c.save(1, state(1))
    store.fails = lambda key: None
    c.save(1, state(1)).wait(PATIENCE_S)
    c.close()
    assert same(restored(store, 1), state(1))


def test_probes_that_fail_do_not_cost_the_save(store: StubbornStore):
    """A disk may have room for the state and none for the probes of the calibration."""
    store.fails = lambda key: StoreFullError("on purpose") if key.endswith(".probe") else None
    with Checkpointer(store, strategy=DELTA, max_host_bytes=1 << 20, on_error="warn") as c:
        c.save(1, state(1)).wait(PATIENCE_S)
        c.save(2, state(2)).wait(PATIENCE_S)
        assert 2 in c.steps()


@pytest.mark.parametrize("call", ["list", "delete", "get"])
@pytest.mark.parametrize("error", [StoreUnavailableError, RuntimeError])
def test_a_store_that_fails_while_cleaning_up(
    store: StubbornStore, call: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    with checkpointer(store, max_to_keep=1, on_error="warn") as c:
        c.save(1, state(1)).wait()

        def fail(*_args: Any) -> None:
            raise error("on purpose")

        monkeypatch.setattr(store.store, call, fail)
        store.fails = lambda key: StoreFullError("on purpose") if key.endswith(".pack") else None
        with pytest.raises(SaveFailedError):
            c.save(2, state(2)).wait(PATIENCE_S)
        store.fails = lambda key: None
        c.save(3, state(3)).wait(PATIENCE_S)
        monkeypatch.undo()
        c.save(4, state(4)).wait(PATIENCE_S)
        assert 4 in c.steps()
    assert same(restored(store, 4), state(4))


def test_a_failed_retention_is_reported_and_made_up_for(
    store: StubbornStore, monkeypatch: pytest.MonkeyPatch
):
    with checkpointer(store, max_to_keep=1, strategy=RAW) as c:
        c.save(1, state(1)).wait()

        def fail(_key: str) -> None:
            raise StoreUnavailableError("on purpose")

        monkeypatch.setattr(store.store, "delete", fail)
        c.save(2, state(2)).wait(PATIENCE_S)
        with pytest.raises(StoreUnavailableError, match="on purpose"):
            c.wait()
        monkeypatch.undo()
        c.save(3, state(3)).wait(PATIENCE_S)
        c.wait()
        assert c.steps() == [3]


def test_stores_that_fail_at_random(store: StubbornStore):
    """Whatever fails, what is there is what was saved, and nothing else remains."""
    chance = np.random.default_rng(0)
    lock = threading.Lock()

    def now_and_then(key: str) -> StoreError | None:
        with lock:
            return StoreFullError("on purpose") if chance.random() < 0.15 else None

    oracle = Oracle()
    with checkpointer(store, on_error="warn", max_to_keep=4, max_chain=3) as c:
        c.save(0, state(0)).wait()
        store.fails = now_and_then
        for step in range(1, 60):
            oracle.submit(step, state(step))
            pending = c.save(step, state(step))
            if step % 3 == 0:
                try:
                    pending.wait(PATIENCE_S)
                    oracle.acknowledge(step, state(step))
                except SaveFailedError:
                    pass
        store.fails = lambda key: None
        oracle.submit(60, state(60))
        c.save(60, state(60)).wait(PATIENCE_S)
        oracle.acknowledge(60, state(60))
    assert oracle.acknowledged  # how many depends on which saves the failures hit
    with checkpointer(store, max_to_keep=4) as c:  # a record that may have stood kept its packs
        oracle.submit(61, state(61))
        c.save(61, state(61)).wait(PATIENCE_S)
    check_everything(store, oracle)


# Disks that are full or forbid


@pytest.mark.parametrize("strategy", [DELTA, RAW, Synchronous()])
def test_a_full_disk(strategy: Strategy):
    filesystem = SimulatedFilesystem(capacity_nbytes=400_000)
    store = LocalStore("/run", filesystem)
    steps: list[int] = []
    with checkpointer(store, strategy=strategy) as c:
        with pytest.raises(SaveFailedError) as raised:
            for step in range(20):
                c.save(step, state(step)).wait(PATIENCE_S)
                steps.append(step)
        assert isinstance(raised.value.__cause__, StoreFullError)
        assert 1 < len(steps) < 15
        assert c.steps() == steps
        assert objects_but(store, *steps) == []
        assert same(c.restore(), state(steps[-1]))
        c.discard_after(steps[1])  # room returns
        c.save(steps[-1] + 1, state(77)).wait(PATIENCE_S)
    assert same(restored(store, steps[-1] + 1), state(77))


def test_a_disk_that_is_full_of_orphans():
    """The space that torn runs take is given back although nothing can be committed before."""
    filesystem = SimulatedFilesystem(capacity_nbytes=400_000)
    store = LocalStore("/run", filesystem)
    store.put("data/0000000000000007-torn-000000/w00000-000000.pack", memoryview(bytes(370_000)))
    with checkpointer(store, strategy=RAW, on_error="warn") as c:
        for step in range(3):
            c.save(step, state(step))
            c.wait()
        assert c.steps()[-1] == 2
    assert not [key for key in store.list("") if "torn" in key]


def can_mount(path: Path, options: str) -> bool:
    return os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True
    ).returncode == 0  # fmt: skip


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mount"
    path.mkdir()
    if not can_mount(path, "size=1m"):
        pytest.skip("no right to mount a tmpfs")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_real_full_disk(tmpfs: Path):
    saved: list[int] = []
    with checkpointer(tmpfs / "run", strategy=RAW) as c:
        with pytest.raises(SaveFailedError) as raised:
            for step in range(40):
                c.save(step, state(step)).wait(PATIENCE_S)
                saved.append(step)
        assert isinstance(raised.value.__cause__, StoreFullError)
        assert "Free space" in str(raised.value)
        assert same(c.restore(), state(saved[-1]))
        assert objects_but(LocalStore(tmpfs / "run"), *saved) == []
        c.discard_after(saved[2])
        c.save(50, state(50)).wait(PATIENCE_S)
        assert same(c.restore(), state(50))
    assert list((tmpfs / "run" / ".tmp").iterdir()) == []


def test_a_disk_that_becomes_read_only(tmpfs: Path):
    with checkpointer(tmpfs / "run", strategy=RAW) as c:
        c.save(1, state(1)).wait()
        subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
        with pytest.raises(SaveFailedError) as raised:
            c.save(2, state(2)).wait(PATIENCE_S)
        assert isinstance(raised.value.__cause__, StorePermissionError)
        assert same(c.restore(), state(1))
        subprocess.run(["mount", "-o", "remount,rw", tmpfs], check=True)
        c.save(3, state(3)).wait(PATIENCE_S)
        assert c.steps() == [1, 3]


class ForbiddenFilesystem(SimulatedFilesystem):
    """Nothing may be created."""

    error = errno.EACCES

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(self.error, os.strerror(self.error), str(path))
        return super().open(path, flags)

    def make_directory(self, path: Path) -> None:
        raise OSError(self.error, os.strerror(self.error), str(path))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_directory_without_permission(code: int):
    filesystem = ForbiddenFilesystem()
    filesystem.error = code
    c = checkpointer(LocalStore("/run", filesystem))
    with pytest.raises(StorePermissionError):
        c.save(1, state(1))
    c.close()


# Stores that hang


def hung(store: StubbornStore, **options: Any) -> tuple[Checkpointer, int]:
    """A checkpointer whose store hangs, and the first step for which no memory was left."""
    c = checkpointer(store, strategy=RAW, **options)
    c.save(0, state(0)).wait()
    store.open.clear()
    for step in range(1, 200):
        pending = c.save(step, state(step))
        if isinstance(pending._attempt.error, CaptureTimeoutError):
            return c, step
    raise AssertionError("a store that hangs holds nothing back")


def test_a_hanging_store_is_reported_once_memory_is_used_up(store: StubbornStore):
    c, step = hung(store, stall_timeout_s=0.05)
    with pytest.raises(SaveFailedError) as raised:
        c.save(step + 1, state(0))
    assert raised.value.step == step
    assert isinstance(raised.value.__cause__, CaptureTimeoutError)
    with pytest.raises(TimeoutError, match="hangs"):
        c.wait(timeout_s=0.01)
    store.open.set()
    with pytest.raises(SaveFailedError):  # of those between
        c.save(step + 2, state(1))
        c.wait(PATIENCE_S)
    c.save(step + 3, state(step + 3)).wait(PATIENCE_S)
    assert same(c.restore(), state(step + 3))
    c.close()
    check_everything(store, Oracle({s: [state(s)] for s in range(step + 4)}))


def test_training_waits_for_a_hanging_store_once_and_not_at_every_step(store: StubbornStore):
    c, step = hung(store, on_error="warn", stall_timeout_s=2.0)
    later = [c.save(step + i, state(0)) for i in range(1, 11)]
    assert sum(pending.stall_s for pending in later) < 2.0
    assert all(isinstance(p._attempt.error, CaptureTimeoutError) for p in later)
    store.open.set()
    c.wait(PATIENCE_S)
    c.save(step + 20, state(20)).wait(PATIENCE_S)
    assert same(c.restore(), state(20))
    c.close()


def test_close_gives_up_on_a_hanging_store(store: StubbornStore):
    c, _ = hung(store, stall_timeout_s=0.05, on_error="warn")
    with pytest.raises(TimeoutError):
        c.close(timeout_s=0.05)
    c.close()  # a second time nothing happens


def test_a_process_exits_although_its_store_hangs(tmp_path: Path):
    body = """
        import sys, threading
        sys.path.insert(0, TESTS)
        from test_store_failures import *
        store = StubbornStore(LocalStore(sys.argv[1]))
        c = checkpointer(store, strategy=DELTA, on_error="warn")  # stalls for 300 s by default
        c.save(0, state(0)).wait()
        store.open.clear()
        c.save(1, state(1, 100_000))
        try:
            c.close(timeout_s=0.1)
        except TimeoutError:
            print("gave up")
    """.replace("TESTS", repr(str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(body), tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "gave up\n"), done.stderr
    assert same(restored(LocalStore(tmp_path), 0), state(0))


def test_a_pack_that_hangs_does_not_hold_back_restoring(store: StubbornStore):
    c = checkpointer(store, strategy=RAW)
    c.save(0, state(0)).wait()
    store.open.clear()
    c.save(1, state(1))
    reader = checkpointer(LocalStore(store.store._root))
    assert same(reader.restore(), state(0))
    store.open.set()
    c.close()
    assert same(reader.restore(), state(1))


# Memory


class Mixed:
    """Another codec for every kind of leaf, so that units are staged and raw at once."""

    def decide(self, request: PolicyRequest) -> Decision:
        coded = "delta" if request.has_base else "plane"
        return Decision({"params": coded, "exp_avg": "raw"}.get(request.kind, "zstd"), "mixed")

    def decide_replay(self, requests: object) -> None:
        return None

    def wants_base(self, *_: Any) -> bool:
        return True


MIXED = Strategy("mixed", Mixed(), windows=False, batched=True, blocking=False)
MIXED_WINDOWS = Strategy("mixed", Mixed(), windows=True, batched=False, blocking=False)


def training_state(nbytes: int, step: int) -> Any:
    """Co-located leaves of three kinds, and small ones beside them."""
    n = nbytes // 12
    base = np.random.default_rng(nbytes).standard_normal(n).astype(np.float32)
    return {
        "params": {"w": base + np.float32(1e-4 * step), "b": base[: n // 3].copy()},
        "exp_avg": {"w": base * np.float32(step)},
        "exp_avg_sq": {"w": np.abs(base)},
        "n": step,
    }


MIB = 1 << 20


@pytest.mark.parametrize("host_nbytes", [MIB, MIB + 4097, 3 * MIB - 1])
@pytest.mark.parametrize(
    "nbytes", [0, 12, 5000, 65_536, 65_548, 150_000, 200_000, 260_000, 330_000, 9 * MIB]
)
@pytest.mark.parametrize("strategy", [RAW, DELTA, MIXED, MIXED_WINDOWS])
def test_any_state_goes_through_any_memory(
    store: StubbornStore, strategy: Strategy, nbytes: int, host_nbytes: int
):
    """Far more than `max_host_bytes` takes its turn; no pair of sizes locks up."""
    steps = 2 if nbytes > MIB else 5
    with checkpointer(
        store, strategy=strategy, max_host_bytes=host_nbytes, stall_timeout_s=PATIENCE_S
    ) as c:
        for step in range(steps):
            c.save(step, training_state(nbytes, step))
            assert c.host_nbytes <= host_nbytes
        c.wait()
        assert c.host_nbytes <= host_nbytes
    for step in (0, steps - 1):
        assert same(restored(store, step), training_state(nbytes, step))


def test_memory_does_not_grow_with_the_number_of_saves(store: StubbornStore):
    with checkpointer(store, strategy=MIXED, max_to_keep=2, max_chain=3) as c:
        held: list[int] = []
        traced: list[int] = []
        tracemalloc.start()
        for step in range(241):
            c.save(step, training_state(40_000, step))
            if step % 80 == 0:
                c.wait()
                gc.collect()
                held.append(c.host_nbytes)
                traced.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert c.steps()[-2:] == [239, 240]
    assert max(held) <= 1 << 20
    assert traced[-1] - traced[1] < 400_000  # 160 saves; events of the trace, for the most part


def test_the_bound_is_one_of_real_memory(tmp_path: Path):
    """Peak memory of a process that saves sixteen times its bound."""
    body = """
        import resource, sys
        import numpy as np
        sys.path.insert(0, TESTS)
        from test_store_failures import *
        big = {"params": {"w": np.random.default_rng(0).standard_normal(32 << 20).view(np.uint8)}}
        small = {"params": {"w": np.zeros(1000, np.uint8)}}
        strategy = Strategy("plane", Always("plane"), windows=False, batched=True, blocking=False)
        with checkpointer(sys.argv[1], strategy=strategy, max_host_bytes=16 << 20) as c:
            c.save(0, small).wait()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            c.save(1, big).wait()
            c.save(2, big).wait()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """.replace("TESTS", repr(str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (16 + 24) << 10  # KiB; the rest is codecs' and threads' own


def test_failures_leak_no_memory(store: StubbornStore):
    """After any number of failed saves every buffer is back."""
    with checkpointer(store, strategy=MIXED, on_error="warn", stall_timeout_s=0.02) as c:
        c.save(0, training_state(300_000, 0)).wait()
        for round in range(6):
            store.fails = lambda key: StoreFullError("on purpose")
            for i in range(4):
                c.save(10 * round + i + 1, training_state(300_000, i))
            store.fails = lambda key: None
            store.open.clear()
            for i in range(4, 8):
                c.save(10 * round + i + 1, training_state(300_000, i))
            store.open.set()
            c.wait(PATIENCE_S)
        pipeline = c._pipeline
        assert pipeline is not None
        assert pipeline.capture_pool.used_nbytes == pipeline.pack_pool.used_nbytes == 0
        c.save(100, training_state(300_000, 100)).wait(PATIENCE_S)
    assert same(restored(store, 100), training_state(300_000, 100))


def test_no_memory_at_all(store: StubbornStore):
    """An allocation that fails costs the save, and only that."""
    from asymcheck.buffers import page_aligned

    refused = [False]

    def allocate(nbytes: int) -> Any:
        if refused[0]:
            raise MemoryError("on purpose")
        return page_aligned(nbytes)

    with checkpointer(store, strategy=MIXED_WINDOWS, allocate=allocate) as c:
        refused[0] = True
        with pytest.raises(SaveFailedError, match="MemoryError"):
            c.save(1, training_state(100_000, 1)).wait(PATIENCE_S)
        refused[0] = False
        c.save(2, training_state(100_000, 2)).wait(PATIENCE_S)
    assert same(restored(store, 2), training_state(100_000, 2))


def test_a_state_that_cannot_be_read_costs_its_save_only(store: StubbornStore):
    from dataclasses import replace

    from asymcheck.state import ArraySource, numpy_view

    class Broken(ArraySource):
        def read_into(self, start: int, count: int, out: Any) -> None:
            raise RuntimeError("device lost")

    view = numpy_view(training_state(1000, 1))
    first = view.sources[0]
    assert isinstance(first, ArraySource)
    broken = Broken(first.leaf, first.array, first.group, first.owned)
    with checkpointer(store, strategy=MIXED_WINDOWS) as c:
        capture = c.begin(1, replace(view, sources=(broken, *view.sources[1:])))
        capture.enter_window(0)
        capture.finish()
        with pytest.raises(SaveFailedError, match="device lost"):
            capture.pending.wait(PATIENCE_S)
        c.save(2, training_state(1000, 2)).wait(PATIENCE_S)
    assert same(restored(store, 2), training_state(1000, 2))


def test_errors_are_logged_once(store: StubbornStore, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.ERROR)
    with checkpointer(store, on_error="warn") as c:
        c.save(1, state(1)).wait()
        store.fails = lambda key: StoreFullError("on purpose")
        c.save(2, state(2))
        c.wait()
        c.wait()
    records = [r for r in caplog.records if "step 2" in r.getMessage()]
    assert len(records) == 1


def test_every_error_of_a_save_is_typed(store: StubbornStore):
    store.fails = lambda key: StoreFullError("on purpose")
    c = checkpointer(store)
    with pytest.raises(AsymCheckError):
        c.save(1, state(1))
    c.close()
