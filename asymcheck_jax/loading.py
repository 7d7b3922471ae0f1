"""Reading a checkpoint as JAX arrays, without Orbax and without a target."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from asymcheck.reader import Checkpoint, read_step
from asymcheck_jax.restoring import restore_into, restore_tree, stored_shapes
from asymcheck_jax.trees import leaves_by_path


def load(
    url: str | os.PathLike[str],
    step: int | None = None,
    shardings: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None = None,
) -> Any:
    """The state of a step, with JAX arrays; reads checkpoints of any framework.

    Args:
        url: the run, or the item's directory of one step of Orbax: a path or a URL.
        step: which step; None for the newest good one (damaged ones are passed over, loudly).
        shardings: where arrays go: one sharding for all, or one by leaf path for some; every
            process reads only the bytes that its devices hold. By default they go to the default
            device. Arrays that JAX would narrow (float64, int64 without `jax_enable_x64`) come
            back as NumPy arrays.

    Raises:
        CheckpointNotFoundError: there is no such step, or none that is whole.
        CorruptionError, FormatError: the step asked for by number is damaged.
        StoreError: the store failed.
    """
    return read_step(url, step, lambda checkpoint: _read(checkpoint, shardings))


def _read(checkpoint: Checkpoint, shardings: Any) -> Any:
    if shardings is None:
        return restore_tree(checkpoint)
    wanted, rebuild = leaves_by_path(stored_shapes(checkpoint))

    def placed(path: str, leaf: Any) -> Any:
        sharding = shardings.get(path) if isinstance(shardings, Mapping) else shardings
        held = isinstance(leaf, jax.ShapeDtypeStruct)
        if sharding is None or not held:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return restore_into(checkpoint, rebuild({p: placed(p, leaf) for p, leaf in wanted.items()}))
