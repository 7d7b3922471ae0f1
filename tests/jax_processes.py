"""Starting the processes of `jax_worker.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("jax_worker.py")
TIMEOUT_S = 240  # the processes tell where they stand, and end, after 180 s


def start(
    mode: str, directory: str | os.PathLike[str], count: int, devices: int, *more: str
) -> list[subprocess.Popen[str]]:
    """`count` processes that know each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = [f"--count={count}", f"--port={port}", f"--devices={devices}", *more]
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), mode, str(directory), f"--rank={rank}", *shared],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def run(
    mode: str, directory: str | os.PathLike[str], count: int, devices: int, *more: str
) -> list[str]:
    """What the processes say; all must end well."""
    processes = start(mode, directory, count, devices, *more)
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-3000:]
    return said
