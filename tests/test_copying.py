"""Copies of steps: whole or not at all, byte for byte, checked, resumed, whatever happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from crash_oracle import ROOT, simulated_process
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore
from object_urls import gs_url, s3_url
from simulated_filesystem import SimulatedCrash, SimulatedFilesystem
from states import drifted, same, training_state
from test_lease import Clock, write_lease
from writers import Writers

from asymcheck import Always, Checkpointer, CostModel, Strategy, open_store
from asymcheck import copying as copying_module
from asymcheck.commit import commit_key, committed_steps, read_commit
from asymcheck.copying import CopiedStep, StepCopier
from asymcheck.errors import (
    CheckpointNotFoundError,
    CommitError,
    CorruptionError,
    FormatError,
    StepExistsError,
    StoreError,
    StoreUnavailableError,
    UnsupportedVersionError,
)
from asymcheck.inspection.collection import collect
from asymcheck.inspection.copies import copy_all, copy_newest, copy_step
from asymcheck.lease import live_runs, removing
from asymcheck.manifest import MAX_WRITERS, data_prefix
from asymcheck.reader import open_step
from asymcheck.records import header
from asymcheck.retention import collect_orphans
from asymcheck.stores import LocalStore, Store
from asymcheck.stores.base import Guarantees

PATIENCE_S = 30.0
DELTA = Strategy("delta", Always("delta"), windows=False, batched=True, blocking=False)
GOLDEN = Path(__file__).parent / "golden" / "v1"


@pytest.fixture
def source() -> MemoryStore:
    return MemoryStore("source")


@pytest.fixture
def target() -> MemoryStore:
    return MemoryStore("target")


def write_run(
    store: Any, steps: range | list[int] = range(1, 7), elements: int = 3000, **options: Any
) -> dict[int, Any]:
    """Commit those steps, and return their states.

    3000 elements make one pack, and chains of a base and two increments; 30,000 make bases of
    several packs.
    """
    options = {
        "strategy": DELTA,
        "max_chain": 2,
        "max_host_bytes": 1 << 20,
        "cost_model": CostModel(),
        **options,
    }
    states: dict[int, Any] = {}
    state = training_state(0, elements)
    with Checkpointer(store, **options) as checkpointer:
        for step in steps:
            state = states[step] = drifted(state, step)
            checkpointer.save(step, state).wait(PATIENCE_S)
    return states


def write_shared_run(store: Any) -> dict[int, Any]:
    """A base and two increments by three writers, each with a pack of each."""
    states: dict[int, Any] = {}
    state = training_state(3)
    with Writers(store, 3, strategy=DELTA, max_chain=2, cost_model=CostModel()) as writers:
        for step in (1, 2, 3):
            state = drifted(state, step)
            states[step] = {**state, "ranks": {}}
            assert writers.save_state(step, state) == [None] * 3
    return states


def content(store: Store) -> dict[str, bytes]:
    """Everything in a store but leases."""
    keys = [key for key in store.list("") if not key.startswith("runs/")]
    return {key: store.get(key, 1 << 30) for key in keys}


def chain_of(store: Store, step: int) -> list[int]:
    """The step and those that it decodes from, base first."""
    parent = read_commit(store, step)[0].parent
    return [*([] if parent is None else chain_of(store, parent.step)), step]


def assert_whole(store: Store, states: dict[int, Any] | None = None) -> None:
    """Every step of a store restores, and to what was saved."""
    for step in committed_steps(store):
        with open_step(store, step, threads=1) as checkpoint:
            checkpoint.verify()
            assert states is None or same(checkpoint.state(), states[step])


# -- what is copied ----------------------------------------------------------------------------


KINDS = ["memory", "file", "tensorstore", "shared memory", "gs", "s3"]


def open_place(kind: str, request: pytest.FixtureRequest) -> Store:
    """An empty store; for object stores on a server of the tests."""
    if kind == "memory":
        return MemoryStore("m")
    if kind == "shared memory":
        return open_store(request.getfixturevalue("memory_url"))
    if kind == "gs":
        return open_store(gs_url(request.getfixturevalue("gcs_server")))
    if kind == "s3":
        return open_store(s3_url(request.getfixturevalue("s3_server")))
    path = request.getfixturevalue("tmp_path") / kind
    return open_store(f"{'tensorstore+' if kind == 'tensorstore' else ''}file://{path}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["from", "to"])
def test_between_stores(kind: str, direction: str, request: pytest.FixtureRequest) -> None:
    other = open_place(kind, request)
    source, target = (other, MemoryStore()) if direction == "from" else (MemoryStore(), other)
    states = write_run(source)
    states |= write_run(source, [7], elements=30_000)
    copy_step(source, target, 2)
    copies = copy_all(source, target)
    assert copies.good
    assert [step.copied for step in copies.steps] == [False, False, *[True] * 5]
    assert content(target) == content(source)
    assert_whole(target, states)
    assert target.list("runs/") == []
    for store in (source, target):
        store.close()


def test_from_one_cloud_to_another_and_back(request: pytest.FixtureRequest) -> None:
    gs, s3 = open_place("gs", request), open_place("s3", request)
    states = write_run(gs)
    assert copy_all(gs, s3).good
    before = content(gs)
    gs.delete(*before)
    assert copy_all(s3, gs).good
    assert content(gs) == content(s3) == before
    assert_whole(gs, states)


def test_a_step_brings_its_chain(source: MemoryStore, target: MemoryStore) -> None:
    states = write_run(source)
    assert [chain_of(source, step) for step in (3, 5)] == [[1, 2, 3], [4, 5]]
    with StepCopier(source, target) as copier:
        copied = copier.copy(5)
    assert [(each.step, each.copied) for each in copied] == [(4, True), (5, True)]
    assert committed_steps(target) == [4, 5]
    named = {key for key in content(source) if key[:30].find("0004") > 0 or "0005" in key[:30]}
    assert content(target) == {key: content(source)[key] for key in named}
    for each in copied:
        keys = [key for key in named if f"{each.step:016d}" in key]
        assert (each.sent_objects, each.sent_nbytes) == (
            len(keys),
            sum(len(source.objects[key]) for key in keys),
        )
    assert_whole(target, states)


def test_what_no_step_needs_stays_behind(source: MemoryStore, target: MemoryStore) -> None:
    write_run(source, keep_trace=True)
    committed = content(source)
    more = [data_prefix(9, "dead-000000") + "w00000-000000.pack", "notes", "damaged/x"]
    for key in more:
        source.objects[key] = b"x"
    copy_all(source, target)
    assert source.keys("traces/") != []
    assert content(target) == {k: v for k, v in committed.items() if not k.startswith("traces/")}


def test_what_is_there_is_not_sent_again(source: MemoryStore, target: MemoryStore) -> None:
    write_run(source)
    copy_step(source, target, 2)
    target.calls.clear()
    source.calls.clear()
    copies = copy_all(source, target)
    assert [step.copied for step in copies.steps] == [False, False, True, True, True, True]
    assert copies.steps[0] == CopiedStep(1, False, 0, 0)
    put = target.called("put") + target.called("put_if_absent")
    assert not any(f"{step:016d}" in key for key in put for step in (1, 2))
    assert not any(f"{step:016d}" in key for key in source.called("get_range") for step in (1, 2))
    assert len(source.called("get", "commits/")) == 6
    target.calls.clear()
    assert not any(step.copied for step in copy_all(source, target).steps)
    assert {operation for operation, _ in target.calls} == {"get"}


def test_the_order_in_which_a_step_comes_to_be(source: MemoryStore, target: MemoryStore) -> None:
    """A lease, packs, manifests, the record: each only when all of those before are there."""
    write_run(source, [1], elements=30_000)
    copy_all(source, target)
    put = [k for op, k in target.calls if op in ("put", "put_if_absent")]
    kinds = ["lease", *["pack"] * (len(put) - 3), "manifest", "commits"]
    assert len(put) > 5
    for key, kind in zip(put, kinds, strict=True):
        assert key.startswith("runs/") if kind == "lease" else kind in key
    number = int(put[0].split("/w")[1].split("-")[0])
    assert number >= MAX_WRITERS


def test_a_run_of_several_writers(source: MemoryStore, target: MemoryStore) -> None:
    states = write_shared_run(source)
    assert copy_all(source, target).good
    assert content(target) == content(source)
    with open_step(target, 3) as checkpoint:
        assert [len(index.manifests) for index in checkpoint.chain] == [3, 3, 3]
    assert len(source.keys(".pack")) == 9
    assert_whole(target, states)


@pytest.mark.parametrize("case", ["chain", "dtypes", "nested", "writers", "left_behind"])
def test_golden_runs(case: str, target: MemoryStore) -> None:
    (run,) = GOLDEN.glob(f"{case}/run") or ()
    golden = LocalStore(run)
    copies = copy_all(golden, target)
    assert copies.good
    assert committed_steps(target) == committed_steps(golden) != []
    assert_whole(target)
    assert content(target).items() <= content(golden).items()


# -- damage ------------------------------------------------------------------------------------


def corruptions(data: bytes) -> Iterator[bytes | None]:
    """The object with a bit flipped at its begin, middle and end, cut, longer, empty, or gone."""
    for position in (0, len(data) // 2, len(data) - 1):
        yield data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
    yield from (data[:-1], data + b"\0", b"", None)


def test_damage_of_every_object_keeps_its_step_out(source: MemoryStore) -> None:
    """And those that decode from it; all others come whole, and all damage is told of."""
    states = write_run(source, range(1, 4))
    chain = [1, 2, 3]
    cases = 0
    for key, good in content(source).items():
        for bad in corruptions(good):
            source.objects[key] = bad or b""
            if bad is None:
                del source.objects[key]
            step = int(key.split("/")[1][:16])
            target = MemoryStore("target")
            copies = copy_all(source, target)
            assert committed_steps(target) == [s for s in chain if s < step], key
            gone = bad is None and key.startswith("commits/")
            told = [uncopied.damage.step for uncopied in copies.uncopied]
            assert copies.good == (told == []) == (gone and step == 3)
            if not gone:
                assert set(told) == {step}
                assert {uncopied.damage.object for uncopied in copies.uncopied} == {key}
                assert [uncopied.step for uncopied in copies.uncopied] == list(range(step, 4))
            assert_whole(target, states)
            assert target.keys("runs/") == []
            for number in (s for s in chain if s >= step):
                kind = CheckpointNotFoundError if gone and number == step else DAMAGE
                with pytest.raises(kind), StepCopier(source, target) as copier:
                    copier.copy(number)
            assert committed_steps(target) == [s for s in chain if s < step]
            source.objects[key] = good
            cases += 1
    assert cases == 7 * 9


DAMAGE = (CorruptionError, FormatError)


def test_damage_names_the_leaf_and_the_place(source: MemoryStore, target: MemoryStore) -> None:
    write_run(source, [1])
    (key,) = source.keys(".pack")
    data = bytearray(source.objects[key])
    data[-1] ^= 1
    source.objects[key] = bytes(data)
    with pytest.raises(CorruptionError) as raised, StepCopier(source, target) as copier:
        copier.copy(1)
    error = raised.value
    assert (error.step, error.object) == (1, key)
    assert error.leaf is not None and error.offset is not None
    assert str(error.expected).startswith("xxh3-128")


def test_the_newest_that_is_whole(
    source: MemoryStore, target: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    states = write_run(source)
    (key,) = source.keys("data/0000000000000006-")[:1]
    source.objects[key] = b""
    copies = copy_newest(source, target)
    assert [(u.step, u.damage.object) for u in copies.uncopied] == [(6, key)]
    assert [step.step for step in copies.steps] == [4, 5]
    assert committed_steps(target) == [4, 5]
    assert "step 6 cannot be restored" in caplog.text
    assert_whole(target, states)


def test_no_step_is_whole(source: MemoryStore, target: MemoryStore) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint"):
        copy_newest(source, target)
    write_run(source, [1, 2], max_chain=0)
    for key in source.keys(".manifest"):
        del source.objects[key]
    copies = copy_newest(source, target)
    assert not copies.good and copies.steps == []
    assert len(copies.uncopied) == 2
    assert content(target) == {}


def test_a_later_version_is_not_damage(source: MemoryStore, target: MemoryStore) -> None:
    write_run(source, [1])
    body = source.objects[commit_key(1)].partition(b"\n")[2]
    source.objects[commit_key(1)] = header("commit", 2, body) + body
    for copy in (copy_all, copy_newest):
        with pytest.raises(UnsupportedVersionError):
            copy(source, target)
    assert content(target) == {}


def test_a_chain_whose_depths_lie(source: MemoryStore, target: MemoryStore) -> None:
    """The records are the bound on how far a chain is followed."""
    write_run(source, [1, 2])
    body = source.objects[commit_key(2)].partition(b"\n")[2].replace(b'"depth":1', b'"depth":7')
    source.objects[commit_key(2)] = header("commit", 1, body) + body
    with pytest.raises(FormatError, match="count down"), StepCopier(source, target) as copier:
        copier.copy(2)


def test_a_parent_that_was_replaced(source: MemoryStore, target: MemoryStore) -> None:
    write_run(source, [1, 2])
    for key in source.keys(f"{1:016d}"):
        del source.objects[key]
    states = write_run(source, [1], elements=500)
    with pytest.raises(CorruptionError, match="replaced"), StepCopier(source, target) as copier:
        copier.copy(2)
    assert content(target) == {}
    assert [uncopied.step for uncopied in copy_all(source, target).uncopied] == [2]
    assert committed_steps(target) == [1]
    assert_whole(target, states)


# -- the target has something else -------------------------------------------------------------


def test_another_step_of_the_same_number(source: MemoryStore, target: MemoryStore) -> None:
    write_run(source, range(1, 4))
    write_run(target, [2], elements=500)
    before = content(target)
    with pytest.raises(StepExistsError) as raised:
        copy_step(source, target, 3)
    assert raised.value.step == 2
    assert source.url in str(raised.value) and target.url in str(raised.value)
    assert content(target).items() >= before.items()
    assert committed_steps(target) == [1, 2]
    target.objects[commit_key(2)] = b"x" * (1 << 26) + b"x"  # too long for any record
    with pytest.raises(StepExistsError):
        copy_step(source, target, 3)


def test_another_step_of_the_number_comes_meanwhile(
    source: MemoryStore, target: MemoryStore
) -> None:
    write_run(source, [1])

    def commit_first(operation: str, key: str) -> None:
        if operation == "put_if_absent":
            target.objects.setdefault(key, b"another")

    target.hook = commit_first
    with pytest.raises(StepExistsError):
        copy_step(source, target, 1)
    assert target.objects[commit_key(1)] == b"another"


@pytest.mark.parametrize("alias", ["", "/", "/../local"])
def test_refuses_to_copy_onto_itself(alias: str, tmp_path: Path) -> None:
    write_run(tmp_path / "local", [1])
    with pytest.raises(StoreError, match="the same place"):
        copy_all(LocalStore(tmp_path / "local"), LocalStore(f"{tmp_path}/local{alias}"))


def test_notices_that_it_would_copy_onto_itself(source: MemoryStore, target: MemoryStore) -> None:
    """Two URLs of one place: the step that is to be copied was removed and comes again."""
    write_run(source, [1])
    target.objects = source.objects
    assert not copy_all(source, target).steps[0].copied
    record = source.objects[commit_key(1)]

    def hide(operation: str, key: str) -> None:
        if operation == "get" and key == commit_key(1):
            source.objects.pop(key, None)

    target.hook = hide
    with pytest.raises(StoreError, match="the same place"):
        copy_all(source, target)
    source.objects[commit_key(1)] = record
    assert_whole(source)
    assert source.keys("runs/") == []


class Overwriting(MemoryStore):
    """Stands for a server that ignores the condition of a put; known servers do not any more."""

    guarantees = Guarantees("one assignment", "none", True, True, False, tried_first=True)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        self.put(key, data)
        return True


def test_a_target_that_would_overwrite_another_step(source: MemoryStore) -> None:
    """Somebody may commit another one between the look and the put: nothing is copied there."""
    write_run(source, [1])
    target = Overwriting("target")
    with pytest.raises(StoreError, match="ignores conditional puts"):
        copy_step(source, target, 1)
    assert target.objects == {}


# -- crashes and faults ------------------------------------------------------------------------


class Died(BaseException):
    """The process that copies is dead."""


class Dying:
    """A store whose calls all raise from number `at` on; that one perhaps after it was done."""

    def __init__(self, store: MemoryStore, at: int, *, done: bool, error: BaseException) -> None:
        self._store = store
        self._left = at
        self._done = done
        self._error = error
        self._lock = threading.Lock()
        self.died = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return self._dying(found) if callable(found) else found

    def _dying(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*arguments: Any) -> Any:
            with self._lock:
                self._left -= 1
                left = self._left
            if left < 0:
                self.died = True
                if left == -1 and self._done:
                    call(*arguments)
                raise self._error
            return call(*arguments)

        return dying


@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("dies", ["source", "target"])
def test_dies_at_every_call_and_goes_on(
    in_flight: int, done: bool, dies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment the target has whole steps only; the next copy sends only what is missing."""
    monkeypatch.setattr(copying_module, "PACKS_IN_FLIGHT", in_flight)
    source = MemoryStore("source")
    states = write_shared_run(source)
    packs = len(source.keys(".pack"))
    at = 0
    while True:
        target = MemoryStore("target")
        dying = Dying(source if dies == "source" else target, at, done=done, error=Died())
        with suppress(Died):
            copy_all(*((dying, target) if dies == "source" else (source, dying)))
        assert_whole(target, states)
        if not dying.died:
            break
        for key in target.keys("runs/"):
            del target.objects[key]  # the lease of a dead process
        sent = len(target.keys(".pack"))
        target.calls.clear()
        assert copy_all(source, target).good
        assert content(target) == content(source)
        assert len(target.called("put", ".pack")) == packs - sent, at
        at += 1
    assert at > (15 if dies == "source" else 20)
    assert content(target) == content(source)


