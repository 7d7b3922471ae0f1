"""AsymCheckHandler in Orbax's CheckpointManager, with Orbax's own handler as the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import asymcheck_jax
from asymcheck.errors import AsymCheckError, StateMismatchError, UnsupportedStateError


@dataclass(frozen=True)
class Judged:
    """A handler with its arguments."""

    name: str
    handler: Callable[[], Any]
    save: Callable[[Any], Any]
    restore: Callable[..., Any]

    def __str__(self) -> str:
        return self.name


ORBAX = Judged(
    "orbax", ocp.StandardCheckpointHandler, ocp.args.StandardSave, ocp.args.StandardRestore
)
OURS = Judged(
    "asymcheck",
    asymcheck_jax.AsymCheckHandler,
    asymcheck_jax.AsymCheckSave,
    asymcheck_jax.AsymCheckRestore,
)
both = pytest.mark.parametrize("judged", [ORBAX, OURS], ids=str)
Managers = Callable[..., ocp.CheckpointManager]


@pytest.fixture
def managers(tmp_path: Path) -> Iterator[Managers]:
    """Managers of one directory, closed at the end."""
    made: list[ocp.CheckpointManager] = []

    def manager(handler: Any = None, **options: Any) -> ocp.CheckpointManager:
        made.append(
            ocp.CheckpointManager(
                tmp_path / "run",
                item_handlers=handler,
                options=ocp.CheckpointManagerOptions(**options),
            )
        )
        return made[-1]

    yield manager
    for one in made:
        one.close()


def mesh(*shape: int) -> Mesh:
    count = int(np.prod(shape))
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("x", "y")[: len(shape)])


def sharded(array: Any, *axes: Any, on: Mesh | None = None) -> jax.Array:
    return jax.device_put(array, NamedSharding(on or mesh(4, 2), P(*axes)))


def train_state(seed: int = 0) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "dense": {
            "kernel": sharded(jax.random.normal(keys[0], (16, 8)), "x", "y"),
            "bias": sharded(jax.random.normal(keys[1], (8,))),
        },
        "scale": sharded(jax.random.normal(keys[2], (24,), jnp.bfloat16), "x"),
    }
    return TrainState.create(apply_fn=None, params=params, tx=optax.adamw(1e-3))


def zeros_of(state: Any) -> Any:
    """Another state of the same types, dtypes and shardings."""
    return jax.tree.map(lambda x: jnp.zeros_like(x) if isinstance(x, jax.Array) else x, state)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_same_leaf(a, b)


def assert_same_leaf(a: Any, b: Any) -> None:
    if isinstance(b, jax.Array) and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
        assert a.dtype == b.dtype
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    if isinstance(b, jax.Array):
        assert isinstance(a, jax.Array) and a.sharding.is_equivalent_to(b.sharding, b.ndim)
    assert type(a) is type(b) or isinstance(b, jax.Array)
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


# -- in all the ways Orbax's users expect -----------------------------------------------------


@both
@pytest.mark.parametrize("asynchronous", [True, False])
def test_saves_and_restores_a_train_state(
    judged: Judged, managers: Managers, asynchronous: bool
) -> None:
    manager = managers(judged.handler(), enable_async_checkpointing=asynchronous)
    states = {step: train_state(step) for step in range(3)}
    for step, state in states.items():
        assert manager.save(step, args=judged.save(state))
    manager.wait_until_finished()
    assert manager.all_steps() == [0, 1, 2] and manager.latest_step() == 2
    for step, state in states.items():
        target = zeros_of(state)
        assert_same(manager.restore(step, args=judged.restore(target)), state)


@both
def test_restores_to_shapes_with_shardings(judged: Judged, managers: Managers) -> None:
    state = train_state().replace(step=jnp.int32(3))
    manager = managers(judged.handler())
    manager.save(8, args=judged.save(state))
    manager.wait_until_finished()
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    assert_same(manager.restore(8, args=judged.restore(target)), state)


@both
def test_restores_without_a_target_as_nested_dictionaries(
    judged: Judged, managers: Managers
) -> None:
    state = train_state()
    manager = managers(judged.handler())
    manager.save(0, args=judged.save(state))
    manager.wait_until_finished()
    found = manager.restore(0, args=judged.restore())
    assert set(found) == {"step", "params", "opt_state"}
    assert_same_leaf(
        np.asarray(found["params"]["dense"]["kernel"]), np.asarray(state.params["dense"]["kernel"])
    )
    moments = found["opt_state"][0]["mu"]["dense"]
    assert_same_leaf(
        np.asarray(moments["bias"]), np.asarray(state.opt_state[0].mu["dense"]["bias"])
    )


@both
def test_a_fresh_manager_restores_without_arguments(judged: Judged, managers: Managers) -> None:
    """The handler is found by what the step's metadata say, or by the registry."""
    manager = managers(judged.handler())
    manager.save(0, args=judged.save({"w": jnp.arange(5)}))
    manager.close()
    found = managers(judged.handler()).restore(0)
    assert np.asarray(found["w"]).tolist() == [0, 1, 2, 3, 4]


