"""Progress on stderr, for work that takes a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from asymcheck.inspection.text import printable, size


def steps(count: float) -> str:
    """For progress that is counted in steps."""
    return f"{count:.0f} {'step' if round(count) == 1 else 'steps'}"


class Progress:
    """Work done of a total: one line written over itself on a terminal, else one a second.

    Args:
        label: what is going on.
        total: how much there is to do.
        enabled: None for only if stderr is a terminal.
        unit: writes an amount; bytes by default.
    """

    def __init__(
        self,
        label: str,
        total: int,
        enabled: bool | None,
        unit: Callable[[float], str] = size,
    ) -> None:
        self._label = printable(label)
        self._total = total
        self._unit = unit
        self._terminal = sys.stderr.isatty()
        self._enabled = self._terminal if enabled is None else enabled
        self._interval_s = 0.1 if self._terminal else 1.0
        self._done = 0
        self._begun_s = self._shown_s = time.monotonic()

    def add(self, amount: int) -> None:
        """So much more is done."""
        self._done += amount
        if self._enabled and time.monotonic() - self._shown_s >= self._interval_s:
            self._show()

    def _show(self) -> None:
        self._shown_s = time.monotonic()
        total = max(self._total, self._done, 1)
        speed = self._done / max(self._shown_s - self._begun_s, 1e-9)
        share = f"{100 * self._done // total:3d} %"
        line = f"{self._label}: {share} of {self._unit(total)}, {self._unit(speed)}/s"
        sys.stderr.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._enabled:
            self._show()
            if self._terminal:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
