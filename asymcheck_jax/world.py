"""The processes of `jax.distributed`, and the little that they must agree on."""

from __future__ import annotations

import secrets

import jax
import numpy as np
from jax.experimental import multihost_utils


class World:
    """All processes; every method is a collective call, if there are several."""

    def fresh_name(self) -> str:
        """A name that no other run has, the same on all processes."""
        name = np.frombuffer(secrets.token_bytes(8), np.uint8)
        if jax.process_count() > 1:
            name = np.asarray(multihost_utils.broadcast_one_to_all(name))
        return f"run{name.tobytes().hex()}"

    def extremes(self, number: int) -> tuple[int, int]:
        """The smallest and the largest number that any process gives; within int64."""
        if jax.process_count() == 1:
            return number, number
        halves = np.array(divmod(number, 1 << 31), np.int32)  # JAX narrows int64
        gathered = np.asarray(multihost_utils.process_allgather(halves)).astype(np.int64)
        numbers = gathered[:, 0] * (1 << 31) + gathered[:, 1]
        return int(numbers.min()), int(numbers.max())
