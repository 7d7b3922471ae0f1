"""The strategies that benchmarks compare, by the names of their variants."""

from __future__ import annotations

import asymcheck
from asymcheck.policy import Always
from asymcheck.strategy import Strategy

REPLAY = "asymcheck-replay"
"""The smallest checkpoints, whatever they cost: every update is replayed."""


def strategy_of(variant: str) -> str | Strategy:
    """What to give to `strategy=`."""
    return asymcheck.AsymCheck(policy=Always("replay")) if variant == REPLAY else variant
