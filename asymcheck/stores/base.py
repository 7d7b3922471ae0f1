"""The protocol between AsymCheck and the place where bytes are kept."""

from __future__ import annotations

import re
from typing import Protocol, runtime_checkable

from asymcheck.errors import StoreError

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
MAX_KEY_LENGTH = 512


def is_key(key: str) -> bool:
    """Whether `key` is a relative path of plain names, which cannot leave the root."""
    return len(key) <= MAX_KEY_LENGTH and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """Return `key` if it is a relative path of plain names, which cannot leave the root.

    Raises:
        StoreError: for anything else: absolute paths, `..`, empty names, control characters.
    """
    if not is_key(key):
        raise StoreError(
            f"key {key[:64]!r} is not a relative path of plain names",
            expected=f"at most {MAX_KEY_LENGTH} of [A-Za-z0-9_.-/], no name starting with '.'",
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or a key followed by `/`; `StoreError` for anything else."""
    if prefix:
        check_key(prefix.removesuffix("/"))
        if not prefix.endswith("/"):
            raise StoreError(f"prefix {prefix!r} does not end in '/'")
    return prefix


@runtime_checkable
class Store(Protocol):
    """Immutable objects under keys: the only things that AsymCheck asks of a place for bytes.

    Keys are checked by `check_key`. A key is written once in its life and never reused. All
    methods may be called from several threads at once. Every failure is a `StoreError`:
    `ObjectNotFoundError`, `ShortReadError`, `ObjectTooLongError`, `StoreFullError`,
    `StorePermissionError`, `StoreUnavailableError`, or the base class.
    """

    @property
    def url(self) -> str:
        """Where this store is, for people and for messages; never holds credentials."""
        ...

    @property
    def durable(self) -> bool:
        """Whether an object survives a power cut once `put` has returned."""
        ...

    def get(self, key: str, max_nbytes: int) -> bytes:
        """The whole object; `ObjectTooLongError` if it has more than `max_nbytes` (none read)."""
        ...

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        """Fill `out` (writable, contiguous bytes) from `offset`; `ShortReadError` past the end."""
        ...

    def has_length(self, key: str, nbytes: int) -> bool:
        """Whether the object exists and is exactly `nbytes` long."""
        ...

    def put(self, key: str, data: memoryview) -> None:
        """Publish an object atomically: after a crash it is whole or not there.

        Returns when it is as durable as this store makes things. `data` may be reused then.
        """
        ...

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        """As `put`, but only if the key does not exist; False (and no change) if it does.

        Of several callers at once exactly one gets True.
        """
        ...

    def list(self, prefix: str) -> list[str]:
        """All keys that start with `prefix` (a key prefix that ends in `/`, or empty), sorted."""
        ...

    def delete(self, *keys: str) -> None:
        """Remove objects, in any order; no error for those that are not there.

        On return the removals are as durable as this store makes things.
        """
        ...

    def clear_stale_temporaries(self) -> int:
        """Remove what puts of dead processes left outside of the keys; how many pieces."""
        ...

    def close(self) -> None:
        """Release threads, handles and files."""
        ...
