"""One process of a JAX run without Orbax: trains, checkpoints every step, resumes if it can.

    python jax_run.py URL STEPS OUTPUT

Prints `resumed STEP`, then `durable STEP` for every third step; at the end the digest of what this
process holds goes to OUTPUT, with its rank. Environment: see `rank_processes`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

if RANKS > 1:
    jax.distributed.initialize(f"127.0.0.1:{os.environ['MASTER_PORT']}", RANKS, RANK)

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import asymcheck_jax
from asymcheck import Always, AsymCheck
from asymcheck.errors import CheckpointNotFoundError


def initial() -> dict[str, Any]:
    mesh = Mesh(np.array(jax.devices()).reshape(-1, 1), ("x", "y"))
    rows, copies = NamedSharding(mesh, P("x", None)), NamedSharding(mesh, P())
    weights = np.random.default_rng(0).standard_normal((256, 192)).astype(np.float32)
    placed = {"w": (weights, rows), "m": (0 * weights, rows), "b": (weights[0], copies)}
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda i, a=array: a[i])
        for name, (array, sharding) in placed.items()
    }


def update(state: dict[str, Any]) -> dict[str, Any]:
    gradient = jnp.sin(3 * state["w"]) + state["b"]
    m = 0.9 * state["m"] + 0.1 * gradient
    return {"w": state["w"] - 0.01 * m, "m": m, "b": state["b"] * 0.999}


def digest(state: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        for shard in state[name].addressable_shards:
            found.update(f"{name} {shard.index}".encode())
            found.update(np.asarray(shard.data).tobytes())
    return found.hexdigest()


def main(url: str, steps: int, output: Path) -> None:
    step_fn = jax.jit(update, donate_argnums=0)
    state, begun = initial(), 0
    strategy = AsymCheck(policy=Always("delta"))
    options = {"strategy": strategy, "max_to_keep": 3, "max_chain": 2, "max_host_bytes": 64 << 20}
    with asymcheck_jax.Checkpointer(url, commit_timeout_s=60, **options) as checkpointer:
        try:
            found = checkpointer.restore({"step": 0, "state": state})
            state, begun = found["state"], found["step"]
        except CheckpointNotFoundError:
            pass
        print(f"resumed {begun}", flush=True)
        for step in range(begun + 1, steps + 1):
            state = step_fn(state)
            pending = checkpointer.save(step, {"step": step, "state": state})
            if step % 3 == 0:  # else several are under way at once
                pending.wait()
                print(f"durable {step}", flush=True)
    output.with_suffix(f".{RANK}").write_text(digest(state))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
