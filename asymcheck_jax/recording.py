"""Gradients kept in the optimizer's state, so that the rest of an update follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    import optax


class RecordedUpdates(NamedTuple):
    """The state of `record_updates`: what went through it last, in the dtypes of the parameters."""

    recorded_gradients: Any


(RECORDED,) = RecordedUpdates._fields


def record_updates() -> optax.GradientTransformation:
    """A transformation of optax that changes nothing and keeps what goes through it in its state.

    Place it right before the optimizer, after clipping, so that it sees the gradients that the
    optimizer is given: `optax.chain(optax.clip_by_global_norm(1.0), record_updates(),
    optax.adamw(1e-3))`. A checkpoint of the state then holds the gradients of its update, and if
    it is told the update (`AsymCheckSave(update=...)`), increments derive everything else from
    them. They take about as much as without, and less where moments are kept in low precision
    (`mu_dtype`).
    (XLA may fuse a step with it in another way, and round its last bits in another way.)

    Takes one more array for each parameter, of its shape and dtype (to which gradients are
    rounded), on the device, in host memory and in full steps.
    """

    import optax  # only who trains with it needs to wait for it

    def init(params: Any) -> RecordedUpdates:
        return RecordedUpdates(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RecordedUpdates]:
        del params
        kept = jax.tree.map(
            lambda new, old: new.astype(old.dtype), updates, state.recorded_gradients
        )
        return updates, RecordedUpdates(kept)

    return optax.GradientTransformation(init, update)
