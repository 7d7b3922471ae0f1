"""Pytrees in a store without Orbax."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_store import MemoryStore

import asymcheck
import asymcheck_jax
from asymcheck import Always, AsymCheck
from asymcheck.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    SaveFailedError,
    StateMismatchError,
    StepExistsError,
    StoreUnavailableError,
    UnsupportedStateError,
)

SMALL = {"max_host_bytes": 8 << 20, "stall_timeout_s": 20.0}


def state(seed: int) -> dict[str, object]:
    key = jax.random.key(seed)
    return {
        "params": {"w": jax.random.normal(key, (64, 32)), "b": jnp.full(32, seed, jnp.bfloat16)},
        "key": key,
        "step": seed,
    }


def assert_same(found: object, expected: object) -> None:
    def plain(leaf: object) -> object:
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(plain(one)), np.asarray(plain(other))
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("policy", ["raw", "plane", "delta"])
def test_every_step_comes_back(tmp_path: Path, policy: str) -> None:
    strategy = AsymCheck(policy=Always(policy))
    with asymcheck_jax.Checkpointer(tmp_path, strategy=strategy, **SMALL) as checkpointer:
        for step in range(5):
            checkpointer.save(step, state(step), metadata={"epoch": step})
        checkpointer.wait()
        assert checkpointer.latest_step() == 4
        assert_same(checkpointer.restore(state(0)), state(4))
        assert_same(checkpointer.restore(state(0), step=1), state(1))
        assert_same(checkpointer.restore(), state(4))
    with asymcheck.open_checkpoint(tmp_path, 3) as checkpoint:
        assert checkpoint.metadata == {"epoch": 3}
        checkpoint.verify()
    assert_same(asymcheck_jax.load(tmp_path, 2), state(2))


def test_arrays_may_be_donated_when_save_returns(tmp_path: Path) -> None:
    step_fn = jax.jit(lambda w: w * 1.5 + 1, donate_argnums=0)
    w = jnp.arange(1 << 18, dtype=jnp.float32)
    expected = []
    with asymcheck_jax.Checkpointer(tmp_path, **SMALL) as checkpointer:
        for step in range(6):
            expected.append(np.array(w))
            checkpointer.save(step, {"w": w})
            w = step_fn(w)
        checkpointer.wait()
        for step in range(6):
            found = checkpointer.restore(step=step)["w"]
            assert np.asarray(found).tobytes() == expected[step].tobytes()


def test_a_blocking_strategy_is_done_when_save_returns(tmp_path: Path) -> None:
    with asymcheck_jax.Checkpointer(tmp_path, strategy="synchronous", **SMALL) as checkpointer:
        assert checkpointer.save(1, state(1)).done()


def test_a_damaged_step_is_passed_over_and_gives_way() -> None:
    store = MemoryStore()
    with asymcheck_jax.Checkpointer(store, max_chain=0, **SMALL) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step)).wait()
    (pack,) = (key for key in store.objects if "0002-" in key and key.endswith(".pack"))
    damaged = bytearray(store.objects[pack])
    damaged[0] ^= 1
    store.objects[pack] = bytes(damaged)
    with asymcheck_jax.Checkpointer(store, **SMALL) as checkpointer:
        with pytest.raises(CorruptionError):
            checkpointer.restore(state(0), step=2)
        assert_same(checkpointer.restore(state(0)), state(1))
        checkpointer.save(2, state(7)).wait()
        assert_same(checkpointer.restore(state(0)), state(7))


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with asymcheck_jax.Checkpointer(tmp_path, **SMALL) as checkpointer:
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.restore()
        with pytest.raises(UnsupportedStateError, match="dates"):
            checkpointer.save(0, {"dates": np.array(["2020"], "M8[Y]")})
        checkpointer.save(1, state(1)).wait()
        with pytest.raises(StepExistsError):
            checkpointer.save(1, state(1))
        with pytest.raises(StateMismatchError, match="params/w"):
            checkpointer.restore({"params": {"w": jnp.zeros(3)}})


def test_a_failed_save_is_told_and_the_next_one_works() -> None:
    store = MemoryStore()
    with asymcheck_jax.Checkpointer(store, **SMALL) as checkpointer:
        checkpointer.save(1, state(1)).wait()

        def fail(operation: str, key: str) -> None:
            if operation == "put" and key.endswith(".pack"):
                raise StoreUnavailableError("out of reach", object=key)

        store.hook = fail
        with pytest.raises(SaveFailedError, match="out of reach"):
            checkpointer.save(2, state(2)).wait()
        store.hook = lambda operation, key: None
        checkpointer.save(3, state(3)).wait()
        assert checkpointer.checkpointer.steps() == [1, 3]


def test_a_lost_disk_costs_nothing_that_the_mirror_has(tmp_path: Path) -> None:
    places = {"url": tmp_path / "run", "mirror": tmp_path / "mirror"}
    with asymcheck_jax.Checkpointer(**places, **SMALL) as checkpointer:
        checkpointer.save(1, state(1))
    shutil.rmtree(tmp_path / "run")
    with asymcheck_jax.Checkpointer(**places, **SMALL) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert_same(checkpointer.restore(state(0)), state(1))
        checkpointer.save(2, state(2))
    for place in places.values():
        assert_same(asymcheck_jax.Checkpointer(place).restore(state(0)), state(2))
