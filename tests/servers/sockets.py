"""What the servers do to sockets."""

from __future__ import annotations

import socket
import struct


def reset_on_close(connection: socket.socket) -> None:
    """Make the next close of a connection reset it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
