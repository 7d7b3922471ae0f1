"""From blocks to bytes: along chains, in parallel, checked, and back to the newest good step."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore, RemoteStore
from states import drifted, same, training_state

from asymcheck import Always, AsymCheck, Checkpointer, CostModel, Never
from asymcheck import codecs as registry
from asymcheck.commit import MAX_CHAIN
from asymcheck.errors import (
    CodecError,
    CorruptionError,
    StoreUnavailableError,
)
from asymcheck.index import StepIndex, StoredBlock, load_chain
from asymcheck.reader import open_step, whole
from asymcheck.restore import _STRETCHES, ChainReader, Want, _Batch, _stretches
from asymcheck.spans import Spans, reach_of
from asymcheck.state import ShardSpec

DELTA = AsymCheck(policy=Always("delta"))


def saved(store: MemoryStore, count: int, strategy: Any = DELTA, **options: Any) -> list[Any]:
    """Save so many steps, each a little later; what was saved."""
    states = [training_state(0)]
    for seed in range(1, count):
        states.append(drifted(states[-1], seed))
    options = {"cost_model": CostModel(), "strategy": strategy, "max_chain": 10, **options}
    with Checkpointer(store, **options) as checkpointer:
        for step, state in enumerate(states):
            checkpointer.save(step, state)
    return states


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_every_step_of_a_chain(store: MemoryStore, threads: int) -> None:
    states = saved(store, 7, max_chain=4)
    for step, state in enumerate(states):
        checkpoint = open_step(store, step, threads)
        assert len(checkpoint.chain) == step % 5 + 1
        assert same(checkpoint.state(), state)


def test_the_longest_chain_that_is_allowed(store: MemoryStore) -> None:
    """Decoding recurses; the format's limit fits into Python's."""
    state = {"w": np.zeros(100, np.int32)}
    with Checkpointer(
        store, strategy=DELTA, max_chain=MAX_CHAIN, cost_model=CostModel()
    ) as checkpointer:
        for step in range(MAX_CHAIN + 2):
            state["w"] += 1
            checkpointer.save(step, state)
    chain = load_chain(store, MAX_CHAIN)
    assert len(chain) == MAX_CHAIN + 1
    for threads in (1, 4):
        assert same(open_step(store, MAX_CHAIN, threads).state(), {"w": state["w"] - 1})
    assert len(load_chain(store, MAX_CHAIN + 1)) == 1


@dataclass(frozen=True)
class PairCodec:
    """Jointly coded: every column but the first is XORed with the first."""

    id = "pair"
    params = MappingProxyType({})
    needs_base = False
    lossy = False
    joint = True

    def encode(self, columns: Any) -> list[bytes]:
        first = columns[0].new
        return [(c.new if c is columns[0] else c.new ^ first).tobytes() + b"joint" for c in columns]

    def decode(self, columns: Any, payloads: Any) -> None:
        assert len(columns) == len(payloads) == 3
        for column, payload in zip(columns, payloads, strict=True):
            if bytes(payload[-5:]) != b"joint":
                raise CodecError("not joint")
            column.new[:] = np.frombuffer(payload[:-5], np.uint8)
            if column is not columns[0]:
                np.bitwise_xor(column.new, columns[0].new, out=column.new)


@pytest.fixture
def pair_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._CODECS, "pair", lambda **params: PairCodec())


@pytest.mark.usefixtures("pair_codec")
def test_leaves_that_only_decode_together(store: MemoryStore) -> None:
    rng = np.random.default_rng(0)
    state = {k: {"w": rng.random((700, 40))} for k in ("params", "exp_avg", "exp_avg_sq")}
    strategy = AsymCheck(policy=Always("pair"))
    with Checkpointer(store, strategy=strategy, max_host_bytes=1 << 20) as checkpointer:
        checkpointer.save(0, state)
    checkpoint = open_step(store, 0)
    assert len({b.group for b in checkpoint.chain[0].blocks()}) > 3
    assert same(checkpoint.state(), state)
    for kind in state:  # one leaf alone, of which only a part
        assert np.array_equal(checkpoint[f"{kind}/w"][333], state[kind]["w"][333])
    checkpoint.verify()
    key = store.keys(".pack")[0]
    store.objects[key] = bytes([store.objects[key][0] ^ 1]) + store.objects[key][1:]
    with pytest.raises(CorruptionError):
        checkpoint["exp_avg_sq/w"][0]


# -- requests and bytes ------------------------------------------------------------------------

MIB = 1 << 20


class Reads:
    """Requests for pieces of packs, and their bytes, since this was made."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._calls = len(store.called("get_range", ".pack"))
        self._nbytes = store.read_nbytes

    @property
    def count(self) -> int:
        return len(self._store.called("get_range", ".pack")) - self._calls

    @property
    def nbytes(self) -> int:
        return self._store.read_nbytes - self._nbytes


