"""The directories of a local store: created durably, never through symbolic links."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

from asymcheck.errors import StoreError
from asymcheck.stores.filesystem import Filesystem

_STAYS = {errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EBUSY}


class Directories:
    """Creates the directories under `root` (and `root` itself) so that they survive a crash.

    A directory is created only when the name of its parent is durable. So at any moment only
    the deepest existing directory of a path may be not durable yet, whoever created it, and
    syncing its parent is enough.
    """

    def __init__(self, filesystem: Filesystem, root: Path) -> None:
        self._filesystem = filesystem
        self._root = root
        self._durable: set[Path] = set()
        # Creating and removing exclude each other: what is in `_durable` exists as it was synced.
        self._lock = threading.Lock()

    def check(self, directory: Path) -> None:
        """Raise unless everything from the root to `directory` is a true directory.

        Raises:
            StoreError: a symbolic link, which might lead out of the root; a root that is a file.
            FileNotFoundError, NotADirectoryError: there is no such directory.
        """
        if self._root in directory.parents:
            self.check(directory.parent)
        self._require_directory(directory)

    def ensure(self, directory: Path) -> None:
        """Create `directory` and what is missing above it; its name is durable on return."""
        if directory not in self._durable:
            with self._lock:
                self._ensure(directory)

    def forget(self) -> None:
        """Look again at what exists: somebody removed a directory."""
        with self._lock:
            self._durable.clear()

    def remove_empty(self, directory: Path) -> None:
        """Remove `directory` and its parents up to the root, as far as they are empty.

        On return these removals, and those of names in the directory that stays, are durable.
        """
        while True:
            with self._lock:
                while directory != self._root and self._removed(directory):
                    directory = directory.parent
            try:
                return self._filesystem.sync_directory(directory)
            except FileNotFoundError:  # somebody else removed this one too
                if directory == self._root:
                    return None

    def _ensure(self, directory: Path) -> None:
        if directory in self._durable:
            return
        existed = self._exists(directory)
        if not existed:
            self._ensure(directory.parent)
            with suppress(FileExistsError):  # another process was faster
                self._filesystem.make_directory(directory)
        try:
            self._filesystem.sync_directory(directory.parent)
        except PermissionError:
            if not existed:
                raise
            # A parent that may not even be opened is none that we or our peers wrote to.
        self._durable.add(directory)

    def _exists(self, directory: Path) -> bool:
        try:
            self.check(directory)
        except FileNotFoundError:
            return False
        return True

    def _require_directory(self, directory: Path) -> None:
        kind = self._filesystem.status(directory).kind
        if kind == "symlink" or (kind != "directory" and directory == self._root):
            raise StoreError(
                f"{directory} is not a directory",
                expected="directory",
                found=kind,
                hint="Symbolic links inside of a store are not followed",
            )
        if kind != "directory":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))

    def _removed(self, directory: Path) -> bool:
        try:
            self._filesystem.remove_directory(directory)
        except FileNotFoundError:
            pass  # somebody else did
        except OSError as error:
            if error.errno in _STAYS:
                return False
            raise
        self._durable.discard(directory)
        return True
