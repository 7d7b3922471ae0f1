"""Objects in a key-value store that a driver of TensorStore reaches."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorstore

from asymcheck.errors import (
    ObjectNotFoundError,
    ObjectTooLongError,
    ShortReadError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnavailableError,
)
from asymcheck.stores.base import check_key, check_prefix, is_key

ts: Any = tensorstore  # it ships no types

_MUST_NOT_EXIST = b"\x02"  # the generation that TensorStore gives a missing key
_MEMORY_CONTEXT = ts.Context()  # keeps the stores of memory:// for the life of the process

_STATUS = re.compile(r"([A-Z_]+): ")
_ERRORS: dict[str, type[StoreError]] = {
    "NOT_FOUND": ObjectNotFoundError,
    "OUT_OF_RANGE": ShortReadError,
    "RESOURCE_EXHAUSTED": StoreFullError,
    "PERMISSION_DENIED": StorePermissionError,
    "UNAUTHENTICATED": StorePermissionError,
    "UNAVAILABLE": StoreUnavailableError,
    "ABORTED": StoreUnavailableError,
    "DEADLINE_EXCEEDED": StoreUnavailableError,
}


class KeyValueStore:
    """A `Store` over TensorStore's KvStore.

    `memory://NAME` lives as long as the process; every store of that NAME sees the same objects.
    `tensorstore+file:///PATH` writes files with TensorStore's own driver, which syncs data and
    directory but not new directories above it, follows symbolic links, and copies what it
    writes: `LocalStore` is the better one for files.
    """

    def __init__(self, scheme: str, location: str) -> None:
        self._url = f"{scheme}://{location}"
        with _typed_errors("open", self._url, None):
            self._kvstore = ts.KvStore.open(
                _SPECS[scheme](location), context=_MEMORY_CONTEXT
            ).result()
        # A killed writer's `KEY.__lock` is not cut by the next: old bytes may follow the new.
        self._may_publish_wrong_length = scheme == "tensorstore+file"

    @property
    def url(self) -> str:
        """The URL that this store was opened with."""
        return self._url

    @property
    def durable(self) -> bool:
        """False: memory is not, and the file driver leaves new directories unsynced."""
        return False

    def get(self, key: str, max_nbytes: int) -> bytes:
        """The whole object; `ObjectTooLongError` if it has more than `max_nbytes` (none read)."""
        if self._is_longer(key, max_nbytes):
            raise ObjectTooLongError(
                "object is too long", object=key, expected=f"at most {max_nbytes}"
            )
        return self._read(key, 0, None)

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        """Fill `out` (writable, contiguous bytes) from `offset`; `ShortReadError` past the end."""
        if offset < 0:
            raise ShortReadError("negative offset", object=key, offset=offset)
        out = out.cast("B")
        out[:] = self._read(key, offset, offset + len(out))

    def has_length(self, key: str, nbytes: int) -> bool:
        """Whether the object exists and is exactly `nbytes` long."""
        try:
            self._read(key, nbytes, nbytes)
            return not self._is_longer(key, nbytes)
        except (ObjectNotFoundError, ShortReadError):
            return False

    def put(self, key: str, data: memoryview) -> None:
        """Publish an object atomically; one under the same key is replaced."""
        self._write(key, data, None)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        """As `put`, but only if the key does not exist; False (and no change) if it does."""
        return self._write(key, data, _MUST_NOT_EXIST)

    def list(self, prefix: str) -> list[str]:
        """All keys under `prefix` (empty, or ending in `/`), sorted."""
        check_prefix(prefix)
        keys = ts.KvStore.KeyRange(prefix, _after(prefix)) if prefix else ts.KvStore.KeyRange()
        with _typed_errors("list", self._url, prefix):
            found = [key.decode(errors="replace") for key in self._kvstore.list(keys).result()]
        return sorted(key for key in found if is_key(key))

    def delete(self, *keys: str) -> None:
        """Remove objects, all at once; no error for those that are not there."""
        # Deleting what is not there makes the file driver create directories.
        present = [key for key in [check_key(key) for key in keys] if self._exists(key)]
        removals = [(key, self._kvstore.write(key, None)) for key in present]
        for key, removal in removals:
            with _typed_errors("delete", self._url, key):
                removal.result()

    def clear_stale_temporaries(self) -> int:
        """Nothing to remove: TensorStore's stale locks are overwritten by the next writer."""
        return 0

    def close(self) -> None:
        """Nothing to release: TensorStore shares its threads in the process."""

    def _read(self, key: str, start: int, stop: int | None) -> bytes:
        check_key(key)
        with _typed_errors("read", self._url, key, start):
            found = self._kvstore.read(key, byte_range=slice(start, stop)).result()
        if found.state != "value":
            raise ObjectNotFoundError(f"no such object in {self._url}", object=key)
        return found.value

    def _exists(self, key: str) -> bool:
        try:
            self._read(key, 0, 0)
        except ObjectNotFoundError:
            return False
        return True

    def _is_longer(self, key: str, nbytes: int) -> bool:
        try:
            self._read(key, nbytes, nbytes + 1)
        except ShortReadError:
            return False
        return True

    def _write(self, key: str, data: memoryview, if_equal: bytes | None) -> bool:
        check_key(key)
        with _typed_errors("write", self._url, key):
            written = self._kvstore.write(key, data.tobytes(), if_equal=if_equal).result()
        if not written.generation:  # how a condition that does not hold is reported
            return False
        if self._may_publish_wrong_length and not self.has_length(key, data.nbytes):
            self.delete(key)
            raise StoreError(
                "the driver published another length than was written, and it was removed",
                object=key,
                expected=data.nbytes,
                hint=f"A killed writer left {key}.__lock; write again",
            )
        return True


def _memory_spec(name: str) -> dict[str, Any]:
    return {"driver": "memory", "path": f"{name}/"}


def _file_spec(path: str) -> dict[str, Any]:
    return {"driver": "file", "path": f"{Path(path).resolve()}/"}


_SPECS: dict[str, Callable[[str], dict[str, Any]]] = {
    "memory": _memory_spec,
    "tensorstore+file": _file_spec,
}


def _after(prefix: str) -> str:
    """The first string after all that start with `prefix`, which ends in an ASCII character."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


@contextmanager
def _typed_errors(
    action: str, url: str, key: str | None, offset: int | None = None
) -> Generator[None]:
    """Raise the error that the status at the start of TensorStore's message stands for."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError, KeyError) as error:
        status = _STATUS.match(str(error))
        kind = _ERRORS.get(status[1], StoreError) if status else StoreError
        raise kind(f"cannot {action} in {url}: {error}", object=key, offset=offset) from error
