"""Donated buffers: never an error, never wrong values; on a device by `hold_donation`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import asymcheck_jax
from asymcheck.checkpointer import Checkpointer
from asymcheck.partition import Phase, Window
from asymcheck.snapshot import Capture
from asymcheck.state import LeafSpec, ShardSpec, StateView
from asymcheck_jax import donation
from asymcheck_jax.sources import DeviceShard

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32, jnp.bool_]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(), (64,), (512, 256)], ids=str)
def test_values_of_the_moment_of_saving(dtype: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    """The state is donated at once, and its memory would be used for other values."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    axes = P("x") if shape else P()
    flip = jax.jit(lambda x: (1 - x.astype(jnp.float32)).astype(dtype), donate_argnums=0)
    ones = jnp.ones(shape, dtype)
    w = jax.device_put(ones, NamedSharding(mesh, axes))
    saved: list[np.ndarray] = []
    with ocp.CheckpointManager(tmp_path, item_handlers=asymcheck_jax.AsymCheckHandler()) as manager:
        for step in range(6):
            saved.append(np.array(w))
            manager.save(step, args=asymcheck_jax.AsymCheckSave({"w": w}))
            w = flip(flip(flip(w)))
        manager.wait_until_finished()
        for step, value in enumerate(saved):
            target = {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=w.sharding)}
            found = manager.restore(step, args=asymcheck_jax.AsymCheckRestore(target))["w"]
            assert np.asarray(found).tobytes() == value.tobytes(), step
    assert saved[0].tobytes() != saved[1].tobytes()


def device_source(array: jax.Array) -> DeviceShard:
    """An array as if it lay on an accelerator (there is none here): read by a copy to the host."""
    leaf = LeafSpec("w", np.dtype(array.dtype).name, array.shape)
    return DeviceShard(leaf, ShardSpec.whole(array.shape), "w", (0, array.size), array)


def begun(checkpointer: Checkpointer, array: jax.Array) -> Capture:
    view = StateView({"dict": [["w", {"leaf": "w"}]]}, (device_source(array),))
    windows = [Window(Phase.FORWARD, i, 1.0) for i in range(2)]
    return checkpointer.begin(0, view, windows=windows)


def test_donation_is_held_while_a_save_reads_device_memory(tmp_path: Path) -> None:
    step = asymcheck_jax.hold_donation(lambda x: x + 1.0, donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        w = step(jnp.zeros(1 << 20))
        assert not donation.is_capturing()
        capture = begun(checkpointer, w)
        donation.note_capture(capture)
        assert donation.is_capturing()
        capture.enter_window(0)  # half of it may be read
        later = step(w)
        assert not w.is_deleted() and later[0] == 2.0
        capture.finish()
        assert not donation.is_capturing()
        last = step(later)
        assert later.is_deleted() and last[0] == 3.0
        checkpointer.wait()
        assert np.array_equal(checkpointer.restore()["w"], np.ones(1 << 20, np.float32))


def test_a_device_array_is_copied_to_the_host_once_and_let_go() -> None:
    w = jnp.arange(1000.0)
    source = device_source(w)
    source.start()
    out = np.empty(4000, np.uint8)
    for start in range(0, 1000, 250):
        assert (source._host is None) == (start == 0)
        source.read_into(start, 250, out[4 * start : 4 * (start + 250)])
    assert source._host is None
    assert out.tobytes() == np.asarray(w).tobytes()


def test_a_failed_save_holds_no_donation(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, on_error="warn") as checkpointer:
        capture = begun(checkpointer, jnp.zeros(10))
        donation.note_capture(capture)
        capture.fail(RuntimeError("no"))
        assert not donation.is_capturing()
        capture.finish()
