"""The way to HDFS by Hadoop's own protocols, through hdfs-native."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from hdfs_native import Client, FileReader, WriteOptions
from hdfs_native import FileStatus as NativeStatus

from asymcheck.errors import StoreError
from asymcheck.stores.base import RANGE_NBYTES
from asymcheck.stores.bounded_calls import BoundedCalls, CallTimedOutError
from asymcheck.stores.hadoop_errors import (
    CLIENT_FAILED,
    FILE_EXISTS,
    FILE_NOT_FOUND,
    UNREACHABLE,
    UNSUPPORTED,
    HadoopError,
)
from asymcheck.stores.hdfs_client import Deadline, FileStatus
from asymcheck.stores.urls import RemotePlace

PIECE_NBYTES = 1 << 20
"""What is handed over at once: hdfs-native takes bytes fast, and any other memory very slowly."""

LONGEST_SILENCE_S = 60.0

# How hdfs-native shows its errors: NAME("TEXT"), or NAME("JAVA.CLASS", "TEXT").
_ERROR = re.compile(r'(\w+)(?:\("((?:[^"\\]|\\.)*)"(?:, "((?:[^"\\]|\\.)*)"\))?)?', re.DOTALL)

_MORE_TRIES = 4  # with one replica: each may go to another DataNode
_OF_DATANODES = (UNREACHABLE, "DataTransferError")

T = TypeVar("T")


class RpcClient:
    """Talks to the NameNode of `HOST:PORT`, or to those of a nameservice.

    Who one is for HDFS, and all else, is what Hadoop's environment says: HADOOP_CONF_DIR,
    HADOOP_USER_NAME, HADOOP_TOKEN_FILE_LOCATION, a Kerberos ticket. hdfs-native waits for a
    NameNode as long as the connection stands, so each call is made in a thread that can be left
    behind, and with it the connection.

    Raises:
        StoreError: a nameservice that is not in Hadoop's configuration, or other `credentials`
            than `default`.
    """

    range_nbytes = RANGE_NBYTES

    def __init__(self, place: RemotePlace) -> None:
        if place.options.credentials not in (None, "default"):
            raise StoreError(
                "hdfs:// does not know this source of credentials, which is not shown here",
                expected="default: what Hadoop's environment says",
                hint="Set HADOOP_USER_NAME, or get a Kerberos ticket",
            )
        self._url = f"{place.scheme}://{place.authority}"
        silence_s = min(place.options.timeout_s / 4, LONGEST_SILENCE_S)  # then the next replica
        self._configuration = {
            # Once around the NameNodes: to wait and ask again is the store's business.
            "dfs.client.failover.max.attempts": "3",
            "dfs.client.failover.sleep.base.millis": "50",
            "dfs.client.failover.sleep.max.millis": "100",
            "dfs.client.socket-timeout": str(max(1, int(silence_s * 1000))),
        }
        self._calls = BoundedCalls()
        self._client = self._connect()

    def create(self, path: str, data: memoryview, deadline: Deadline) -> None:
        """See `HdfsClient`. hdfs-native ends each block with the order to sync it.

        A NameNode goes on naming a DataNode that died, for minutes, and hdfs-native, unlike
        Java's client, takes what it is told. So when DataNodes fail, ever fewer replicas are asked
        for, down to one; the NameNode has the others made then.
        """
        try:
            self._write(path, data, None, deadline)
        except HadoopError as error:
            if error.kind not in _OF_DATANODES:
                raise
            self._create_with_fewer_replicas(path, data, error, deadline)

    def rename(self, source: str, target: str, overwrite: bool, deadline: Deadline) -> None:
        """See `HdfsClient`."""
        self._call(deadline, self._client.rename, source, target, overwrite)

    def make_directory(self, path: str, deadline: Deadline) -> None:
        """See `HdfsClient`."""
        self._call(deadline, self._client.mkdirs, path, 0o755, True)

    def open(self, path: str, deadline: Deadline) -> RpcReader:
        """See `HdfsClient`."""
        return RpcReader(self._call, self._call(deadline, self._client.read, path))

    def status(self, path: str, deadline: Deadline) -> FileStatus:
        """See `HdfsClient`."""
        return _status(self._call(deadline, self._client.get_file_info, path))

    def entries(self, path: str, deadline: Deadline) -> list[tuple[str, FileStatus]]:
        """See `HdfsClient`."""
        found = self._call(deadline, lambda: list(self._client.list_status(path)))
        return [(status.path.rpartition("/")[2], _status(status)) for status in found]

    def delete(self, path: str, deadline: Deadline) -> None:
        """See `HdfsClient`."""
        self._call(deadline, self._client.delete, path)

    def close(self) -> None:
        """See `HdfsClient`."""
        self._calls.close()

    def _create_with_fewer_replicas(
        self, path: str, data: memoryview, failure: HadoopError, deadline: Deadline
    ) -> None:
        wanted = self._call(deadline, self._client.get_file_info, path).replication or 1
        for replicas in (*range(wanted - 1, 0, -1), *[1] * _MORE_TRIES):
            self.delete(path, deadline)
            try:
                self._write(path, data, replicas, deadline)
            except HadoopError as error:
                if error.kind not in _OF_DATANODES:
                    raise
                failure = error
            else:
                self._call(deadline, self._client.set_replication, path, wanted)
                return
        raise failure

    def _write(self, path: str, data: memoryview, replicas: int | None, deadline: Deadline) -> None:
        options = WriteOptions(replication=replicas)
        writer = self._call(deadline, self._client.create, path, options)
        for begin in range(0, len(data), PIECE_NBYTES):
            piece = bytes(data[begin : begin + PIECE_NBYTES])
            self._call(deadline, writer.write, piece)
        self._call(deadline, writer.close)

    def _connect(self) -> Client:
        """A client without connections: those are made as they are needed."""
        try:
            return Client(self._url, self._configuration)
        except (RuntimeError, OSError, ValueError) as error:
            raise StoreError(
                f"cannot open {self._url}: {error}",
                expected="hdfs://HOST:PORT/PATH, or hdfs://NAMESERVICE/PATH and HADOOP_CONF_DIR",
                hint="See 'HDFS' in docs/stores.md",
            ) from error

    def _call(self, deadline: Deadline, function: Callable[..., T], *arguments: object) -> T:
        try:
            return self._calls.call(deadline.remaining_s(), function, *arguments)
        except CallTimedOutError:
            self._client = self._connect()  # the other one would wait for its dead connection
            raise deadline.error() from None
        except HadoopError:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise hadoop_error(error) from error


class RpcReader:
    """A file and the places of its blocks, as they were when it was opened."""

    def __init__(self, call: Callable[..., bytes | None], reader: FileReader) -> None:
        self._call = call
        self._reader = reader

    @property
    def nbytes(self) -> int:
        """See `Reader`."""
        return len(self._reader)

    def read_into(self, offset: int, out: memoryview, deadline: Deadline) -> None:
        """See `Reader`. `out` is only written to by the calling thread."""
        pieces = self._reader.read_range_stream(offset, len(out))
        filled = 0
        # The first one may wait for the NameNode, the others for DataNodes, which hdfs-native
        # gives up when they are silent.
        piece = self._call(deadline, next, pieces, None)
        while piece is not None:
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            deadline.remaining_s()
            try:
                piece = next(pieces, None)
            except Exception as error:
                raise hadoop_error(error) from error
        if filled < len(out):
            raise HadoopError(UNREACHABLE, f"only {filled} of {len(out)} bytes came")


def _status(status: NativeStatus) -> FileStatus:
    return FileStatus(status.isdir, status.length, status.modification_time)


def hadoop_error(error: BaseException) -> HadoopError:
    """hdfs-native has few classes of errors, and the rest in the text of `RuntimeError`."""
    text = str(error)
    match error:
        case FileNotFoundError() | IsADirectoryError():
            return HadoopError(FILE_NOT_FOUND, text)
        case FileExistsError():
            return HadoopError(FILE_EXISTS, text)
        case OSError():
            return HadoopError(UNREACHABLE, text)
        case NotImplementedError():
            return HadoopError(UNSUPPORTED, text)
        case RuntimeError() if match := _ERROR.match(text):
            name, first, second = match.groups()
            if second is None:
                return HadoopError(name, first or text)
            java_class = re.split(r"[.$]", first)[-1]
            return HadoopError(java_class, second.replace("\\n", "\n").replace('\\"', '"'))
        case _:
            return HadoopError(CLIENT_FAILED, f"{type(error).__name__}: {text}")
