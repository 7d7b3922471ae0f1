"""Which runs are alive, so that nobody collects the packs of a run that is still writing.

A run keeps a small object `runs/<run>/w<writer>-<n>.json` that says until when it is to be left
alone, and replaces it by one with a later time while it lives (every writer of a run has its
own). Keys are never reused. On the host where the run was started a dead process is known at
once; elsewhere its time must have passed.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from asymcheck.errors import (
    AsymCheckError,
    CommitError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
)
from asymcheck.manifest import Record
from asymcheck.records import seal, unseal
from asymcheck.stores.base import Store

_KEY = re.compile(r"runs/([0-9a-z]{1,32})/w[0-9]{5}-[0-9]{8}\.json")
_MAX_LEASE_NBYTES = 4096


class Lease(Record):
    """Who writes, and until when (UNIX time, seconds) nobody else may collect what it wrote."""

    run: Annotated[str, Meta(max_length=32)]
    host: Annotated[str, Meta(max_length=256)]
    boot: Annotated[str, Meta(max_length=64)]
    pid: int
    pid_started: int
    expires_unix_s: float


class LeaseKeeper:
    """Takes a lease at the first save of a run, renews it in the background, ends it at close.

    Args:
        store: where the run writes.
        run, writer: the run's name and this writer's number in it.
        lease_s: how long a run that stopped without a word is left alone, at least.
    """

    def __init__(self, store: Store, run: str, writer: int, lease_s: float) -> None:
        self._store = store
        self._run = run
        self._writer = writer
        self._lease_s = lease_s
        self._sequence = 0
        self._expires_unix_s = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def ensure(self) -> None:
        """Hold a lease from now on; raises `StoreError` if it cannot be stored."""
        with self._lock:
            if self._thread is None:
                self._renew()
                self._thread = threading.Thread(
                    target=self._keep, name="asymcheck-lease", daemon=True
                )
                self._thread.start()

    def check(self) -> None:
        """`CommitError` if the lease has run out, so that packs may have been collected."""
        if time.time() >= self._expires_unix_s:
            raise CommitError(
                "the run's lease ran out before it could commit: the process was suspended or "
                "the store did not answer, and its packs may have been collected",
                expected=f"a renewal every {self._lease_s / 3:.0f} s",
                hint="The next save starts afresh",
            )

    def close(self) -> None:
        """Stop renewing and give the lease up (best effort: else it runs out)."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join(timeout=self._lease_s)
        try:
            self._store.delete(self._key(self._sequence))
        except AsymCheckError:
            return  # it runs out by itself

    def _keep(self) -> None:
        while not self._stop.wait(self._lease_s / 3):
            try:
                self._renew()
            except AsymCheckError:
                continue  # tried again in a third of the lease; `check` tells when it ran out

    def _renew(self) -> None:
        expires_unix_s = time.time() + self._lease_s
        lease = Lease(
            self._run,
            socket.gethostname(),
            _boot_id(),
            os.getpid(),
            _started(os.getpid()) or 0,
            expires_unix_s,
        )
        self._store.put(self._key(self._sequence + 1), memoryview(seal("lease", lease)))
        previous, self._sequence = self._sequence, self._sequence + 1
        self._expires_unix_s = expires_unix_s
        if previous:
            self._store.delete(self._key(previous))

    def _key(self, sequence: int) -> str:
        return f"runs/{self._run}/w{self._writer:05d}-{sequence:08d}.json"


def live_runs(store: Store) -> set[str]:
    """Names of the runs whose uncommitted objects must be left alone.

    Leases of dead runs are removed on the way.
    """
    alive: set[str] = set()
    for key in store.list("runs/"):
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        if _is_alive(store, key):
            alive.add(match[1])
        else:
            store.delete(key)
    return alive


def _is_alive(store: Store, key: str) -> bool:
    try:
        lease = unseal(store.get(key, _MAX_LEASE_NBYTES), "lease", Lease, object=key)
    except ObjectNotFoundError:
        return True  # replaced by its successor this moment
    except (CorruptionError, FormatError):
        return False  # never written whole: stores publish whole objects
    if lease.host == socket.gethostname() and lease.boot == _boot_id() and lease.boot:
        return _started(lease.pid) == lease.pid_started
    return time.time() < lease.expires_unix_s


def _boot_id() -> str:
    """Changes with every boot of this machine; empty where the system does not tell."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19])
