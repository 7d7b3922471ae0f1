"""A strategy is a frozen composition of the parts: when to copy, what to compress, how to batch."""

from __future__ import annotations

from dataclasses import dataclass

from asymcheck.policy import CompressionPolicy


@dataclass(frozen=True)
class Strategy:
    """How a checkpointer works.

    Attributes:
        name: as given on the command line and recorded with every step.
        policy: which codec for which partition.
        windows: copy in the windows of the forward and backward pass, sized by their idle time;
            else everything at once where the capture begins.
        batched: gather blocks into packs of the derived optimal size; else every partition has
            packs of its own.
        blocking: hold training until the step is committed.
    """

    name: str
    policy: CompressionPolicy
    windows: bool
    batched: bool
    blocking: bool
