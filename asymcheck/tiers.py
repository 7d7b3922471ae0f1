"""Which step to read, and from where: a run has a store, and perhaps a mirror of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TypeVar

from asymcheck.commit import CommitRecord, committed_steps, read_commit
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    StoreError,
    UnsupportedVersionError,
)
from asymcheck.stores.base import Store

T = TypeVar("T")
_log = logging.getLogger("asymcheck")


class Tiers:
    """The places of a run's steps, the nearer one first.

    A mirror that cannot be listed keeps nobody from the steps of the nearer store. But where
    that has none, the error is raised: what looks like a new run may be one that has lost its
    disk.

    Args:
        store: the run's own.
        mirror: one that has copies of some of its steps, or of steps that it has not any more.
    """

    def __init__(self, store: Store, mirror: Store | None = None) -> None:
        self.stores = (store,) if mirror is None else (store, mirror)

    def steps(self) -> list[int]:
        """All committed steps of both, ascending.

        Raises:
            StoreError: the nearer store failed, or it has no step and the mirror failed.
        """
        return sorted({step for step, _ in self._candidates(())})

    def commit_record(self, step: int) -> CommitRecord:
        """The commit record of a step; see `read` for the errors."""
        return self.read(step, lambda store: read_commit(store, step)[0])

    def read(self, step: int, read: Callable[[Store], T]) -> T:
        """`read(store)` for the nearest store that has the step, and has it whole.

        Raises:
            CheckpointNotFoundError: no store has the step.
            CorruptionError, FormatError: those that have it have it damaged.
            StoreError: a store failed; that says nothing of damage.
        """
        problem: Exception | None = None
        for store in self.stores:
            try:
                result = read(store)
            except UnsupportedVersionError:
                raise
            except (CorruptionError, FormatError, CheckpointNotFoundError) as error:
                if problem is None or isinstance(problem, CheckpointNotFoundError):
                    problem = error
                continue
            if problem is not None:
                _log.warning("step %d is read from the mirror %s: %s", step, store.url, problem)
            return result
        assert problem is not None
        raise problem

    def read_newest(
        self,
        read: Callable[[Store, int], T],
        damaged: Callable[[Store, int, AsymCheckError], None],
    ) -> T:
        """`read(store, step)` for the newest committed step for which it does not find damage.

        Of a step that both stores have, the nearer one's is tried first, then the mirror's, then
        older ones. Steps that turn out damaged are reported to `damaged` and to the log, and
        passed over; one that a running writer has removed meanwhile is not, since there is a
        newer one then. Any other failure (the store is unavailable, the target does not match,
        the step was written by a later version) is raised: it says nothing of damage.

        Raises:
            CheckpointNotFoundError: no committed step is good; the damage of the newest is chained.
            StoreError: as `steps` does, where every step of the nearer store is damaged.
        """
        first: Exception | None = None
        passed_over: set[tuple[int, int]] = set()
        while candidates := self._candidates(passed_over):
            step, tier = max(candidates, key=lambda candidate: (candidate[0], -candidate[1]))
            store = self.stores[tier]
            try:
                result = read(store, step)
            except UnsupportedVersionError:
                raise  # whole, but not for this reader: an older step would undo newer ones
            except (CorruptionError, FormatError, CheckpointNotFoundError) as error:
                if step not in committed_steps(store):
                    _log.warning("step %d was removed while it was read (max_to_keep)", step)
                    continue
                _log.error(
                    "step %d cannot be restored from %s, trying another: %s", step, store.url, error
                )
                damaged(store, step, error)
                passed_over.add((step, tier))
                first = first or error
                continue
            if tier > 0:
                _log.warning(
                    "step %d is read from the mirror %s: it is not, or not whole, in %s",
                    step,
                    store.url,
                    self.stores[0].url,
                )
            return result
        raise CheckpointNotFoundError(
            "there is no checkpoint" if first is None else "no checkpoint is whole",
            hint=None if first is None else f"See 'asymcheck verify {self.stores[0].url}'",
        ) from first

    def _candidates(self, passed_over: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        """All steps but those passed over, each with the number of the store that has it."""
        found: set[tuple[int, int]] = set()
        for tier, store in enumerate(self.stores):
            try:
                found |= {(step, tier) for step in committed_steps(store)} - set(passed_over)
            except StoreError as error:
                if not found:
                    raise
                _log.error("the mirror is taken to have no step that is missing here: %s", error)
        return found
