"""Errors of the operating system as errors of a store."""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager

from asymcheck.errors import (
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    StorePermissionError,
)

_FULL = "Free space (or raise the quota); what was stored before is intact"
_RIGHTS = "Check owner, mode and mount options"
_MISSING = {errno.ENOENT, errno.ENOTDIR}

_ERRORS: dict[int, tuple[type[StoreError], str]] = {
    errno.ENOSPC: (StoreFullError, _FULL),
    errno.EDQUOT: (StoreFullError, _FULL),
    errno.EFBIG: (StoreFullError, "The file is larger than a limit (ulimit -f) allows"),
    errno.EACCES: (StorePermissionError, _RIGHTS),
    errno.EPERM: (StorePermissionError, f"{_RIGHTS}; the file system must have hard links"),
    errno.EROFS: (StorePermissionError, "The file system is mounted read-only"),
    errno.EIO: (StoreError, "The disk failed: look at the kernel's log"),
    errno.ELOOP: (StoreError, "Symbolic links inside of a store are not followed"),
    errno.EMFILE: (StoreError, "Raise the limit of open files (ulimit -n)"),
    errno.ENOTDIR: (StoreError, "A file lies where a directory should be"),
}


@contextmanager
def reading(url: str, key: str) -> Generator[None]:
    """Raise `StoreError` for an `OSError` while reading; what is missing is not found."""
    try:
        yield
    except OSError as error:
        if error.errno in _MISSING:
            raise ObjectNotFoundError(f"no such object in {url}", object=key) from error
        raise _store_error("read", url, key, error) from error


@contextmanager
def changing(action: str, url: str, key: str) -> Generator[None]:
    """Raise `StoreError` for an `OSError` while writing or deleting."""
    try:
        yield
    except OSError as error:
        raise _store_error(action, url, key, error) from error


def _store_error(action: str, url: str, key: str, error: OSError) -> StoreError:
    kind, hint = _ERRORS.get(error.errno or 0, (StoreError, None))
    return kind(f"cannot {action} in {url}: {error.strerror or error}", object=key, hint=hint)
