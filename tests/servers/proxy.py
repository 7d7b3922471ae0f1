"""A proxy that spoils the connections between a client and any server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, TypeVar

from servers.sockets import reset_on_close

Direction = Literal["up", "down"]

_PIECE_NBYTES = 256 << 10
_MAX_DELAYED_PIECES = 1024


@dataclass(slots=True)
class _Fault:
    """What happens to the next `times` connections (None: to all)."""

    times: int | None
    swallow: bool = False
    direction: Direction = "down"
    after_nbytes: int = 0


@dataclass(slots=True)
class _Canned:
    """What the next `times` requests are answered with (None: all)."""

    times: int | None
    answer: bytes


class _Cut(Exception):
    """The connection is to be reset now."""


_T = TypeVar("_T", _Fault, _Canned)
_Delayed = asyncio.Queue[tuple[float, bytes]]  # when to pass on what


class Proxy:
    """Passes bytes between clients of `address` and the server at `target`; knows no protocol.

        with Proxy(("127.0.0.1", port), latency_s=0.05) as proxy:
            connect(proxy.address)

    `cut` and `swallow` concern connections that are made later; `drop` resets those that are
    there, which a client may have kept for its next request.

    Attributes:
        address: where it listens.
        latency_s: how much later what the server sends arrives. Set at any time.
        nbytes_per_s: the most that passes in each direction of each connection; None: no limit.
            Set at any time.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        latency_s: float = 0.0,
        nbytes_per_s: float | None = None,
    ) -> None:
        self.latency_s = latency_s
        self.nbytes_per_s = nbytes_per_s
        self._target = target
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self._failures: list[BaseException] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._connections: set[asyncio.Task[None]] = set()
        # Bound but not listening, it keeps the port while connections are refused.
        self._reserved = _bound_socket(0)
        self.address: tuple[str, int] = self._reserved.getsockname()
        self._listening: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()
        if self._failures and error is None:
            raise self._failures[0]

    @property
    def url(self) -> str:
        """The address, for a server that speaks HTTP."""
        return f"http://{self.address[0]}:{self.address[1]}"

    def cut(self, direction: Direction, *, after_nbytes: int = 0, times: int | None = 1) -> None:
        """Reset the next `times` connections (None: all) when so many bytes have passed.

        `up` counts what the client sends, `down` what the server sends. With `after_nbytes` 0 a
        connection is reset as soon as it is made. No more bytes pass; of the last of them, what
        the other side had no room for is lost, as always when a connection is reset.
        """
        self._add(_Fault(times, direction=direction, after_nbytes=after_nbytes))

    def swallow(self, *, times: int | None = 1) -> None:
        """Take what the next `times` connections (None: all) send, and never answer."""
        self._add(_Fault(times, swallow=True))

    def refuse(self) -> None:
        """Refuse connections, as if no server ran, until `heal`."""
        self._run(self._stop_listening())

    def drop(self) -> None:
        """Reset all connections that are there now."""
        self._run(self._reset_all())

    def heal(self) -> None:
        """Forget faults that did not happen yet, and accept connections again."""
        with self._lock:
            self._faults.clear()
        self._run(self._listen())

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _next_fault(self) -> _Fault | None:
        with self._lock:
            return _used(self._faults)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> None:
        if self._listening is None:
            listener = _bound_socket(self.address[1])
            listener.listen(128)
            listener.setblocking(False)
            self._listening = self._loop.create_task(self._accept(listener))

    async def _stop_listening(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])
            self._listening = None

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                connection = self._loop.create_task(self._serve(client))
                self._connections.add(connection)
                connection.add_done_callback(self._ended)

    def _ended(self, connection: asyncio.Task[None]) -> None:
        self._connections.discard(connection)
        if not connection.cancelled() and (error := connection.exception()):
            self._failures.append(error)

    async def _reset_all(self) -> None:
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        if connections:
            await asyncio.wait(connections)

    async def _close(self) -> None:
        await self._stop_listening()
        await self._reset_all()

    async def _serve(self, client: socket.socket) -> None:
        fault = self._next_fault()
        reader, writer = await asyncio.open_connection(sock=client, limit=_PIECE_NBYTES)
        writers = [writer]
        try:
            if fault and fault.swallow:
                await _swallow(reader)
            elif fault and fault.after_nbytes == 0:
                raise _Cut
            else:
                server_reader, server_writer = await asyncio.open_connection(
                    *self._target, limit=_PIECE_NBYTES
                )
                writers.append(server_writer)
                await self._pass(reader, writer, server_reader, server_writer, fault)
        except* (_Cut, OSError, asyncio.CancelledError):
            for writer in writers:
                _reset(writer)
        finally:
            for writer in writers:
                writer.close()

    async def _pass(
        self,
        client_reader: asyncio.StreamReader,
        client_writer: asyncio.StreamWriter,
        server_reader: asyncio.StreamReader,
        server_writer: asyncio.StreamWriter,
        fault: _Fault | None,
    ) -> None:
        for writer in (client_writer, server_writer):
            writer.transport.set_write_buffer_limits(0)  # `drain` then means: sent
        down: _Delayed = asyncio.Queue(_MAX_DELAYED_PIECES)
        async with asyncio.TaskGroup() as group:
            group.create_task(
                self._pass_up(client_reader, server_writer, _allowance(fault, "up"), down)
            )
            group.create_task(self._delay(server_reader, down))
            group.create_task(self._deliver(down, client_writer, _allowance(fault, "down")))

    async def _pass_up(
        self,
        client: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        allowance: _Allowance,
        down: _Delayed,
    ) -> None:
        pace = _Pace(self)
        while piece := await client.read(_PIECE_NBYTES):
            await _send(server, piece, allowance, pace)
        server.write_eof()

    async def _delay(self, server: asyncio.StreamReader, down: _Delayed) -> None:
        piece = b"-"
        while piece:
            piece = await server.read(_PIECE_NBYTES)
            await down.put((self._loop.time() + self.latency_s, piece))

    async def _deliver(
        self,
        down: _Delayed,
        client: asyncio.StreamWriter,
        allowance: _Allowance,
    ) -> None:
        pace = _Pace(self)
        while True:
            due_s, piece = await down.get()
            await asyncio.sleep(due_s - self._loop.time())
            if not piece:
                break
            await _send(client, piece, allowance, pace)
        client.write_eof()


