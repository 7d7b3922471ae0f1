"""One process of several that save and restore with Orbax; run by test_jax_processes.py."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["save", "restore", "die", "unnamed", "refuse", "differ"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--devices", type=int, default=2)
    return parser.parse_args()


args = parse()
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"

import jax

if args.count > 1:
    jax.distributed.initialize(f"127.0.0.1:{args.port}", args.count, args.rank)

import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import asymcheck_jax
from asymcheck.errors import UnsupportedStateError
from asymcheck.policy import Always
from asymcheck.stores import LocalStore
from asymcheck.strategies import AsymCheck

SHAPE = (64, 48)
STEPS = 4


def value(step: int) -> np.ndarray:
    rng = np.random.default_rng(step)
    return rng.standard_normal(SHAPE).astype(np.float32)


def sharding(*axes: str | None) -> NamedSharding:
    devices = np.array(jax.devices()).reshape(-1, 2 if len(jax.devices()) % 2 == 0 else 1)
    return NamedSharding(Mesh(devices, ("x", "y")), P(*axes))


def placed(array: np.ndarray, *axes: str | None) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding(*axes), lambda i: array[i])


def state(step: int) -> dict[str, Any]:
    return {
        "both": placed(value(step), "x", "y"),
        "rows": placed(value(step + 100), "x"),
        "all": placed(value(step + 200)),
        "host": np.arange(5),
        "step": step,
        "of rank 0": 1.0 + args.rank,
        "keys": jax.make_array_from_callback((8,), sharding("x"), keys),
    }


def keys(index: tuple[slice, ...]) -> jax.Array:
    return jax.random.split(jax.random.key(7), 8)[index[0]]


def manager(handler: Any, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        args.directory,
        item_handlers=handler,
        options=ocp.CheckpointManagerOptions(
            async_options=ocp.AsyncOptions(timeout_secs=30), **options
        ),
    )


def save() -> None:
    with manager(asymcheck_jax.AsymCheckHandler(strategy="asymcheck"), max_to_keep=2) as saver:
        for step in range(STEPS):
            saver.save(step, args=asymcheck_jax.AsymCheckSave(state(step)))
        saver.wait_until_finished()
        assert saver.all_steps() == [STEPS - 2, STEPS - 1], saver.all_steps()


def restore() -> None:
    read = [0]
    get_range = LocalStore.get_range

    def counted(self: LocalStore, key: str, offset: int, out: memoryview) -> None:
        read[0] += len(out) if key.endswith(".pack") else 0
        get_range(self, key, offset, out)

    LocalStore.get_range = counted  # type: ignore[method-assign]
    step = STEPS - 1
    target = {
        "both": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding("y", "x")),
        "rows": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding("x")),
        "all": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding(None, "x")),
        "host": np.zeros(5, np.int64),
        "step": 0,
        "of rank 0": 0.0,
        "keys": jax.ShapeDtypeStruct((8,), jax.random.key(0).dtype, sharding=sharding("y")),
    }
    with manager(asymcheck_jax.AsymCheckHandler()) as reader:
        found = reader.restore(step, args=asymcheck_jax.AsymCheckRestore(target))
    for name, offset in (("both", 0), ("rows", 100), ("all", 200)):
        assert found[name].sharding == target[name].sharding
        for shard in found[name].addressable_shards:
            assert np.array_equal(shard.data, value(step + offset)[shard.index]), name
    assert found["host"].tolist() == list(range(5)) and found["step"] == step
    assert found["of rank 0"] == 1.0
    for shard in found["keys"].addressable_shards:
        assert np.array_equal(
            jax.random.key_data(shard.data), jax.random.key_data(keys(shard.index))
        )
    print(f"read {read[0]}", flush=True)


def refuse() -> None:
    """What cannot be stored is refused by every process, so that none waits for another."""
    odd = {"dates": np.array(["2020"], "M8[Y]"), "of one process": jax.numpy.int32(args.rank)}
    for name, leaf in odd.items():
        with manager(asymcheck_jax.AsymCheckHandler()) as saver:
            try:
                saver.save(0, args=asymcheck_jax.AsymCheckSave({"w": placed(value(0)), name: leaf}))
            except UnsupportedStateError as error:
                assert error.leaf == name
                print(f"refused {name}", flush=True)


def differ() -> None:
    """Process 0 holds nothing to build on, process 1 believes it does: no read may fail."""
    strategy = AsymCheck(policy=Always("delta"))
    handler = asymcheck_jax.AsymCheckHandler(strategy=strategy, commit_timeout_s=20.0)
    with manager(handler) as saver:
        for step in range(4):
            if step == 1 and args.rank == 0:
                handler._base_step = None
            saver.save(step, args=asymcheck_jax.AsymCheckSave({"both": placed(value(step), "x")}))
            try:
                saver.wait_until_finished()
            except Exception as error:
                print(f"step {step} failed: {type(error).__name__}", flush=True)
        for step in saver.all_steps():
            target = {"both": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding("x"))}
            found = saver.restore(step, args=asymcheck_jax.AsymCheckRestore(target))
            for shard in found["both"].addressable_shards:
                assert np.array_equal(shard.data, value(step)[shard.index]), step
        print(f"steps {saver.all_steps()}", flush=True)


def die() -> None:
    """Process 1 vanishes while it writes the second step; the others must learn it."""
    handler = asymcheck_jax.AsymCheckHandler(strategy="asymcheck-naive", commit_timeout_s=5.0)
    with manager(handler) as saver:
        saver.save(0, args=asymcheck_jax.AsymCheckSave(state(0)))
        saver.wait_until_finished()
        if args.rank == 1:
            handler._directories.put = lambda key, data: os._exit(9)  # type: ignore[method-assign]
        begun_s = time.monotonic()
        try:
            saver.save(1, args=asymcheck_jax.AsymCheckSave(state(1)))
            saver.wait_until_finished()
        except BaseException as error:
            print(f"failed after {time.monotonic() - begun_s:.0f} s: {error!r}", flush=True)
            os._exit(3)
    sys.exit("a step was saved without one process's part")


def unnamed() -> None:
    """The process dies when all of a step is durable and Orbax has not yet named it a step."""
    handler = asymcheck_jax.AsymCheckHandler()
    with manager(handler) as saver:
        saver.save(0, args=asymcheck_jax.AsymCheckSave(state(0)))
        saver.wait_until_finished()
        handler.finalize = lambda directory: os._exit(9)  # type: ignore[method-assign]
        saver.save(1, args=asymcheck_jax.AsymCheckSave(state(1)))
        saver.wait_until_finished()


MODES = {
    "save": save,
    "restore": restore,
    "die": die,
    "unnamed": unnamed,
    "refuse": refuse,
    "differ": differ,
}
MODES[args.mode]()
