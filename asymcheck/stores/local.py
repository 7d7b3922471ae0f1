"""Objects as files of a local (or mounted) file system, durable and atomic."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from asymcheck.errors import (
    ObjectNotFoundError,
    ObjectTooLongError,
    ShortReadError,
    StoreError,
)
from asymcheck.stores.base import MAX_KEY_LENGTH, Guarantees, check_key, check_prefix, is_key
from asymcheck.stores.direct_io import DirectWriter, read_up_to, write_all
from asymcheck.stores.directories import Directories
from asymcheck.stores.filesystem import (
    CREATE_FLAGS,
    READ_FLAGS,
    FileKind,
    FileStatus,
    Filesystem,
)
from asymcheck.stores.os_errors import changing, reading
from asymcheck.stores.temporaries import Temporaries

DIRECT_MIN_NBYTES = 64 << 10
_PUBLISH_RETRIES = 16

GUARANTEES = Guarantees("temporary name, rename", "link to a new name", True, True, True)


class LocalStore:
    """A directory that holds each object as the file `root/key`.

    An object is written to a temporary file, which is synced, then named (`rename` for `put`,
    `link` for `put_if_absent`), then the directory is synced; the names of new directories are
    durable before anything is put into them. So after a crash at any moment an object is there
    whole or not at all, and an object whose `put` returned is there. Data of at least
    `DIRECT_MIN_NBYTES` goes past the page cache, straight from the caller's memory as far as
    that is aligned to 4096 bytes, where the file system allows it.

    A file system without true syncs (tmpfs, some network mounts) keeps only what it can.
    Nothing is created before the first `put`. Symbolic links below the root are refused.
    Linux only.
    """

    def __init__(self, root: str | os.PathLike[str], filesystem: Filesystem | None = None) -> None:
        self._root = Path(root).resolve()
        self._url = self._root.as_uri()
        self._filesystem = filesystem or Filesystem()
        self._directories = Directories(self._filesystem, self._root)
        self._temporaries = Temporaries(self._filesystem, self._directories, self._root)
        self._direct_writer = DirectWriter(self._filesystem)
        self._use_direct = True

    @property
    def url(self) -> str:
        """`file://` and the absolute path of the root."""
        return self._url

    @property
    def root(self) -> Path:
        """The directory."""
        return self._root

    @property
    def guarantees(self) -> Guarantees:
        """Durable: `put` returns when data and names are synced."""
        return GUARANTEES

    def get(self, key: str, max_nbytes: int) -> bytes:
        """The whole object; `ObjectTooLongError` if it has more than `max_nbytes` (none read)."""
        nbytes = self._status(key).nbytes
        if nbytes > max_nbytes:
            raise ObjectTooLongError(
                "object is too long", object=key, expected=f"at most {max_nbytes}", found=nbytes
            )
        content = bytearray(nbytes)
        self.get_range(key, 0, memoryview(content))
        return bytes(content)

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        """Fill `out` (writable, contiguous bytes) from `offset`; `ShortReadError` past the end."""
        out = out.cast("B")
        nbytes = self._status(key).nbytes
        if not 0 <= offset <= nbytes - len(out):
            raise _short_read(key, offset, len(out), nbytes)
        with reading(self._url, key):
            fd = self._filesystem.open(self._root / key, READ_FLAGS)
            try:
                filled = read_up_to(self._filesystem, fd, out, offset)
            finally:
                self._filesystem.close(fd)
        if filled < len(out):
            raise _short_read(key, offset, len(out), offset + filled)

    def has_length(self, key: str, nbytes: int) -> bool:
        """Whether the object exists and is exactly `nbytes` long."""
        try:
            return self._status(key).nbytes == nbytes
        except ObjectNotFoundError:
            return False

    def put(self, key: str, data: memoryview) -> None:
        """Publish an object atomically and durably; one under the same key is replaced.

        Raises:
            StoreFullError, StorePermissionError, StoreError: the temporary file is removed.
                Nothing was published, unless the last step, the directory's sync, failed.
        """
        self._publish(key, data, self._filesystem.rename)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        """As `put`, but only if the key does not exist; False (and no change) if it does.

        Of several callers at once, in any processes, exactly one gets True. The object that
        stands is durable on return, whoever wrote it.
        """
        return self._publish(key, data, self._filesystem.link)

    def list(self, prefix: str) -> list[str]:
        """All keys under `prefix` (empty, or ending in `/`), sorted; empty without a root.

        What has no name of an object (dot names, symbolic links) is passed over.
        """
        directory = self._root / check_prefix(prefix)
        try:
            with reading(self._url, prefix):
                self._directories.check(directory)
                return sorted(self._walk(prefix))
        except ObjectNotFoundError:
            return []

    def delete(self, *keys: str) -> None:
        """Remove objects, and the directories that they leave empty, durably.

        Objects of one directory cost one sync together. No error for those that are not there.
        """
        for key in keys:
            check_key(key)
        for parent, siblings in groupby(sorted(keys), lambda key: key.rpartition("/")[0]):
            self._delete_siblings(self._root / parent, list(siblings))

    def adopt(self, root: Path, keys: Iterable[str]) -> None:
        """Give objects of another local store the same keys in this one, durably (hard links).

        Nothing is copied. What has its key here already stays.

        Raises:
            StoreError: an object is not there, or the file system has no hard links; some may
                have been adopted.
        """
        for parent, siblings in groupby(sorted(keys), lambda key: key.rpartition("/")[0]):
            directory = self._root / parent
            with changing("link", self._url, parent):
                self._directories.ensure(directory)
                for key in siblings:
                    _named(self._filesystem.link, root / check_key(key), self._root / key)
                self._filesystem.sync_directory(directory)

    def clear_stale_temporaries(self) -> int:
        """Remove the temporary files of writers that died; return how many.

        Safe beside living writers: at worst one that is mistaken for dead, because it runs on
        another machine and has hung for an hour, writes its file again.
        """
        with changing("clean", self._url, ".tmp"):
            return self._temporaries.clear_stale()

    def close(self) -> None:
        """Free the write buffers."""
        self._direct_writer.close()

    def _delete_siblings(self, directory: Path, keys: Sequence[str]) -> None:
        with changing("delete", self._url, keys[0]):
            try:
                self._directories.check(directory)
            except NotADirectoryError:
                return
            except FileNotFoundError:
                pass  # but perhaps nobody has made that durable
        for key in keys:
            with changing("delete", self._url, key), suppress(FileNotFoundError, IsADirectoryError):
                self._filesystem.unlink(self._root / key)
        with changing("delete", self._url, keys[0]):
            self._directories.remove_empty(directory)

    def _status(self, key: str) -> FileStatus:
        path = self._root / check_key(key)
        with reading(self._url, key):
            self._directories.check(path.parent)
            status = self._filesystem.status(path)
        if status.kind == "directory":
            raise ObjectNotFoundError(f"no such object in {self._url}", object=key)
        if status.kind != "file":
            raise StoreError("not a regular file", object=key, found=status.kind)
        return status

    def _publish(self, key: str, data: memoryview, name: Callable[[Path, Path], None]) -> bool:
        data = data.cast("B")
        path = self._root / check_key(key)
        with changing("write", self._url, key):
            for _ in range(_PUBLISH_RETRIES):
                try:
                    return self._publish_once(path, data, name)
                except FileNotFoundError:  # a racing delete removed the directory
                    self._directories.forget()
            return self._publish_once(path, data, name)

    def _publish_once(
        self, path: Path, data: memoryview, name: Callable[[Path, Path], None]
    ) -> bool:
        temporary = self._temporaries.new_path()
        try:
            self._write(temporary, data)
            self._directories.ensure(path.parent)
            named = _named(name, temporary, path)
        finally:
            self._temporaries.discard(temporary)
        self._directories.ensure(path.parent)  # it may have been removed and made anew meanwhile
        self._filesystem.sync_directory(path.parent)
        return named

    def _write(self, path: Path, data: memoryview) -> None:
        if self._use_direct and len(data) >= DIRECT_MIN_NBYTES:
            try:
                return self._write_file(path, CREATE_FLAGS | os.O_DIRECT, data)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._use_direct = False
                self._temporaries.discard(path)  # it may exist although its open was refused
        return self._write_file(path, CREATE_FLAGS, data)

    def _write_file(self, path: Path, flags: int, data: memoryview) -> None:
        fd = self._filesystem.open(path, flags)
        try:
            if flags & os.O_DIRECT:
                self._direct_writer.write(fd, data)
            else:
                write_all(self._filesystem, fd, data, 0)
            self._filesystem.sync(fd)
        finally:
            self._filesystem.close(fd)

    def _walk(self, prefix: str) -> Iterator[str]:
        pending = [prefix]
        while pending:
            prefix = pending.pop()
            for name, kind in self._entries(prefix):
                key = prefix + name
                if kind == "directory" and is_key(key) and len(key) < MAX_KEY_LENGTH:
                    pending.append(key + "/")
                elif kind == "file" and is_key(key):
                    yield key

    def _entries(self, prefix: str) -> list[tuple[str, FileKind]]:
        try:
            return self._filesystem.entries(self._root / prefix)
        except FileNotFoundError:  # removed meanwhile
            return []


def _named(name: Callable[[Path, Path], None], temporary: Path, path: Path) -> bool:
    try:
        name(temporary, path)
    except FileExistsError:
        return False
    return True


def _short_read(key: str, offset: int, nbytes: int, end: int) -> ShortReadError:
    return ShortReadError(
        f"object ends before the {nbytes} bytes asked for", object=key, offset=offset, found=end
    )
