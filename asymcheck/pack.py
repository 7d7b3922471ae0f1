"""Packs in the making: blocks laid one behind the other in a host buffer."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from asymcheck.buffers import ALIGNMENT, Buffer, BufferPool


@dataclass(eq=False)
class OpenPack:
    """A pack being filled: `used_nbytes` from `begin` in `buffer`.

    Holds its buffer until `release`.
    """

    buffer: Buffer
    begin: int
    used_nbytes: int = 0
    sequence: int = field(default=-1)

    @property
    def data(self) -> memoryview:
        """The pack's bytes; they start at a page boundary."""
        return self.buffer.data.data[self.begin : self.begin + self.used_nbytes]

    def release(self) -> None:
        """Give the buffer back."""
        self.buffer.release()


class Slot(msgspec.Struct, eq=False, gc=False):
    """Room for one block in a pack."""

    pack: OpenPack
    offset: int
    view: NDArray[np.uint8]


class PackBuilder:
    """Lays blocks into packs of at most `target_nbytes` (a larger block is a pack of its own).

    A pack is as large as the target allows without splitting a block, at most a buffer. Packs
    share a buffer when several fit. Not thread-safe: the caller serialises.
    """

    def __init__(self, pool: BufferPool, target_nbytes: int) -> None:
        self._pool = pool
        self._target_nbytes = min(target_nbytes, pool.buffer_nbytes)
        self._buffer: Buffer | None = None
        self._position = 0
        self._pack: OpenPack | None = None

    def reserve(self, nbytes: int) -> tuple[Slot, OpenPack | None]:
        """Room for a block of `nbytes`, and the pack that was full and is sealed by this.

        Raises:
            CaptureTimeoutError, ClosedError: see `BufferPool.acquire`; nothing has changed.
        """
        sealed = None
        if self._pack is not None and not self._fits(self._pack, nbytes):
            sealed = self.seal()
        if self._pack is None:
            try:
                self._pack = self._open(nbytes)
            except BaseException:
                self._pack = sealed
                raise
        pack = self._pack
        offset = pack.used_nbytes
        pack.used_nbytes += nbytes
        self._position = pack.begin + pack.used_nbytes
        view = pack.buffer.data[pack.begin + offset : self._position]
        return Slot(pack, offset, view), sealed

    def seal(self) -> OpenPack | None:
        """Close the pack being filled and hand it over; None if there is none."""
        sealed, self._pack = self._pack, None
        return sealed

    def close(self) -> OpenPack | None:
        """As `seal`, and let go of the buffer."""
        sealed = self.seal()
        if self._buffer is not None:
            self._buffer.release()
            self._buffer = None
        return sealed

    def _fits(self, pack: OpenPack, nbytes: int) -> bool:
        return pack.used_nbytes + nbytes <= self._target_nbytes

    def _open(self, nbytes: int) -> OpenPack:
        begin = -(-self._position // ALIGNMENT) * ALIGNMENT
        room = max(nbytes, self._target_nbytes)
        if self._buffer is None or begin + room > self._pool.buffer_nbytes:
            fresh = self._pool.acquire()
            if self._buffer is not None:
                self._buffer.release()
            self._buffer, begin = fresh, 0
        self._buffer.hold()
        return OpenPack(self._buffer, begin)
