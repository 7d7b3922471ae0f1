"""A file system in memory that keeps after a power cut what POSIX promises, and no more.

`LocalStore(root, SimulatedFilesystem())` runs on it unchanged. `die_at(n)` stops the process at
its n-th call; `crash(seed)` is then one of the disks that the machine may come up with, and
`restart()` what a new process sees if only the process died.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from asymcheck.stores.filesystem import FileKind, FileStatus, Filesystem

_T = TypeVar("_T")
_SECTOR_NBYTES = 512  # what a disk writes whole or not at all
_ALIGNMENT = 4096  # what O_DIRECT asks of memory, offset and length


class SimulatedCrash(BaseException):
    """The process died. No `except Exception` survives that, and no further call works."""


@dataclass(eq=False)
class _File:
    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    # Since the last sync: (offset, bytes written), or (new length, None) for a cut.
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)

    def apply(self, offset: int, data: bytes | None) -> None:
        self.unsynced.append((offset, data))
        _apply(self.content, offset, data)

    def sync(self) -> None:
        self.synced = bytes(self.content)
        self.unsynced.clear()


@dataclass(eq=False)
class _Directory:
    names: dict[str, _File | _Directory] = field(default_factory=dict)
    # Names changed since the last sync: all that each has stood for, the durable one first.
    unsynced: dict[str, list[_File | _Directory | None]] = field(default_factory=dict)

    def bind(self, name: str, node: _File | _Directory | None) -> None:
        self.unsynced.setdefault(name, [self.names.get(name)]).append(node)
        if node is None:
            del self.names[name]
        else:
            self.names[name] = node


class SimulatedFilesystem(Filesystem):
    """Files and directories with a volatile and a durable image. Thread-safe.

    Args:
        direct: whether O_DIRECT is supported; if so its alignment is enforced.
        capacity_nbytes: how much all files may hold; ENOSPC beyond.
    """

    def __init__(self, *, direct: bool = True, capacity_nbytes: int | None = None) -> None:
        self.operations = 0
        self._direct = direct
        self._capacity_nbytes = capacity_nbytes
        self._generation = 0
        self._dies_at: int | None = None
        self._dead = False
        self._lock = threading.RLock()
        self._root = _Directory()
        self._open: dict[int, tuple[_File, int]] = {}
        self._next_fd = 3

    def die_at(self, n: int) -> None:
        """Raise `SimulatedCrash` at the n-th call from now (1: the next) and at all later ones."""
        self._dies_at = self.operations + n

    def crash(self, seed: int) -> SimulatedFilesystem:
        """One of the disks that a power cut now may leave.

        Of what was not synced every part is lost or kept independently: sectors of files (lost
        ones read as zeros, as garbage or as they were), lengths, and each name of a directory.
        A quarter of the seeds each lose all, about half, a tenth, or nothing.
        """
        with self._lock:
            survivor = _Survivor(random.Random(seed))
            return self._successor(survivor.directory(self._root))

    def restart(self) -> SimulatedFilesystem:
        """What the next process sees if this one dies and the machine does not."""
        with self._lock:
            self._dead = True
            return self._successor(self._root)

    def _successor(self, root: _Directory) -> SimulatedFilesystem:
        new = type(self)(direct=self._direct, capacity_nbytes=self._capacity_nbytes)
        new._root = root
        new._generation = self._generation + 1
        return new

    @contextmanager
    def _operation(self) -> Generator[None]:
        with self._lock:
            self.operations += 1
            if self._dies_at is not None and self.operations >= self._dies_at:
                self._dead = True
            if self._dead:
                raise SimulatedCrash(f"at operation {self.operations}")
            yield

    def _node(self, path: Path) -> _File | _Directory:
        node: _File | _Directory = self._root
        for name in path.parts[1:]:
            if not isinstance(node, _Directory):
                raise _error(errno.ENOTDIR, path)
            if name not in node.names:
                raise _error(errno.ENOENT, path)
            node = node.names[name]
        return node

    def _directory(self, path: Path) -> _Directory:
        node = self._node(path)
        if not isinstance(node, _Directory):
            raise _error(errno.ENOTDIR, path)
        return node

    def _file(self, path: Path) -> _File:
        node = self._node(path)
        if not isinstance(node, _File):
            raise _error(errno.EISDIR, path)
        return node

    def open(self, path: Path, flags: int) -> int:
        with self._operation():
            if flags & os.O_CREAT:
                self._create(path)
            if flags & os.O_DIRECT and not self._direct:
                raise _error(errno.EINVAL, path)  # the file exists now, as on Linux
            fd, self._next_fd = self._next_fd, self._next_fd + 1
            self._open[fd] = (self._file(path), flags)
            return fd

    def _create(self, path: Path) -> None:
        directory = self._directory(path.parent)
        if path.name in directory.names:
            raise _error(errno.EEXIST, path)
        directory.bind(path.name, _File())

    def close(self, fd: int) -> None:
        with self._operation():
            del self._open[fd]

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        with self._operation():
            file, flags = self._open[fd]
            if flags & os.O_DIRECT:
                _require_alignment(data, offset)
            self._require_room(file, offset + len(data))
            file.apply(offset, data.tobytes())
            return len(data)

    def _require_room(self, file: _File, end: int) -> None:
        if self._capacity_nbytes is None:
            return
        files = {file, *_files(self._root), *(opened for opened, _ in self._open.values())}
        used = sum(len(other.content) for other in files if other is not file)
        if used + max(end, len(file.content)) > self._capacity_nbytes:
            raise _error(errno.ENOSPC, None)

    def pread(self, fd: int, out: memoryview, offset: int) -> int:
        with self._operation():
            found = self._open[fd][0].content[offset : offset + len(out)]
            out[: len(found)] = found
            return len(found)

    def truncate(self, fd: int, nbytes: int) -> None:
        with self._operation():
            self._open[fd][0].apply(nbytes, None)

    def sync(self, fd: int) -> None:
        with self._operation():
            self._open[fd][0].sync()

    def sync_directory(self, path: Path) -> None:
        with self._operation():
            self._directory(path).unsynced.clear()

    def status(self, path: Path) -> FileStatus:
        with self._operation():
            node = self._node(path)
            nbytes = len(node.content) if isinstance(node, _File) else 0
            return FileStatus(_kind(node), nbytes, 0.0)

    def entries(self, path: Path) -> list[tuple[str, FileKind]]:
        with self._operation():
            return [(name, _kind(node)) for name, node in self._directory(path).names.items()]

    def make_directory(self, path: Path) -> None:
        with self._operation():
            parent = self._directory(path.parent)
            if path.name in parent.names:
                raise _error(errno.EEXIST, path)
            parent.bind(path.name, _Directory())

    def remove_directory(self, path: Path) -> None:
        with self._operation():
            if self._directory(path).names:
                raise _error(errno.ENOTEMPTY, path)
            self._directory(path.parent).bind(path.name, None)

    def rename(self, source: Path, target: Path) -> None:
        with self._operation():
            file, directory = self._file(source), self._directory(target.parent)
            if isinstance(directory.names.get(target.name), _Directory):
                raise _error(errno.EISDIR, target)
            directory.bind(target.name, file)
            self._directory(source.parent).bind(source.name, None)

    def link(self, source: Path, target: Path) -> None:
        with self._operation():
            file, directory = self._file(source), self._directory(target.parent)
            if target.name in directory.names:
                raise _error(errno.EEXIST, target)
            directory.bind(target.name, file)

    def unlink(self, path: Path) -> None:
        with self._operation():
            self._file(path)
            self._directory(path.parent).bind(path.name, None)

    def process_token(self) -> str:
        return f"simulated-{self._generation}"

    def is_gone(self, process_token: str) -> bool:
        return process_token != self.process_token()


class _Survivor:
    """One outcome of a power cut, drawn part by part."""

    def __init__(self, random: random.Random) -> None:
        self._random = random
        self._kept_share = random.choice([0.0, 0.5, 0.9, 1.0])
        self._files: dict[_File, _File] = {}

    def directory(self, before: _Directory) -> _Directory:
        after = _Directory()
        for name in {**before.unsynced, **before.names}:
            node = self._one_of(before.unsynced.get(name) or [before.names[name]])
            if isinstance(node, _Directory):
                after.names[name] = self.directory(node)
            elif node is not None:
                after.names[name] = self._file(node)
        return after

    def _one_of(self, states: list[_T]) -> _T:
        """One of the states since the last sync: the first is durable, the last the newest."""
        if self._kept_share == 0:
            return states[0]
        if self._random.random() < self._kept_share:
            return states[-1]
        return self._random.choice(states)

    def _file(self, before: _File) -> _File:
        if before not in self._files:
            content = self._content(before)
            self._files[before] = _File(bytearray(content), content)
        return self._files[before]

    def _content(self, before: _File) -> bytes:
        lengths = [len(before.synced)]
        for offset, data in before.unsynced:
            lengths.append(offset if data is None else max(lengths[-1], offset + len(data)))
        image = bytearray(self._blank(max(lengths)))
        image[: len(before.synced)] = before.synced
        for offset, data in before.unsynced:
            self._write_some_sectors(image, offset, data or b"")
        between = self._random.randint(min(lengths), max(lengths))
        return bytes(image[: self._one_of([*lengths[:-1], between, lengths[-1]])])

    def _blank(self, nbytes: int) -> bytes:
        return self._random.choice([bytes, self._random.randbytes])(nbytes)

    def _write_some_sectors(self, image: bytearray, offset: int, data: bytes) -> None:
        for start in range(0, len(data), _SECTOR_NBYTES):
            if self._random.random() < self._kept_share:
                _apply(image, offset + start, data[start : start + _SECTOR_NBYTES])


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    """Write `data` at `offset`, or cut (or extend with zeros) to `offset` bytes."""
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    if data is None:
        del content[offset:]
    else:
        content[offset : offset + len(data)] = data


def _files(directory: _Directory) -> Generator[_File]:
    for node in directory.names.values():
        if isinstance(node, _File):
            yield node
        else:
            yield from _files(node)


def _kind(node: _File | _Directory) -> FileKind:
    return "file" if isinstance(node, _File) else "directory"


def _error(code: int, path: Path | None) -> OSError:
    return OSError(code, os.strerror(code), None if path is None else str(path))


def _require_alignment(data: memoryview, offset: int) -> None:
    address = np.frombuffer(data, np.uint8).ctypes.data
    if any(value % _ALIGNMENT for value in (address, len(data), offset)):
        raise _error(errno.EINVAL, None)