@both
def test_next_to_other_items(judged: Judged, managers: Managers) -> None:
    manager = managers({"state": judged.handler(), "notes": ocp.JsonCheckpointHandler()})
    state = train_state()
    manager.save(
        3,
        args=ocp.args.Composite(state=judged.save(state), notes=ocp.args.JsonSave({"epoch": 4})),
    )
    manager.wait_until_finished()
    found = manager.restore(
        3,
        args=ocp.args.Composite(
            state=judged.restore(zeros_of(state)),
            notes=ocp.args.JsonRestore(),
        ),
    )
    assert_same(found.state, state)
    assert found.notes == {"epoch": 4}


@both
def test_handlers_from_a_registry(judged: Judged, tmp_path: Path) -> None:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = judged.handler()
    registry.add("state", judged.save, handler)
    registry.add("state", judged.restore, handler)
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        manager.save(0, args=ocp.args.Composite(state=judged.save({"w": jnp.ones(3)})))
        manager.wait_until_finished()
        found = manager.restore(0, args=ocp.args.Composite(state=judged.restore()))
    assert np.asarray(found.state["w"]).tolist() == [1, 1, 1]


@both
def test_retention_and_intervals(judged: Judged, managers: Managers) -> None:
    manager = managers(judged.handler(), max_to_keep=2, keep_period=4, save_interval_steps=2)
    states = {step: train_state(step) for step in range(0, 11, 2)}
    for step in range(11):
        assert manager.should_save(step) == (step % 2 == 0)
        if step % 2 == 0:
            manager.save(step, args=judged.save(states[step]))
    manager.wait_until_finished()
    kept = manager.all_steps()
    assert kept == [0, 4, 8, 10]
    for step in kept:
        target = zeros_of(states[step])
        assert_same(manager.restore(step, args=judged.restore(target)), states[step])


@both
def test_preservation_policy(judged: Judged, managers: Managers) -> None:
    policy = ocp.checkpoint_managers.LatestN(n=2)
    manager = managers(judged.handler(), preservation_policy=policy)
    states = {step: train_state(step) for step in range(5)}
    for step, state in states.items():
        manager.save(step, args=judged.save(state))
    manager.wait_until_finished()
    assert manager.all_steps() == [3, 4]
    for step in (3, 4):
        target = zeros_of(states[step])
        assert_same(manager.restore(step, args=judged.restore(target)), states[step])


@both
def test_read_only_managers_and_reload(judged: Judged, managers: Managers) -> None:
    manager = managers(judged.handler())
    manager.save(0, args=judged.save({"w": jnp.zeros(4)}))
    manager.wait_until_finished()
    reader = managers(judged.handler(), read_only=True)
    assert reader.all_steps() == [0]
    manager.save(1, args=judged.save({"w": jnp.ones(4)}))
    manager.wait_until_finished()
    reader.reload()
    assert reader.latest_step() == 1
    assert np.asarray(reader.restore(1, args=judged.restore())["w"]).tolist() == [1] * 4


@both
def test_saving_again_after_going_back(judged: Judged, managers: Managers) -> None:
    """A step that was deleted is saved anew, as after a resume from an older one."""
    manager = managers(judged.handler())
    for step in range(3):
        manager.save(step, args=judged.save({"w": jnp.full(1000, step)}))
    manager.wait_until_finished()
    manager.delete(2)
    manager.delete(1)
    for step in (1, 2):
        manager.save(step, args=judged.save({"w": jnp.full(1000, 10 + step)}))
    manager.wait_until_finished()
    found = [np.asarray(manager.restore(s, args=judged.restore())["w"])[0] for s in range(3)]
    assert found == [0, 11, 12]


