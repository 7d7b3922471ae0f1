"""Adam and AdamW, as torch and optax compute them.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; Loshchilov and Hutter,
"Decoupled Weight Decay Regularization", ICLR 2019. With m, v the moments, w the weight, g the
gradient (its L2 term included), c1 = 1 − beta1^step and c2 = 1 − beta2^step (or both 1):

    m' = beta1 m + (1 − beta1) g        v' = beta2 v + (1 − beta2) g²
    w' = w − lr (decay w + (m' / c1) / (sqrt(v' / c2) + eps))

`amsgrad` divides by the largest v' so far (Reddi et al., ICLR 2018). The forms of a formula differ
in rounding only.
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
    power,
    weighted_sum,
    weighted_sum_inverse,
    weighted_sum_unfused,
)

_where: Any = np.where

NUMBERS = ("lr", "beta1", "beta2", "eps", "decay", "l2", "step", "corrects_bias")


def _lerp(k: Constants, g: Any, m: Any) -> Any:
    return f32(f64(k[1]) * f64(g - m) + f64(m))


def _lerp_inverse(k: Constants, new: Any, old: Any) -> Any:
    return f32((f64(new) - f64(old)) / f64(k[1]) + f64(old))


def _square_torch(k: Constants, g: Any, v: Any) -> Any:
    return f32(f64(k[1] * g) * f64(g) + f64(k[0] * v))


def _square_cuda(k: Constants, g: Any, v: Any) -> Any:
    return f32(f64(k[1]) * f64(g * g) + f64(k[0] * v))


def _square_optax(k: Constants, g: Any, v: Any) -> Any:
    return f32(f64(k[0]) * f64(v) + f64(k[1] * (g * g)))


def _weight_torch(k: Constants, w: Any, m: Any, v: Any) -> Any:
    return k[0] * w + (k[1] * m) / (np.sqrt(v) / k[2] + k[3])


def _weight_cuda(k: Constants, w: Any, m: Any, v: Any) -> Any:
    return f32(f64(k[1]) * f64(m / (np.sqrt(v) / k[2] + k[3])) + f64(k[0] * w))


def _weight_optax(k: Constants, w: Any, m: Any, v: Any) -> Any:
    u: Any = (m * k[1]) / (np.sqrt(v * k[2]) + k[3])
    return f32(f64(k[0]) * f64(u + k[4] * w) + f64(w))


def _largest(_k: Constants, largest: Any, v: Any) -> Any:
    return _where(v > largest, v, largest)  # np.maximum may give either of two zeros


def _root(_k: Constants, v: Any) -> Any:
    return np.sqrt(v)


def _of_first(numbers: Numbers) -> tuple[float, ...]:
    return numbers["beta1"], 1 - numbers["beta1"]


def _of_second(numbers: Numbers) -> tuple[float, ...]:
    return numbers["beta2"], 1 - numbers["beta2"]


def _corrections(numbers: Numbers) -> tuple[float, float]:
    if not numbers["corrects_bias"]:
        return 1.0, 1.0
    step = numbers["step"]
    return 1 - power(numbers["beta1"], step), 1 - power(numbers["beta2"], step)


def _of_torch(numbers: Numbers) -> tuple[float, ...]:
    first, second = _corrections(numbers)
    lr = numbers["lr"]
    step_size = f64(-lr) / f64(first)  # infinite at step 0, which nobody makes
    return 1 - lr * numbers["decay"], float(step_size), float(np.sqrt(f64(second))), numbers["eps"]


def _of_optax(numbers: Numbers) -> tuple[float, ...]:
    first, second = _corrections(_in_float32(numbers))
    inverses = float(f32(1) / f32(first)), float(f32(1) / f32(second))
    return -numbers["lr"], *inverses, numbers["eps"], numbers["decay"]


def _in_float32(numbers: Numbers) -> Numbers:
    return dict(numbers) | {key: float(f32(numbers[key])) for key in ("beta1", "beta2")}


def _weights(second: str) -> tuple[Form, ...]:
    inputs = ("weight", "first'", second)
    return (
        Form(inputs, _weight_torch, _of_torch),
        Form(inputs, _weight_optax, _of_optax),
        Form(inputs, _weight_cuda, _of_torch),
    )


_MOMENTS = (
    MomentForm(_lerp, _lerp_inverse, _of_first),
    MomentForm(weighted_sum, weighted_sum_inverse, _of_first),
    MomentForm(weighted_sum_unfused, weighted_sum_inverse, _of_first),
)
_SECONDS = (
    Form(("gradient", "second"), _square_torch, _of_second),
    Form(("gradient", "second"), _square_optax, _of_second),
    Form(("gradient", "second"), _square_cuda, _of_second),
)
_REFERENCE = Form(("second",), _root, no_constants)

ADAM = Rule(
    "adam",
    NUMBERS,
    "first",
    _MOMENTS,
    {"second": _SECONDS, "weight": _weights("second'")},
    _REFERENCE,
)
AMSGRAD = Rule(
    "amsgrad",
    NUMBERS,
    "first",
    _MOMENTS,
    {
        "second": _SECONDS,
        "largest": (Form(("largest", "second'"), _largest, no_constants),),
        "weight": _weights("largest'"),
    },
    _REFERENCE,
)