def small_leaves(count: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kinds = ("params", "exp_avg", "exp_avg_sq")
    return {k: {f"w{i}": rng.random((8, 16)) for i in range(count)} for k in kinds}


def stored_nbytes(store: MemoryStore, step: int) -> int:
    return sum(len(store.objects[key]) for key in store.keys(f"{step:016d}-") if ".pack" in key)


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("codec", ["raw", "plane"])
def test_many_small_leaves_take_few_requests(remote: bool, codec: str) -> None:
    store, state = RemoteStore() if remote else MemoryStore(), small_leaves(1000)
    with Checkpointer(store, strategy=AsymCheck(policy=Always(codec))) as checkpointer:
        checkpointer.save(0, state)
    checkpoint, reads = open_step(store, 0), Reads(store)
    assert same(checkpoint.state(), state)
    assert reads.nbytes == stored_nbytes(store, 0)
    assert reads.count <= len(store.keys(".pack")) + reads.nbytes / (MIB / 2)


def test_a_part_of_small_leaves_is_read_with_what_lies_between(store: MemoryStore) -> None:
    """Of three kinds side by side one is wanted: a few large reads, not a thousand small ones."""
    state = small_leaves(1000)
    with Checkpointer(store, strategy="asymcheck-naive") as checkpointer:
        checkpointer.save(0, state)
    checkpoint, reads = open_step(store, 0), Reads(store)
    arrays = {path: np.empty((8, 16)) for path in checkpoint if path.startswith("exp_avg/")}
    checkpoint.read_into(whole(path, array) for path, array in arrays.items())
    assert all(np.array_equal(arrays[f"exp_avg/{k}"], v) for k, v in state["exp_avg"].items())
    assert reads.count <= 8
    assert reads.nbytes <= stored_nbytes(store, 0)


@pytest.mark.parametrize("remote", [True, False])
def test_one_leaf_and_one_row_cost_what_they_hold(remote: bool) -> None:
    store = RemoteStore() if remote else MemoryStore()
    rng = np.random.default_rng(0)
    state = {f"w{i}": rng.integers(0, 256, (16, MIB), np.uint8) for i in range(3)}
    with Checkpointer(store, strategy="asymcheck-naive", max_host_bytes=1 << 30) as checkpointer:
        checkpointer.save(0, state)
    checkpoint = open_step(store, 0)
    reads = Reads(store)
    assert np.array_equal(checkpoint["w1"][7, 5:9], state["w1"][7, 5:9])
    assert reads.count == 1
    assert MIB / 16 <= reads.nbytes <= 4 * MIB
    reads = Reads(store)
    assert np.array_equal(checkpoint["w1"][...], state["w1"])
    assert reads.nbytes == 16 * MIB
    assert reads.count <= (3 if remote else 17)
    reads = Reads(store)
    assert checkpoint["w1"][3:3].shape == (0, MIB)
    assert reads.count == 0


@pytest.mark.parametrize("remote", [True, False])
def test_a_chain_takes_a_request_a_pack_for_all_its_small_leaves(remote: bool) -> None:
    store, state = RemoteStore() if remote else MemoryStore(), small_leaves(200)
    with Checkpointer(store, strategy=DELTA, max_chain=10) as checkpointer:
        for step in range(6):
            state = drifted(state, step)
            checkpointer.save(step, state).wait()
    checkpoint, reads = open_step(store, 5), Reads(store)
    assert len(checkpoint.chain) == 6
    assert same(checkpoint.state(), state)
    assert reads.nbytes == sum(stored_nbytes(store, step) for step in range(6))
    assert reads.count <= len(store.keys(".pack")) + (0 if remote else 18)  # of 3600 blocks
    reads = Reads(store)
    assert np.array_equal(checkpoint["params/w7"][3], state["params"]["w7"][3])
    assert reads.count == 6
    assert reads.nbytes < 6 * 2048


def test_what_a_row_needs_of_a_chain_is_read_at_once() -> None:
    store, state = RemoteStore(), small_leaves(3)
    with Checkpointer(store, strategy=DELTA, max_chain=10) as checkpointer:
        for step in range(6):
            state = drifted(state, step)
            checkpointer.save(step, state).wait()
    checkpoint = open_step(store, 5)
    with store.hold("get_range", ".pack") as held, ThreadPoolExecutor(1) as other:
        row = other.submit(lambda: checkpoint["params/w2"][3])
        held.await_calls(6)
        held.release()
        assert np.array_equal(row.result(30), state["params"]["w2"][3])


def test_many_requests_are_under_way_where_they_are_journeys() -> None:
    store = RemoteStore(12)
    state = {f"w{i}": np.full(MIB, i, np.uint8) for i in range(160)}
    with Checkpointer(store, strategy=AsymCheck(policy=Never()), max_host_bytes=1 << 30) as saver:
        saver.save(0, state)
    checkpoint = open_step(store, 0)
    with store.hold("get_range", ".pack") as held, ThreadPoolExecutor(1) as other:
        restored = other.submit(checkpoint.state)
        held.await_calls(12)
        held.release()
        assert same(restored.result(60), state)


def test_the_records_of_a_chain_are_read_at_once() -> None:
    store = RemoteStore()
    saved(store, 5)
    with store.hold("get", ".manifest") as held, ThreadPoolExecutor(1) as other:
        opened = other.submit(open_step, store, 4)
        held.await_calls(5)
        held.release()
        assert len(opened.result(30).chain) == 5


@pytest.mark.parametrize("remote", [True, False])
def test_memory_beside_the_state_is_bounded(remote: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No span is longer than allowed, and no batch has more than twice that in spans."""
    store = RemoteStore() if remote else MemoryStore()
    state = {f"w{i}": np.random.default_rng(i).random(20_000) for i in range(200)}
    saved_states = [state]
    with Checkpointer(store, strategy=DELTA, max_chain=9, max_host_bytes=1 << 30) as saver:
        for step in range(10):
            saver.save(step, saved_states[-1]).wait()
            saved_states.append(drifted(saved_states[-1], step))
    reach = reach_of(store)
    most: list[int] = []
    read = ChainReader._read

    def watched(self: ChainReader, spans: Spans, requests: Any) -> Any:
        most.append(spans.nbytes)
        assert all(s.stop - s.start <= reach.span_nbytes for s in spans.all())
        return read(self, spans, requests)

    monkeypatch.setattr(ChainReader, "_read", watched)
    assert same(open_step(store, 9).state(), saved_states[-2])
    assert len(most) > 3 and max(most) <= 2 * reach.span_nbytes


# -- damage ------------------------------------------------------------------------------------


def only_block(index: StepIndex, path: str) -> StoredBlock:
    (box,) = index.leaves[path].boxes.values()
    return box.blocks[0]


def test_errors_name_step_leaf_object_and_offset(store: MemoryStore) -> None:
    saved(store, 3)
    chain = load_chain(store, 2)
    stored = only_block(chain[2], "exp_avg/h.w")  # in the base, two steps below
    data = bytearray(store.objects[stored.block.key])
    data[stored.block.offset] ^= 255
    store.objects[stored.block.key] = bytes(data)
    with pytest.raises(CorruptionError, match="stored bytes") as raised:
        open_step(store, 2).state()
    error = raised.value
    assert (error.step, error.leaf) == (0, "exp_avg/h.w")
    assert (error.object, error.offset) == (stored.block.key, stored.block.offset)
    assert str(error.expected).endswith(stored.block.digest)


@pytest.mark.parametrize("how", ["gone", "short"])
def test_a_pack_that_is_not_whole_is_damage(store: MemoryStore, how: str) -> None:
    saved(store, 1, "asymcheck-naive")
    checkpoint = open_step(store, 0)
    for key in store.keys(".pack"):
        if how == "gone":
            del store.objects[key]
        else:
            store.objects[key] = store.objects[key][:-1]
    with pytest.raises(CorruptionError, match="cannot be read") as raised:
        checkpoint.state()
    assert raised.value.object is not None and raised.value.step == 0


@pytest.mark.parametrize("threads", [1, 4])
def test_a_store_that_fails_says_nothing_of_damage(store: MemoryStore, threads: int) -> None:
    saved(store, 3)
    checkpoint = open_step(store, 2, threads)
    error = StoreUnavailableError("503")
    with store.failing("get_range", "", error), pytest.raises(StoreUnavailableError) as raised:
        checkpoint.state()
    assert raised.value is error
    checkpoint.state()


def test_a_failure_ends_all_reading(store: MemoryStore) -> None:
    """The error comes when no thread writes into the destination any more."""
    saved(store, 1, "asymcheck-naive", max_host_bytes=1 << 20)
    reading = threading.Semaphore(0)
    before = threading.active_count()

    def hook(operation: str, key: str) -> None:
        if operation == "get_range":
            reading.release()
            raise StoreUnavailableError("503")

    checkpoint = open_step(store, 0, 3)
    store.hook = hook
    with pytest.raises(StoreUnavailableError):
        checkpoint.state()
    assert threading.active_count() == before
    assert reading.acquire(timeout=0)


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 400), st.integers(1, 5)
)
def test_every_batch_is_in_one_stretch_and_no_thread_waits_for_long(
    sizes: list[int], max_nbytes: int, threads: int
) -> None:
    batches = [_Batch(Spans(reach_of(MemoryStore())), nbytes=nbytes) for nbytes in sizes]
    stretches = list(_stretches(batches, max_nbytes, threads))
    assert [batch for stretch in stretches for batch in stretch] == batches
    for stretch in stretches:
        before_the_last = sum(batch.nbytes for batch in stretch[:-1])
        assert before_the_last < max(1, min(max_nbytes, sum(sizes) / threads / 4))


def test_one_thread_reads_what_lies_in_a_row(store: MemoryStore) -> None:
    """So that a disk reads ahead of it."""
    state = {f"leaf {i}": np.full(1 << 19, i, np.float32) for i in range(32)}  # 2 MiB each
    with Checkpointer(store, strategy=AsymCheck(policy=Never())) as checkpointer:
        checkpointer.save(0, state)
    rows: dict[str, list[tuple[str, int]]] = {}
    get_range = store.get_range

    def watched(key: str, offset: int, out: memoryview) -> None:
        rows.setdefault(threading.current_thread().name, []).append((key, offset))
        get_range(key, offset, out)

    store.get_range = watched
    assert same(open_step(store, 0, 2).state(), state)
    places = sorted(place for row in rows.values() for place in row)
    following = dict(pairwise(places))
    jumps = sum(following.get(a) != b for row in rows.values() for a, b in pairwise(row))
    assert len(places) == 32 and jumps <= 2 * _STRETCHES


def wants(index: StepIndex, path: str) -> list[Want]:
    spec = index.leaves[path].spec
    shard = ShardSpec.whole(spec.shape)
    return [Want(path, shard, 0, spec.size, np.empty(spec.nbytes, np.uint8))]


def read(store: MemoryStore, chain: list[StepIndex], path: str) -> None:
    ChainReader(store, chain, 1).read(wants(chain[0], path))


def change_block(stored: StoredBlock, **changes: Any) -> None:
    blocks = stored.box.blocks
    block = msgspec.structs.replace(stored.block, **changes)
    blocks[blocks.index(stored)] = msgspec.structs.replace(stored, block=block)


def test_an_absurd_payload_is_not_allocated(store: MemoryStore) -> None:
    saved(store, 1, AsymCheck(policy=Always("plane")))
    chain = load_chain(store, 0)
    change_block(only_block(chain[0], "params/h.w"), nbytes=1 << 50)
    store.calls.clear()
    with pytest.raises(CorruptionError, match="absurd"):
        read(store, chain, "params/h.w")
    assert store.calls == []


def test_a_raw_block_of_another_length_is_damage(store: MemoryStore) -> None:
    saved(store, 1, "asymcheck-naive")
    chain = load_chain(store, 0)
    stored = only_block(chain[0], "params/h.w")
    change_block(stored, nbytes=stored.block.nbytes - 1)
    with pytest.raises(CorruptionError, match="bytes where"):
        read(store, chain, "params/h.w")


def test_decoded_bytes_are_checked_again(store: MemoryStore) -> None:
    saved(store, 1, AsymCheck(policy=Always("plane")))
    chain = load_chain(store, 0)
    change_block(only_block(chain[0], "params/h.w"), raw="0" * 32)
    with pytest.raises(CorruptionError, match="decoded bytes") as raised:
        read(store, chain, "params/h.w")
    assert (raised.value.step, raised.value.leaf) == (0, "params/h.w")


def test_a_base_must_hold_what_the_increment_needs(store: MemoryStore) -> None:
    saved(store, 2)
    chain = load_chain(store, 1)
    with pytest.raises(CorruptionError, match="there is none"):
        read(store, chain[:1], "params/h.w")
    base = chain[1].leaves["params/h.w"]
    (box,) = base.boxes.values()
    box.leaf = msgspec.structs.replace(box.leaf, dtype="float64")
    with pytest.raises(CorruptionError, match="another dtype"):
        read(store, chain, "params/h.w")
    base.boxes.clear()
    with pytest.raises(CorruptionError, match="does not hold the box"):
        read(store, chain, "params/h.w")
    del chain[1].leaves["params/h.w"]
    with pytest.raises(CorruptionError, match="does not hold the box"):
        read(store, chain, "params/h.w")