def test_dies_again_and_again(source: MemoryStore, target: MemoryStore) -> None:
    """A little further each time, and in the end there is everything."""
    states = write_shared_run(source)
    for life in range(1000):
        dying = Dying(target, 16, done=life % 2 == 0, error=Died())
        with suppress(Died):
            copy_all(source, dying)
        assert_whole(target, states)
        for key in target.keys("runs/"):
            del target.objects[key]
        if not dying.died:
            break
    assert life > 1
    assert content(target) == content(source)


@pytest.mark.parametrize("seed", range(3))
def test_power_cuts(source: MemoryStore, seed: int) -> None:
    """On a disk that keeps what POSIX promises and no more: at every seventh call, then again."""
    states = write_shared_run(source)
    cuts = 0
    for at in range(seed + 1, 10_000, 7):
        filesystem = SimulatedFilesystem()
        filesystem.die_at(at)
        died = True
        with simulated_process(filesystem), suppress(SimulatedCrash):
            copy_all(source, LocalStore(ROOT, filesystem))
            died = False
        filesystem.die_at(1)
        filesystem = filesystem.crash(seed)
        with simulated_process(filesystem):
            disk = LocalStore(ROOT, filesystem)
            assert_whole(disk, states)
            if not died:
                break
            assert copy_all(source, disk).good
            assert content(disk) == content(source)
            assert_whole(disk, states)
        cuts += 1
    assert cuts > 20


