"""Objects in a key-value store that a driver of TensorStore reaches."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorstore

from asymcheck.errors import (
    ObjectNotFoundError,
    ObjectTooLongError,
    ShortReadError,
    StoreError,
    StoreUnavailableError,
)
from asymcheck.stores.base import Guarantees, check_key, check_prefix, is_key
from asymcheck.stores.drivers import Driver
from asymcheck.stores.http_answers import answers, refusal_since
from asymcheck.stores.tensorstore_errors import store_error

ts: Any = tensorstore  # it ships no types

_MUST_NOT_EXIST = b"\x02"  # the generation that TensorStore gives a missing key
_CONTEXT = ts.Context()  # keeps the stores of memory:// for the life of the process
_REMOVALS_AT_ONCE = 32
_LISTINGS = 3  # a refusal may be of another thread's request, or pass


class KeyValueStore:
    """A `Store` over TensorStore's KvStore.

    `memory://NAME` lives as long as the process; every store of that NAME sees the same objects.
    `tensorstore+file:///PATH` writes files with TensorStore's own driver, which syncs data and
    directory but not new directories above it, and follows symbolic links: `LocalStore` is the
    better one for files. `gs://` and `s3://` are object stores: an upload is one request, so an
    object appears whole or not at all, and is durable when that is answered.

    TensorStore copies what it writes. An operation that is given up after its time may go on
    behind the scenes: an upload that was sent may still appear.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        # In one context, stores of one spec share what the first has found in the environment.
        context = ts.Context() if driver.remote else _CONTEXT
        with self._typed_errors("open"):
            self._kvstore = ts.KvStore.open(driver.spec, context=context).result()

    @property
    def url(self) -> str:
        """The URL that opens this store again, with the options that are not the defaults."""
        return self._driver.url

    @property
    def guarantees(self) -> Guarantees:
        """Object stores are durable; memory is not, and the file driver leaves names unsynced."""
        return self._driver.guarantees

    def get(self, key: str, max_nbytes: int) -> bytes:
        """The whole object; `ObjectTooLongError` if it has more than `max_nbytes` (none read).

        Two requests, since TensorStore tells no lengths: a read of the whole takes all there is,
        and can be neither bounded nor stopped.
        """
        try:
            self._read(key, max_nbytes, max_nbytes + 1)
        except ShortReadError:
            return self._read(key, 0, None)
        raise ObjectTooLongError("object is too long", object=key, expected=f"at most {max_nbytes}")

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        """Fill `out` (writable, contiguous bytes) from `offset`; `ShortReadError` past the end."""
        if offset < 0:
            raise ShortReadError("negative offset", object=key, offset=offset)
        out = out.cast("B")
        try:
            out[:] = self._read(key, offset, offset + len(out))
        except StoreError as error:
            error.offset = offset
            raise

    def has_length(self, key: str, nbytes: int) -> bool:
        """Whether the object exists and is exactly `nbytes` long.

        Two requests at a time: its last byte must be there, and the one after it must not.
        """
        last = self._begin_read(key, max(nbytes - 1, 0), nbytes)
        after = self._begin_read(key, nbytes, nbytes + 1)
        try:
            self._end_read(last, key)
        except (ObjectNotFoundError, ShortReadError):
            return False
        try:
            self._end_read(after, key)
        except ShortReadError:
            return True
        return False

    def put(self, key: str, data: memoryview) -> None:
        """Publish an object atomically; one under the same key is replaced."""
        if not self._write(key, data, None):
            raise StoreError(
                f"the upload to {self.url} was refused for a condition that it did not have",
                object=key,
                hint="Check the bucket's rules: retention, holds, required conditions",
            )

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        """As `put`, but only if the key does not exist; False (and no change) if it does.

        One request, with the condition in it. When its answer is lost and it is sent again, False
        may mean that the first one came through: compare what stands there.
        """
        if self._write(key, data, _MUST_NOT_EXIST):
            return True
        if self._driver.hides_missing_bucket and not self._exists(key):
            self.list(f"{key}/")  # raises if the bucket is missing
        return False

    def list(self, prefix: str) -> list[str]:
        """All keys under `prefix` (empty, or ending in `/`), sorted."""
        check_prefix(prefix)
        found = self._list(prefix)
        return sorted(key for key in found if is_key(key))

    def delete(self, *keys: str) -> None:
        """Remove objects, many at a time; no error for those that are not there.

        After an error the others of the same group are removed, later groups are not.
        """
        for key in keys:
            check_key(key)
        for group in _groups(keys, _REMOVALS_AT_ONCE):
            self._delete(group)

    def clear_stale_temporaries(self) -> int:
        """Nothing to remove: TensorStore's stale locks are overwritten by the next writer."""
        return 0

    def close(self) -> None:
        """Nothing to release: TensorStore shares its threads in the process."""

    def _list(self, prefix: str) -> list[str]:
        if not self._driver.hides_refused_listings:
            return self._list_once(prefix)
        refusal: str | None = None
        for _ in range(_LISTINGS):
            before = answers()
            found = self._list_once(prefix)
            refusal = refusal_since(before)
            if refusal is None:
                return found
        message = "the list may lack objects, since the service refused a part of it"
        if refusal:
            message += f" [http_response_code='{refusal}']"
        raise store_error("list in", self.url, message, remote=True, object=prefix or None)

    def _list_once(self, prefix: str) -> list[str]:
        keys = ts.KvStore.KeyRange(prefix, _after(prefix)) if prefix else ts.KvStore.KeyRange()
        with self._typed_errors("list in", prefix or None):
            found = self._result(self._kvstore.list(keys))
        return [key.decode(errors="replace") for key in found]

    def _read(self, key: str, start: int, stop: int | None) -> bytes:
        return self._end_read(self._begin_read(key, start, stop), key)

    def _begin_read(self, key: str, start: int, stop: int | None) -> Any:
        check_key(key)
        with self._typed_errors("read in", key):
            return self._kvstore.read(key, byte_range=slice(start, stop))

    def _end_read(self, reading: Any, key: str) -> bytes:
        with self._typed_errors("read in", key):
            found = self._result(reading)
        if found.state != "value":
            raise ObjectNotFoundError(f"no such object in {self.url}", object=key)
        return found.value

    def _exists(self, key: str) -> bool:
        try:
            self._read(key, 0, 0)
        except ObjectNotFoundError:
            return False
        return True

    def _write(self, key: str, data: memoryview, if_equal: bytes | None) -> bool:
        check_key(key)
        with self._typed_errors("write in", key):
            written = self._result(self._kvstore.write(key, data.tobytes(), if_equal=if_equal))
        if not written.generation:  # how a condition that does not hold is reported
            return False
        if self._driver.may_cut_wrongly and not self.has_length(key, data.nbytes):
            self.delete(key)
            raise StoreError(
                "the driver published another length than was written, and it was removed",
                object=key,
                expected=data.nbytes,
                hint=f"A killed writer left {key}.__lock; write again",
            )
        return True

    def _delete(self, keys: Sequence[str]) -> None:
        if not self._driver.remote:
            # Deleting what is not there makes the file driver create directories.
            keys = [key for key in keys if self._exists(key)]
        removals = [(key, self._kvstore.write(key, None)) for key in keys]
        errors: list[StoreError] = []
        for key, removal in removals:
            try:
                with self._typed_errors("delete in", key):
                    self._result(removal)
            except StoreError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _result(self, future: Any) -> Any:
        try:
            return future.result(timeout=self._driver.timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    @contextmanager
    def _typed_errors(self, action: str, key: str | None = None) -> Generator[None]:
        try:
            yield
        except TimeoutError:
            raise StoreUnavailableError(
                f"cannot {action} {self.url}: no answer within timeout_s",
                object=key,
                expected=f"one within {self._driver.timeout_s:g} s, retries included",
                hint="Check the store and the network, or raise the option timeout_s",
            ) from None
        except (ValueError, NotImplementedError, OSError, KeyError) as error:
            raise store_error(
                action, self.url, str(error), remote=self._driver.remote, object=key
            ) from None


def _after(prefix: str) -> str:
    """The first string after all that start with `prefix`, which ends in an ASCII character."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _groups(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Groups of at most `size`, so that other requests get their turn between them."""
    return (keys[begin : begin + size] for begin in range(0, len(keys), size))
