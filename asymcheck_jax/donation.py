"""Donating buffers to a jitted step, but not while a save still reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import jax

from asymcheck.snapshot import Capture

_under_way: WeakSet[Capture] = WeakSet()
_lock = threading.Lock()


def note_capture(capture: Capture) -> None:
    """A save has begun to read device memory; it counts until everything is captured."""
    with _lock:
        _under_way.add(capture)


def is_capturing() -> bool:
    """Whether a save still reads device memory."""
    with _lock:
        for capture in list(_under_way):
            if capture.await_captured(0.0):
                _under_way.discard(capture)
        return bool(_under_way)


class HeldDonation:
    """A jitted function in two compilations: one that donates, one for steps under a save.

    Compiled twice, the second at the first step under a save. That step needs memory for the old
    and the new state; so does every step while a save captures.
    """

    def __init__(
        self, function: Callable[..., Any], donate_argnums: int | Sequence[int], **jit: Any
    ) -> None:
        self._donating = jax.jit(function, donate_argnums=donate_argnums, **jit)
        self._keeping = jax.jit(function, **jit)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step; donates unless a save still reads device memory."""
        step = self._keeping if is_capturing() else self._donating
        return step(*args, **kwargs)


def hold_donation(
    function: Callable[..., Any], *, donate_argnums: int | Sequence[int], **jit: Any
) -> HeldDonation:
    """`jax.jit(function, donate_argnums=...)` that does not donate while a save reads the state.

    With it `AsymCheckHandler(donation_is_held=True)` lets `save` return before the copies from
    the device are done.

    Args:
        function: the training step, not jitted.
        donate_argnums: the arguments whose memory the results may take.
        jit: what else `jax.jit` takes.
    """
    return HeldDonation(function, donate_argnums, **jit)