def test_a_store_that_fails_leaves_no_threads_and_no_lease(
    source: MemoryStore, target: MemoryStore
) -> None:
    write_run(source, [1], elements=30_000)
    error = StoreUnavailableError("503")
    for store, operation, part in (
        (source, "get_range", ".pack"),
        (target, "put", "000002.pack"),
        (target, "put", ".manifest"),
        (target, "put_if_absent", "commits/"),
    ):
        with store.failing(operation, part, error), pytest.raises(StoreUnavailableError):
            copy_step(source, target, 1)
        assert committed_steps(target) == []
        assert target.keys("runs/") == []
        assert not [t for t in threading.enumerate() if t.name.startswith("asymcheck-copy")]
    copy_step(source, target, 1)
    assert content(target) == content(source)


# -- others at the same time -------------------------------------------------------------------


def test_two_copies_at_once(source: MemoryStore, target: MemoryStore) -> None:
    states = write_run(source, elements=30_000)
    barrier = threading.Barrier(4)

    def copy(_: int) -> bool:
        barrier.wait(PATIENCE_S)
        return copy_all(source, target).good

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy, range(4))) == [True] * 4
    assert content(target) == content(source)
    assert_whole(target, states)
    assert target.keys("runs/") == []


def test_nobody_collects_what_is_being_copied(source: MemoryStore, target: MemoryStore) -> None:
    write_run(source, [1], elements=30_000)
    with ThreadPoolExecutor(1) as pool:
        with target.hold("put", ".manifest") as held:
            copied = pool.submit(copy_step, source, target, 1)
            held.await_calls()
            assert target.keys(".pack") != []
            assert live_runs(target) != set()
            with removing(target):
                assert collect_orphans(target) == []
        assert copied.result(PATIENCE_S).good
    assert content(target) == content(source)


