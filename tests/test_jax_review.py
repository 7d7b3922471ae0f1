"""What an adversarial reader found: faults of the Orbax adapter, and states nothing else covers."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import asymcheck
import asymcheck_jax
import asymcheck_jax.sources
from asymcheck.errors import AsymCheckError
from asymcheck.policy import Always
from asymcheck.snapshot import Capture
from asymcheck.strategies import AsymCheck
from asymcheck_jax import AsymCheckHandler, AsymCheckRestore, AsymCheckSave
from asymcheck_jax.held import HeldStep

DELTA = AsymCheck(policy=Always("delta"))
Managers = Callable[..., ocp.CheckpointManager]


@pytest.fixture
def managers(tmp_path: Path) -> Iterator[Managers]:
    made: list[ocp.CheckpointManager] = []

    def manager(handler: Any = None, **options: Any) -> ocp.CheckpointManager:
        handler = AsymCheckHandler() if handler is None else handler
        options_ = ocp.CheckpointManagerOptions(**options)
        made.append(
            ocp.CheckpointManager(tmp_path / "run", item_handlers=handler, options=options_)
        )
        return made[-1]

    yield manager
    for one in made:
        one.close()


def saved(managers: Managers, state: Any) -> ocp.CheckpointManager:
    manager = managers()
    manager.save(0, args=AsymCheckSave(state))
    manager.wait_until_finished()
    return manager


def restored(manager: ocp.CheckpointManager, like: Any = None, **more: Any) -> Any:
    return manager.restore(0, args=AsymCheckRestore(like, **more))


# -- increments: what is committed can be read --------------------------------------------------


@pytest.mark.parametrize("lost", ["data", "commits", "."])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_predecessor_half_deleted_never_leaves_a_committed_step_unreadable(
    managers: Managers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, when: str
) -> None:
    """Orbax deletes in the background (`enable_background_delete`), or a user by hand."""
    manager = managers(AsymCheckHandler(strategy=DELTA, max_chain=10))
    manager.save(0, args=AsymCheckSave({"w": jnp.ones(50_000)}))
    manager.wait_until_finished()
    give = HeldStep.give

    def delete() -> None:
        shutil.rmtree(tmp_path / "run" / "0" / "default" / lost)

    def give_late(self: HeldStep, directory: Any) -> None:
        delete()
        give(self, directory)

    if when == "before":
        delete()
    else:
        monkeypatch.setattr(HeldStep, "give", give_late)
    try:
        manager.save(1, args=AsymCheckSave({"w": jnp.full(50_000, 2.0)}))
        manager.wait_until_finished()
    except AsymCheckError:
        assert not (tmp_path / "run" / "1").exists()
    else:
        found = manager.restore(1, args=AsymCheckRestore())
        assert np.array_equal(found["w"], np.full(50_000, 2.0, np.float32))


def test_the_best_are_kept_and_deleted_in_the_background(managers: Managers) -> None:
    """The newest step is deleted (it is not the best) while the next one would build on it."""
    manager = managers(
        AsymCheckHandler(strategy=DELTA, max_chain=10),
        max_to_keep=1,
        best_fn=lambda metrics: metrics["loss"],
        best_mode="min",
        enable_background_delete=True,
    )
    for step, loss in enumerate([5, 4, 6, 3, 7, 2, 8, 1, 9, 0]):
        state = {f"w{i}": jnp.full(50_000, float(step)) for i in range(4)}
        manager.save(step, args=AsymCheckSave(state), metrics={"loss": loss})
    manager.wait_until_finished()
    assert 9 in manager.all_steps()
    assert float(manager.restore(9, args=AsymCheckRestore())["w1"][0]) == 9.0


def test_step_numbers_are_found_behind_a_prefix(managers: Managers, tmp_path: Path) -> None:
    manager = managers(AsymCheckHandler(strategy=DELTA, max_chain=10), step_prefix="gpt2")
    for step in range(3):
        manager.save(step, args=AsymCheckSave({"w": jnp.full(50_000, float(step))}))
    manager.wait_until_finished()
    found: list[tuple[int, int]] = []
    for step in range(3):
        with asymcheck.open_checkpoint(tmp_path / "run" / f"gpt2_{step}" / "default") as checkpoint:
            found.append((checkpoint.step, len(checkpoint.chain)))
    assert found == [(0, 1), (1, 2), (2, 3)]


def test_a_directory_with_a_long_number_is_no_reason_to_refuse(tmp_path: Path) -> None:
    with ocp.AsyncCheckpointer(AsymCheckHandler()) as checkpointer:
        path = tmp_path / "run_20261124123456789012" / "one"
        checkpointer.save(path, args=AsymCheckSave({"w": jnp.arange(3)}))
        checkpointer.wait_until_finished()
        assert checkpointer.restore(path, args=AsymCheckRestore())["w"].tolist() == [0, 1, 2]


# -- how long a save takes ----------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_long_pause_between_saves_does_not_hold_the_next_one_up(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """After an hour without a save the next one must not take half an hour to be durable."""
    now_s, waited_s = [0.0], [0.0]
    await_captured = Capture.await_captured

    def note(self: Capture, timeout_s: float) -> bool:
        waited_s[0] += timeout_s
        return await_captured(self, 0.0)

    monkeypatch.setattr(Capture, "await_captured", note)
    monkeypatch.setattr("asymcheck_jax.handler.time", _Clock(now_s))
    manager = managers(enable_async_checkpointing=asynchronous)
    state = {f"w{i}": jnp.ones(300_000) for i in range(16)}
    manager.save(0, args=AsymCheckSave(state))
    manager.wait_until_finished()
    now_s[0] = 3600.0
    manager.save(1, args=AsymCheckSave(state))
    manager.wait_until_finished()
    assert waited_s[0] <= (60.0 if asynchronous else 0.0)


class _Clock:
    def __init__(self, now_s: list[float]) -> None:
        self._now_s = now_s

    def monotonic(self) -> float:
        return self._now_s[0]


def test_copies_from_a_device_are_spread_over_the_time_between_saves(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asymcheck_jax.sources, "HostShard", _as_on_a_device)
    waited_s: list[float] = []
    await_captured = Capture.await_captured

    def note(self: Capture, timeout_s: float) -> bool:
        waited_s.append(timeout_s)
        return await_captured(self, timeout_s)

    monkeypatch.setattr(Capture, "await_captured", note)
    now_s = [0.0]
    monkeypatch.setattr("asymcheck_jax.handler.time", _Clock(now_s))
    manager = managers(AsymCheckHandler(donation_is_held=True))
    for step in range(3):
        state = {"w": jnp.full(1 << 20, float(step))}
        waited_s.clear()
        manager.save(step, args=AsymCheckSave(state))
        manager.wait_until_finished()
        paces_s = {s for s in waited_s if s > 0}  # others only ask
        assert paces_s <= {[0.0, 0.1 / 8, 1.0 / 8][step]}, step
        now_s[0] = [0.2, 1000.0, 0.0][step]
    assert paces_s
    assert np.array_equal(manager.restore(2, args=AsymCheckRestore())["w"], state["w"])


def test_a_synchronous_save_inside_an_event_loop(tmp_path: Path) -> None:
    """As in a notebook; Orbax's own handler can."""

    async def save() -> None:
        ocp.Checkpointer(AsymCheckHandler()).save(
            tmp_path / "one", args=AsymCheckSave({"w": jnp.arange(3)})
        )

    asyncio.run(save())
    assert asymcheck_jax.load(tmp_path / "one")["w"].tolist() == [0, 1, 2]


