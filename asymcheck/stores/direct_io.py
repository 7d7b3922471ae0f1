"""Writing memory to files past the page cache (O_DIRECT), or through it."""

from __future__ import annotations

import mmap
from collections import deque

import numpy as np
from numpy.typing import NDArray

from asymcheck.stores.filesystem import Filesystem

ALIGNMENT = 4096  # of memory, offset and length; enough for every common file system and disk
_BOUNCE_NBYTES = 1 << 20
_READ_NBYTES = 256 << 10
_MAX_CALL_NBYTES = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call


def write_all(filesystem: Filesystem, fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    while data:
        written = filesystem.pwrite(fd, data[:_MAX_CALL_NBYTES], offset)
        data = data[written:]
        offset += written


def read_up_to(filesystem: Filesystem, fd: int, out: memoryview, offset: int) -> int:
    """Fill `out` from `offset`; return how many bytes there were before the end of the file.

    In pieces, so that the kernel reads the next ones from the disk while it copies one.
    """
    filled = 0
    while filled < len(out):
        rest = out[filled : filled + _READ_NBYTES]
        count = filesystem.pread(fd, rest, offset + filled)
        if count == 0:
            break
        filled += count
    return filled


class DirectWriter:
    """Writes whole files opened with O_DIRECT: aligned memory as it lies, the rest by a bounce.

    Every writing thread takes one aligned bounce buffer of 1 MiB, which is kept for the next.
    """

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._idle_bounces: deque[NDArray[np.uint8]] = deque()

    def write(self, fd: int, data: memoryview) -> None:
        """Write `data` to an empty file, of exactly its length at the end.

        Raises:
            OSError: EINVAL where the file system or the disk wants another alignment.
        """
        body = len(data) & -ALIGNMENT if _is_aligned(data) else 0
        write_all(self._filesystem, fd, data[:body], 0)
        if body < len(data):
            self._write_bounced(fd, data, body)

    def close(self) -> None:
        """Free the bounce buffers."""
        self._idle_bounces.clear()

    def _write_bounced(self, fd: int, data: memoryview, offset: int) -> None:
        source = np.frombuffer(data, np.uint8)
        bounce = self._take_bounce()
        for start in range(offset, len(data), len(bounce)):
            piece = source[start : start + len(bounce)]
            padded = -(-len(piece) // ALIGNMENT) * ALIGNMENT
            np.copyto(bounce[: len(piece)], piece)  # releases the GIL, as slicing does not
            bounce[len(piece) : padded] = 0
            write_all(self._filesystem, fd, bounce[:padded].data, start)
        self._idle_bounces.append(bounce)
        if len(data) % ALIGNMENT:
            self._filesystem.truncate(fd, len(data))

    def _take_bounce(self) -> NDArray[np.uint8]:
        try:
            return self._idle_bounces.pop()
        except IndexError:
            return np.frombuffer(mmap.mmap(-1, _BOUNCE_NBYTES), np.uint8)


def _is_aligned(data: memoryview) -> bool:
    return np.frombuffer(data, np.uint8).ctypes.data % ALIGNMENT == 0
