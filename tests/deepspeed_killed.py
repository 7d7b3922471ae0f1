"""A rank that trains with ZeRO-3 and a checkpoint at every step, and may kill itself.

    python deepspeed_killed.py DIRECTORY STEPS WIDTH VICTIM POINT NUMBER    (ranks by environment)

Restores first. Rank 0 prints `restored STEP DIGEST` and `step STEP DIGEST`. Rank VICTIM dies at
POINT, one of `before pack`, `after pack`, `before manifest`, `after manifest`, `before commit`,
`after commit`, when it comes there for the NUMBER-th time. Host memory is so small that a wide
model is stored in several packs by each rank at every step.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed_runs import Setting, build, snapshot

import asymcheck_torch
from asymcheck.checkpointer import MIN_HOST_NBYTES
from asymcheck.stores import LocalStore


def kind_of(key: str) -> str:
    if key.startswith("commits/"):
        return "commit"
    return "pack" if key.endswith(".pack") else "manifest"


def die_at(point: str, number: int) -> None:
    """Kill this process before or after it writes the `number`-th object of a kind."""
    moment, kind = point.split()
    seen = [0]
    counting = threading.Lock()  # several packs are written at once

    def wrapped(write: Callable[..., Any]) -> Callable[..., Any]:
        def put(self: LocalStore, key: str, data: memoryview) -> Any:
            counts = key.startswith(("data/", "commits/")) and kind_of(key) == kind
            with counting:
                seen[0] += counts
                last = counts and seen[0] == number
            if last and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = write(self, key, data)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return put

    LocalStore.put = wrapped(LocalStore.put)  # type: ignore[method-assign]
    LocalStore.put_if_absent = wrapped(LocalStore.put_if_absent)  # type: ignore[method-assign]


def digest(engine: Any) -> str:
    """Over everything that is trained; the same on all ranks."""
    sha = hashlib.sha256()
    for name, value in sorted(snapshot(engine).items()):
        if isinstance(value, torch.Tensor) and name != "seen":
            sha.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def train_step(engine: Any, step: int) -> None:
    """Data come from the number of the step, dropout from the generators that are restored."""
    data = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    tokens = torch.randint(29, (4, 5), generator=data)
    logits = engine(tokens)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 29), tokens.reshape(-1))
    engine.backward(loss)
    engine.step()


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def main(directory: str, steps: int, width: int, victim: int, point: str, number: int) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_EXTENSIONS_DIR"] = f"{directory}/built"
    # Without it DeepSpeed compiles an extension for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    engine = build(Setting(stage=3, width=width))
    torch.manual_seed(100 + dist.get_rank())
    url = f"{directory}/run"
    options: dict[str, Any] = {"commit_timeout_s": 6.0, "max_host_bytes": MIN_HOST_NBYTES}
    with asymcheck_torch.attach(engine, url=url, **options) as checkpointer:
        first = checkpointer.restore()
        say("restored", first, digest(engine) if first else "nothing")
        if dist.get_rank() == victim:
            die_at(point, number)
        for step in range(first + 1, first + steps + 1):
            train_step(engine, step)
            say("step", step, digest(engine))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    directory, steps, width, victim, point, number = sys.argv[1:]
    main(directory, int(steps), int(width), int(victim), point, int(number))