def test_device_arrays_larger_than_the_host_memory(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save` captures before Orbax has made the directory: it must not wait for what needs it."""
    monkeypatch.setattr(asymcheck_jax.sources, "HostShard", _as_on_a_device)
    # Without this the fault shows after the 300 s for which a stalled capture waits.
    monkeypatch.setattr("asymcheck_jax.handler.Checkpointer", _impatient)
    manager = managers(AsymCheckHandler(max_host_bytes=16 << 20))
    state = {f"w{i}": jnp.full(1 << 20, float(i)) for i in range(16)}
    manager.save(0, args=AsymCheckSave(state))
    manager.wait_until_finished()
    found = restored(manager)
    assert all(np.array_equal(found[name], array) for name, array in state.items())


def _impatient(*args: Any, **options: Any) -> asymcheck.Checkpointer:
    return asymcheck.Checkpointer(*args, **options, stall_timeout_s=5.0)


def _as_on_a_device(leaf: Any, box: Any, group: str, owned: Any, memory: Any) -> Any:
    data = jnp.asarray(memory.view(asymcheck.state.dtype_of(leaf.dtype)).reshape(box.shape))
    return asymcheck_jax.sources.DeviceShard(leaf, box, group, owned, data)


# -- targets ------------------------------------------------------------------------------------


def test_counters_come_back(managers: Managers) -> None:
    """A torch scheduler's state has them (MultiStepLR)."""
    state = {"milestones": Counter({2: 2, 5: 1}), "w": jnp.ones(2)}
    assert restored(saved(managers, state))["milestones"] == Counter({2: 2, 5: 1})


@pytest.mark.parametrize("leaf", ["key", "bytes"])
def test_item_metadata_is_a_target(managers: Managers, leaf: str) -> None:
    state = {"w": jnp.ones(3), "odd": {"key": jax.random.key(3), "bytes": b"abc"}[leaf]}
    manager = saved(managers, state)
    found = restored(manager, manager.item_metadata(0))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    if leaf == "bytes":
        assert found["odd"] == b"abc"
    else:
        assert np.array_equal(jax.random.key_data(found["odd"]), jax.random.key_data(state["odd"]))


@pytest.mark.parametrize("leaf", ["key", "bytes"])
def test_load_with_shardings_beside_odd_leaves(
    managers: Managers, tmp_path: Path, leaf: str
) -> None:
    saved(
        managers, {"w": jnp.arange(8.0), "odd": {"key": jax.random.key(3), "bytes": b"abc"}[leaf]}
    )
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("x",)), P("x"))
    found = asymcheck_jax.load(tmp_path / "run" / "0" / "default", shardings={"w": sharding})
    assert found["w"].sharding == sharding and np.array_equal(found["w"], np.arange(8.0))


@pytest.mark.parametrize("kind", ["metadata", "struct"])
def test_shapes_without_shardings_give_jax_arrays(managers: Managers, kind: str) -> None:
    """As with Orbax's own handler: a training step may donate them."""
    manager = saved(managers, {"w": jnp.arange(4.0)})
    target = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    found = restored(manager, manager.item_metadata(0) if kind == "metadata" else target)
    assert isinstance(found["w"], jax.Array)


def test_numbers_are_cast_when_asked_for(managers: Managers) -> None:
    manager = saved(managers, {"rate": 0.1, "count": 7})
    found = restored(manager, {"rate": jnp.float32(0), "count": 0.0}, cast=True)
    assert found["rate"].dtype == np.float32 and float(found["rate"]) == float(np.float32(0.1))
    assert type(found["count"]) is float and found["count"] == 7.0


def test_numbers_for_numpy_scalars(managers: Managers) -> None:
    found = restored(saved(managers, {"n": 7}), {"n": np.int64(0)})
    assert type(found["n"]) is np.int64 and found["n"] == 7


def test_one_scalar_in_two_places_for_an_array_and_a_number(managers: Managers) -> None:
    scalar = jnp.float32(4.0)
    found = restored(saved(managers, {"a": scalar, "b": scalar}), {"a": jnp.float32(0), "b": 0.0})
    assert float(found["a"]) == 4.0 and found["b"] == 4.0


# -- covered nowhere else -----------------------------------------------------------------------


def test_nnx_and_optax_states_come_back(managers: Managers) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(4, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    model = Model(nnx.Rngs(0))
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(3)}
    chain = optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9))
    several = optax.multi_transform({"x": optax.adam(1e-3), "y": chain}, {"a": "x", "b": "y"})
    masked = optax.masked(optax.adamw(1e-3), {"a": True, "b": False})
    injected = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    state = {
        "model": nnx.state(model),
        "optimizer": nnx.state(nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)),
        "optax": [tx.init(params) for tx in (several, masked, injected)],
    }
    found = restored(saved(managers, state), state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host"])
def test_memory_kinds_come_back(managers: Managers, kind: str) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    sharding = NamedSharding(mesh, P("x"), memory_kind=kind)
    state = {"w": jax.device_put(jnp.arange(64.0), sharding)}
    found = restored(saved(managers, state), state)
    assert found["w"].sharding.memory_kind == kind and np.array_equal(found["w"], np.arange(64.0))


def test_restored_copies_may_be_donated(managers: Managers) -> None:
    """Replicas are made of one host array: a donated one must not be another's memory."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    state = {
        "all": jax.device_put(jnp.arange(1 << 16), NamedSharding(mesh, P())),
        "some": jax.device_put(jnp.arange(1 << 16), NamedSharding(mesh, P("y"))),
    }
    found = restored(saved(managers, state), state)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for _ in range(3):
        found = step(found)
    for name in state:
        for shard in found[name].addressable_shards:
            assert np.array_equal(shard.data, np.arange(1 << 16)[shard.index] + 3)
