"""The script that is killed: saves known states as fast as it can, and says what is durable.

    python kill_writer.py DIRECTORY LIFE STRATEGY [STEPS]

Restores first, and goes on from there. Prints `restored STEP LIFE` (or `nothing`), then
`saved STEP` when a step is captured and `durable STEP` when it is acknowledged. Ends after STEPS
steps; without it never.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from typing import Any

import numpy as np
from crash_oracle import same

from asymcheck import Always, AsymCheck, AsymCheckNaive, Checkpointer, CostModel, Strategy
from asymcheck.errors import CheckpointNotFoundError

SIZE = 50_000
STRATEGIES = {
    "delta": Strategy("delta", Always("delta"), windows=False, batched=True, blocking=False),
    "asymcheck": AsymCheck(),
    "naive": AsymCheckNaive(),
}


def known_state(step: int, life: int) -> Any:
    """What is saved as `step` in the `life`-th process; packs of 100 to 600 KB."""
    base = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    change = np.random.default_rng([step, life]).standard_normal(SIZE).astype(np.float32)
    return {
        "params": {"w": base + np.float32(1e-4) * change},
        "exp_avg": {"w": change},
        "exp_avg_sq": {"w": change * change},
        "step": step,
        "life": np.int64(life),
    }


def restored(state: Any) -> tuple[int, int]:
    """Step and life of a state that was saved here; `AssertionError` if it is not whole."""
    step, life = state["step"], int(state["life"])
    assert same(state, known_state(step, life)), f"step {step} is a mixture"
    return step, life


def say(*words: object) -> None:
    print(*words, flush=True)


def main(directory: str, life: int, strategy: str, steps: int | None) -> None:
    with Checkpointer(
        directory,
        strategy=STRATEGIES[strategy],
        max_host_bytes=8 << 20,
        max_to_keep=3,
        max_chain=3,
        cost_model=CostModel(),
    ) as checkpointer:
        first = 0
        try:
            step, of = restored(checkpointer.restore())
            say("restored", step, of)
            first = step + 1
        except CheckpointNotFoundError:
            say("nothing")
        waiting = deque()
        last = None if steps is None else first + steps
        for step in itertools.count(first):
            if step == last:
                break
            waiting.append(checkpointer.save(step, known_state(step, life)))
            say("saved", step)
            while waiting and (waiting[0].done() or len(waiting) > 4):
                pending = waiting.popleft()
                pending.wait()
                say("durable", pending.step)
        checkpointer.wait()
        for pending in waiting:
            say("durable", pending.step)


if __name__ == "__main__":
    main(
        sys.argv[1],
        int(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]) if len(sys.argv) > 4 else None,
    )
