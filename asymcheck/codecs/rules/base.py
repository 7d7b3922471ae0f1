"""What an update rule is: formulas that give the new state from the old one and the gradient.

Formulas are elementwise, in float32 and float64 of IEEE 754 with rounding to nearest, each
operation rounded by itself in the order written, so that every machine gives the same bits. They
are plain functions that work on scalars and on arrays alike: numba compiles their loops, NumPy runs
them as they are. Where an optimizer uses a fused multiply-add, the formula takes the exact product
of two float32 in float64, adds in float64 and rounds once more (`fused`): equal to the fused
operation but for cases so rare that they do not matter to a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

f32: Any = np.float32
f64: Any = np.float64

Constants = tuple[Any, ...]
"""float32 numbers."""

Numbers = Mapping[str, float]
"""Hyperparameters by name."""

Formula = Callable[..., Any]
"""(constants, *inputs) -> float32."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which optimizers compute a quantity.

    Attributes:
        inputs: what `compute` takes after the constants: roles (old values), roles with a prime
            (new values, of roles decoded before this one) or a tilde (the same unrounded),
            `gradient`.
        compute: the formula.
        constants: what it takes of the hyperparameters.
    """

    inputs: tuple[str, ...]
    compute: Formula
    constants: Callable[[Numbers], tuple[float, ...]]

    def constants_of(self, numbers: Numbers) -> Constants:
        """What the formula takes."""
        return _in_float32(self.constants, numbers)


@dataclass(frozen=True, slots=True)
class MomentForm:
    """A state from the gradient, and the gradient back from two successive states.

    Both formulas take the same constants: `forward` (constants, gradient, old), `inverse`
    (constants, new, old).
    """

    forward: Formula
    inverse: Formula
    constants: Callable[[Numbers], tuple[float, ...]]

    def constants_of(self, numbers: Numbers) -> Constants:
        """What both formulas take."""
        return _in_float32(self.constants, numbers)


@dataclass(frozen=True, slots=True)
class Rule:
    """An optimizer.

    Attributes:
        id: its name in manifests.
        numbers: the hyperparameters that it takes, all finite.
        moment: the role of the state that the gradient is found from: the first moment, if there
            is one.
        moments: the forms of that.
        forms: of all other roles, in the order in which they are decoded.
        reference: about the size of the gradient, from old values.
    """

    id: str
    numbers: tuple[str, ...]
    moment: str
    moments: tuple[MomentForm, ...]
    forms: Mapping[str, tuple[Form, ...]]
    reference: Form

    @property
    def roles(self) -> tuple[str, ...]:
        """What the rule needs of a parameter."""
        return (self.moment, *self.forms)


def _in_float32(constants: Callable[[Numbers], tuple[float, ...]], numbers: Numbers) -> Constants:
    """Too large ones become infinite."""
    with np.errstate(all="ignore"):
        return tuple(f32(value) for value in constants(numbers))


def weighted_sum(k: Constants, g: Any, moment: Any) -> Any:
    """A first moment: k[0] moment + k[1] g, with one fused operation."""
    return f32(f64(k[0]) * f64(moment) + f64(k[1] * g))


def weighted_sum_gradient_fused(k: Constants, g: Any, moment: Any) -> Any:
    """The same with the other one fused."""
    return f32(f64(k[1]) * f64(g) + f64(k[0] * moment))


def weighted_sum_unfused(k: Constants, g: Any, moment: Any) -> Any:
    """The same, each operation rounded."""
    return k[0] * moment + k[1] * g


def weighted_sum_inverse(k: Constants, new: Any, old: Any) -> Any:
    """The g of both."""
    return f32((f64(new) - f64(k[0]) * f64(old)) / f64(k[1]))


def descended(k: Constants, direction: Any, weight: Any) -> Any:
    """A weight: weight + k[0] direction, each operation rounded."""
    return weight + k[0] * direction


def descended_fused(k: Constants, direction: Any, weight: Any) -> Any:
    """The same with a fused operation."""
    return f32(f64(k[0]) * f64(direction) + f64(weight))


def step_size(numbers: Numbers) -> tuple[float, ...]:
    """What both take."""
    return (-numbers["lr"],)


def no_constants(_numbers: Numbers) -> tuple[float, ...]:
    """For formulas without any."""
    return ()


def power(base: float, exponent: float) -> float:
    """base ** exponent for a whole exponent >= 0, by products: the same bits on every machine."""
    result, square, rest = 1.0, base, max(0, int(exponent))
    while rest:
        if rest & 1:
            result *= square
        square *= square
        rest >>= 1
    return result
