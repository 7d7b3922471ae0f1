"""Copies of committed steps in another store: the same keys, the same bytes.

A step goes with its whole chain, bases first. Of each step first go the packs, then the manifests,
and the commit record last; so whatever happens, the target has whole steps only, and objects that
no record names. The next copy takes those over instead of sending them again. That they are there
is enough: a put is atomic, and nobody writes other bytes under the keys of an attempt. Only where a
step was taken out of the way because it is damaged, its objects are not to be trusted.

Unlike those of a run, the keys of a copy may come again. So an object that is taken over may be
one that somebody else is about to remove, having found it before the copier's lease stood. For
that reason all who remove objects hold a lease while they do, and a copier that finds some of its
objects waits until nobody does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from asymcheck.buffers import page_aligned
from asymcheck.calibration import check_conditional_puts
from asymcheck.commit import (
    MAX_CHAIN,
    MAX_COMMIT_NBYTES,
    CommitRecord,
    SealedCommit,
    commit_key,
    follow_chain,
    read_manifest,
    read_sealed_commit,
    was_retired,
)
from asymcheck.errors import (
    CheckpointNotFoundError,
    CommitError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    ObjectTooLongError,
    ShortReadError,
    StepExistsError,
    StoreError,
)
from asymcheck.index import StepIndex, StoredBlock, merge
from asymcheck.lease import LEASE_S, LeaseKeeper, copier_number, live_removers
from asymcheck.manifest import Manifest, Pack, data_prefix
from asymcheck.records import sha256
from asymcheck.restore import Bytes, check_digest
from asymcheck.stores.base import Store
from asymcheck.threads import in_parallel

PACKS_IN_FLIGHT = 4
MAX_SHARED_NBYTES = 32 << 20
"""A pack that is longer is sent when no other is in memory; writers of this library make none."""

_FIRST_POLL_S = 0.01
_LONGEST_POLL_S = 1.0


def copying_nbytes(max_pack_nbytes: int) -> int:
    """Host memory that copying takes if no pack is longer than that."""
    return PACKS_IN_FLIGHT * max_pack_nbytes


class Meter(Protocol):
    """Is told how far the copy of a step is."""

    def add(self, amount: int) -> None:
        """So many bytes more are in the target."""
        ...


class Unwatched:
    """A meter that nobody reads."""

    def add(self, amount: int) -> None:
        """Nothing."""


Watch = Callable[[int, int], AbstractContextManager[Meter]]
"""Given a step and the bytes of its packs, a context in which a `Meter` follows them."""


@dataclass(frozen=True)
class CopiedStep:
    """What became of a step: whether the target has it by this copy, and what that took."""

    step: int
    copied: bool
    sent_objects: int
    sent_nbytes: int


def check_distinct(source: Store, target: Store, lease: LeaseKeeper | None = None) -> None:
    """`StoreError` if both are the same, by their URLs or since both have a lease of the target."""
    if source.url == target.url or (lease is not None and lease.is_in(source)):
        raise StoreError(f"source and target are the same place, {target.url}")


class StepCopier:
    """Copies steps of one store to another; a context manager.

    Holds a lease in the target, so that nobody collects what it has sent. Takes the memory of
    `PACKS_IN_FLIGHT` packs of up to `MAX_SHARED_NBYTES`, or of one that is longer.

    Args:
        source, target: the stores.
        lease_s: how long others leave its uncommitted objects alone if it vanishes.
        watch: follows the progress of every step that is sent.

    Raises:
        StoreError: both are the same place.
    """

    def __init__(
        self,
        source: Store,
        target: Store,
        *,
        lease_s: float = LEASE_S,
        watch: Watch = lambda _step, _nbytes: nullcontext(Unwatched()),
    ) -> None:
        check_distinct(source, target)
        self._source = source
        self._target = target
        self._lease_s = lease_s
        self._watch = watch
        self._lease: LeaseKeeper | None = None
        self._run: str | None = None
        self._there: set[str] = set()  # digests of commit records that the target has
        self._commit: Callable[[int], SealedCommit] = functools.lru_cache(MAX_CHAIN + 1)(
            functools.partial(read_sealed_commit, source)
        )

    def copy(self, step: int) -> list[CopiedStep]:
        """Have a step and its chain in the target, and say what that took, the base first.

        Everything is checked on the way, and no step is committed of which anything is damaged.
        A crash at any moment leaves in the target what was there, perhaps more of the chain, and
        perhaps the step.

        Raises:
            CheckpointNotFoundError: there is no such step, or it was removed meanwhile.
            CorruptionError, FormatError: the step, or one below it, is damaged in the source.
            StepExistsError: the target has another step of that number, or of one below it.
            CommitError: the lease ran out, or others are removing objects in the target.
            StoreError: one of the stores failed.
        """
        commit = self._commit(step)
        try:
            return [self._copy_one(each) for each in reversed(follow_chain(step, self._commit))]
        except (CorruptionError, FormatError) as error:
            if self._stands(commit):
                raise
            raise CheckpointNotFoundError(
                f"the step was removed from {self._source.url} while it was copied",
                step=step,
                hint="Its run keeps only so many steps: copy a later one",
            ) from error

    def close(self) -> None:
        """Give the lease up."""
        self._end_lease()

    def __enter__(self) -> StepCopier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- one step --------------------------------------------------------------------------

    def _copy_one(self, commit: SealedCommit) -> CopiedStep:
        record = commit.record
        if commit.sha256 in self._there or self._is_published(commit):
            self._there.add(commit.sha256)
            return CopiedStep(record.step, False, 0, 0)
        lease = self._hold_lease(record.attempt.rpartition("-")[0])
        begun_s = time.monotonic()
        found = self._take_over(record)
        writers = range(len(record.manifests))
        manifests = [read_manifest(self._source, record, writer) for writer in writers]
        sent = self._send_packs(merge(record, commit.sha256, [m for m, _ in manifests]), found)
        sent += self._send_manifests(record, manifests, found)
        self._publish(commit, lease, begun_s)
        sent.append(len(commit.sealed))
        return CopiedStep(record.step, True, len(sent), sum(sent))

    def _take_over(self, record: CommitRecord) -> Collection[str]:
        """Keys of the attempt that the target has already, whole, and that nobody is removing."""
        prefix = data_prefix(record.step, record.attempt)
        if not self._target.list(prefix):
            return ()
        self._await_removers(record.step)
        return () if was_retired(self._target, record.step) else set(self._target.list(prefix))

    def _await_removers(self, step: int) -> None:
        deadline_s = time.monotonic() + self._lease_s
        interval_s = _FIRST_POLL_S
        while removers := live_removers(self._target):
            if time.monotonic() > deadline_s:
                raise CommitError(
                    f"{self._target.url} has objects of an earlier copy of the step, and runs "
                    "that may be removing them",
                    step=step,
                    found=f"runs {', '.join(sorted(removers)[:8])}",
                    hint="Copy again when they have ended, or into another place",
                )
            time.sleep(interval_s)
            interval_s = min(2 * interval_s, _LONGEST_POLL_S)

    def _send_packs(self, index: StepIndex, found: Collection[str]) -> list[int]:
        """Lengths of the packs that were sent."""
        packs = [pack for manifest in index.manifests for pack in manifest.packs]
        blocks: dict[str, list[StoredBlock]] = {}
        for stored in index.blocks():
            blocks.setdefault(stored.block.key, []).append(stored)
        together = [pack for pack in packs if pack.nbytes <= MAX_SHARED_NBYTES]
        alone = [[pack] for pack in packs if pack.nbytes > MAX_SHARED_NBYTES]
        sent: list[int] = []
        with self._watch(index.step, sum(pack.nbytes for pack in packs)) as meter:
            for group in (together, *alone):
                sent += self._send_together(index.step, group, blocks, found, meter)
        return sent

    def _send_together(
        self,
        step: int,
        packs: Sequence[Pack],
        blocks: Mapping[str, Sequence[StoredBlock]],
        found: Collection[str],
        meter: Meter,
    ) -> list[int]:
        def send(pack: Pack) -> tuple[int, bool]:
            return pack.nbytes, self._send_pack(step, pack, blocks[pack.key], found)

        calls = [functools.partial(send, pack) for pack in packs]
        sent: list[int] = []
        with closing(in_parallel(calls, PACKS_IN_FLIGHT, "asymcheck-copy")) as results:
            for nbytes, was_sent in results:
                sent += [nbytes] if was_sent else []
                meter.add(nbytes)
        return sent

    def _send_pack(
        self, step: int, pack: Pack, blocks: Sequence[StoredBlock], found: Collection[str]
    ) -> bool:
        """Whether that was necessary."""
        if pack.key in found and self._target.has_length(pack.key, pack.nbytes):
            return False
        self._target.put(pack.key, self._read_pack(step, pack, blocks).data)
        return True

    def _read_pack(self, step: int, pack: Pack, blocks: Sequence[StoredBlock]) -> Bytes:
        try:
            if not self._source.has_length(pack.key, pack.nbytes):
                raise _wrong_pack(step, pack)
            data = page_aligned(max(1, pack.nbytes))[: pack.nbytes]
            self._source.get_range(pack.key, 0, data.data)
        except (ObjectNotFoundError, ShortReadError) as error:
            raise _wrong_pack(step, pack) from error
        for stored in blocks:
            block = stored.block
            try:
                payload = data[block.offset : block.offset + block.nbytes]
                check_digest(stored, payload, block.digest, "stored")
            except CorruptionError as error:
                error.step = step
                raise
        return data

    def _send_manifests(
        self,
        record: CommitRecord,
        manifests: Sequence[tuple[Manifest, bytes]],
        found: Collection[str],
    ) -> list[int]:
        """Lengths of the manifests that were sent."""
        sent: list[int] = []
        for ref, (_, sealed) in zip(record.manifests, manifests, strict=True):
            if ref.key in found and self._target.has_length(ref.key, ref.nbytes):
                continue
            self._target.put(ref.key, memoryview(sealed))
            sent.append(len(sealed))
        return sent

    # -- commit records --------------------------------------------------------------------

    def _publish(self, commit: SealedCommit, lease: LeaseKeeper, begun_s: float) -> None:
        try:
            lease.check(begun_s)
        except CommitError as error:
            error.step = commit.record.step
            error.hint = "Copy again: what was sent and is still there is not sent again"
            raise
        key = commit_key(commit.record.step)
        if not self._target.put_if_absent(key, memoryview(commit.sealed)):
            self._is_published(commit)  # by another copier, which is as good; or else raises
        self._there.add(commit.sha256)

    def _is_published(self, commit: SealedCommit) -> bool:
        step = commit.record.step
        try:
            found = self._target.get(commit_key(step), MAX_COMMIT_NBYTES)
        except ObjectNotFoundError:
            return False
        except ObjectTooLongError:
            found = b""  # no record of ours
        if found == commit.sealed:
            return True
        raise StepExistsError(
            f"{self._target.url} has another step of that number than {self._source.url}",
            step=step,
            object=commit_key(step),
            expected=f"the record with sha256 {commit.sha256[:16]}...",
            found=f"{sha256(found)[:16]}...",
            hint="They are not of the same training: copy into another place, or discard_after()"
            " what is not wanted",
        )

    def _stands(self, commit: SealedCommit) -> bool:
        try:
            return read_sealed_commit(self._source, commit.record.step).sha256 == commit.sha256
        except CheckpointNotFoundError:
            return False

    # -- the lease -------------------------------------------------------------------------

    def _hold_lease(self, run: str) -> LeaseKeeper:
        """A lease of the run whose objects are sent."""
        if self._lease is not None and self._run == run:
            return self._lease
        self._end_lease()
        number = copier_number()
        self._lease = lease = LeaseKeeper(self._target, run, number, self._lease_s)
        lease.ensure()
        if self._run is None:
            check_distinct(self._source, self._target, lease)
            check_conditional_puts(self._target, run, number)
        self._run = run
        return lease

    def _end_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close(abandon=False)


def _wrong_pack(step: int, pack: Pack) -> CorruptionError:
    return CorruptionError(
        "a pack is missing or has another length",
        step=step,
        object=pack.key,
        expected=f"{pack.nbytes} bytes",
    )
