"""The way to HDFS over HTTP: WebHDFS, as a NameNode of Hadoop 3 serves it.

fsspec's client brings the connection and the user. Its files are no use here: they are written by
appending, replace what is there, drop the name of Java's exception, and wait for ever.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import requests
import urllib3
from fsspec.implementations import webhdfs  # pyright: ignore[reportMissingTypeStubs]
from requests.adapters import HTTPAdapter

from asymcheck.errors import StoreError
from asymcheck.stores.base import RANGE_NBYTES
from asymcheck.stores.hadoop_errors import FILE_NOT_FOUND, UNREACHABLE, UNSUPPORTED, HadoopError
from asymcheck.stores.hdfs_client import Deadline, FileStatus
from asymcheck.stores.urls import RemotePlace

DEFAULT_PORT = 9870
LONGEST_SILENCE_S = 60.0
PIECE_NBYTES = 4 << 20
WAKING_NBYTES = 1 << 20

_DATANODES = 4  # to try, one after the other

_KINDS_OF_CODES = {401: "AuthorizationException", 403: "AuthorizationException"}

fsspec_webhdfs: Any = webhdfs  # it ships no types


class WebHdfsClient:
    """Talks to the NameNode at `HOST:PORT`, which sends it on to DataNodes.

    The user is the one that `credentials=user:NAME` says, HADOOP_USER_NAME, or that of the
    process; the NameNode believes it, or refuses if it wants more (Kerberos).

    Raises:
        StoreError: the address is none, or `credentials` says something else.
    """

    range_nbytes = 4 * RANGE_NBYTES  # each read is three requests, one over a new connection

    def __init__(self, place: RemotePlace) -> None:
        host, port = _address(place)
        self._silence_s = min(place.options.timeout_s / 4, LONGEST_SILENCE_S)
        # A DataNode needs a minute and more to find that the next one in the pipeline hangs.
        self._silence_of_write_s = place.options.timeout_s * 3 / 4
        self._connection = fsspec_webhdfs.WebHDFS(
            host, port, user=_user(place.options.credentials), skip_instance_cache=True
        )
        adapter = HTTPAdapter(pool_maxsize=place.options.concurrency)
        self._session: requests.Session = self._connection.session
        self._session.mount("http://", adapter)

    def create(self, path: str, data: memoryview, deadline: Deadline) -> None:
        """See `HdfsClient`. The flag gives the order to sync at the end of each block."""
        request = {"op": "CREATE", "overwrite": "false", "createflag": "CREATE,SYNC_BLOCK"}
        silence_s = self._silence_of_write_s
        with self._datanode("PUT", path, deadline, silence_s, request, data) as created:
            if created.status_code != 201:
                raise HadoopError(UNREACHABLE, f"HTTP {created.status_code} instead of 201")

    def rename(self, source: str, target: str, overwrite: bool, deadline: Deadline) -> None:
        """See `HdfsClient`.

        With options the NameNode answers a rename with nothing, or an exception. A truth value is
        the answer to a rename without options, which may do nothing, or put the source *into* the
        target: a gateway (HttpFS) dropped them.
        """
        answer = self._namenode(
            "PUT",
            source,
            deadline,
            op="RENAME",
            destination=target,
            renameoptions="OVERWRITE" if overwrite else "NONE",
        )
        if answer.content:
            raise HadoopError(UNSUPPORTED, "this gateway does not know renameoptions")

    def make_directory(self, path: str, deadline: Deadline) -> None:
        """See `HdfsClient`."""
        self._namenode("PUT", path, deadline, op="MKDIRS")

    def open(self, path: str, deadline: Deadline) -> WebHdfsReader:
        """See `HdfsClient`."""
        status = self.status(path, deadline)
        if status.is_directory:
            raise HadoopError(FILE_NOT_FOUND, f"{path} is a directory")
        return WebHdfsReader(self, path, status.nbytes)

    def status(self, path: str, deadline: Deadline) -> FileStatus:
        """See `HdfsClient`."""
        answer = self._namenode("GET", path, deadline, op="GETFILESTATUS")
        return _status(_json(answer)["FileStatus"])

    def entries(self, path: str, deadline: Deadline) -> list[tuple[str, FileStatus]]:
        """See `HdfsClient`."""
        answer = self._namenode("GET", path, deadline, op="LISTSTATUS")
        found = _json(answer)["FileStatuses"]["FileStatus"]
        return [(entry["pathSuffix"], _status(entry)) for entry in found]

    def delete(self, path: str, deadline: Deadline) -> None:
        """See `HdfsClient`."""
        self._namenode("DELETE", path, deadline, op="DELETE", recursive="false")

    def close(self) -> None:
        """See `HdfsClient`."""
        self._session.close()

    def read_into(self, path: str, offset: int, out: memoryview, deadline: Deadline) -> None:
        """Fill `out` from `offset`."""
        request = {"op": "OPEN", "offset": offset, "length": len(out)}
        with self._datanode("GET", path, deadline, self._silence_s, request) as content:
            filled = 0
            coming = min(len(out), content.raw.length_remaining or 0)
            rarely = coming - PIECE_NBYTES - WAKING_NBYTES  # enough follows a piece up to there
            if rarely > 0:
                with _waking_rarely(content.raw.fileno()):
                    filled = _receive(content.raw, out, 0, rarely, deadline)
            _receive(content.raw, out, filled, len(out), deadline)

    def _namenode(
        self, method: str, path: str, deadline: Deadline, **parameters: str | int
    ) -> requests.Response:
        """The answer to a request, or the way to the DataNode that will answer it."""
        with _failures():
            answer = self._session.request(
                method,
                self._connection.url + quote(path),
                params=self._connection.pars | parameters,
                allow_redirects=False,
                timeout=min(deadline.remaining_s(), self._silence_s),
            )
        return _checked(answer)

    @contextmanager
    def _datanode(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        silence_s: float,
        request: Mapping[str, str | int],
        data: memoryview | None = None,
    ) -> Generator[requests.Response]:
        """The answer of the DataNode to which the NameNode sends a request, not read yet."""
        with _failures():
            answer = self._ask_datanode(method, path, deadline, silence_s, request, data)
            with answer:
                yield _checked(answer)

    def _ask_datanode(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        silence_s: float,
        request: Mapping[str, str | int],
        data: memoryview | None,
    ) -> requests.Response:
        """A NameNode names one that died, for minutes, and perhaps another one the next time."""
        for _ in range(_DATANODES):
            way = self._namenode(method, path, deadline, **request)
            if "Location" not in way.headers:
                raise HadoopError(UNSUPPORTED, "this server names no DataNode: it is a gateway")
            try:
                return self._session.request(
                    method,
                    way.headers["Location"],
                    data=data,
                    headers={"Content-Type": "application/octet-stream"},
                    timeout=min(deadline.remaining_s(), silence_s),
                    stream=True,
                )
            except requests.ConnectionError as error:
                if not _is_refused(error):
                    raise
        raise HadoopError(UNREACHABLE, f"{_DATANODES} times a DataNode that refuses connections")


class WebHdfsReader:
    """A file that was there, and its length."""

    def __init__(self, client: WebHdfsClient, path: str, nbytes: int) -> None:
        self._client = client
        self._path = path
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        """See `Reader`."""
        return self._nbytes

    def read_into(self, offset: int, out: memoryview, deadline: Deadline) -> None:
        """See `Reader`."""
        if out:
            self._client.read_into(self._path, offset, out, deadline)


@contextmanager
def _waking_rarely(fileno: int) -> Generator[None]:
    """Wakes whoever reads from a socket only when so many bytes are there (SO_RCVLOWAT).

    A DataNode sends pieces of some 12 KiB; a thread that wakes for each spends most of its
    processor's time on that. Less than so many bytes, in the end, would be waited for in vain.
    """
    with socket.socket(fileno=os.dup(fileno)) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, WAKING_NBYTES)
        try:
            yield
        finally:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _receive(content: Any, out: memoryview, begin: int, end: int, deadline: Deadline) -> int:
    """Fill `out` from `begin` by pieces, until `end` or a little beyond; where that is."""
    filled = begin
    while filled < end:
        deadline.remaining_s()
        nbytes = content.readinto(out[filled : filled + PIECE_NBYTES])
        if nbytes == 0:
            raise HadoopError(UNREACHABLE, f"only {filled} of {len(out)} bytes came")
        filled += nbytes
    return filled


def _address(place: RemotePlace) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{place.authority}")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if not host:
        raise StoreError(
            f"the {place.scheme}:// URL names no address of a NameNode",
            expected=f"{place.scheme}://HOST:PORT/PATH",
        )
    return f"[{host}]" if ":" in host else host, port


def _user(credentials: str | None) -> str:
    source, _, name = (credentials or "default").partition(":")
    if source == "user" and name:
        return name
    if source == "default" and not name:
        return os.environ.get("HADOOP_USER_NAME") or getpass.getuser()
    raise StoreError(
        "webhdfs:// does not know this source of credentials, which is not shown here",
        expected="default, or user:NAME",
    )


def _status(answer: dict[str, Any]) -> FileStatus:
    return FileStatus(answer["type"] == "DIRECTORY", answer["length"], answer["modificationTime"])


def _checked(answer: requests.Response) -> requests.Response:
    """The answer, unless it is an error."""
    if answer.status_code < 400:
        return answer
    code = answer.status_code
    try:
        told = answer.json()["RemoteException"]
        raise HadoopError(told["exception"], told["message"])
    except (ValueError, KeyError, TypeError):
        kind = UNREACHABLE if code >= 500 else _KINDS_OF_CODES.get(code, f"HTTP {code}")
        raise HadoopError(kind, f"HTTP {code} {answer.reason}") from None


def _json(answer: requests.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise HadoopError(UNREACHABLE, "the answer is no JSON") from error


def _is_refused(error: requests.ConnectionError) -> bool:
    """Whether there was no connection over which anything could have been sent."""
    cause = error.args[0] if error.args else None
    return isinstance(getattr(cause, "reason", None), urllib3.exceptions.NewConnectionError)


@contextmanager
def _failures() -> Generator[None]:
    """Failures of connections as `HadoopError`."""
    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise HadoopError(UNREACHABLE, str(error)) from error