@pytest.mark.parametrize("remove", ["gc", "discard_after", "mirror"])
def test_what_others_are_removing_is_not_relied_on(
    remove: str, source: MemoryStore, target: MemoryStore
) -> None:
    """While the objects of a torn copy or of a step are removed, the step is copied again."""
    states = write_run(source, [1], elements=30_000)
    if remove == "gc":
        tear(source, target)
    else:
        copy_step(source, target, 1)

    def work() -> None:
        if remove == "gc":
            assert collect(target, dry_run=False).objects != []
        elif remove == "discard_after":
            Checkpointer(target).discard_after(0)
        else:
            with Checkpointer(
                MemoryStore(), mirror=target, mirror_max_to_keep=1, max_chain=0
            ) as checkpointer:
                checkpointer.save(2, training_state(2))

    with ThreadPoolExecutor(2) as pool:
        with target.hold("delete", ".pack") as held:
            removed = pool.submit(work)
            held.await_calls()
            target.calls.clear()
            copied = pool.submit(copy_step, source, target, 1)
            await_that(lambda: len(target.called("list", "runs/")) > 3 or copied.done())
            assert not copied.done()
            assert 1 not in committed_steps(target)
        assert copied.result(PATIENCE_S).good
        removed.result(PATIENCE_S)
    assert content(target).items() >= content(source).items()
    with open_step(target, 1) as checkpoint:
        assert same(checkpoint.state(), states[1])


