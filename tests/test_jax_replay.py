"""Told which update was made, increments of optax states take a tenth, and come back exactly."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402

import asymcheck_jax  # noqa: E402
from asymcheck.index import load_index  # noqa: E402
from asymcheck.policy import Always  # noqa: E402
from asymcheck.stores import open_store  # noqa: E402
from asymcheck.strategies import AsymCheck  # noqa: E402
from asymcheck_jax.directories import read_item  # noqa: E402

WIDTH = 256
STEPS = range(4)
RATE = optax.exponential_decay(1e-3, 2, 0.9)

# Optimizer, the update that is told, and the largest part of the state that a step may take.
OPTIMIZERS: dict[str, tuple[Any, Any, float]] = {
    "adam": (optax.adam(1e-3), asymcheck_jax.AdamUpdate(1e-3), 0.16),
    "adamw": (
        optax.adamw(1e-3, b2=0.95, weight_decay=0.1),
        asymcheck_jax.AdamUpdate(1e-3, b2=0.95, weight_decay=0.1),
        0.14,
    ),
    "schedule": (optax.adam(RATE), asymcheck_jax.AdamUpdate(RATE), 0.16),
    "clipped": (
        optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(1e-3)),
        asymcheck_jax.AdamUpdate(1e-3),
        0.19,
    ),
    "lion": (optax.lion(1e-4), asymcheck_jax.LionUpdate(1e-4), 0.35),
    "sgd": (optax.sgd(1e-2, momentum=0.9), asymcheck_jax.SGDUpdate(1e-2, 0.9), 0.23),
    "descent": (optax.sgd(1e-2), asymcheck_jax.SGDUpdate(1e-2), 0.44),
    "nesterov": (
        optax.sgd(1e-2, momentum=0.9, nesterov=True),
        asymcheck_jax.SGDUpdate(1e-2, 0.9),
        0.23,
    ),
    "recorded": (
        optax.chain(
            optax.clip_by_global_norm(1e-3), asymcheck_jax.record_updates(), optax.adam(1e-3)
        ),
        asymcheck_jax.AdamUpdate(1e-3),
        0.15,  # of a state that is a third larger
    ),
    "recorded-lion": (
        optax.chain(asymcheck_jax.record_updates(), optax.lion(1e-4)),
        asymcheck_jax.LionUpdate(1e-4),
        0.15,
    ),
    "recorded-descent": (
        optax.chain(asymcheck_jax.record_updates(), optax.sgd(1e-2)),
        asymcheck_jax.SGDUpdate(1e-2),
        0.3,
    ),
    "recorded-twice": (
        optax.chain(
            asymcheck_jax.record_updates(),
            optax.clip_by_global_norm(1e-3),
            asymcheck_jax.record_updates(),
            optax.adam(1e-3),
        ),
        asymcheck_jax.AdamUpdate(1e-3),
        0.3,
    ),
    "low": (optax.adam(1e-3, mu_dtype=jnp.bfloat16), asymcheck_jax.AdamUpdate(1e-3), 0.5),
    "recorded-low": (
        optax.chain(asymcheck_jax.record_updates(), optax.adam(1e-3, mu_dtype=jnp.bfloat16)),
        asymcheck_jax.AdamUpdate(1e-3),
        0.15,
    ),
    "wrong": (optax.adam(1e-3), asymcheck_jax.AdamUpdate(0.5, b1=0.1, b2=0.2), 0.95),
}


def train(optimizer: Any) -> list[dict[str, Any]]:
    """States after each of some steps with gradients in bfloat16."""
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)) / 16}}
    state = {"params": params, "opt_state": optimizer.init(params)}

    def loss(low: Any, x: Any) -> Any:
        return jnp.square(jnp.tanh(x @ low["dense"]["kernel"]) - x).mean()

    @jax.jit
    def step(state: Any, x: Any) -> Any:
        low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state["params"])
        gradient = jax.grad(loss)(low, x.astype(jnp.bfloat16))
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        updates, rest = optimizer.update(gradient, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": rest}

    states = []
    for number in STEPS:
        state = step(state, jax.random.normal(jax.random.key(number), (32, WIDTH)))
        states.append(state)
    return states


def ratio(item: Path) -> tuple[float, set[str]]:
    """Stored to raw bytes of an item, and the codecs."""
    with closing(open_store(item)) as store:
        blocks = list(load_index(store, read_item(store)).blocks())
    stored, raw = sum(b.block.nbytes for b in blocks), sum(b.nbytes for b in blocks)
    return stored / raw, {block.codec.id for block in blocks}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optax_is_replayed(name, tmp_path):
    optimizer, update, limit = OPTIMIZERS[name]
    states = train(optimizer)
    strategy = AsymCheck(policy=Always("replay"))
    handler = asymcheck_jax.AsymCheckHandler(strategy=strategy, max_chain=10)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        for number, state in zip(STEPS, states, strict=True):
            manager.save(number, args=asymcheck_jax.AsymCheckSave(state, update=update))
            manager.wait_until_finished()
        for number, state in zip(STEPS, states, strict=True):
            target = asymcheck_jax.AsymCheckRestore(jax.tree.map(jnp.zeros_like, state))
            found = manager.restore(number, args=target)
            assert jax.tree.all(
                jax.tree.map(
                    lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), found, state
                )
            )
    for number in STEPS[2:]:
        part, codecs = ratio(tmp_path / str(number) / "default")
        assert part < limit
        assert "replay" in codecs


def test_recording_changes_nothing_and_keeps_what_the_optimizer_is_given():
    clip = optax.clip_by_global_norm(1e-3)
    optimizers = [
        optax.chain(clip, optax.adam(1e-3)),
        optax.chain(clip, asymcheck_jax.record_updates(), optax.adam(1e-3)),
    ]
    params = {"w": jax.random.normal(jax.random.key(0), (WIDTH,))}
    gradient = {"w": jax.random.normal(jax.random.key(1), (WIDTH,))}
    plain, recorded = (each.update(gradient, each.init(params), params) for each in optimizers)
    assert np.array_equal(plain[0]["w"], recorded[0]["w"])
    clipped, _ = clip.update(gradient, clip.init(params))
    assert np.array_equal(recorded[1][1].recorded_gradients["w"], clipped["w"])


def test_what_is_not_found_beside_a_parameter_is_not_replayed(tmp_path):
    state = {"params": {"w": jnp.ones((WIDTH, WIDTH))}, "mu": {"w": jnp.ones((WIDTH, WIDTH))}}
    handler = asymcheck_jax.AsymCheckHandler(strategy=AsymCheck(policy=Always("replay")))
    update = asymcheck_jax.AdamUpdate(1e-3)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        for number in range(2):
            manager.save(number, args=asymcheck_jax.AsymCheckSave(state, update=update))
            manager.wait_until_finished()
    assert "replay" not in ratio(tmp_path / "1" / "default")[1]
