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
    Rule,
    descended,
    descended_fused,
    f32,
    f64,
    no_constants,
    step_size,
)


def _gradient(k: Constants, new: Any, old: Any) -> Any:
    return f32((f64(new) - f64(old)) / f64(k[0]))


def _nothing(_k: Constants, w: Any) -> Any:
    return f32(0) * w  # as an array; the old state does not tell the size of gradients


DESCENT = Rule(
    "descent",
    ("lr", "l2"),
    "weight",
    (
        MomentForm(descended_fused, _gradient, step_size),
        MomentForm(descended, _gradient, step_size),
    ),
    {},
    Form(("weight",), _nothing, no_constants),
)