@both
def test_the_plain_checkpointer(judged: Judged, tmp_path: Path) -> None:
    with ocp.AsyncCheckpointer(judged.handler()) as checkpointer:
        checkpointer.save(tmp_path / "one", args=judged.save({"w": jnp.arange(3)}))
        checkpointer.wait_until_finished()
        checkpointer.save(tmp_path / "two", args=judged.save({"w": jnp.arange(4)}))
        checkpointer.wait_until_finished()
        checkpointer.save(tmp_path / "two", args=judged.save({"w": jnp.arange(5)}), force=True)
        checkpointer.wait_until_finished()
        found = [
            np.asarray(checkpointer.restore(tmp_path / name, args=judged.restore())["w"]).size
            for name in ("one", "two")
        ]
    assert found == [3, 5]


@both
def test_item_metadata_gives_shapes_and_dtypes(judged: Judged, managers: Managers) -> None:
    state = train_state()
    manager = managers(judged.handler())
    manager.save(0, args=judged.save(state))
    manager.wait_until_finished()
    metadata = manager.item_metadata(0)
    kernel = metadata["params"]["dense"]["kernel"]
    assert tuple(kernel.shape) == (16, 8) and kernel.dtype == np.float32
    assert metadata["params"]["scale"].dtype == jnp.bfloat16


class Point(NamedTuple):
    a: Any
    b: Any


LEAVES: dict[str, Callable[[], Any]] = {
    "0-d": lambda: jnp.float32(3.5),
    "bool": lambda: jnp.array([True, False]),
    "bf16": lambda: jnp.arange(7, dtype=jnp.bfloat16),
    "fp8": lambda: jnp.arange(7, dtype=jnp.float8_e4m3fn),
    "complex": lambda: jnp.arange(3) + 1j,
    "numpy": lambda: np.arange(6, dtype=np.int16).reshape(2, 3),
    "int": lambda: 7,
    "float": lambda: 0.1,
    "replicated": lambda: sharded(jnp.arange(8.0)),
    "partly replicated": lambda: sharded(jnp.arange(8.0), "y"),
    "2-d": lambda: sharded(jnp.arange(64.0).reshape(8, 8), "x", "y"),
    "both axes": lambda: sharded(jnp.arange(64.0).reshape(8, 8), None, ("x", "y")),
    "one device": lambda: jax.device_put(jnp.arange(4), jax.devices()[3]),
}


@both
@pytest.mark.parametrize("kind", LEAVES)
def test_every_kind_of_leaf(judged: Judged, kind: str, managers: Managers) -> None:
    state = {"a": LEAVES[kind](), "b": [LEAVES[kind](), Point(None, LEAVES[kind]())]}
    manager = managers(judged.handler())
    manager.save(0, args=judged.save(state))
    manager.wait_until_finished()
    assert_same(manager.restore(0, args=judged.restore(state)), state)


@both
def test_containers_without_leaves(judged: Judged, managers: Managers) -> None:
    state = {"w": jnp.ones(2), "none": None, "dict": {}, "list": [], "state": optax.EmptyState()}
    manager = managers(judged.handler())
    manager.save(0, args=judged.save(state))
    manager.wait_until_finished()
    assert_same(manager.restore(0, args=judged.restore(state)), state)


@both
def test_errors_of_the_state_come_out_of_save(judged: Judged, managers: Managers) -> None:
    manager = managers(judged.handler())
    with pytest.raises((ValueError, UnsupportedStateError), match="odd"):
        manager.save(0, args=judged.save({"ok": jnp.ones(2), "odd": object()}))
    manager.save(1, args=judged.save({"ok": jnp.ones(2)}))
    manager.wait_until_finished()
    assert manager.all_steps() == [1]


@both
@pytest.mark.parametrize("change", ["shape", "missing", "more"])
def test_a_target_that_differs_is_refused(judged: Judged, change: str, managers: Managers) -> None:
    manager = managers(judged.handler())
    manager.save(0, args=judged.save({"a": jnp.ones((2, 3)), "b": jnp.ones(2)}))
    manager.wait_until_finished()
    target = {
        "shape": {"a": jnp.ones((3, 3)), "b": jnp.ones(2)},
        "missing": {"a": jnp.ones((2, 3))},
        "more": {"a": jnp.ones((2, 3)), "b": jnp.ones(2), "c": jnp.ones(1)},
    }[change]
    with pytest.raises((ValueError, StateMismatchError)):
        manager.restore(0, args=judged.restore(target))


# -- what only AsymCheck promises ---------------------------------------------------------------


def restored(manager: ocp.CheckpointManager, step: int, like: Any, **more: Any) -> Any:
    return manager.restore(step, args=asymcheck_jax.AsymCheckRestore(like, **more))


