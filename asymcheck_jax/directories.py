"""Orbax's item directories as one store: every save has a directory of its own.

Orbax makes a directory for each save, renames it when the save is done, and deletes it without
asking. So a step must not need another step's directory: what an increment builds on is linked
(hard links) into its own, or, in an object store, there are no increments. Any directory can then
go, be moved or be copied alone.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field, replace
from typing import Annotated

from msgspec import Meta

from asymcheck.commit import CommitRecord
from asymcheck.errors import (
    CommitError,
    CorruptionError,
    ObjectNotFoundError,
    ObjectTooLongError,
    StoreError,
    StoreUnavailableError,
)
from asymcheck.manifest import MAX_STEP, Record
from asymcheck.records import seal, unseal
from asymcheck.stores import Store, open_store
from asymcheck.stores.base import Guarantees

_STEP = re.compile(r"(?:data|commits)/([0-9]{16})[-.].*", re.DOTALL)


ITEM_KEY = "orbax/item.json"


class Item(Record):
    """Which of the steps in an item's directory is the item's; the others are its bases."""

    step: Annotated[int, Meta(ge=0, le=MAX_STEP)]


def read_item(store: Store) -> int:
    """The step that an item's directory is for.

    Raises:
        CorruptionError, FormatError: it does not say, or not any more.
    """
    try:
        data = store.get(ITEM_KEY, 1 << 16)
    except (ObjectNotFoundError, ObjectTooLongError) as error:
        raise CorruptionError(
            "the directory does not say which step it holds", object=ITEM_KEY
        ) from error
    return unseal(data, "item", Item, object=ITEM_KEY).step


@dataclass(slots=True)
class ItemDirectory:
    """The directory of one save; Orbax may create it after the save has begun.

    `has_bases`: what the step may build on was linked into it.
    """

    step: int
    has_bases: bool = False
    error: BaseException | None = None
    created: threading.Event = field(default_factory=threading.Event)
    _store: Store | None = None

    @property
    def opened(self) -> Store:
        """The directory as a store; `StoreError` if it was never opened."""
        if self._store is None:
            raise StoreError("the directory was not created") from self.error
        return self._store

    def open(self, url: str) -> None:
        """The directory exists: objects may be written."""
        self._store = open_store(url)
        self.created.set()

    def mark(self) -> None:
        """Say which step the directory is for, durably."""
        self.opened.put(ITEM_KEY, memoryview(seal("item", Item(self.step))))

    def give_up(self, error: BaseException) -> None:
        """The directory will not exist, or nobody wants it any more: who waits for it fails."""
        self.error, self._store = error, None
        self.created.set()

    def close(self) -> None:
        """Forget it."""
        if self._store is not None:
            self._store.close()


class ItemDirectories:
    """A `Store` whose objects lie in the directory of their step's save.

    Leases are kept in memory: a save's directory is nobody else's.

    Args:
        root: where all directories lie; a path or a URL.
        timeout_s: how long to wait until Orbax has created a directory.
    """

    def __init__(self, root: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        store = open_store(root)
        # Only process 0 publishes a record, in a directory that was made for this one save.
        self._guarantees = replace(store.guarantees, tried_first=False)
        store.close()
        self._directories: dict[int, ItemDirectory] = {}
        self._leases: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        """What messages call it."""
        return "orbax:"

    @property
    def guarantees(self) -> Guarantees:
        """Those of the place where the directories lie."""
        return self._guarantees

    def begin(self, step: int) -> ItemDirectory:
        """The directory of a step about to be saved; those before the last are forgotten."""
        for old in sorted(self._directories)[:-1]:
            self._directories.pop(old).close()
        directory = self._directories[step] = ItemDirectory(step)
        return directory

    def get(self, key: str, max_nbytes: int) -> bytes:
        """See `Store.get`."""
        return self._of(key).get(key, max_nbytes)

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        """See `Store.get_range`."""
        self._of(key).get_range(key, offset, out)

    def has_length(self, key: str, nbytes: int) -> bool:
        """See `Store.has_length`."""
        return self._of(key).has_length(key, nbytes)

    def put(self, key: str, data: memoryview) -> None:
        """See `Store.put`; waits for the directory."""
        if key.startswith("runs/"):
            self._leases[key] = bytes(data)
        else:
            self._of(key).put(key, data)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        """See `Store.put_if_absent`; waits for the directory."""
        directory = self._directory(key)
        if key.startswith("commits/"):
            _check_bases(directory, bytes(data), key)
        return directory.opened.put_if_absent(key, data)

    def list(self, prefix: str) -> list[str]:
        """The objects of one save; nothing for any other prefix: the runs before are Orbax's."""
        if step_of(prefix) is None:
            return []
        return self._of(prefix).list(prefix)

    def delete(self, *keys: str) -> None:
        """See `Store.delete`."""
        for key in keys:
            self._leases.pop(key, None)
        for step in {step_of(key) for key in keys} - {None}:
            own = [key for key in keys if step_of(key) == step]
            self._of(own[0]).delete(*own)

    def clear_stale_temporaries(self) -> int:
        """Nothing: Orbax removes the directories of saves that were never done."""
        return 0

    def close(self) -> None:
        """Forget all directories."""
        for directory in self._directories.values():
            directory.close()
        self._directories.clear()

    def _of(self, key: str) -> Store:
        return self._directory(key).opened

    def _directory(self, key: str) -> ItemDirectory:
        step = step_of(key)
        directory = self._directories.get(step) if step is not None else None
        if directory is None:
            raise ObjectNotFoundError("no save of that step is under way", object=key)
        if not directory.created.wait(self._timeout_s):
            raise StoreUnavailableError(
                f"Orbax did not create the directory within {self._timeout_s:g} s", object=key
            )
        return directory


def _check_bases(directory: ItemDirectory, sealed: bytes, key: str) -> None:
    """No step is committed that builds on what is not in its directory.

    Processes decide for themselves whether there is something to build on, and may differ.
    """
    record = unseal(sealed, "commit", CommitRecord, object=key)
    if record.parent is not None and not directory.has_bases:
        raise CommitError(
            "another process has built on a step that this one does not hold",
            step=record.step,
            found=f"step {record.parent.step}",
            hint="Nothing is lost but this save; the next one is stored in full",
        )


def step_of(key: str) -> int | None:
    """The step that an object belongs to; None if to none."""
    match = _STEP.fullmatch(key)
    return int(match[1]) if match is not None else None
