"""Orbax's item directories as one store: every save has a directory of its own.

Orbax makes a directory for each save, renames it when the save is done, and deletes it without
asking. So a step must not need another step's directory: what an increment builds on is linked
(hard links) into its own. Any directory can then go, be moved or be copied alone.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from asymcheck.commit import read_commit
from asymcheck.errors import ObjectNotFoundError, StoreError, StoreUnavailableError
from asymcheck.stores import LocalStore

_STEP = re.compile(r"(?:data|commits)/([0-9]{16})[-.].*", re.DOTALL)


@dataclass(slots=True)
class ItemDirectory:
    """The directory of one save; Orbax may create it after the save has begun, and renames it."""

    step: int
    created: threading.Event = field(default_factory=threading.Event)
    store: LocalStore | None = None
    error: BaseException | None = None
    _descriptor: int = -1

    def open(self, path: Path) -> None:
        """The directory exists: objects may be written."""
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.store = LocalStore(path)
        self.created.set()

    def give_up(self, error: BaseException) -> None:
        """The directory will not exist: whoever waits for it fails."""
        self.error = error
        self.created.set()

    def path(self) -> Path | None:
        """Where it lies now, whatever it was renamed to; None if it is gone."""
        if self._descriptor < 0 or os.fstat(self._descriptor).st_nlink == 0:
            return None
        return Path(f"/proc/self/fd/{self._descriptor}").resolve()

    def close(self) -> None:
        """Forget it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self.store is not None:
            self.store.close()


class ItemDirectories:
    """A `Store` whose objects lie in the directory of their step's save.

    Leases are kept in memory: a save's directory is nobody else's.

    Args:
        timeout_s: how long to wait until Orbax has created a directory.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._directories: dict[int, ItemDirectory] = {}
        self._leases: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        """What messages call it."""
        return "orbax:"

    @property
    def durable(self) -> bool:
        """As local files are."""
        return True

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
        return self._of(key).put_if_absent(key, data)

    def list(self, prefix: str) -> list[str]:
        """The objects of one save; nothing for any other prefix: the runs before are Orbax's."""
        if step_of(prefix) is None:
            return []
        return self._of(prefix).list(prefix)

    def delete(self, *keys: str) -> None:
        """See `Store.delete`."""
        for key in keys:
            if key.startswith("runs/"):
                self._leases.pop(key, None)
            else:
                self._of(key).delete(key)

    def clear_stale_temporaries(self) -> int:
        """Nothing: Orbax removes the directories of saves that were never done."""
        return 0

    def close(self) -> None:
        """Forget all directories."""
        for directory in self._directories.values():
            directory.close()
        self._directories.clear()

    def _of(self, key: str) -> LocalStore:
        step = step_of(key)
        directory = self._directories.get(step) if step is not None else None
        if directory is None:
            raise ObjectNotFoundError("no save of that step is under way", object=key)
        if not directory.created.wait(self._timeout_s):
            raise StoreUnavailableError(
                f"Orbax did not create the directory within {self._timeout_s:g} s", object=key
            )
        if directory.store is None:
            raise StoreError("the directory was not created", object=key) from directory.error
        return directory.store


def step_of(key: str) -> int | None:
    """The step that an object belongs to; None if to none."""
    match = _STEP.fullmatch(key)
    return int(match[1]) if match is not None else None


def link_objects(source: ItemDirectory, target: ItemDirectory) -> None:
    """Give everything that a step consists of a name in another one's directory, durably.

    Raises:
        StoreError: some object is gone, or the file system has no hard links.
    """
    path = source.path()
    if path is None or target.store is None:
        raise StoreError("the directory of the step before is gone")
    for prefix in ("data/", "commits/"):
        target.store.adopt(path, LocalStore(path).list(prefix))


def unlink_unused(directory: ItemDirectory) -> None:
    """Remove what was linked from the step before if the step turned out to need none of it."""
    store = directory.store
    assert store is not None
    record, _ = read_commit(store, directory.step)
    if record.parent is None:
        keys = [*store.list("data/"), *store.list("commits/")]
        store.delete(*(key for key in keys if step_of(key) != directory.step))


def can_be_linked(directory: ItemDirectory) -> bool:
    """Whether the directory is still there, on a file system with hard links."""
    path = directory.path()
    if path is None or directory.store is None:
        return False
    probe = path / f".link-{os.getpid()}"
    try:
        record = next((path / "commits").iterdir())
        os.link(record, probe)
    except (OSError, StopIteration):
        return False
    with suppress(OSError):
        probe.unlink()
    return True