def test_arrays_without_elements(managers: Managers) -> None:
    """Orbax's own handler refuses them."""
    state = {"a": jnp.zeros((0, 4)), "b": np.zeros((3, 0), np.int8)}
    manager = managers(OURS.handler())
    manager.save(0, args=OURS.save(state))
    manager.wait_until_finished()
    assert_same(restored(manager, 0, state), state)


def test_typed_random_keys(managers: Managers) -> None:
    state = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 5),
        "old": jax.random.PRNGKey(5),
    }
    manager = managers(OURS.handler())
    manager.save(0, args=OURS.save(state))
    manager.wait_until_finished()
    assert_same(restored(manager, 0, state), state)
    assert_same(restored(manager, 0, None), state)


def test_dtypes_are_cast_only_when_asked_for(managers: Managers) -> None:
    manager = managers(OURS.handler())
    manager.save(0, args=OURS.save({"w": jnp.arange(4, dtype=jnp.float32)}))
    manager.wait_until_finished()
    target = {"w": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}
    with pytest.raises(StateMismatchError, match=r"w is float32.*bfloat16"):
        restored(manager, 0, target)
    assert restored(manager, 0, target, cast=True)["w"].dtype == ml_dtypes.bfloat16


def test_restores_onto_another_mesh(managers: Managers) -> None:
    array = jnp.arange(32 * 24, dtype=jnp.float32).reshape(32, 24)
    manager = managers(OURS.handler())
    manager.save(0, args=OURS.save({"w": sharded(array, "x", "y")}))
    manager.wait_until_finished()
    for on, axes in [
        (mesh(2, 4), ("x", "y")),
        (mesh(2, 2), ("y", "x")),
        (mesh(8), ("x",)),
        (mesh(4, 2), (None, "y")),
        (mesh(1), ()),
    ]:
        target = jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=NamedSharding(on, P(*axes))
        )
        found = restored(manager, 0, {"w": target})["w"]
        assert found.sharding == target.sharding
        assert np.array_equal(found, array)


def test_every_byte_is_stored_once(managers: Managers, tmp_path: Path) -> None:
    state = {
        "replicated": sharded(jnp.ones(100_000)),
        "partly": sharded(jnp.ones(100_000), "x"),
        "whole": sharded(jnp.ones((1000, 100)), "x", "y"),
    }
    manager = managers(asymcheck_jax.AsymCheckHandler(strategy="asymcheck-naive"))
    manager.save(0, args=OURS.save(state))
    manager.wait_until_finished()
    packs = (tmp_path / "run" / "0").rglob("*.pack")
    assert sum(pack.stat().st_size for pack in packs) == 3 * 400_000


def test_donated_arrays_keep_their_values_in_the_checkpoint(managers: Managers) -> None:
    """Whoever donates what was just saved gets neither an error nor a wrong checkpoint."""
    step = jax.jit(lambda x: x * 2.0 + 1.0, donate_argnums=0)
    manager = managers(OURS.handler())
    w = sharded(jnp.arange(1 << 16, dtype=jnp.float32), "x")
    values = []
    for number in range(4):
        values.append(np.array(w))
        manager.save(number, args=OURS.save({"w": w}))
        for _ in range(3):
            w = step(w)
    manager.wait_until_finished()
    for number, value in enumerate(values):
        assert np.array_equal(restored(manager, number, None)["w"], value)


def test_numpy_arrays_are_copied_before_save_returns(managers: Managers) -> None:
    array = np.arange(1000)
    manager = managers(OURS.handler())
    manager.save(0, args=OURS.save({"w": array}))
    array[:] = -1
    manager.wait_until_finished()
    assert np.array_equal(restored(manager, 0, {"w": array})["w"], np.arange(1000))


def test_errors_of_writing_come_out_of_the_next_call(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = asymcheck_jax.AsymCheckHandler()
    manager = managers(handler)
    manager.save(0, args=OURS.save({"w": jnp.ones(10)}))
    manager.wait_until_finished()
    with monkeypatch.context() as broken:
        broken.setattr(handler._run.directories, "put", _fails)
        manager.save(1, args=OURS.save({"w": jnp.ones(10)}))
        with pytest.raises(AsymCheckError, match="no space"):
            manager.wait_until_finished()
    assert manager.all_steps() == [0]
    again = managers(asymcheck_jax.AsymCheckHandler())
    assert again.all_steps() == [0]
    again.save(1, args=OURS.save({"w": jnp.full(10, 2.0)}))
    again.wait_until_finished()
    assert np.array_equal(restored(again, 1, None)["w"], np.full(10, 2.0, np.float32))


def _fails(key: str, data: memoryview) -> None:
    raise OSError("no space")
