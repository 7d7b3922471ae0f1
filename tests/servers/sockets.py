"""What the servers do to sockets."""

from __future__ import annotations

import random
import socket
import struct
from contextlib import suppress

_NOT_GIVEN = range(20_000, 32_768)
_random = random.SystemRandom()  # tests that run side by side may have the same seed


def reset_on_close(connection: socket.socket) -> None:
    """Make the next close of a connection reset it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nothing listens, and which the system gives to nobody by itself.

    Those that it gives (to whoever binds port 0, to connections) may be gone before they are used.
    """
    found: list[int] = []
    for port in _random.sample(_NOT_GIVEN, len(_NOT_GIVEN)):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"there are no {count} free ports")
