"""A rank that trains with ZeRO-3 and a checkpoint at every step; rank 1's store fails.

    python deepspeed_store_fails.py DIRECTORY    (ranks by environment)

Who has an error leaves with it, as a script that handles none does.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed_runs import Setting, build, train

import asymcheck_torch
from asymcheck.stores import LocalStore

GOOD_STEPS = 2
COMMIT_TIMEOUT_S = 10.0


def fill_disk() -> None:
    """No pack can be written any more."""

    def full(write: Callable[..., Any]) -> Callable[..., Any]:
        def put(self: LocalStore, key: str, data: memoryview) -> Any:
            if key.endswith(".pack"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, key, data)

        return put

    LocalStore.put = full(LocalStore.put)  # type: ignore[method-assign]
    LocalStore.put_if_absent = full(LocalStore.put_if_absent)  # type: ignore[method-assign]


def main(directory: str) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_EXTENSIONS_DIR"] = f"{directory}/built"
    # Without it DeepSpeed compiles an extension for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    engine = build(Setting(stage=3))
    url = f"{directory}/run"
    with asymcheck_torch.attach(engine, url=url, commit_timeout_s=COMMIT_TIMEOUT_S) as ckpt:
        train(engine, GOOD_STEPS)
        ckpt.wait()
        if dist.get_rank() == 1:
            fill_disk()
        train(engine, 10_000)


if __name__ == "__main__":
    main(sys.argv[1])
