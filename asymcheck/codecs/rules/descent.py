"""Plain gradient descent (SGD without momentum), as torch and optax compute it.

With w the weight and g the gradient (its L2 term included): w' = w − lr g. There is no moment: the
gradient is found from the weight itself, to a few bits less.
"""

from __future__ import annotations

from typing import Any

from asymcheck.codecs.rules.base import (
    Constants,
    Form,
    MomentForm,
    Numbers,
    Rule,
    f32,
    f64,
    no_constants,
)


def _weight(k: Constants, g: Any, w: Any) -> Any:
    return w + k[0] * g


def _weight_fused(k: Constants, g: Any, w: Any) -> Any:
    return f32(f64(k[0]) * f64(g) + f64(w))


def _gradient(k: Constants, new: Any, old: Any) -> Any:
    return f32((f64(new) - f64(old)) / f64(k[0]))


def _nothing(_k: Constants, w: Any) -> Any:
    return f32(0) * w  # as an array; the old state does not tell the size of gradients


def _of_weight(numbers: Numbers) -> tuple[float, ...]:
    return (-numbers["lr"],)


DESCENT = Rule(
    "descent",
    ("lr", "l2"),
    "weight",
    (
        MomentForm(_weight_fused, _gradient, _of_weight),
        MomentForm(_weight, _gradient, _of_weight),
    ),
    {},
    Form(("weight",), _nothing, no_constants),
)
