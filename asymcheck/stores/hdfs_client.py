"""What `HdfsStore` asks of the way to HDFS, whatever the protocol on it."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from asymcheck.stores.hadoop_errors import TIMED_OUT, HadoopError


class Deadline:
    """The time by which an operation must have come to its end."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """What is left; `HadoopError` if nothing is."""
        remaining_s = self._end_s - time.monotonic()
        if remaining_s <= 0:
            raise self.error()
        return remaining_s

    def passes_in(self, delay_s: float) -> bool:
        """Whether it will have passed after a delay."""
        return time.monotonic() + delay_s >= self._end_s

    def error(self) -> HadoopError:
        """What to raise when it has passed."""
        return HadoopError(TIMED_OUT, f"no answer within {self._timeout_s:g} s, retries included")


class FileStatus(NamedTuple):
    """What is under a path."""

    is_directory: bool
    nbytes: int
    modified_ms: int


class Reader(Protocol):
    """A file that was opened to read."""

    @property
    def nbytes(self) -> int:
        """Its length."""
        ...

    def read_into(self, offset: int, out: memoryview, deadline: Deadline) -> None:
        """Fill `out` from `offset`; the range must lie in the file."""
        ...


class HdfsClient(Protocol):
    """Requests to a NameNode and its DataNodes, each sent once; safe in any thread.

    Paths are absolute and plain. Everything that fails raises `HadoopError`; of a request that
    changes something and fails by `UNREACHABLE` or `TIMED_OUT` nobody knows whether it was done.

    Attributes:
        range_nbytes: what a read should have at most; see `Guarantees`.
    """

    range_nbytes: int

    def create(self, path: str, data: memoryview, deadline: Deadline) -> None:
        """Write a new file, and the directories above it.

        On return the NameNode has recorded it, and every DataNode that has a replica has synced
        its data and its name.
        """
        ...

    def rename(self, source: str, target: str, overwrite: bool, deadline: Deadline) -> None:
        """Give a file another name, in one step.

        Raises:
            HadoopError: `FILE_EXISTS` if there is a target and not `overwrite`, `FILE_NOT_FOUND`
                if the source or the directory of the target is missing.
        """
        ...

    def make_directory(self, path: str, deadline: Deadline) -> None:
        """Create a directory, and those above it, unless it is there."""
        ...

    def open(self, path: str, deadline: Deadline) -> Reader:
        """Open a file; `FILE_NOT_FOUND` for a directory too."""
        ...

    def status(self, path: str, deadline: Deadline) -> FileStatus:
        """What is under a path; `FILE_NOT_FOUND` if nothing is."""
        ...

    def entries(self, path: str, deadline: Deadline) -> list[tuple[str, FileStatus]]:
        """What a directory holds, by name."""
        ...

    def delete(self, path: str, deadline: Deadline) -> None:
        """Remove a file or an empty directory, if it is there; `NOT_EMPTY` if it is not empty."""
        ...

    def close(self) -> None:
        """Release threads and connections."""
        ...
