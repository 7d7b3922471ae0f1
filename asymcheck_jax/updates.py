"""The update that a training step has made, told by whoever saves: increments replay it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from asymcheck.codecs.rules import RULES
from asymcheck.state import LeafSource, Update

Schedule = float | Callable[[int], Any]
"""A learning rate, or an optax schedule of the number of updates before."""

_ROLES = {
    "adam": {"params": "weight", "mu": "first", "m": "first", "nu": "second", "v": "second"},
    "lion": {"params": "weight", "mu": "first", "m": "first"},
    "sgd": {"params": "weight", "trace": "first"},
}


class OptimizerUpdate(Protocol):
    """What `AsymCheckSave(update=...)` takes: `AdamUpdate`, `LionUpdate` or `SGDUpdate`."""

    @property
    def rule(self) -> str:
        """The name of the optimizer's rule."""
        ...

    def numbers(self, step: int) -> Mapping[str, float]:
        """The rule's numbers at update `step`, counted from 1."""
        ...


@dataclass(frozen=True, slots=True)
class AdamUpdate:
    """An update by `optax.adam` or `optax.adamw`, with their arguments.

    Nothing has to be exactly right: what the prediction misses is stored, so that wrong numbers
    cost bytes and nothing else.
    """

    learning_rate: Schedule
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    rule = "adam"

    def numbers(self, step: int) -> Mapping[str, float]:
        """See `OptimizerUpdate`."""
        return {
            "lr": _rate(self.learning_rate, step),
            "beta1": self.b1,
            "beta2": self.b2,
            "eps": self.eps,
            "decay": self.weight_decay,
            "l2": 0.0,
            "step": step,
            "corrects_bias": 1.0,
        }


@dataclass(frozen=True, slots=True)
class LionUpdate:
    """An update by `optax.lion`, with its arguments; see `AdamUpdate`."""

    learning_rate: Schedule
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 1e-3

    rule = "lion"

    def numbers(self, step: int) -> Mapping[str, float]:
        """See `OptimizerUpdate`."""
        return {
            "lr": _rate(self.learning_rate, step),
            "beta1": self.b1,
            "beta2": self.b2,
            "decay": self.weight_decay,
            "l2": 0.0,
        }


@dataclass(frozen=True, slots=True)
class SGDUpdate:
    """An update by `optax.sgd` with momentum, with its arguments; see `AdamUpdate`."""

    learning_rate: Schedule
    momentum: float

    rule = "sgd"

    def numbers(self, step: int) -> Mapping[str, float]:
        """See `OptimizerUpdate`."""
        rate = _rate(self.learning_rate, step)
        return {"lr": rate, "momentum": self.momentum, "dampening": 0.0, "l2": 0.0}


def _rate(learning_rate: Schedule, step: int) -> float:
    return float(learning_rate(step - 1) if callable(learning_rate) else learning_rate)


def updates_of(
    sources: Iterable[LeafSource], told: OptimizerUpdate, step: int
) -> dict[str, Update]:
    """The update of every parameter whose moments are found beside it, by their optax names.

    Args:
        sources: of the state's view.
        told: what was done.
        step: how many updates there were, this one included.
    """
    numbers = dict(told.numbers(step))
    if not all(math.isfinite(number) for number in numbers.values()):
        return {}
    by_group: dict[str, dict[str, str]] = defaultdict(dict)
    for source in sources:
        prefix = source.leaf.path.removesuffix(f"/{source.group}")
        role = _ROLES[told.rule].get(prefix.rpartition("/")[2])
        if role is not None:
            by_group[source.group][prefix] = role
    needed = sorted(RULES[told.rule].roles)
    known: dict[tuple[tuple[str, str], ...], Update] = {}
    found: dict[str, Update] = {}
    for group, roles in by_group.items():
        if sorted(roles.values()) == needed:
            key = tuple(sorted(roles.items()))
            found[group] = known.setdefault(key, Update(told.rule, key, numbers))
    return found


def step_in(leaves: Mapping[str, Any]) -> int:
    """How many updates optax has counted, by the leaves' paths; 1 if it does not count."""
    count = next((v for path, v in leaves.items() if path.rpartition("/")[2] == "count"), 1)
    return int(count)
