"""Processes that run a script, one or several ranks of it, to their end or until they are ready."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_READY = "ready to be killed"


def await_kill() -> None:
    """In such a process: there is nothing to come."""
    print(_READY, flush=True)
    signal.pause()


def leave_together() -> None:
    """The end of a process that still is in a group.

    gloo's threads crash an interpreter that ends while they still have something to tell it.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def call_in_ranks(function: Callable[..., None], *arguments: object, ranks: int) -> None:
    """Call `function(rank, *arguments)` in that many processes; all end well.

    They are forked from a server that has imported what takes long, and nothing else: each import
    of torch takes seconds.
    """
    import torch.multiprocessing

    multiprocessing.set_forkserver_preload(["asymcheck_torch"])
    torch.multiprocessing.start_processes(function, arguments, ranks, start_method="forkserver")


def run_to_the_end(script: str, *words: object, ranks: int = 1) -> None:
    """All end well."""
    for process in _start(script, words, ranks):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err


def run_and_kill(script: str, *words: object, ranks: int = 1) -> None:
    """All are killed, when all are ready."""
    processes = _start(script, words, ranks)
    for process in processes:
        assert process.stdout is not None
        if not any(line.strip() == _READY for line in process.stdout):
            raise AssertionError(process.communicate()[1])
    for process in processes:
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL


def run_and_kill_after(script: str, line: str, delay_s: float, *words: object, ranks: int) -> None:
    """All are killed at once, some time after the first has said `line`; none ends before."""
    processes = _start(script, words, ranks)
    assert processes[0].stdout is not None
    if not any(said.strip() == line for said in processes[0].stdout):
        raise AssertionError(processes[0].communicate()[1])
    time.sleep(delay_s)
    for process in processes:
        process.kill()
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err


def _start(script: str, words: tuple[object, ...], ranks: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0}
    together |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script), *map(str, words)],
            env=os.environ | _text(together | {"RANK": rank, "LOCAL_RANK": rank}, ranks > 1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def _text(environment: dict[str, object], needed: bool) -> dict[str, str]:
    return {key: str(value) for key, value in environment.items()} if needed else {}
