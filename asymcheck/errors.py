"""Every error that AsymCheck raises, each naming the place, what was found and what to do next."""

from __future__ import annotations


class AsymCheckError(Exception):
    """Base of all errors of this library.

    The context is kept in attributes, for programs, and is part of the message, for people.

    Attributes:
        step: the training step concerned, if any.
        leaf: the leaf path concerned, if any.
        object: the key of the stored object concerned, relative to the root of the run.
        offset: byte offset in that object.
        expected, found: what was expected and what was found instead.
        hint: what to do next.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        leaf: str | None = None,
        object: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.step = step
        self.leaf = leaf
        self.object = object
        self.offset = offset
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        places = [
            f"{name} {value}"
            for name, value in (
                ("step", self.step),
                ("leaf", self.leaf),
                ("object", self.object),
                ("offset", self.offset),
            )
            if value is not None
        ]
        text = self.message
        if places:
            text += f" [{', '.join(places)}]"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.found is not None:
            text += f"; found {self.found}"
        if self.hint is not None:
            text += f". {self.hint}"
        return text


class UnsupportedStateError(AsymCheckError):
    """The state holds an object that no checkpoint can represent; nothing was saved."""


class StateMismatchError(AsymCheckError):
    """The checkpoint and the target to restore into differ in paths, shapes or dtypes."""


class FormatError(AsymCheckError):
    """A stored record does not follow docs/format.md."""


class UnsupportedVersionError(FormatError):
    """A stored record has a version, a codec or a dtype that this reader does not know."""


class CorruptionError(AsymCheckError):
    """Stored bytes are missing or are not the bytes that were written."""


class SourceError(AsymCheckError):
    """What is to be imported is not what it should be, or would run code; nothing was imported."""


class CodecError(AsymCheckError):
    """A block cannot be encoded or decoded."""


class CheckpointNotFoundError(AsymCheckError):
    """There is no such step, or no good step at all."""


class StepExistsError(AsymCheckError):
    """The step is committed already; a committed step is never overwritten."""


class SaveFailedError(AsymCheckError):
    """A background save did not become durable; its cause is chained. The step does not exist."""


class CommitError(AsymCheckError):
    """A step could not be committed; it does not exist and its packs will be collected."""


class MirrorError(AsymCheckError):
    """The mirror failed; the step is committed in the run's own store. The cause is chained."""


class CaptureTimeoutError(AsymCheckError):
    """Host memory did not become free in time: the store does not keep up or hangs."""


class ClosedError(AsymCheckError):
    """The checkpointer was closed."""


class StoreError(AsymCheckError):
    """A store refused or failed an operation. What was durable before is untouched."""


class ObjectNotFoundError(StoreError):
    """There is no object under that key."""


class ShortReadError(StoreError):
    """An object ends before the range that was asked for."""


class ObjectTooLongError(StoreError):
    """An object is longer than what was asked for can be; nothing of it was read."""


class StoreFullError(StoreError):
    """The store has no room (disk full, quota exceeded)."""


class StorePermissionError(StoreError):
    """The store may not be written or read with these rights."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached or answered with a passing error."""
