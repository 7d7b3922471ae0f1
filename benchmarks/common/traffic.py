"""What AsymCheck sent to the store."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from asymcheck.trace import Event


def flushed_nbytes(events: Iterable[Event], steps: Collection[int]) -> float:
    """Bytes of packs for one step, the mean of `steps`: some are increments, some are bases."""
    flushed = (event for event in events if event.track == "flush" and event.step in steps)
    return sum(event.nbytes for event in flushed) / len(steps)
