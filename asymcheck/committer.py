"""Committing: manifests, the meeting of all writers in the store, the record, and what follows.

Writers need no other connection than the store: each publishes its manifest when its packs are
durable; writer 0 waits for all of them, checks that together they cover the state, and publishes
the commit record, for which the others wait. A writer that fails says so in an `abort` object.
Once its manifest is out, a writer other than 0 keeps its objects unless it has seen that writer 0
gave up: the record may name them, however late it comes.
Attempts are committed in the order in which they began, so the base of an increment is committed
before it, or neither is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from asymcheck.attempt import Attempt
from asymcheck.chains import BaseSchedule
from asymcheck.commit import (
    MAX_COMMIT_NBYTES,
    CommitRecord,
    ManifestRef,
    ParentRef,
    commit_key,
    publish,
    seal_commit,
)
from asymcheck.cost import CostModel
from asymcheck.errors import (
    CommitError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    StepExistsError,
    StoreFullError,
    StorePermissionError,
)
from asymcheck.index import merge
from asymcheck.lease import LeaseKeeper
from asymcheck.manifest import (
    MAX_MANIFEST_NBYTES,
    Manifest,
    Record,
    data_prefix,
    manifest_key,
    parse_manifest,
    seal_manifest,
)
from asymcheck.plan import Plan
from asymcheck.records import seal, sha256, unseal
from asymcheck.stores.base import Store
from asymcheck.threads import run_at_low_priority
from asymcheck.trace import Trace

T = TypeVar("T")

_log = logging.getLogger("asymcheck")

_FIRST_POLL_S = 0.001
_LONGEST_POLL_S = 0.1
_MAX_ABORT_NBYTES = 1 << 16


class Abort(Record):
    """Why a writer gave an attempt up."""

    writer: int
    message: str


class Committer:
    """One thread that takes attempts, in order, from flushed to committed (or failed).

    Args:
        store: the run's store.
        lease: must hold at the moment of the commit.
        warm_start: gives what a restart wants to know (cost model, idle profile), for the
            manifest.
        bases: told to the other writers, or heard of from writer 0, through commit records.
        cost: what decides on them.
        timeout_s: how long to wait for other writers.
        before_commit: called on writer 0 before the record is published.
        after: called with every attempt when it is committed, with its record, or has failed, with
            None; must not raise.
    """

    def __init__(
        self,
        store: Store,
        lease: LeaseKeeper,
        *,
        warm_start: Callable[[], Mapping[str, Any]],
        bases: BaseSchedule,
        cost: CostModel,
        timeout_s: float,
        before_commit: Callable[[Attempt], None],
        after: Callable[[Attempt, CommitRecord | None], None],
        trace: Trace,
    ) -> None:
        self._store = store
        self._lease = lease
        self._warm_start = warm_start
        self._bases = bases
        self._cost = cost
        self._timeout_s = timeout_s
        self._before_commit = before_commit
        self._after = after
        self._trace = trace
        self._checked_plan: Plan | None = None  # alone, the same plan gives the same cover
        self._last: tuple[CommitRecord, str] | None = None  # what the next increment builds on
        self._attempts: SimpleQueue[Attempt | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="asymcheck-commit", daemon=True)
        self._thread.start()

    def submit(self, attempt: Attempt) -> None:
        """Commit this attempt when it is flushed, after those submitted before."""
        self._attempts.put(attempt)

    def close(self, timeout_s: float | None) -> bool:
        """Finish what was submitted and end the thread; False if that takes too long."""
        self._attempts.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        run_at_low_priority()
        while (attempt := self._attempts.get()) is not None:
            attempt.flushed.wait()
            begun_s = time.monotonic()
            record = self._settle(attempt)
            self._trace.add("commit", f"step {attempt.step}", attempt.step, begun_s)
            try:
                self._after(attempt, record)
            except BaseException:  # later attempts need the thread
                _log.exception("after step %d", attempt.step)
            finally:
                attempt.finished.set()

    def _settle(self, attempt: Attempt) -> CommitRecord | None:
        """Commit it or clean up after it; never raises, since later attempts need the thread."""
        if attempt.error is None:
            try:
                record, _ = self._last = self._commit(attempt)
                if record.base_at is not None:
                    self._bases.hear(record.base_at)
                return record
            except BaseException as error:
                attempt.fail(error)
        self._last = None
        try:
            self._give_up(attempt)
        except BaseException as error:
            assert attempt.error is not None
            attempt.error.add_note(f"and cleaning up failed: {error}")
        return None

    def _commit(self, attempt: Attempt) -> tuple[CommitRecord, str]:
        if attempt.used_base and (self._last is None or self._last[0].step != attempt.base_step):
            raise CommitError(
                "the step is an increment to one that failed",
                step=attempt.step,
                expected=f"step {attempt.base_step} committed before",
            )
        if len(attempt.block_packs) != attempt.plan.block_count:
            raise CommitError(
                "blocks of the step are missing",
                step=attempt.step,
                expected=f"{attempt.plan.block_count} blocks",
                found=len(attempt.block_packs),
            )
        own = attempt.manifest(self._warm_start())
        sealed = seal_manifest(own)
        key = manifest_key(attempt.step, attempt.name, attempt.writer)
        if len(sealed) > MAX_MANIFEST_NBYTES:
            raise CommitError(
                "the manifest is too long to be read again",
                step=attempt.step,
                expected=f"at most {MAX_MANIFEST_NBYTES} bytes",
                found=len(sealed),
            )
        if attempt.writers > 1 or attempt.plan is not self._checked_plan:
            own = parse_manifest(sealed, object=key)  # nothing is stored that nobody could read
        attempt.published = attempt.writer != 0  # from here on writer 0 decides, unseen from here
        self._store.put(key, memoryview(sealed))
        if attempt.writer != 0:
            return self._await_commit(attempt)
        return self._publish(attempt, own, sealed)

    def _publish(self, attempt: Attempt, own: Manifest, sealed: bytes) -> tuple[CommitRecord, str]:
        manifests, refs = [own], [_ref(attempt, 0, sealed)]
        deadline = time.monotonic() + self._timeout_s
        for writer in range(1, attempt.writers):
            data = self._await_manifest(attempt, writer, deadline)
            refs.append(_ref(attempt, writer, data))
            manifests.append(parse_manifest(data, object=refs[-1].key))
        record = self._record(attempt, manifests, refs)
        if attempt.writers > 1 or attempt.plan is not self._checked_plan:
            merge(record, "", manifests)  # raises unless everything is covered exactly once
            self._checked_plan = attempt.plan
        self._before_commit(attempt)
        sealed_record = seal_commit(record)
        self._lease.check(attempt.begun_s)
        attempt.published = True
        try:
            publish(self._store, attempt.step, sealed_record)
        except StepExistsError:
            attempt.published = False
            raise
        except (StoreFullError, StorePermissionError):  # refused, not lost on the way
            attempt.published = self._get(commit_key(attempt.step), MAX_COMMIT_NBYTES) is not None
            raise
        return record, sha256(sealed_record)

    def _record(
        self, attempt: Attempt, manifests: Sequence[Manifest], refs: list[ManifestRef]
    ) -> CommitRecord:
        bases = {m.base_step for m in manifests} - {None}
        parent, depth = None, 0
        if bases:
            if self._last is None or bases != {self._last[0].step}:
                raise CommitError(
                    "a writer's increments build on a step that was not committed before",
                    step=attempt.step,
                    expected=None if self._last is None else f"step {self._last[0].step}",
                    found=f"steps {sorted(map(str, bases))}",
                )
            parent = ParentRef(self._last[0].step, self._last[1])
            depth = self._last[0].depth + 1
        base_at = self._bases.announce(attempt.number, manifests, parent is None, self._cost)
        now_s = time.time()
        return CommitRecord(attempt.step, attempt.name, refs, parent, depth, now_s, base_at)

    def _await_manifest(self, attempt: Attempt, writer: int, deadline: float) -> bytes:
        key = manifest_key(attempt.step, attempt.name, writer)

        def look() -> bytes | None:
            self._check_abort(attempt, writer)
            return self._get(key, MAX_MANIFEST_NBYTES)

        return _poll(look, deadline, f"writer {writer} did not publish its manifest", attempt)

    def _await_commit(self, attempt: Attempt) -> tuple[CommitRecord, str]:
        key = commit_key(attempt.step)

        def look() -> tuple[CommitRecord, str] | None:
            try:
                self._check_abort(attempt, 0)
            except CommitError:
                attempt.published = False
                raise
            data = self._get(key, MAX_COMMIT_NBYTES)
            record = None if data is None else _record_of(data, attempt, key)
            return None if data is None or record is None else (record, sha256(data))

        deadline = time.monotonic() + self._timeout_s
        return _poll(look, deadline, "writer 0 did not commit", attempt)

    def _get(self, key: str, max_nbytes: int) -> bytes | None:
        try:
            return self._store.get(key, max_nbytes)
        except ObjectNotFoundError:
            return None

    def _check_abort(self, attempt: Attempt, writer: int) -> None:
        key = _abort_key(attempt, writer)
        data = self._get(key, _MAX_ABORT_NBYTES)
        if data is not None:
            abort = unseal(data, "abort", Abort, object=key)
            raise CommitError(
                f"writer {writer} gave the attempt up: {abort.message}", step=attempt.step
            )

    def _give_up(self, attempt: Attempt) -> None:
        """Tell the other writers, and remove what this one has stored if no record may name it.

        Writer 0 does not speak of giving up a record that may stand: the others would remove
        what it names.
        """
        if attempt.writers > 1 and not (attempt.writer == 0 and attempt.published):
            reason = str(attempt.error) or type(attempt.error).__name__
            abort = Abort(attempt.writer, reason[:1000])
            key = _abort_key(attempt, attempt.writer)
            self._store.put_if_absent(key, memoryview(seal("abort", abort)))
        if attempt.published:
            return
        own = f"{data_prefix(attempt.step, attempt.name)}w{attempt.writer:05d}"
        objects = self._store.list(data_prefix(attempt.step, attempt.name))
        self._store.delete(*(k for k in objects if k.startswith((f"{own}-", f"{own}.manifest"))))


def _ref(attempt: Attempt, writer: int, sealed: bytes) -> ManifestRef:
    return ManifestRef(
        manifest_key(attempt.step, attempt.name, writer), len(sealed), sha256(sealed)
    )


def _abort_key(attempt: Attempt, writer: int) -> str:
    return f"{data_prefix(attempt.step, attempt.name)}w{writer:05d}.abort"


def _record_of(data: bytes, attempt: Attempt, key: str) -> CommitRecord | None:
    """The commit record if it is the attempt's.

    Any other is a damaged step's that writer 0 is about to retire, or makes writer 0 give up.
    """
    try:
        record = unseal(data, "commit", CommitRecord, object=key)
    except (CorruptionError, FormatError):
        return None
    return record if record.attempt == attempt.name else None


def _poll(look: Callable[[], T | None], deadline: float, message: str, attempt: Attempt) -> T:
    """What `look` finds, asked again at growing intervals until the deadline."""
    interval_s = _FIRST_POLL_S
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise CommitError(
                f"{message} in time",
                step=attempt.step,
                hint="Its process may have died: restart the run from the newest step",
            )
        time.sleep(interval_s)
        interval_s = min(interval_s * 1.5, _LONGEST_POLL_S)
    return found
