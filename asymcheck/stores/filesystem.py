"""The calls on a file system that `LocalStore` makes: the seam where a test may pull the plug."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal, NamedTuple

from asymcheck.stores import process_identity

FileKind = Literal["file", "directory", "symlink", "other"]

CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class FileStatus(NamedTuple):
    """What is under a path: its kind, its length in bytes and when it was last written."""

    kind: FileKind
    nbytes: int
    modified_s: float


class Filesystem:
    """The file system of this machine: thin calls that raise `OSError`, each safe in any thread.

    Paths are absolute. Another implementation promises what POSIX does and no more: data
    survives a power cut after `sync`, a name (new, removed or replaced) after `sync_directory`
    of its directory, and neither before; `rename` replaces atomically and `link` never replaces.
    """

    def open(self, path: Path, flags: int) -> int:
        """A descriptor; flags are `CREATE_FLAGS` (with or without `os.O_DIRECT`) or `READ_FLAGS`.

        Where `O_DIRECT` is refused the error is EINVAL, here or at the first `pwrite`.
        """
        return os.open(path, flags, 0o666)

    def close(self, fd: int) -> None:
        """Release a descriptor."""
        os.close(fd)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Write some of `data` at `offset` and return how many bytes."""
        return os.pwrite(fd, data, offset)

    def pread(self, fd: int, out: memoryview, offset: int) -> int:
        """Fill some of `out` from `offset` and return how many bytes; 0 at the end."""
        return os.preadv(fd, [out], offset)

    def truncate(self, fd: int, nbytes: int) -> None:
        """Cut an open file to `nbytes`."""
        os.ftruncate(fd, nbytes)

    def sync(self, fd: int) -> None:
        """Make the content and the length of an open file durable, not its name."""
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable, not what they name."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def status(self, path: Path) -> FileStatus:
        """What is under `path`; a symbolic link is not followed."""
        found = path.stat(follow_symlinks=False)
        return FileStatus(_kind(found.st_mode), found.st_size, found.st_mtime)

    def entries(self, path: Path) -> list[tuple[str, FileKind]]:
        """Names in a directory with their kinds, in no order; symbolic links are not followed."""
        with os.scandir(path) as found:
            return [(entry.name, _entry_kind(entry)) for entry in found]

    def make_directory(self, path: Path) -> None:
        """Create a directory in an existing one."""
        path.mkdir()

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, in the place of what had it."""
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a further name; `FileExistsError` if something has it."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name of a file."""
        path.unlink()

    def process_token(self) -> str:
        """What tells this process from every other, of this and of other machines."""
        return process_identity.token()

    def is_gone(self, process_token: str) -> bool | None:
        """Whether the process of a token has ended; None if that cannot be told from here."""
        return process_identity.is_gone(process_token)


def _kind(mode: int) -> FileKind:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(mode) else "other"


def _entry_kind(entry: os.DirEntry[str]) -> FileKind:
    if entry.is_symlink():
        return "symlink"
    if entry.is_dir(follow_symlinks=False):
        return "directory"
    return "file" if entry.is_file(follow_symlinks=False) else "other"
