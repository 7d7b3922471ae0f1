"""The updates that optimizers make, as `asymcheck.codecs.rules` knows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from asymcheck.codecs.rules import CAPTURED, RULES
from asymcheck.state import Update
from asymcheck_torch.gradients import GRADIENTS
from asymcheck_torch.optimizers import kind_of

_ADAMS = frozenset({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"})
_LIONS = frozenset({"Lion", "FusedLion", "DeepSpeedCPULion"})
_ROLES = {
    "adam": {"exp_avg": "first", "exp_avg_sq": "second"},
    "amsgrad": {"exp_avg": "first", "exp_avg_sq": "second", "max_exp_avg_sq": "largest"},
    "sgd": {"momentum_buffer": "first"},
    "descent": {},
    "lion": {"exp_avg": "first"},
}


def update_of(
    optimizer: Optimizer, index: int, group: Mapping[str, Any], step: float
) -> Update | None:
    """The update that a parameter of a group has just had, its `step`-th; None if not known.

    By the names of the optimizer's classes: if one only looks like another it is predicted badly,
    and its checkpoints are as large as without.

    Args:
        optimizer: which.
        index: its number among those of the run.
        group: one of its `param_groups`, with the options that it has just stepped with.
        step: updates so far.
    """
    names = {each.__name__ for each in type(optimizer).__mro__}
    try:
        if names & _ADAMS:
            rule = "amsgrad" if group.get("amsgrad") else "adam"
            numbers = _adam(optimizer, group, step)
        elif names & _LIONS:
            rule, numbers = "lion", _lion(group)
        elif "SGD" in names:
            rule, numbers = "sgd" if group["momentum"] else "descent", _sgd(group)
        else:
            return None
    except (KeyError, TypeError, ValueError):
        return None  # an optimizer of that name with other options
    if not all(math.isfinite(number) for number in numbers.values()):
        return None
    roles = {"params": "weight"}
    if not group.get("maximize"):  # then its negative is the one that is replayed
        roles[GRADIENTS] = CAPTURED
    roles |= {kind_of(index, key): role for key, role in _ROLES[rule].items()}
    return Update(rule, tuple(roles.items()), {k: numbers[k] for k in RULES[rule].numbers})


def _adam(optimizer: Optimizer, group: Mapping[str, Any], step: float) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    decoupled = group.get("decoupled_weight_decay", getattr(optimizer, "adam_w_mode", False))
    decay = _number(group["weight_decay"])
    return {
        "lr": _number(group["lr"]),
        "beta1": _number(beta1),
        "beta2": _number(beta2),
        "eps": _number(group["eps"]),
        "decay": decay if decoupled else 0.0,
        "l2": 0.0 if decoupled else decay,
        "step": step,
        "corrects_bias": float(bool(group.get("bias_correction", True))),
    }


def _lion(group: Mapping[str, Any]) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    return {
        "lr": _number(group["lr"]),
        "beta1": _number(beta1),
        "beta2": _number(beta2),
        "decay": _number(group.get("weight_decay", 0.0)),
        "l2": 0.0,
    }


def _sgd(group: Mapping[str, Any]) -> dict[str, float]:
    return {
        "lr": _number(group["lr"]),
        "momentum": _number(group["momentum"]),
        "dampening": _number(group["dampening"]),
        "l2": _number(group["weight_decay"]),
    }


def _number(value: Any) -> float:
    """`ValueError` for what lies on a device: to look at it would wait for the device."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        raise ValueError("on a device")
    return float(value)


def step_of(state: Mapping[str, Any], otherwise: int) -> float:
    """How many updates a parameter has had, by its optimizer state."""
    step = state.get("step", otherwise)
    if isinstance(step, torch.Tensor) and (step.device.type != "cpu" or step.ndim):
        return float(otherwise)
    return float(step) if isinstance(step, int | float | torch.Tensor) else float(otherwise)
