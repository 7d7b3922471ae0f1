"""Hard links that let a step build on the one before, whatever Orbax does to its directory."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from asymcheck.commit import read_commit
from asymcheck.stores import LocalStore
from asymcheck_jax.directories import ItemDirectory, step_of


class HeldStep:
    """Hard links to everything that the newest step consists of, where Orbax does not delete.

    They are made before Orbax learns that the step is done, so that the next one can build on it
    whatever happens to its directory. A hidden directory beside the steps, which Orbax ignores;
    one that a killed process left is replaced. Process 0 links; the others ask what it holds.
    """

    def __init__(self, path: Path, *, primary: bool) -> None:
        self.path = path
        self._primary = primary
        self._keys: set[str] = set()
        if primary:
            shutil.rmtree(path, ignore_errors=True)

    def holds(self, step: int) -> bool:
        """Whether the step after this one may build on it."""
        return (self.path / _held_key(step)).exists()

    def take(self, directory: ItemDirectory) -> None:
        """Hold this step, and no other any more.

        Raises:
            StoreError: it cannot be linked; nothing is held then.
        """
        source = _files(directory)
        self._keys = {*source.list("data/"), *source.list("commits/")}
        store = LocalStore(self.path)
        store.adopt(source.root, self._keys)
        store.delete(*(set(store.list("")) - self._keys))
        store.put(_held_key(directory.step), memoryview(b""))

    def drop(self) -> None:
        """Hold nothing."""
        if self._keys:
            store, self._keys = LocalStore(self.path), set()
            store.delete(*store.list(""))

    def give(self, directory: ItemDirectory) -> None:
        """Link what is held into the directory of a step that may build on it, durably.

        Raises:
            StoreError: something of it is gone.
        """
        _files(directory).adopt(self.path, self._keys)
        directory.has_bases = True

    def close(self) -> None:
        """Let go of it."""
        if not self._primary:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            self.path.parent.rmdir()


def unlink_unused(directory: ItemDirectory) -> None:
    """Remove what was linked from the step before if the step turned out to need none of it."""
    store = directory.opened
    record, _ = read_commit(store, directory.step)
    if record.parent is None:
        keys = [*store.list("data/"), *store.list("commits/")]
        store.delete(*(key for key in keys if step_of(key) != directory.step))


def _files(directory: ItemDirectory) -> LocalStore:
    store = directory.opened
    if not isinstance(store, LocalStore):
        raise TypeError(f"{store.url} has no hard links")
    return store


def _held_key(step: int) -> str:
    return f"held/{step:016d}"
