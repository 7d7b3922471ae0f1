"""Reading lazily: the same as NumPy's, and only the bytes that are needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore
from reading_in_place import check_that_only_what_is_asked_for_is_read
from states import arrays, bits, drifted, same, states, training_state
from test_reshard import SHAPES, boxes_in, tilings
from writers import BoxSource, Writers

from asymcheck import Always, AsymCheck, Checkpointer, CostModel, open_checkpoint
from asymcheck.commit import commit_key
from asymcheck.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    StateMismatchError,
    StoreError,
)
from asymcheck.reader import Checkpoint, Destination, fill_target, open_step
from asymcheck.state import ShardSpec, StateView

DELTA = AsymCheck(policy=Always("delta"))


def saved(store: MemoryStore, *states: Any, strategy: Any = "asymcheck-naive") -> Checkpoint:
    """Save the states as steps 0, 1, ... and open the last."""
    options = {"cost_model": CostModel(), "max_chain": 10}
    with Checkpointer(store, strategy=strategy, **options) as checkpointer:
        for step, state in enumerate(states):
            checkpointer.save(step, state, metadata={"step": step})
    return open_step(store, len(states) - 1)


@st.composite
def basic_indices(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """An index of integers, slices and at most one ellipsis that NumPy takes."""
    sides = list(shape)
    if draw(st.booleans()):
        del sides[draw(st.integers(0, len(sides))) :]
    items: list[Any] = []
    for n in sides:
        if n and draw(st.booleans()):
            item: Any = draw(st.integers(-n, n - 1))
            items.append(draw(st.sampled_from([item, np.int64(item)])))
        else:
            bound = st.none() | st.integers(-n - 2, n + 2)
            step = draw(st.none() | st.integers(-3, 3).filter(bool))
            items.append(slice(draw(bound), draw(bound), step))
    if len(sides) == len(shape) and draw(st.booleans()):
        keep = draw(st.integers(0, len(items)))
        end = draw(st.integers(keep, len(items)))
        items[keep:end] = [...]
    if len(items) == 1 and draw(st.booleans()):
        return items[0]
    return tuple(items)


@given(arrays(max_side=9), st.data())
def test_indexes_like_numpy(array: np.ndarray, data: st.DataObject) -> None:
    checkpoint = saved(MemoryStore(), {"w": array})
    lazy = checkpoint["w"]
    assert (lazy.shape, lazy.dtype, lazy.ndim) == (array.shape, array.dtype, array.ndim)
    assert lazy.nbytes == array.nbytes
    for _ in range(5):
        index = data.draw(basic_indices(array.shape))
        expected = array[index]
        found = lazy[index]
        assert isinstance(found, np.generic) == (expected.ndim == 0)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), index
        assert bits(found) == bits(expected), index


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (3, IndexError, "out of bounds"),
        (-4, IndexError, "out of bounds"),
        ((0, 0, 0), IndexError, "too many indices"),
        ((..., ...), IndexError, "single ellipsis"),
        (1.0, TypeError, "not float"),
        ("w", TypeError, "not str"),
        (None, TypeError, "not NoneType"),
        (True, TypeError, "not bool"),
        (np.bool_(True), TypeError, "not bool"),
        ([0, 1], TypeError, "not list"),
        (np.array([True, False, True]), TypeError, "integer|ndarray|scalar"),
        (slice(None, None, 0), ValueError, "zero"),
    ],
)
def test_refuses_other_indices(
    store: MemoryStore, index: Any, error: type[Exception], message: str
) -> None:
    lazy = saved(store, {"w": np.zeros((3, 4))})["w"]
    with pytest.raises(error, match=message):
        lazy[index]


def test_is_an_array_to_numpy(store: MemoryStore) -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    lazy = saved(store, {"w": array})["w"]
    assert np.array_equal(np.asarray(lazy), array)
    assert np.asarray(lazy, dtype=np.float64).dtype == np.float64
    assert np.array_equal(np.add(lazy, 1), array + 1)
    with pytest.raises(ValueError, match="copy=False"):
        lazy.__array__(copy=False)
    assert repr(lazy) == "<LazyArray 'w' int16[3, 4]>"


def test_reads_only_what_it_needs(store: MemoryStore) -> None:
    """A row costs the block that holds it, not the leaf; another leaf costs nothing."""
    rng = np.random.default_rng(0)
    state = {"w": rng.random((1000, 2000), np.float32), "v": rng.random((1000, 2000), np.float32)}
    checkpoint = saved(store, state)
    store.read_nbytes = 0
    assert np.array_equal(checkpoint["w"][500, 3:9], state["w"][500, 3:9])
    assert 0 < store.read_nbytes <= 4 << 20
    store.read_nbytes = 0
    assert checkpoint["w"][5:5].shape == (0, 2000)
    assert checkpoint["w"].nbytes == 8_000_000
    assert store.read_nbytes == 0
    checkpoint["w"][...]
    assert store.read_nbytes == 8_000_000


def test_reads_only_what_it_needs_of_files(tmp_path: Path) -> None:
    check_that_only_what_is_asked_for_is_read(str(tmp_path / "run"))


def test_opening_touches_no_pack(store: MemoryStore) -> None:
    saved(store, *[training_state(0)] * 3, strategy=DELTA)
    store.calls.clear()
    checkpoint = open_step(store, 2)
    assert checkpoint.step == 2 and len(checkpoint.chain) == 3
    assert not [key for _, key in store.calls if key.endswith(".pack")]


def test_an_increment_reads_its_chain_only_where_needed(store: MemoryStore) -> None:
    rng = np.random.default_rng(0)
    first = {"w": rng.integers(0, 9, 3_000_000, np.int32)}
    second = {"w": first["w"] + rng.integers(0, 2, 3_000_000, np.int32)}
    checkpoint = saved(store, first, second, strategy=DELTA)
    assert len(checkpoint.chain) == 2
    store.read_nbytes = 0
    assert checkpoint["w"][17] == second["w"][17]
    one_block_of_each = store.read_nbytes
    assert np.array_equal(checkpoint["w"][...], second["w"])
    assert one_block_of_each < (store.read_nbytes - one_block_of_each) / 2


def test_is_a_mapping_of_paths(store: MemoryStore) -> None:
    w = np.arange(4.0)
    state = {"params": {"w": w, "tied": w}, "n": 3, "blob": b"xyz"}
    checkpoint = saved(store, state)
    assert isinstance(checkpoint, Mapping)
    assert list(checkpoint) == ["params/w", "blob"]
    assert len(checkpoint) == 2
    assert "params/w" in checkpoint and "params/tied" in checkpoint
    assert "params" not in checkpoint and "n" not in checkpoint
    assert checkpoint.get("params/x") is None
    assert {path: lazy.shape for path, lazy in checkpoint.items()} == {
        "params/w": (4,),
        "blob": (3,),
    }
    assert np.array_equal(checkpoint["params/tied"][1:], w[1:])
    assert bytes(checkpoint["blob"][...]) == b"xyz"
    assert checkpoint.aliases == {"params/tied": "params/w"}
    with pytest.raises(KeyError):
        checkpoint["params/x"]
    assert checkpoint.metadata == {"step": 0}
    restored = checkpoint.state()
    assert restored["params"]["w"] is restored["params"]["tied"]
    assert same(restored, state)


@settings(max_examples=60)
@given(states())
def test_states_come_back_as_they_were(state: Any) -> None:
    assert same(saved(MemoryStore(), state).state(), state)


# -- other layouts -----------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    SHAPES.flatmap(lambda s: st.tuples(st.just(s), tilings(s), tilings(s), boxes_in(s))), st.data()
)
def test_saved_as_boxes_read_as_other_boxes(drawn: Any, data: st.DataObject) -> None:
    """Written by several writers in one tiling, as a chain, and read in another."""
    shape, stored, wanted, some_box = drawn
    store = MemoryStore()
    dtype = data.draw(st.sampled_from(["float32", "int8", "complex128"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    first = (rng.random(shape) * 100).astype(dtype)
    second = first + np.ones((), dtype)
    boxes = [box for box in stored if box.size] or stored[:1]  # of one writer each
    with Writers(store, len(boxes), strategy=DELTA, cost_model=CostModel()) as writers:
        for step, whole in enumerate((first, second)):
            view = lambda i, whole=whole: StateView(  # noqa: E731
                {"leaf": "w"}, (BoxSource("w", whole, boxes[i]),)
            )
            assert writers.save(step, view) == [None] * len(boxes)
    checkpoint = open_step(store, 1)
    assert bits(checkpoint.state()) == bits(second)
    for box in (*wanted, some_box):
        cut = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
        out = np.zeros(box.size * second.itemsize, np.uint8)
        checkpoint.read_into([Destination("w", box, out)])
        assert out.tobytes() == bits(second[cut])
        assert bits(checkpoint["w"][cut]) == bits(second[cut])


# -- filling a target --------------------------------------------------------------------------


def emptied(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: emptied(value) for key, value in state.items()}
    return np.zeros_like(state) if isinstance(state, np.ndarray) else state


def test_fills_arrays_in_place(store: MemoryStore) -> None:
    state = training_state(0, name="x", blob=b"abc", scalar=np.float32(3))
    checkpoint = saved(store, state)
    target = emptied(state)
    target |= {"name": "old", "blob": b"longer", "scalar": np.float32(0), "step": -1}
    arrays = target["params"]
    filled = fill_target(checkpoint, target)
    assert same(filled, state)
    for name in arrays:
        assert filled["params"][name] is arrays[name]


@pytest.mark.parametrize("layout", ["F", "strided", "reversed"])
def test_fills_arrays_of_any_layout(store: MemoryStore, layout: str) -> None:
    state = {"w": np.arange(24.0).reshape(4, 6)}
    checkpoint = saved(store, state)
    targets = {
        "F": np.asfortranarray(np.zeros((4, 6))),
        "strided": np.zeros((8, 12))[::2, ::2],
        "reversed": np.zeros((4, 6))[::-1],
    }
    filled = fill_target(checkpoint, {"w": targets[layout]})
    assert filled["w"] is targets[layout]
    assert np.array_equal(targets[layout], state["w"])


def test_a_read_only_target_is_replaced(store: MemoryStore) -> None:
    checkpoint = saved(store, {"w": np.ones(3)})
    target = np.zeros(3)
    target.flags.writeable = False
    filled = fill_target(checkpoint, {"w": target})
    assert np.array_equal(filled["w"], np.ones(3)) and not target.any()


def test_all_mismatches_are_listed_and_nothing_is_touched(store: MemoryStore) -> None:
    checkpoint = saved(store, {"a": np.ones(3), "b": np.ones((2, 2)), "c": np.ones(1), "d": 1})
    target = {
        "a": np.zeros(3, np.float32),
        "b": np.zeros((2, 3)),
        "extra": np.zeros(1),
        "good": 2,
    }
    with pytest.raises(StateMismatchError) as raised:
        fill_target(checkpoint, target)
    message = str(raised.value)
    for part in (
        "a is float64[3] in the checkpoint and float32[3] in the target",
        "b is float64[2, 2] in the checkpoint and float64[2, 3] in the target",
        "extra is not in the checkpoint",
        "c is not in the target",
    ):
        assert part in message
    assert raised.value.step == 0
    assert not any(v.any() for v in target.values() if isinstance(v, np.ndarray))


# -- opening by URL ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "run", max_chain=0) as checkpointer:
        for step in range(1, 12):
            checkpointer.save(step, {"w": np.full(5, step)}, metadata={"at": step})
    return tmp_path / "run"


def test_opens_the_newest_or_any(run: Path) -> None:
    for url in (run, str(run), run.as_uri()):
        with open_checkpoint(url) as checkpoint:
            assert (checkpoint.step, checkpoint.metadata) == (11, {"at": 11})
            assert checkpoint["w"][2] == 11
            checkpoint.verify()
        with open_checkpoint(url, step=3) as checkpoint:
            assert checkpoint["w"][...].tolist() == [3] * 5


def test_a_missing_step_lists_those_there_are(run: Path) -> None:
    with pytest.raises(CheckpointNotFoundError) as raised:
        open_checkpoint(run, step=99)
    assert "..., 4, 5, 6, 7, 8, 9, 10, 11" in str(raised.value)
    assert raised.value.step == 99


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointNotFoundError, match="none"):
        open_checkpoint(tmp_path / "nothing", step=1)
    with pytest.raises(StoreError):
        open_checkpoint("nfs://somewhere")
    assert not (tmp_path / "nothing").exists()


def test_damaged_metadata_are_passed_over_loudly(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / commit_key(11)).write_bytes(b"torn")
    with open_checkpoint(run) as checkpoint:
        assert checkpoint.step == 10
    assert "step 11 cannot be restored" in caplog.text
    with pytest.raises(CorruptionError):
        open_checkpoint(run, step=11)


def test_reading_writes_nothing(run: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    with open_checkpoint(run) as checkpoint:
        checkpoint.state()
    Checkpointer(run).restore()
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before


def test_verify_reads_every_byte_of_the_chain(store: MemoryStore) -> None:
    state = training_state(0)
    checkpoint = saved(store, state, drifted(state, 1), drifted(state, 2), strategy=DELTA)
    checkpoint.verify()
    for key in store.keys(".pack"):
        good = store.objects[key]
        for position in (0, len(good) // 2, len(good) - 1):
            damaged = bytearray(good)
            damaged[position] ^= 1
            store.objects[key] = bytes(damaged)
            with pytest.raises(CorruptionError) as raised:
                checkpoint.verify()
            assert raised.value.object == key
        for other in (good + b"\0", good[:-1], b""):
            store.objects[key] = other
            with pytest.raises(CorruptionError, match="another length"):
                checkpoint.verify()
        del store.objects[key]
        with pytest.raises(CorruptionError, match="missing"):
            checkpoint.verify()
        store.objects[key] = good
    checkpoint.verify()


def test_boxes_may_be_read_whole_or_in_part(store: MemoryStore) -> None:
    array = np.arange(60, dtype=np.int32).reshape(3, 4, 5)
    checkpoint = saved(store, {"w": array})
    box = ShardSpec((1, 1, 0), (2, 2, 5))
    out = np.zeros(80, np.uint8)
    checkpoint.read_into([Destination("w", box, out)])
    assert np.array_equal(out.view(np.int32).reshape(2, 2, 5), array[1:, 1:3])
