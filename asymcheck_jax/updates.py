"""The update that a training step has made, told by whoever saves: increments replay it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from asymcheck.codecs.replay import are_roles
from asymcheck.codecs.rules import CAPTURED
from asymcheck.state import LeafSource, Update
from asymcheck_jax.recording import RECORDED

Schedule = float | Callable[[int], Any]
"""A learning rate, or an optax schedule of the number of updates before."""

_ROLES = {
    "adam": {"params": "weight", "mu": "first", "m": "first", "nu": "second", "v": "second"},
    "lion": {"params": "weight", "mu": "first", "m": "first"},
    "sgd": {"params": "weight", "trace": "first"},
    "descent": {"params": "weight"},
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
    """An update by `optax.sgd`, with its arguments; see `AdamUpdate`."""

    learning_rate: Schedule
    momentum: float | None = None

    @property
    def rule(self) -> str:
        """See `OptimizerUpdate`."""
        return "descent" if self.momentum is None else "sgd"

    def numbers(self, step: int) -> Mapping[str, float]:
        """See `OptimizerUpdate`."""
        plain = {"lr": _rate(self.learning_rate, step), "l2": 0.0}
        if self.momentum is None:
            return plain
        return plain | {"momentum": self.momentum, "dampening": 0.0}


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
    role_of = _ROLES[told.rule] | {RECORDED: CAPTURED}
    for source in sources:
        prefix = source.leaf.path.removesuffix(f"/{source.group}")
        role = role_of.get(prefix.rpartition("/")[2])
        if role is not None:
            roles = by_group[source.group]
            if role == CAPTURED:  # what was recorded last came next to the optimizer
                by_group[source.group] = roles = {p: r for p, r in roles.items() if r != CAPTURED}
            roles[prefix] = role
    known: dict[tuple[tuple[str, str], ...], Update] = {}
    found: dict[str, Update] = {}
    for group, roles in by_group.items():
        if are_roles(told.rule, [*roles.values()]):
            key = tuple(sorted(roles.items()))
            found[group] = known.setdefault(key, Update(told.rule, key, numbers))
    return found


def step_in(leaves: Mapping[str, Any]) -> int:
    """How many updates optax has counted, by the leaves' paths; 1 if it does not count."""
    count = next((v for path, v in leaves.items() if path.rpartition("/")[2] == "count"), 1)
    return int(count)
