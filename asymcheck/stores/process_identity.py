"""Tokens of processes: whether the writer of an abandoned file still lives."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path


def token() -> str:
    """`SPACE-PID-START` of this process; never equal for two processes, even after a reboot.

    SPACE stands for the boot and the PID namespace in which PID has a meaning, START is the
    time at which the process started, in clock ticks since the boot.
    """
    return _token(os.getpid())


def is_gone(token: str) -> bool | None:
    """Whether the process of a token has ended; None if it was of another machine or boot."""
    space, _, rest = token.partition("-")
    pid, _, start = rest.partition("-")
    if space != _pid_space() or not pid.isdecimal():
        return None
    return _start_ticks(int(pid)) != start


@functools.lru_cache(maxsize=1)
def _token(pid: int) -> str:
    return f"{_pid_space()}-{pid}-{_start_ticks(pid)}"


@functools.lru_cache(maxsize=1)
def _pid_space() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/pid").readlink()
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]


def _start_ticks(pid: int) -> str | None:
    """Field 22 of proc_pid_stat(5), or None if there is no such process (or only its corpse)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start
