"""A small, strict stand-in for Google Cloud Storage, in this process."""

from __future__ import annotations

import re
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

from servers.gcs_errors import Refusal, on_demand
from servers.gcs_objects import Objects
from servers.gcs_requests import GcsHandler, Request
from servers.sockets import reset_on_close

TOKEN = "token-of-the-stand-in"


@dataclass(slots=True)
class Fault:
    """What goes wrong with the next `times` requests that match (None: with all)."""

    times: int | None
    action: str
    name: re.Pattern[str]
    reason: str = ""
    retry_after_s: int | None = None
    reset: Literal["", "request", "response", "unanswered"] = ""
    after_nbytes: int = 0

    def matches(self, request: Request) -> bool:
        """Whether it concerns this request."""
        return self.action in ("", request.action) and bool(self.name.search(request.name))


class GcsServer:
    """A stand-in for the JSON API of Google Cloud Storage: it is not Google's server.

    It follows Google's documentation of the part that TensorStore's `gcs` driver uses, and what
    Orbax asks through gcsfs, and is strict: what is not documented, or not known here, is refused
    with a 4xx and noted in `violations`. Objects are in memory. Not here: other methods and
    parameters, chunked and batched requests, metadata of one's own, ACLs, versions, retention,
    quotas and rates (but on demand), HTTP/2, TLS.

        with GcsServer() as server:
            os.environ |= server.environment

    TensorStore reads `TENSORSTORE_GCS_HTTP_URL` whenever a store is opened, unless one of the same
    spec and the same `Context` is still open, which it then shares. It reads
    `GOOGLE_AUTH_TOKEN_FOR_TESTING` once in the life of a process, at the first request: set it
    before, and leave it. Expired credentials are simulated from here, with `token`.

    Attributes:
        url: where it listens, on 127.0.0.1.
        bucket: the name of a bucket that exists.
        token: the only one that is accepted; None lets everybody in.
        page_size: the most entries on a page of a listing (Google: 1,000).
        latency_s: waited before each answer.
        requests: all that came in, oldest first.
        violations: descriptions of those that a correct client would not have sent.
    """

    def __init__(
        self,
        *,
        bucket: str = "bucket-of-tests",
        token: str | None = TOKEN,
        page_size: int = 1000,
        latency_s: float = 0.0,
    ) -> None:
        self.bucket = bucket
        self.token = token
        self.page_size = page_size
        self.latency_s = latency_s
        self.objects = Objects()
        self.objects.create_bucket(bucket)
        self.requests: list[Request] = []
        self.violations: list[str] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._http = _HttpServer(type("Handler", (GcsHandler,), {"gcs": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.close_connections()
        self._http.server_close()
        self._thread.join()
        if self._http.failures and error is None:
            raise self._http.failures[0]

    @property
    def environment(self) -> dict[str, str]:
        """What TensorStore must find in its environment to come here."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": self.token or TOKEN,
        }

    def contents(self) -> dict[str, bytes]:
        """All objects of the bucket, by name."""
        return self.objects.contents(self.bucket)

    def fail(
        self,
        reason: str,
        *,
        times: int | None = 1,
        action: str = "",
        name: str = "",
        retry_after_s: int | None = None,
    ) -> None:
        """Answer the next `times` requests (None: all) with an error, and do nothing else.

        Args:
            reason: as Google calls it: `authError` (401), `forbidden` (403), `quotaExceeded`
                (403), `uploadBrokenConnection` (408), `rateLimitExceeded` (429), `internalError`
                (500) or `backendError` (503).
            times: how many requests.
            action: only such requests; see `Request.action`.
            name: only requests for objects in whose name this regular expression is found.
            retry_after_s: sent along as `Retry-After`.
        """
        on_demand(reason)  # known?
        fault = Fault(times, action, re.compile(name), reason, retry_after_s)
        with self._lock:
            self._faults.append(fault)

    def reset(
        self,
        where: Literal["request", "response", "unanswered"],
        *,
        after_nbytes: int = 0,
        times: int | None = 1,
        action: str = "",
        name: str = "",
    ) -> None:
        """Reset the connections of the next `times` requests (None: of all).

        `request`: when `after_nbytes` of the body are read; nothing is done. `response`: the
        request is carried out, and the connection reset after `after_nbytes` of the body of the
        answer. `unanswered`: it is carried out, and not a byte of the answer is sent.
        """
        fault = Fault(times, action, re.compile(name), reset=where, after_nbytes=after_nbytes)
        with self._lock:
            self._faults.append(fault)

    def heal(self) -> None:
        """Forget what `fail` and `reset` have asked for."""
        with self._lock:
            self._faults.clear()

    def record(self, request: Request) -> None:
        """Note a request."""
        with self._lock:
            self.requests.append(request)

    def record_violation(self, what: str) -> None:
        """Note what a correct client would not have sent."""
        with self._lock:
            self.violations.append(what)

    def next_fault(self, request: Request) -> Fault | None:
        """The oldest fault that concerns this request; one of its times is used up."""
        with self._lock:
            fault = next((fault for fault in self._faults if fault.matches(request)), None)
            if fault and fault.times is not None:
                fault.times -= 1
                if fault.times == 0:
                    self._faults.remove(fault)
        return fault

    def wait_latency(self) -> None:
        """Wait as long as is set."""
        if self.latency_s:
            self._closing.wait(self.latency_s)

    def authorize(self, request: Request) -> None:
        """`Refusal` 401 without the one token that is accepted."""
        if self.token is None:
            return
        given = request.headers.get("authorization")
        if given is None:
            raise Refusal(401, "required", "Login Required")
        if given != f"Bearer {self.token}":
            raise on_demand("authError")

    def reset_connection(self, connection: socket.socket) -> None:
        """Reset instead of ending in order, when the handler is done with it."""
        self._http.reset(connection)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False  # so that `server_close` waits for them
    request_queue_size = 128

    def __init__(self, handler: Callable[..., Any]) -> None:
        self.failures: list[BaseException] = []
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._resets: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
            reset = request in self._resets
            self._resets.discard(request)
        if reset:  # no orderly end, which `shutdown` would be
            reset_on_close(request)
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def reset(self, connection: socket.socket) -> None:
        with self._lock:
            self._resets.add(connection)

    def close_connections(self) -> None:
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):  # the client may have closed it
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error and not isinstance(error, ConnectionError):  # a client may leave
            self.failures.append(error)
