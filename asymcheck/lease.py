"""Which runs are alive, so that nobody collects the packs of a run that is still writing.

A run keeps a small object `runs/<run>/w<writer>-<n>.json` that says until when it is to be left
alone, and replaces it by one with a later time while it lives (every writer of a run has its
own). Keys are never reused. Where the writer's process can be seen (same boot, same PID
namespace) it is known at once whether it lives; elsewhere its time must have passed.

Whoever copies a step of the run into this store holds such a lease, too, with a number that no
writer has. And whoever removes objects without being a run holds one of a run of its own: a copier
must not rely on objects that are about to go.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

from msgspec import Meta

from asymcheck.errors import (
    AsymCheckError,
    CommitError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    ObjectTooLongError,
    StoreFullError,
)
from asymcheck.manifest import MAX_WRITERS, Record
from asymcheck.records import seal, unseal
from asymcheck.stores import process_identity
from asymcheck.stores.base import Store

_log = logging.getLogger("asymcheck")
LEASE_S = 120.0

_KEY = re.compile(r"runs/([0-9a-z]{1,32})/w([0-9]{5,6})-[0-9]{8}\.json")
_MAX_LEASE_NBYTES = 4096
_MAX_NUMBER = 999_999


class Lease(Record):
    """Who writes, and until when (UNIX time, seconds) nobody else may collect what it wrote.

    `process` is the writer's `process_identity.token()`.
    """

    run: Annotated[str, Meta(max_length=32)]
    process: Annotated[str, Meta(max_length=128)]
    expires_unix_s: float


class LeaseKeeper:
    """Takes a lease at the first save of a run, renews it in the background, ends it at close.

    Args:
        store: where the run writes.
        run, writer: the run's name and this writer's (or copier's) number in it.
        lease_s: how long a run that stopped without a word is left alone, at least.
    """

    def __init__(self, store: Store, run: str, writer: int, lease_s: float) -> None:
        self._store = store
        self._run = run
        self._writer = writer
        self._lease_s = lease_s
        self._sequence = 0
        self._expires_unix_s = 0.0
        self._held_since_s = 0.0  # monotonic, like the time at which an attempt began
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

    def check(self, since_s: float) -> None:
        """`CommitError` unless the lease was held without a gap since `since_s` (monotonic).

        In a gap somebody may have collected what was stored before.
        """
        if time.time() >= self._expires_unix_s or since_s < self._held_since_s:
            raise CommitError(
                "the run's lease ran out before it could commit: the process was suspended or "
                "the store did not answer, and its packs may have been collected",
                expected=f"a renewal every {self._lease_s / 3:.0f} s",
                hint="The next save starts afresh",
            )

    def is_in(self, store: Store) -> bool:
        """Whether a store shows this lease, and so is the one in which it is held."""
        own = f"runs/{self._run}/w{self._writer:05d}-"
        return any(key.startswith(own) for key in store.list(f"runs/{self._run}/"))

    def close(self, *, abandon: bool) -> None:
        """Stop renewing and give the lease up (best effort: else it runs out).

        With `abandon` the store is not asked again, since it may never answer.
        """
        self._stop.set()
        if self._thread is None or abandon:
            return
        self._thread.join()
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
        lease = Lease(self._run, process_identity.token(), expires_unix_s)
        self._store.put(self._key(self._sequence + 1), memoryview(seal("lease", lease)))
        previous, self._sequence = self._sequence, self._sequence + 1
        if time.time() >= self._expires_unix_s:
            self._held_since_s = time.monotonic()
        self._expires_unix_s = expires_unix_s
        if previous:
            self._store.delete(self._key(previous))

    def _key(self, sequence: int) -> str:
        return f"runs/{self._run}/w{self._writer:05d}-{sequence:08d}.json"


def copier_number() -> int:
    """A number for a copier's lease: above all writers' numbers, and at random."""
    return MAX_WRITERS + secrets.randbelow(_MAX_NUMBER + 1 - MAX_WRITERS)


@contextmanager
def removing(store: Store) -> Generator[LeaseKeeper]:
    """Hold a lease while removing objects outside of a run that has one."""
    keeper = LeaseKeeper(store, secrets.token_hex(8), 0, LEASE_S)
    try:
        with suppress(StoreFullError):  # nor can anybody copy into it: go on and make room
            keeper.ensure()
        yield keeper
    finally:
        keeper.close(abandon=False)


def live_runs(store: Store) -> set[str]:
    """Names of the runs whose uncommitted objects must be left alone.

    Leases of dead runs are removed on the way.
    """
    return {run for run, _ in _live_leases(store)}


def live_removers(store: Store) -> set[str]:
    """Names of the live runs that may be removing objects: all that do not only copy."""
    return {run for run, number in _live_leases(store) if number < MAX_WRITERS}


def _live_leases(store: Store) -> Iterator[tuple[str, int]]:
    """Run and number of each; those of the dead are removed on the way."""
    for key in store.list("runs/"):
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        if _is_alive(store, key):
            yield match[1], int(match[2])
        else:
            store.delete(key)


def _is_alive(store: Store, key: str) -> bool:
    try:
        lease = unseal(store.get(key, _MAX_LEASE_NBYTES), "lease", Lease, object=key)
    except ObjectNotFoundError:
        return True  # replaced by its successor this moment
    except (CorruptionError, FormatError, ObjectTooLongError) as error:
        _log.warning("run %s is taken to be alive: %s", key.split("/")[1], error)
        return True  # damaged, or of a later version: better garbage than a dead writer
    gone = process_identity.is_gone(lease.process)
    return time.time() < lease.expires_unix_s if gone is None else not gone
