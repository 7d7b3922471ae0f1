"""The protocol between AsymCheck and the place where bytes are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from asymcheck.errors import StoreError

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
MAX_KEY_LENGTH = 512
RANGE_NBYTES = 8 << 20  # some 100 ms of one stream, where a request costs 20 to 50 ms


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


@dataclass(frozen=True, slots=True)
class Guarantees:
    """What a store promises, and by which means; docs/stores.md has the table of all.

    Attributes:
        atomic_put: what makes an object appear whole or not at all.
        conditional_put: what makes `put_if_absent` have exactly one winner.
        durable: whether an object survives a power cut once `put` has returned.
        consistent_list: whether `list` shows every object whose `put` has returned.
        rename: whether the place can rename objects, which is never asked of it by AsymCheck.
        tried_first: whether servers of this kind are known to ignore the condition of
            `put_if_absent`, so that a run tries it before it relies on it.
        concurrency: requests that it serves at a time, if each is a journey over a network: then
            many are under way at once, and ranges that lie close together are read by one. None
            for a place on this machine, where a request costs next to nothing.
        range_nbytes: what one such request reads at most, if it reads several ranges.
    """

    atomic_put: str
    conditional_put: str
    durable: bool
    consistent_list: bool
    rename: bool
    tried_first: bool = False
    concurrency: int | None = None
    range_nbytes: int = RANGE_NBYTES


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
    def guarantees(self) -> Guarantees:
        """What it promises."""
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
