"""One process of several that save and restore, most with Orbax; run by test_jax_processes.py."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from typing import Any

from etils import epath


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    modes = ["save", "restore", "die", "unnamed", "refuse", "refuse_alone", "differ", "unlike"]
    modes += ["keep_two"]
    parser.add_argument("mode", choices=modes)
    parser.add_argument("directory", type=epath.Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--orbax", action="store_true", help="with Orbax's own handler")
    return parser.parse_args()


args = parse()
faulthandler.dump_traceback_later(180, exit=True)  # sooner than the test gives up
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"

import jax

if args.count > 1:
    jax.distributed.initialize(f"127.0.0.1:{args.port}", args.count, args.rank)

import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import asymcheck_jax
from asymcheck.errors import SaveFailedError, UnsupportedStateError
from asymcheck.policy import Always, Never
from asymcheck.stores import LocalStore
from asymcheck.strategies import AsymCheck

SHAPE = (1024, 512)  # a part is larger than the gaps that are read with what is wanted
STEPS = 4
DELTA = AsymCheck(policy=Always("delta"))


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


def manager(handler: Any, name: str = "", **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        args.directory / name,
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
    """What cannot be stored is refused by every process, so that none waits for another.

    What can is stored next, by the same handler.
    """
    odd = {"dates": np.array(["2020"], "M8[Y]"), "of one process": jax.numpy.int32(args.rank)}
    for step, (name, leaf) in zip((0, 2), odd.items(), strict=True):
        with manager(asymcheck_jax.AsymCheckHandler()) as saver:
            try:
                odd_one = {"w": placed(value(0)), name: leaf}
                saver.save(step, args=asymcheck_jax.AsymCheckSave(odd_one))
            except UnsupportedStateError as error:
                assert error.leaf == name
                print(f"refused {name}", flush=True)
            saver.save(step + 1, args=asymcheck_jax.AsymCheckSave({"w": placed(value(0))}))
            saver.wait_until_finished()
            print(f"steps {saver.all_steps()}", flush=True)


def refuse_alone() -> None:
    """Without Orbax: process 1 cannot save step 1; the others learn it, and all save step 2."""
    with asymcheck_jax.Checkpointer(args.directory, commit_timeout_s=600.0) as saver:
        for step in range(3):
            odd = {"odd": np.array(["2020"], "M8[Y]")} if (step, args.rank) == (1, 1) else {}
            try:
                saver.save(step, {"w": placed(value(step), "x"), **odd}).wait(60)
            except (SaveFailedError, UnsupportedStateError) as error:
                print(f"step {step} failed: {error}", flush=True)
        print(f"steps {saver.checkpointer.steps()}", flush=True)


def check_all(saver: ocp.CheckpointManager) -> None:
    """Every step that there is holds what was saved as it."""
    target = {"both": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding("x"))}
    for step in saver.all_steps():
        found = saver.restore(step, args=asymcheck_jax.AsymCheckRestore(target))
        for shard in found["both"].addressable_shards:
            assert np.array_equal(shard.data, value(step)[shard.index]), step


def differ() -> None:
    """Process 0 holds nothing to build on, process 1 believes it does: no read may fail."""
    handler = asymcheck_jax.AsymCheckHandler(strategy=DELTA, commit_timeout_s=20.0)
    with manager(handler) as saver:
        for step in range(4):
            if step == 1 and args.rank == 0:
                handler._committed_step = None
            saver.save(step, args=asymcheck_jax.AsymCheckSave({"both": placed(value(step), "x")}))
            try:
                saver.wait_until_finished()
            except Exception as error:
                print(f"step {step} failed: {type(error).__name__}", flush=True)
        check_all(saver)
        print(f"steps {saver.all_steps()}", flush=True)


def unlike() -> None:
    """Processes that choose differently, as costs that each has measured may have them do.

    Process 1 would store increments. Process 0 holds nothing for it, or ends its chain sooner.
    """
    chosen: dict[str, list[dict[str, Any]]] = {
        "never": [{"strategy": AsymCheck(policy=Never())}, {"strategy": DELTA}],
        "sooner": [{"strategy": DELTA, "max_chain": 1}, {"strategy": DELTA, "max_chain": 9}],
    }
    for name, arguments in chosen.items():
        handler = asymcheck_jax.AsymCheckHandler(commit_timeout_s=20.0, **arguments[args.rank])
        with manager(handler, name) as saver:
            for step in range(4):
                one = {"both": placed(value(step), "x")}
                saver.save(step, args=asymcheck_jax.AsymCheckSave(one))
            saver.wait_until_finished()
            check_all(saver)
            print(f"{name}: steps {saver.all_steps()}", flush=True)


def keep_two() -> None:
    """What a user of Orbax does, with its own handler or with ours."""
    one = {"both": placed(value(0), "x", "y"), "all": placed(value(1)), "step": 0}
    if args.orbax:
        handler, save, load = (
            ocp.StandardCheckpointHandler(),
            ocp.args.StandardSave,
            ocp.args.StandardRestore,
        )
    else:
        handler, save, load = (
            asymcheck_jax.AsymCheckHandler(),
            asymcheck_jax.AsymCheckSave,
            asymcheck_jax.AsymCheckRestore,
        )
    with manager(handler, max_to_keep=2) as saver:
        begun = saver.latest_step()
        first = 0 if begun is None else begun + 1
        for step in range(first, first + 3):
            saver.save(step, args=save({**one, "step": step}))
        saver.wait_until_finished()
        for step in saver.all_steps():
            found = saver.restore(step, args=load(one))
            assert int(found["step"]) == step
            for shard in found["both"].addressable_shards:
                assert np.array_equal(shard.data, value(0)[shard.index]), step
        print(f"steps {saver.all_steps()}", flush=True)


def die() -> None:
    """Process 1 vanishes while it writes the second step; the others must learn it."""
    handler = asymcheck_jax.AsymCheckHandler(strategy="asymcheck-naive", commit_timeout_s=5.0)
    with manager(handler) as saver:
        saver.save(0, args=asymcheck_jax.AsymCheckSave(state(0)))
        saver.wait_until_finished()
        if args.rank == 1:
            handler._run.directories.put = lambda key, data: os._exit(9)  # type: ignore[method-assign]
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
    "refuse_alone": refuse_alone,
    "differ": differ,
    "unlike": unlike,
    "keep_two": keep_two,
}
MODES[args.mode]()
