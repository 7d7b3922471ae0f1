"""Restoring on several ranks: all restore the same step, or none does."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from asymcheck.checkpointer import Checkpointer
from asymcheck.errors import AsymCheckError, CorruptionError, FormatError
from asymcheck.reader import Checkpoint

_GAVE_UP = -1


class World(Protocol):
    """The processes that restore together."""

    def extremes(self, number: int) -> tuple[int, int]:
        """The smallest and the largest number that any rank gives; a collective call."""
        ...


class _Outcome(IntEnum):
    DONE = 0
    DAMAGED = 1
    FAILED = 2


def restore_together(
    checkpointer: Checkpointer,
    read: Callable[[Checkpoint], Callable[[], None]],
    step: int | None,
    world: World,
) -> int:
    """Restore the newest step that is good on every rank (or `step`); which one it was.

    Every rank looks for a good step as `Checkpointer.restore_with` does. In `read` they meet:
    who is at a newer step than the others passes it over, and if one rank finds damage all do.
    Of a step that a mirror has, too, they all read the same copy.
    What `read` returns is called when all have read the same step, and then they agree again.
    Neither may wait for another rank, which may have failed.

    Raises:
        what `restore_with` raises; `AsymCheckError` where another rank failed for good.
    """
    meeting = _Meeting(read, world, checkpointer.url)
    try:
        found, apply = checkpointer.restore_with(meeting, step)
    except Exception:
        if not meeting.concluded:
            world.extremes(_GAVE_UP)
        raise
    _apply_together(apply, found, world)
    return found


def _apply_together(apply: Callable[[], None], step: int, world: World) -> None:
    error: Exception | None = None
    try:
        apply()
    except Exception as raised:
        error = raised
    _, worst = world.extremes(_Outcome.DONE if error is None else _Outcome.FAILED)
    if error is not None:
        raise error
    if worst != _Outcome.DONE:
        raise _others_failed(step)


class _Meeting:
    """A reading in which all ranks take part.

    Each exchange is one collective call of all ranks; a rank that leaves with an error of which
    the others do not know tells them in the exchange that they wait in (`restore_together`).
    """

    def __init__(
        self, read: Callable[[Checkpoint], Callable[[], None]], world: World, url: str
    ) -> None:
        self._read = read
        self._world = world
        self._url = url  # of the run's own store, not its mirror
        self.concluded = False

    def __call__(self, checkpoint: Checkpoint) -> tuple[int, Callable[[], None]]:
        self._meet(checkpoint)
        apply, error = self._try(checkpoint)
        _, worst = self._world.extremes(_outcome(error))
        self.concluded = worst != _Outcome.DAMAGED
        if error is not None and _outcome(error) == worst:
            raise error
        if worst == _Outcome.DAMAGED:
            raise CorruptionError("another rank cannot read this step", step=checkpoint.step)
        if worst == _Outcome.FAILED:
            raise _others_failed(checkpoint.step)
        return checkpoint.step, apply

    def _meet(self, checkpoint: Checkpoint) -> None:
        """Return when all ranks are at this step of this store; the mirror's comes after."""
        step = checkpoint.step
        place = 2 * step + (checkpoint.url == self._url)
        while True:
            low, high = self._world.extremes(place)
            if low == high:
                return
            if low == _GAVE_UP:
                self.concluded = True
                raise _others_failed(step)
            if place > low:
                raise CorruptionError("another rank cannot open this step", step=step)

    def _try(self, checkpoint: Checkpoint) -> tuple[Callable[[], None], Exception | None]:
        try:
            return self._read(checkpoint), None
        except Exception as error:
            return lambda: None, error


def _outcome(error: Exception | None) -> _Outcome:
    if error is None:
        return _Outcome.DONE
    damaged = isinstance(error, CorruptionError | FormatError)
    return _Outcome.DAMAGED if damaged else _Outcome.FAILED


def _others_failed(step: int) -> AsymCheckError:
    return AsymCheckError(
        "another rank could not restore", step=step, hint="Its own error says why"
    )
