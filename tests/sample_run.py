"""A small run to look at: every kind of leaf, bases and increments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import asymcheck
from asymcheck.policy import Always, CompressionPolicy
from asymcheck.strategies import AsymCheck

STEPS = (10, 20, 30, 40)


def state_at(step: int) -> dict[str, Any]:
    """The state of a step: a pure function of its number."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 33)).astype(np.float32) * np.float32(1 + step / 1000)
    bias = rng.standard_normal(50).astype(ml_dtypes.bfloat16)
    bias[3] = step
    return {
        "params": {"weight": weight, "tied": weight, "bias": bias, "empty": np.zeros((0, 3))},
        "exp_avg": {"weight": weight * np.float32(0.1)},
        "optimizer": {
            "step": step,
            "rate": 1 / step,
            "count": np.int64(2**62 + step),
            "phase": np.complex64(1j * step),
            "mask": np.array([True, step % 20 == 0]),
            "fp8": np.arange(8, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn),
            "rng": b"abc",
        },
        "nothing": None,
    }


def write_run(
    root: Path | str,
    steps: tuple[int, ...] = STEPS,
    policy: CompressionPolicy | None = None,
    **options: Any,
) -> None:
    """Commit `state_at(step)` for every step, in chains of a base and two increments."""
    strategy = AsymCheck(policy=policy or Always("delta"))
    options = {"max_chain": 2, "max_host_bytes": 64 << 20, **options}
    with asymcheck.Checkpointer(root, strategy=strategy, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, state_at(step), metadata={"epoch": step // 10})
