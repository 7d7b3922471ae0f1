"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from asymcheck.strategies.asymcheck import AsymCheck, AsymCheckNaive, AsymCheckS
from asymcheck.strategies.synchronous import Synchronous
from asymcheck.strategy import Strategy

__all__ = ["STRATEGIES", "AsymCheck", "AsymCheckNaive", "AsymCheckS", "Synchronous", "by_name"]

STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "asymcheck": AsymCheck,
    "asymcheck-s": AsymCheckS,
    "asymcheck-naive": AsymCheckNaive,
    "synchronous": Synchronous,
}


def by_name(strategy: str | Strategy) -> Strategy:
    """The strategy of that name; a `Strategy` is returned as it is.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(strategy, Strategy):
        return strategy
    try:
        return STRATEGIES[strategy]()
    except KeyError:
        raise ValueError(f"unknown strategy {strategy!r}; one of {', '.join(STRATEGIES)}") from None