class HttpProxy(Proxy):
    """A `Proxy` that can answer requests of HTTP/1.x itself.

    Bodies of requests must have a Content-Length.

    Attributes:
        requests: first lines of all requests that came in, without the protocol's version.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        latency_s: float = 0.0,
        nbytes_per_s: float | None = None,
    ) -> None:
        super().__init__(target, latency_s=latency_s, nbytes_per_s=nbytes_per_s)
        self.requests: list[str] = []
        self._canned: list[_Canned] = []

    def answer(
        self,
        status: int,
        *,
        times: int | None = 1,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
    ) -> None:
        """Answer the next `times` requests (None: all), which the server then never sees."""
        fields = {"Content-Length": str(len(body))} | (headers or {})
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        canned = f"HTTP/1.1 {status} Answered by the proxy\r\n{head}\r\n".encode() + body
        with self._lock:
            self._canned.append(_Canned(times, canned))

    def heal(self) -> None:
        """As `Proxy.heal`; also passes all requests on again."""
        with self._lock:
            self._canned.clear()
        super().heal()

    async def _pass_up(
        self,
        client: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        allowance: _Allowance,
        down: _Delayed,
    ) -> None:
        pace = _Pace(self)
        while head := await _read_head(client):
            first_line, fields = _parse_head(head)
            with self._lock:
                self.requests.append(first_line.rpartition(" ")[0])
                canned = _used(self._canned)
            if canned is None:
                await _send(server, head, allowance, pace)
            elif "expect" in fields:
                await down.put((self._loop.time(), b"HTTP/1.1 100 Continue\r\n\r\n"))
            left = int(fields.get("content-length", "0"))
            while left:
                piece = await client.read(min(left, _PIECE_NBYTES))
                if not piece:
                    raise ConnectionResetError("the client left in the middle of a body")
                left -= len(piece)
                if canned is None:
                    await _send(server, piece, allowance, pace)
            if canned is not None:
                await down.put((self._loop.time() + self.latency_s, canned.answer))
        server.write_eof()


class _Allowance:
    """How many bytes may still pass in one direction of one connection."""

    def __init__(self, nbytes: int | None) -> None:
        self.nbytes = nbytes


class _Pace:
    """Keeps one direction of one connection at the speed that is set."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._free_s = 0.0

    async def wait(self, nbytes: int) -> None:
        """Until so many bytes may have passed."""
        if self._proxy.nbytes_per_s is not None:
            now_s = asyncio.get_running_loop().time()
            self._free_s = max(self._free_s, now_s) + nbytes / self._proxy.nbytes_per_s
            await asyncio.sleep(self._free_s - now_s)


def _allowance(fault: _Fault | None, direction: Direction) -> _Allowance:
    concerned = fault is not None and fault.direction == direction
    return _Allowance(fault.after_nbytes if fault and concerned else None)


async def _swallow(reader: asyncio.StreamReader) -> None:
    while await reader.read(_PIECE_NBYTES):
        pass


async def _send(
    writer: asyncio.StreamWriter, piece: bytes, allowance: _Allowance, pace: _Pace
) -> None:
    left = allowance.nbytes
    passing = piece if left is None else piece[:left]
    await pace.wait(len(passing))
    writer.write(passing)
    await writer.drain()
    if left is not None:
        allowance.nbytes = left - len(passing)
        if allowance.nbytes == 0:
            raise _Cut


async def _read_head(client: asyncio.StreamReader) -> bytes:
    try:
        return await client.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ConnectionResetError("the client left in the middle of a request") from None
        return b""


def _parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    first_line, *lines = head.decode("latin-1").split("\r\n")[:-2]
    pairs = (line.partition(":") for line in lines)
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if "transfer-encoding" in fields:
        raise ConnectionResetError("the proxy can only pass bodies with a Content-Length")
    return first_line, fields


def _used(armed: list[_T]) -> _T | None:
    """The oldest of `armed`, one of its times used up."""
    if not armed:
        return None
    first = armed[0]
    if first.times is not None:
        first.times -= 1
        if first.times == 0:
            armed.pop(0)
    return first


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # closed already
        reset_on_close(writer.get_extra_info("socket"))
    writer.transport.abort()


def _bound_socket(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound
