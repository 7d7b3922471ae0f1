"""Lion, as optax and its authors compute it.

Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023. With m the moment, w
the weight, g the gradient:

    w' = w − lr (decay w + sign(beta1 m + (1 − beta1) g))        m' = beta2 m + (1 − beta2) g
"""

from __future__ import annotations

from typing import Any

import numpy as np

from asymcheck.codecs.rules.base import (
    Constants,
    Form,
    MomentForm,
    Numbers,
    Rule,
    f32,
    f64,
    no_constants,
    weighted_sum,
    weighted_sum_inverse,
    weighted_sum_unfused,
)


def _weight_optax(k: Constants, w: Any, m: Any, g: Any) -> Any:
    return f32(f64(k[0]) * f64(np.sign(k[2] * m + k[3] * g) + k[1] * w) + f64(w))


def _weight_decayed_first(k: Constants, w: Any, m: Any, g: Any) -> Any:
    return k[1] * w + k[0] * np.sign(k[2] * m + k[3] * g)


def _magnitude(_k: Constants, m: Any) -> Any:
    return np.abs(m)


def _of_moment(numbers: Numbers) -> tuple[float, ...]:
    return numbers["beta2"], 1 - numbers["beta2"]


def _of_optax(numbers: Numbers) -> tuple[float, ...]:
    return -numbers["lr"], numbers["decay"], numbers["beta1"], 1 - numbers["beta1"]


def _of_decayed_first(numbers: Numbers) -> tuple[float, ...]:
    lr, decay, beta1 = numbers["lr"], numbers["decay"], numbers["beta1"]
    return -lr, 1 - lr * decay, beta1, 1 - beta1


LION = Rule(
    "lion",
    ("lr", "beta1", "beta2", "decay", "l2"),
    "first",
    (
        MomentForm(weighted_sum, weighted_sum_inverse, _of_moment),
        MomentForm(weighted_sum_unfused, weighted_sum_inverse, _of_moment),
    ),
    {
        "weight": (
            Form(("weight", "first", "gradient"), _weight_optax, _of_optax),
            Form(("weight", "first", "gradient"), _weight_decayed_first, _of_decayed_first),
        )
    },
    Form(("first",), _magnitude, no_constants),
)
