"""The simplest of all: training waits until the step is durable."""

from __future__ import annotations

from dataclasses import dataclass, field

from asymcheck.policy import CompressionPolicy, Never
from asymcheck.strategy import Strategy


@dataclass(frozen=True)
class Synchronous(Strategy):
    """Everything is copied and committed before the call returns, as `torch.save` would."""

    name: str = "synchronous"
    policy: CompressionPolicy = field(default_factory=Never)
    windows: bool = False
    batched: bool = True
    blocking: bool = True
