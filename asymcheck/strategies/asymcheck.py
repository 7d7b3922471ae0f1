"""AsymCheck (DAC 2026) at its three levels: naive, S (selective), S+O (and optimal batches)."""

from __future__ import annotations

from dataclasses import dataclass, field

from asymcheck.policy import CompressionPolicy, Never, Selective
from asymcheck.strategy import Strategy


@dataclass(frozen=True)
class AsymCheckNaive(Strategy):
    """Asymmetric partitioned snapshotting only: raw partitions, one pack each."""

    name: str = "asymcheck-naive"
    policy: CompressionPolicy = field(default_factory=Never)
    windows: bool = True
    batched: bool = False
    blocking: bool = False


@dataclass(frozen=True)
class AsymCheckS(Strategy):
    """S: a partition is compressed if, by the measured costs, that is faster than not to."""

    name: str = "asymcheck-s"
    policy: CompressionPolicy = field(default_factory=Selective)
    windows: bool = True
    batched: bool = False
    blocking: bool = False


@dataclass(frozen=True)
class AsymCheck(Strategy):
    """S+O: selective compression, and packs of the size derived from the store's costs."""

    name: str = "asymcheck"
    policy: CompressionPolicy = field(default_factory=Selective)
    windows: bool = True
    batched: bool = True
    blocking: bool = False
