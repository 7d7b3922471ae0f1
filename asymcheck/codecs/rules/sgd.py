"""SGD with momentum, as torch and optax compute it.

Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
With b the momentum buffer, w the weight, g the gradient (its L2 term included):

    b' = momentum b + (1 − dampening) g        w' = w − lr (b', or with Nesterov g + momentum b')
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
    descended,
    descended_fused,
    f32,
    f64,
    no_constants,
    step_size,
    weighted_sum,
    weighted_sum_inverse,
    weighted_sum_unfused,
)


def _weight_nesterov(k: Constants, w: Any, b: Any, g: Any) -> Any:
    return f32(f64(k[0]) * f64(f32(f64(k[1]) * f64(b) + f64(g))) + f64(w))


def _magnitude(_k: Constants, b: Any) -> Any:
    return np.abs(b)


def _of_buffer(numbers: Numbers) -> tuple[float, ...]:
    return numbers["momentum"], 1 - numbers["dampening"]


def _of_nesterov(numbers: Numbers) -> tuple[float, ...]:
    return -numbers["lr"], numbers["momentum"]


SGD = Rule(
    "sgd",
    ("lr", "momentum", "dampening", "l2"),
    "first",
    (
        MomentForm(weighted_sum_unfused, weighted_sum_inverse, _of_buffer),
        MomentForm(weighted_sum, weighted_sum_inverse, _of_buffer),
    ),
    {
        "weight": (
            Form(("first'", "weight"), descended_fused, step_size),
            Form(("first'", "weight"), descended, step_size),
            Form(("weight", "first'", "gradient"), _weight_nesterov, _of_nesterov),
        )
    },
    Form(("first",), _magnitude, no_constants),
)
