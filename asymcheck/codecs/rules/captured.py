"""Rules for updates of which the gradient is known: training has captured it.

It is a further role, before all others, and stored as one that was found from a moment is. That
moment follows from it as everything else does.

Optimizers that keep moments in low precision compute the weight before they round them. So what
was predicted before rounding is an input of further forms: a role with a tilde. JAX rounds the
factor of a moment in bfloat16, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from asymcheck.codecs.rules.base import (
    Constants,
    Form,
    MomentForm,
    Numbers,
    Rule,
    f32,
    no_constants,
    weighted_sum_gradient_fused,
)

CAPTURED = "captured"
"""The role of the gradient: as the optimizer is given it, before it adds an L2 term."""


def _given(_k: Constants, g: Any, _old: Any) -> Any:
    return g


def _itself(_k: Constants, new: Any, _old: Any) -> Any:
    return new


def _with_low_factor(
    constants: Callable[[Numbers], tuple[float, ...]], numbers: Numbers
) -> tuple[float, ...]:
    """The constants of a first moment, the first of them rounded to bfloat16."""
    factor, other = constants(numbers)
    with np.errstate(all="ignore"):
        return float(f32(factor).astype(ml_dtypes.bfloat16)), other


def _with_unrounded(forms: tuple[Form, ...]) -> tuple[Form, ...]:
    """The forms, and again those that take new values of other roles, with these unrounded."""
    more = [(tuple(name.replace("'", "~") for name in form.inputs), form) for form in forms]
    return (
        *forms,
        *(Form(i, f.compute, f.constants) for i, f in more if i != f.inputs),
    )


def takes_unrounded(form: Form) -> bool:
    """Whether it is one of those further forms."""
    return any(name.endswith("~") for name in form.inputs)


def captured(rule: Rule) -> Rule:
    """The rule with the gradient as a role."""
    inputs = "gradient", rule.moment
    first = [Form(inputs, form.forward, form.constants) for form in rule.moments]
    if rule.moment == "first":
        constants = partial(_with_low_factor, rule.moments[0].constants)
        first.append(Form(inputs, weighted_sum_gradient_fused, constants))
    given = MomentForm(_given, _itself, no_constants)
    others = {role: _with_unrounded(forms) for role, forms in rule.forms.items()}
    forms = {rule.moment: tuple(first), **others}
    return Rule(rule.id, rule.numbers, CAPTURED, (given,), forms, rule.reference)
