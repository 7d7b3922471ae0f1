"""Temporary files: what a store writes before it has a name, and what dead writers left."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path

from asymcheck.stores.directories import Directories
from asymcheck.stores.filesystem import Filesystem

FOREIGN_MAX_AGE_S = 3600.0


def temporary_name(owner: str) -> str:
    """A name that no other writer has, which tells the process (see `process_identity`)."""
    return f".{owner}.{secrets.token_hex(8)}"


def owner_of(name: str) -> str:
    """The process that a temporary's name tells."""
    return name.rpartition(".")[0].removeprefix(".")


def is_too_old(modified_s: float) -> bool:
    """Whether the writer of a temporary counts as dead, when nobody here can tell."""
    return time.time() - modified_s > FOREIGN_MAX_AGE_S


class Temporaries:
    """The directory `.tmp` of a root; a file in it is named after the process that writes it."""

    def __init__(self, filesystem: Filesystem, directories: Directories, root: Path) -> None:
        self._filesystem = filesystem
        self._directories = directories
        self._directory = root / ".tmp"

    def new_path(self) -> Path:
        """A path that no other writer has; its directory exists."""
        self._directories.ensure(self._directory)
        return self._directory / temporary_name(self._filesystem.process_token())

    def discard(self, path: Path) -> None:
        """Remove a temporary file that may or may not be there."""
        with suppress(OSError):  # what stays is found by `clear_stale`
            self._filesystem.unlink(path)

    def clear_stale(self) -> int:
        """Remove the files of writers that died; return how many.

        A writer of this boot is known to live or not. One of another machine, or of an earlier
        boot, counts as dead when its file is older than `FOREIGN_MAX_AGE_S`.
        """
        stale = [path for path in self._paths() if self._is_stale(path)]
        for path in stale:
            self.discard(path)
        return len(stale)

    def _paths(self) -> list[Path]:
        try:
            self._directories.check(self._directory)
            entries = self._filesystem.entries(self._directory)
        except FileNotFoundError:
            return []
        return [self._directory / name for name, kind in entries if kind == "file"]

    def _is_stale(self, path: Path) -> bool:
        gone = self._filesystem.is_gone(owner_of(path.name))
        if gone is not None:
            return gone
        try:
            return is_too_old(self._filesystem.status(path).modified_s)
        except FileNotFoundError:
            return False
