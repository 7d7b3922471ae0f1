"""Objects as files in HDFS, whole or not there.

The client is hdfs-native, since its creation of files and its renames are exclusive where they
should be, and it brings no JVM into the training process, as pyarrow's libhdfs binding does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from asymcheck.errors import ObjectTooLongError, ShortReadError, StoreError
from asymcheck.stores import process_identity
from asymcheck.stores.base import MAX_KEY_LENGTH, Guarantees, check_key, check_prefix, is_key
from asymcheck.stores.hadoop_errors import (
    FILE_EXISTS,
    FILE_NOT_FOUND,
    LOST_TEMPORARY,
    NOT_EMPTY,
    PARENT_IS_FILE,
    TIMED_OUT,
    HadoopError,
    is_passing,
    store_error,
)
from asymcheck.stores.hdfs_client import Deadline, FileStatus, HdfsClient, Reader
from asymcheck.stores.temporaries import is_too_old, owner_of, temporary_name
from asymcheck.stores.urls import RemotePlace

FIRST_RETRY_DELAY_S = 0.25
LONGEST_RETRY_DELAY_S = 10.0
"""The delay doubles from retry to retry, up to this: the 8 of the default take about 36 s."""

_DISCARD_TIMEOUT_S = 5.0
_RENAME_RETRIES = 16

GUARANTEES = Guarantees(
    "temporary name, rename", "rename that never replaces", True, True, rename=True
)

T = TypeVar("T")
Item = TypeVar("Item")


class HdfsStore:
    """A directory in HDFS that holds each object as the file `root/key`.

    An object is written to a temporary file, which every DataNode that gets a replica syncs, and
    renamed; the NameNode does a rename in one step, and has synced it when it answers. So after a
    crash of whomever an object is there whole or not at all, and one whose `put` returned is
    there, even after a power cut of all of them, as long as the disk with one replica is.

    A request that fails in passing is sent again, later and later, until the option `retries` or
    `timeout_s` is used up. Nothing is created before the first `put`.
    """

    def __init__(self, place: RemotePlace, client: HdfsClient) -> None:
        self._url = place.url
        self._root = f"/{place.prefix}" if place.prefix else ""
        self._options = place.options
        self._client = client

    @property
    def url(self) -> str:
        """The URL that opens this store again."""
        return self._url

    @property
    def guarantees(self) -> Guarantees:
        """Durable: `put` returns when data and names are synced."""
        return replace(
            GUARANTEES,
            concurrency=self._options.concurrency,
            range_nbytes=self._client.range_nbytes,
        )

    def get(self, key: str, max_nbytes: int) -> bytes:
        """The whole object; `ObjectTooLongError` if it has more than `max_nbytes` (none read)."""

        def read(deadline: Deadline) -> bytes:
            reader = self._open(key, deadline)
            if reader.nbytes > max_nbytes:
                raise ObjectTooLongError(
                    "object is too long",
                    object=key,
                    expected=f"at most {max_nbytes}",
                    found=reader.nbytes,
                )
            content = bytearray(reader.nbytes)
            reader.read_into(0, memoryview(content), deadline)
            return bytes(content)

        return self._run("read", key, read)

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        """Fill `out` (writable, contiguous bytes) from `offset`; `ShortReadError` past the end."""
        out = out.cast("B")

        def read(deadline: Deadline) -> None:
            reader = self._open(key, deadline)
            if not 0 <= offset <= reader.nbytes - len(out):
                raise ShortReadError(
                    f"object ends before the {len(out)} bytes asked for",
                    object=key,
                    offset=offset,
                    found=reader.nbytes,
                )
            reader.read_into(offset, out, deadline)

        self._run("read", key, read)

    def has_length(self, key: str, nbytes: int) -> bool:
        """Whether the object exists and is exactly `nbytes` long. One request."""
        path = self._path(key)

        def look(deadline: Deadline) -> bool:
            status = self._status(path, deadline)
            return status is not None and not status.is_directory and status.nbytes == nbytes

        return self._run("read", key, look)

    def put(self, key: str, data: memoryview) -> None:
        """Publish an object atomically and durably; one under the same key is replaced.

        Raises:
            StoreFullError, StorePermissionError, StoreError: nothing was published.
            StoreUnavailableError: nobody knows whether it was published: the answer is missing.
        """
        path, data = self._path(key), data.cast("B")

        def publish(deadline: Deadline) -> None:
            with self._temporary(data, deadline) as temporary:
                self._rename(temporary, path, True, deadline)

        self._run("write", key, publish)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        """As `put`, but only if the key does not exist; False (and no change) if it does.

        Of several callers at once, in any processes, exactly one gets True; also one for whom
        the answer to the rename was lost, and who finds his own file under the key then.
        """
        path, data = self._path(key), data.cast("B")
        perhaps_published: list[FileStatus] = []

        def publish(deadline: Deadline) -> bool:
            try:
                with self._temporary(data, deadline) as temporary:
                    perhaps_published.append(self._client.status(temporary, deadline))
                    self._rename(temporary, path, False, deadline)
            except HadoopError as error:
                if error.kind != FILE_EXISTS:
                    raise
                return self._stands(path, data, perhaps_published[:-1], deadline)
            return True

        return self._run("write", key, publish)

    def list(self, prefix: str) -> list[str]:
        """All keys under `prefix` (empty, or ending in `/`), sorted; empty without a root.

        One request for each directory (and for each thousand files in it), `concurrency` at a
        time. What has no name of an object (dot names) is passed over.
        """
        pending = [check_prefix(prefix)]
        keys: list[str] = []
        while pending:
            found = [entry for entries in self._each(self._entries, pending) for entry in entries]
            keys += [key for key, is_directory in found if not is_directory]
            pending = [f"{key}/" for key, is_directory in found if is_directory]
        return sorted(keys)

    def delete(self, *keys: str) -> None:
        """Remove objects, and the directories that they leave empty, durably.

        Up to `concurrency` at a time. No error for those that are not there.
        """
        for key in keys:
            check_key(key)
        self._each(self._delete, keys)
        self._each(self._remove_empty, sorted({key.rpartition("/")[0] for key in keys}))

    def clear_stale_temporaries(self) -> int:
        """Remove the temporary files of writers that died; return how many.

        Safe beside living writers: at worst one that is mistaken for dead, because it runs on
        another machine and has been writing one object for an hour, writes its file again.
        """

        def names(deadline: Deadline) -> list[str]:
            entries = self._listing(self._temporary_directory, deadline)
            return [name for name, status in entries if _is_stale(name, status)]

        stale = self._run("clean", None, names)
        self._each(self._delete_temporary, stale)
        return len(stale)

    def close(self) -> None:
        """Release threads and connections."""
        self._client.close()

    @property
    def _temporary_directory(self) -> str:
        return f"{self._root}/.tmp"

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    @contextmanager
    def _temporary(self, data: memoryview, deadline: Deadline) -> Generator[str]:
        """A new file with `data`, removed if what is done with it fails."""
        path = f"{self._temporary_directory}/{temporary_name(process_identity.token())}"
        try:
            try:
                self._client.create(path, data, deadline)
            except HadoopError as error:
                if error.kind in (FILE_NOT_FOUND, FILE_EXISTS):
                    raise HadoopError(LOST_TEMPORARY, str(error)) from error
                raise
            yield path
        except HadoopError as error:
            if error.kind != TIMED_OUT:
                self._discard(path)
            raise

    def _rename(self, temporary: str, path: str, overwrite: bool, deadline: Deadline) -> None:
        for _ in range(_RENAME_RETRIES):
            try:
                return self._client.rename(temporary, path, overwrite, deadline)
            except HadoopError as error:
                if error.kind != FILE_NOT_FOUND:
                    raise
            # No such directory yet, or a racing delete removed it.
            self._client.make_directory(path.rpartition("/")[0], deadline)
        raise HadoopError(LOST_TEMPORARY, f"{temporary} is gone, or its target's directory is")

    def _stands(
        self,
        path: str,
        data: memoryview,
        perhaps_published: Sequence[FileStatus],
        deadline: Deadline,
    ) -> bool:
        """Whether what stands under a path is what an earlier attempt has put there."""
        if not perhaps_published or self._status(path, deadline) not in perhaps_published:
            return False
        content = bytearray(len(data))
        self._client.open(path, deadline).read_into(0, memoryview(content), deadline)
        return memoryview(content) == data

    def _discard(self, temporary: str) -> None:
        with suppress(HadoopError):  # what stays is found by `clear_stale_temporaries`
            self._client.delete(temporary, Deadline(_DISCARD_TIMEOUT_S))

    def _open(self, key: str, deadline: Deadline) -> Reader:
        try:
            return self._client.open(self._path(key), deadline)
        except HadoopError as error:
            if error.kind == PARENT_IS_FILE:
                raise HadoopError(FILE_NOT_FOUND, str(error)) from error
            raise

    def _status(self, path: str, deadline: Deadline) -> FileStatus | None:
        try:
            return self._client.status(path, deadline)
        except HadoopError as error:
            if error.kind in (FILE_NOT_FOUND, PARENT_IS_FILE):
                return None
            raise

    def _listing(self, path: str, deadline: Deadline) -> list[tuple[str, FileStatus]]:
        try:
            return self._client.entries(path, deadline)
        except HadoopError as error:
            if error.kind in (FILE_NOT_FOUND, PARENT_IS_FILE):  # perhaps removed meanwhile
                return []
            raise

    def _entries(self, prefix: str) -> list[tuple[str, bool]]:
        """Keys of files and directories right under a prefix, and whether it is a directory."""
        path = f"{self._root}/{prefix}".removesuffix("/") or "/"
        listing = self._run("list", prefix or None, lambda deadline: self._listing(path, deadline))
        named = [(prefix + name, status.is_directory) for name, status in listing]
        return [
            (key, is_directory)
            for key, is_directory in named
            if is_key(key) and len(key) + is_directory <= MAX_KEY_LENGTH
        ]

    def _delete(self, key: str) -> None:
        def delete(deadline: Deadline) -> None:
            try:
                self._client.delete(self._path(key), deadline)
            except HadoopError as error:
                if error.kind not in (FILE_NOT_FOUND, NOT_EMPTY, PARENT_IS_FILE):
                    raise

        self._run("delete", key, delete)

    def _delete_temporary(self, name: str) -> None:
        path = f"{self._temporary_directory}/{name}"
        self._run("clean", None, lambda deadline: self._client.delete(path, deadline))

    def _remove_empty(self, directory: str) -> None:
        """Remove a directory, given as a key, and those above it up to the root, if empty."""

        def remove(deadline: Deadline) -> bool:
            path = self._path(directory)
            status = self._status(path, deadline)
            if status is not None and not status.is_directory:
                return False  # an object, under which somebody wanted to delete another
            try:
                self._client.delete(path, deadline)
            except HadoopError as error:
                if error.kind == NOT_EMPTY:
                    return False
                raise
            return True

        while directory and self._run("delete", directory, remove):
            directory = directory.rpartition("/")[0]

    def _run(self, action: str, key: str | None, operation: Callable[[Deadline], T]) -> T:
        """Do `operation`, again after passing failures, and raise typed errors."""
        deadline = Deadline(self._options.timeout_s)
        delays_s = _retry_delays_s(self._options.retries)
        while True:
            try:
                return operation(deadline)
            except HadoopError as error:
                delay_s = next(delays_s, None)
                if delay_s is None or not is_passing(error) or deadline.passes_in(delay_s):
                    raise store_error(action, self._url, key, error) from error
            time.sleep(delay_s)

    def _each(self, function: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """What `function` returns for each item, `concurrency` at a time."""
        if len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(len(items), self._options.concurrency)) as pool:
            return list(pool.map(function, items))


def open_hdfs(place: RemotePlace) -> HdfsStore:
    """The store at `hdfs://` or `webhdfs://`; no connection is made yet.

    Raises:
        StoreError: an option that it does not have, no address of a NameNode, or the libraries
            are not installed.
    """
    if place.options.endpoint is not None or place.options.region is not None:
        raise StoreError(
            f"{place.scheme}:// has no options endpoint and region",
            expected=f"the address in the URL, {place.scheme}://HOST:PORT/PATH",
        )
    try:
        return HdfsStore(place, _client(place))
    except ImportError as error:
        raise StoreError(
            f"a plain install does not bring what {place.scheme}:// needs ({error})",
            hint="pip install 'asymcheck[hdfs]'",
        ) from error


def _client(place: RemotePlace) -> HdfsClient:
    if place.scheme == "hdfs":
        from asymcheck.stores.hdfs_rpc import RpcClient

        return RpcClient(place)
    from asymcheck.stores.webhdfs import WebHdfsClient

    return WebHdfsClient(place)


def _is_stale(name: str, status: FileStatus) -> bool:
    gone = process_identity.is_gone(owner_of(name))
    return is_too_old(status.modified_ms / 1000) if gone is None else gone


def _retry_delays_s(retries: int) -> Iterator[float]:
    for attempt in range(retries):
        delay_s = min(FIRST_RETRY_DELAY_S * 2**attempt, LONGEST_RETRY_DELAY_S)
        yield delay_s * random.uniform(0.75, 1.0)  # so that many writers do not come at once
