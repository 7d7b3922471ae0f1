"""Servers in processes of their own, none of which outlives the tests."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Starter:
    """Starts processes that the kernel kills when this one ends, by whatever cause.

    They end with the thread that started them, which lives until `close`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Run a command; what it prints is added to `log`."""
        with log.open("ab") as output:
            return self._thread.submit(
                subprocess.Popen,
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            ).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
