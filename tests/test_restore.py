"""From blocks to bytes: along chains, in parallel, checked, and back to the newest good step."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from memory_store import MemoryStore
from states import drifted, same, training_state

from asymcheck import Always, AsymCheck, Checkpointer, CostModel
from asymcheck import codecs as registry
from asymcheck.commit import MAX_CHAIN, commit_key
from asymcheck.errors import (
    CheckpointNotFoundError,
    CodecError,
    CorruptionError,
    FormatError,
    StateMismatchError,
    StoreUnavailableError,
    UnsupportedVersionError,
)
from asymcheck.index import StepIndex, StoredBlock, load_chain
from asymcheck.reader import open_step
from asymcheck.restore import ChainReader, Want, newest_good
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


def wants(index: StepIndex, path: str) -> list[Want]:
    spec = index.leaves[path].spec
    shard = ShardSpec.whole(spec.shape)
    return [Want(path, shard, 0, spec.size, np.empty(spec.nbytes, np.uint8))]


def read(store: MemoryStore, chain: list[StepIndex], path: str) -> None:
    ChainReader(store, chain, 1).read(wants(chain[0], path))


def change_block(stored: StoredBlock, **changes: Any) -> None:
    blocks = stored.box.blocks
    blocks[blocks.index(stored)] = replace(stored, block=replace(stored.block, **changes))


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
    box.leaf = replace(box.leaf, dtype="float64")
    with pytest.raises(CorruptionError, match="another dtype"):
        read(store, chain, "params/h.w")
    base.boxes.clear()
    with pytest.raises(CorruptionError, match="does not hold the box"):
        read(store, chain, "params/h.w")
    del chain[1].leaves["params/h.w"]
    with pytest.raises(CorruptionError, match="does not hold the box"):
        read(store, chain, "params/h.w")


# -- the newest good step ----------------------------------------------------------------------


def steps_with(store: MemoryStore, count: int) -> None:
    for step in range(count):
        store.objects[commit_key(step)] = b""


@pytest.mark.parametrize("error", [CorruptionError, FormatError, CheckpointNotFoundError])
def test_falls_back_loudly(
    store: MemoryStore, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    steps_with(store, 5)
    asked: list[int] = []
    damaged: list[int] = []

    def attempt(step: int) -> str:
        asked.append(step)
        if step > 2:
            raise error(f"no {step}")
        return f"step {step}"

    with caplog.at_level(logging.ERROR):
        assert newest_good(store, attempt, lambda s, e: damaged.append(s)) == "step 2"
    assert (asked, damaged) == ([4, 3, 2], [4, 3])
    assert "step 4 cannot be restored" in caplog.text and "no 3" in caplog.text


def test_a_step_that_is_removed_while_it_is_read(store: MemoryStore) -> None:
    """The writer goes on, and its retention with it: there is a newer step."""
    steps_with(store, 3)
    damaged: list[int] = []

    def attempt(step: int) -> str:
        if step == 2:
            store.put(commit_key(3), memoryview(b""))
            for old in (0, 1, 2):
                store.delete(commit_key(old))
            raise CorruptionError("no such object")
        return f"step {step}"

    assert newest_good(store, attempt, lambda s, e: damaged.append(s)) == "step 3"
    assert damaged == []


def test_none_is_good(store: MemoryStore) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint"):
        newest_good(store, lambda s: s, lambda s, e: None)
    steps_with(store, 3)

    def attempt(step: int) -> None:
        raise CorruptionError(f"torn {step}")

    with pytest.raises(CheckpointNotFoundError, match="no checkpoint is whole") as raised:
        newest_good(store, attempt, lambda s, e: None)
    assert "torn 2" in str(raised.value.__cause__)
    assert store.url in str(raised.value.hint)


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailableError("503"),
        StateMismatchError("shape"),
        UnsupportedVersionError("v9"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_other_failures_say_nothing_about_older_steps(
    store: MemoryStore, error: BaseException
) -> None:
    steps_with(store, 3)
    asked: list[int] = []

    def attempt(step: int) -> None:
        asked.append(step)
        raise error

    with pytest.raises(type(error)):
        newest_good(store, attempt, lambda s, e: None)
    assert asked == [2]