def tear(source: MemoryStore, target: MemoryStore) -> None:
    """Leave the packs of a copy in the target, as one that died."""
    with suppress(Died), target.failing("put", ".manifest", Died()):
        copy_step(source, target, 1)
    assert target.keys(".pack") != []


def test_a_dry_run_of_gc_writes_nothing(source: MemoryStore, target: MemoryStore) -> None:
    write_run(source, [1])
    tear(source, target)
    before = dict(target.objects)
    target.calls.clear()
    assert collect(target, dry_run=True).objects != []
    assert target.objects == before
    assert target.called("put") == target.called("delete") == []


def await_that(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_gives_up_where_others_never_end_removing(source: MemoryStore, target: MemoryStore) -> None:
    """A run that lives in the target may remove its steps at any time."""
    write_run(source, [1])
    tear(source, target)
    before = content(target)
    write_lease(target, "0123456789abcdef-17-4711", expires_s=1000, run="trainer")
    with (
        pytest.raises(CommitError, match="may be removing them") as raised,
        StepCopier(source, target, lease_s=0.05) as copier,
    ):
        copier.copy(1)
    assert "trainer" in str(raised.value)
    assert content(target) == before
    target.objects = {k: v for k, v in target.objects.items() if "data/" not in k}
    copy_step(source, target, 1)  # nothing is there that anybody could remove
    assert_whole(target)


def test_a_copier_that_was_suspended_does_not_commit(
    source: MemoryStore, target: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    write_run(source, [1])
    target.hook = lambda op, key: clock.advance(121) if ".manifest" in key else None
    with pytest.raises(CommitError, match="lease ran out") as raised:
        copy_step(source, target, 1)
    assert raised.value.step == 1 and "Copy again" in str(raised.value)
    assert committed_steps(target) == []
    target.hook = lambda op, key: None
    copy_step(source, target, 1)
    assert content(target) == content(source)


def test_a_step_that_its_run_removes_meanwhile(source: MemoryStore, target: MemoryStore) -> None:
    states = write_run(source, range(1, 4), max_chain=0)

    def remove(operation: str, key: str) -> None:
        if operation == "get_range" and "0003-" in key:
            for old in source.keys(f"{3:016d}"):
                del source.objects[old]

    source.hook = remove
    with pytest.raises(CheckpointNotFoundError, match="removed from memory://source") as raised:
        copy_step(source, target, 3)
    assert raised.value.step == 3
    states |= write_run(source, [3], max_chain=0)
    assert [step.step for step in copy_newest(source, target).steps] == [2]
    states |= write_run(source, [3], max_chain=0)
    copies = copy_all(source, target)
    assert copies.good and copies.removed_steps == [3]
    assert committed_steps(target) == [1, 2]
    assert_whole(target, states)


def test_a_step_that_is_written_anew_meanwhile(source: MemoryStore, target: MemoryStore) -> None:
    """discard_after, and training goes on: what is gone was not damaged."""
    write_run(source, [1], max_chain=0)

    def rewrite(operation: str, key: str) -> None:
        if operation == "get_range":
            source.hook = lambda op, key: None
            source.objects.clear()
            write_run(source, [1], elements=100)

    source.hook = rewrite
    with pytest.raises(CheckpointNotFoundError, match="removed"):
        copy_step(source, target, 1)
    assert committed_steps(target) == []


def test_a_copy_beside_a_run_that_trains(source: MemoryStore, target: MemoryStore) -> None:
    """Its retention removes steps all the time."""
    states: dict[int, Any] = {}
    stop = threading.Event()

    def train() -> None:
        state = training_state(0)
        with Checkpointer(
            source, strategy=DELTA, max_chain=2, max_to_keep=2, cost_model=CostModel()
        ) as checkpointer:
            step = 0
            while not stop.is_set():
                step += 1
                state = states[step] = drifted(state, step)
                checkpointer.save(step, state).wait(PATIENCE_S)

    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(train)
        try:
            while len(committed_steps(target)) < 20:
                with suppress(CheckpointNotFoundError):
                    assert copy_newest(source, target).good
                assert not trained.done() or trained.result()
        finally:
            stop.set()
        trained.result(PATIENCE_S)
    assert_whole(target, states)


# -- how ---------------------------------------------------------------------------------------


def test_several_packs_at_a_time_and_no_more(source: MemoryStore, target: MemoryStore) -> None:
    write_run(source, [1], elements=30_000)
    assert len(source.keys(".pack")) > 4
    with ThreadPoolExecutor(1) as pool:
        with source.hold("get_range", ".pack") as held:
            copied = pool.submit(copy_step, source, target, 1)
            held.await_calls(4)
            assert held.waiting == 4
            assert target.called("put", ".pack") == []
        assert copied.result(PATIENCE_S).good
    assert held.waiting == 4 or held.waiting == len(source.keys(".pack"))


def test_large_packs_go_alone(
    source: MemoryStore, target: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(source, [1], elements=30_000)
    sizes = sorted(len(source.objects[key]) for key in source.keys(".pack"))
    monkeypatch.setattr(copying_module, "MAX_SHARED_NBYTES", sizes[-1] - 1)
    alone = {key for key in source.keys(".pack") if len(source.objects[key]) == sizes[-1]}
    assert 0 < len(alone) < len(sizes)
    inside: set[str] = set()
    lock = threading.Lock()

    def enter(operation: str, key: str) -> None:
        if operation == "get_range":
            with lock:
                inside.add(key)
                assert not alone & inside or len(inside) == 1
            time.sleep(0.001)

    def leave(operation: str, key: str) -> None:
        if operation == "put":
            with lock:
                inside.discard(key)

    source.hook, target.hook = enter, leave
    assert copy_step(source, target, 1).good
    assert content(target) == content(source)


def test_tells_how_far_it_is(source: MemoryStore, target: MemoryStore) -> None:
    write_shared_run(source)
    told: dict[tuple[int, int], int] = {}

    class Meter:
        def __init__(self, step: int, nbytes: int) -> None:
            self._place = (step, nbytes)

        def add(self, amount: int) -> None:
            told[self._place] = told.get(self._place, 0) + amount

    @contextmanager
    def watch(step: int, nbytes: int) -> Iterator[Meter]:
        yield Meter(step, nbytes)

    with StepCopier(source, target, watch=watch) as copier:
        copier.copy(2)
    assert [step for step, _ in told] == [1, 2]  # each with its own
    for (step, nbytes), amount in told.items():
        packs = [k for k in source.keys(f"{step:016d}") if k.endswith(".pack")]
        assert amount == nbytes == sum(len(source.objects[key]) for key in packs)


def test_runs_of_several_starts_each_have_a_lease(source: MemoryStore, target: MemoryStore) -> None:
    """Each protects only objects of its own run."""
    for start in range(3):
        write_run(source, [start], run_id=f"start{start}")
    held: list[str] = []

    def look(operation: str, key: str) -> None:
        if operation == "put" and key.startswith("data/"):
            held.extend({k.split("/")[1] for k in target.keys("runs/")})
            assert key.split("-")[1] in held[-1]

    target.hook = look
    assert copy_all(source, target).good
    assert sorted(set(held)) == ["start0", "start1", "start2"]
    assert target.keys("runs/") == []


# -- any history -------------------------------------------------------------------------------


@given(
    data=st.data(),
    starts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    max_chain=st.integers(0, 3),
    max_to_keep=st.none() | st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 4),
)
def test_any_history(
    data: st.DataObject,
    starts: list[int],
    max_chain: int,
    max_to_keep: int | None,
    keep_every: int | None,
) -> None:
    """Whatever chains, retention and damage there are: all whole steps come, and no others."""
    source, target = MemoryStore("source"), MemoryStore("target")
    states: dict[int, Any] = {}
    step = 0
    for count in starts:
        steps = [step := step + data.draw(st.integers(1, 3)) for _ in range(count)]
        states |= write_run(
            source,
            steps,
            elements=60,
            max_chain=max_chain,
            max_to_keep=max_to_keep,
            keep_every=keep_every,
        )
    before = committed_steps(source)
    copied = data.draw(st.sampled_from(before))
    copy_step(source, target, copied)
    assert committed_steps(target) == chain_of(source, copied)
    objects = [
        k for k in content(source) if not any(f"{s:016d}" in k for s in chain_of(source, copied))
    ]
    bad = set(data.draw(st.lists(st.sampled_from(objects), max_size=2))) if objects else set()
    chains = {s: set(chain_of(source, s)) for s in before}
    for key in bad:
        source.objects[key] = source.objects[key][:-1]
    damaged = {int(key.split("/")[1][:16]) for key in bad}
    copies = copy_all(source, target)
    assert committed_steps(target) == [s for s in before if not chains[s] & damaged]
    assert copies.good == (not damaged)
    assert_whole(target, states)
    if not damaged:
        assert content(target) == content(source)
