"""Which steps stay, and the collection of everything else.

Deleting a step: first its commit record, then its objects. A crash in between leaves objects
that no record names; they are orphans like those of a torn save, and are collected later, unless
their run is alive.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from asymcheck.commit import commit_key, committed_steps, read_commit
from asymcheck.errors import CheckpointNotFoundError, CorruptionError, FormatError
from asymcheck.lease import live_runs, removing
from asymcheck.manifest import data_prefix
from asymcheck.requests import each
from asymcheck.stores.base import Store

_DATA_KEY = re.compile(r"(data/([0-9]{16})-([0-9a-z]{1,32})-([0-9]{6,12})/)[^/]+")


@dataclass(frozen=True, slots=True)
class Retention:
    """Which committed steps to keep: the newest `max_to_keep`, and multiples of `keep_every`.

    Steps that a kept one decodes from are kept with it. None keeps all; `keep_every` alone
    removes nothing.
    """

    max_to_keep: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_to_keep", self.max_to_keep), ("keep_every", self.keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def to_remove(
        self,
        steps: Sequence[int],
        parents: Mapping[int, int | None],
        in_use: Collection[int] = (),
    ) -> list[int]:
        """Steps to delete, newest first, so that no step is ever left without its base.

        Args:
            steps: all committed steps.
            parents: the step that each one decodes from. A step that is not in the mapping has
                a damaged record: it does not count among the newest, and goes when it is older
                than all that are kept.
            in_use: steps to keep in any case, since others will build on them.
        """
        if self.max_to_keep is None:
            return []
        readable = sorted(step for step in steps if step in parents)
        keep = set(readable[-self.max_to_keep :]) | (set(in_use) & parents.keys())
        if self.keep_every is not None:
            keep |= {step for step in readable if step % self.keep_every == 0}
        for step in list(keep):
            ancestor = parents[step]
            while ancestor is not None and ancestor not in keep:
                keep.add(ancestor)
                ancestor = parents.get(ancestor)
        oldest = min(keep, default=0)
        keep |= {step for step in steps if step not in parents and step > oldest}
        return sorted(set(steps) - keep, reverse=True)


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed step as retention needs to know it; `attempt` None if its record is damaged."""

    step: int
    attempt: str | None
    parent: int | None


def survey(store: Store, known: Mapping[int, Committed] | None = None) -> dict[int, Committed]:
    """All committed steps; those in `known` are not read again (records never change)."""
    steps = committed_steps(store)
    known = known or {}
    unknown = [step for step in steps if step not in known]
    read = dict(zip(unknown, each(store, partial(_read, store), unknown), strict=True))
    found = {step: known.get(step) or read.get(step) for step in steps}
    return {step: committed for step, committed in found.items() if committed is not None}


def _read(store: Store, step: int) -> Committed | None:
    """None if the step is gone by now."""
    try:
        record, _ = read_commit(store, step)
    except CheckpointNotFoundError:
        return None
    except (CorruptionError, FormatError):
        return Committed(step, None, None)
    parent = record.parent.step if record.parent is not None else None
    return Committed(step, record.attempt, parent)


def remove_step(store: Store, committed: Committed) -> None:
    """Delete a step: the record first. Its data go too if the record said where they are."""
    store.delete(commit_key(committed.step))
    if committed.attempt is not None:
        remove_attempt(store, committed.step, committed.attempt)


def remove_later(store: Store, step: int) -> list[int]:
    """Delete all steps later than `step`, the newest first; their numbers, ascending."""
    with removing(store):
        later = [committed for number, committed in survey(store).items() if number > step]
        for committed in reversed(later):
            remove_step(store, committed)
    return [committed.step for committed in later]


def remove_attempt(store: Store, step: int, attempt: str) -> None:
    """Delete all objects of an attempt at a step, which must not be committed."""
    store.delete(*store.list(data_prefix(step, attempt)))


def apply(
    store: Store,
    retention: Retention,
    known: Mapping[int, Committed],
    in_use: Collection[int] = (),
) -> dict[int, Committed]:
    """Remove what the retention does not keep and is not `in_use`; the steps that remain."""
    steps = survey(store, known)
    parents = {s: c.parent for s, c in steps.items() if c.attempt is not None}
    for step in retention.to_remove(list(steps), parents, in_use):
        remove_step(store, steps.pop(step))
    return steps


def collect_orphans(store: Store) -> list[str]:
    """Delete objects of attempts that no commit record names and no live run is writing.

    Temporary files of dead writers go as well. Hold a lease (that of a run, or `removing`): who
    copies steps into this store must know that objects may go.

    Returns:
        The keys deleted. While any commit record is damaged nothing is collected: it might be
        the one that names the objects.
    """
    store.clear_stale_temporaries()
    # In this order: who wrote these objects held a lease before, and if it is gone by now, what
    # it has committed is in the records.
    objects = store.list("data/")
    alive = live_runs(store)
    steps = survey(store)
    if any(committed.attempt is None for committed in steps.values()):
        return []
    kept = {data_prefix(c.step, c.attempt) for c in steps.values() if c.attempt is not None}
    orphans: list[str] = []
    for key in objects:
        match = _DATA_KEY.fullmatch(key)
        if match is not None and match[1] not in kept and match[3] not in alive:
            orphans.append(key)
    store.delete(*orphans)
    return orphans
