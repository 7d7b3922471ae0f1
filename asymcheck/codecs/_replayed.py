"""What `replay` computes: an update's formulas over the elements of a block.

A role's elements are words of its dtype in columns, and float32 numbers here: those of low
precision are widened to be computed with, and what is predicted for them is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from asymcheck.codecs import _grid
from asymcheck.codecs._grid import Grid
from asymcheck.codecs.kernels import Floats, Words, kernels
from asymcheck.codecs.rules.base import Form, MomentForm, Numbers, Rule
from asymcheck.codecs.rules.captured import CAPTURED

Values = dict[str, Floats]
"""Arrays by name: roles hold old values, with a prime new ones, with a tilde what was predicted
for new ones of low precision before it was rounded, else the new ones; and `gradient`."""

_FLOAT32, _WORD = np.dtype("<f4"), np.dtype("<u4")
_LOW_WORD = np.dtype("<u2")


def words_of(values: Floats) -> Words:
    """The bit patterns, in the same memory."""
    return values.view(_WORD)


def widened(words: Words, dtype: np.dtype[Any]) -> Floats:
    """The values of words of a dtype; of float32 in the same memory."""
    if dtype.itemsize == 4:
        return words.view(_FLOAT32)
    if dtype.name == "bfloat16":  # whatever a NaN holds
        return (words.astype(_WORD) << np.uint32(16)).view(_FLOAT32)
    with np.errstate(all="ignore"):
        values = words.view(dtype).astype(_FLOAT32)
    nan = np.isnan(values)
    if nan.any():  # processors make other ones of them
        bits = words[nan].astype(_WORD)
        sign, payload = (bits & np.uint32(0x8000)) << 16, (bits & np.uint32(0x3FF)) << 13
        values.view(_WORD)[nan] = sign | np.uint32(0x7F800000) | payload
    return values


def narrowed(values: Floats, dtype: np.dtype[Any], otherwise: Words) -> Words:
    """Values rounded to a dtype, ties to even; where they are NaN, `otherwise`.

    Of float32 as they are, in the same memory: there formulas give no NaN that is not meant.
    """
    if dtype.itemsize == 4:
        return words_of(values)
    with np.errstate(all="ignore"):
        low = values.astype(dtype).view(_LOW_WORD)
    return np.where(np.isnan(values), otherwise, low)


def note_unrounded(values: Values, role: str, dtype: np.dtype[Any], found: Floats | None) -> None:
    """Add what stands for a role's new values unrounded, of which `found` was predicted."""
    if found is None or dtype.itemsize == 4:
        found = values[f"{role}'"]
    values[f"{role}~"] = found


def computed(
    formula: Any, constants: Any, inputs: Sequence[Floats], otherwise: Floats, out: Any = None
) -> Floats:
    """formula(constants, *inputs), and where that is NaN `otherwise`."""
    result: Floats = np.empty_like(otherwise) if out is None else out
    kernels().compute(formula, constants, inputs, words_of(otherwise), words_of(result))
    return result


def predicted(form: Form, numbers: Numbers, values: Values, role: str, out: Any = None) -> Floats:
    """What a form gives for a role; may be computed into the memory of its old values."""
    inputs = [values[name] for name in form.inputs]
    constants = form.constants_of(numbers)
    return computed(form.compute, constants, inputs, values[role], out)


def moment(
    form: MomentForm, numbers: Numbers, gradient: Floats, old: Floats, out: Any = None
) -> Floats:
    """The state that a gradient makes of `old`."""
    return computed(form.forward, form.constants_of(numbers), (gradient, old), old, out)


def estimated(form: MomentForm, numbers: Numbers, new: Floats, old: Floats) -> Floats:
    """The gradient that made `new` of `old`, about; where there is none, `old`."""
    return computed(form.inverse, form.constants_of(numbers), (new, old), old)


def snapped(grid: Grid, l2: float, estimate: Floats, weight: Floats) -> Floats:
    """Grid numbers, as they come back when they are folded and unfolded."""
    constants, numbers = _grid.constants_of(grid, l2), np.zeros_like(estimate)
    if l2:
        computed(_grid.snap_decayed, constants, (estimate, weight), numbers, numbers)
    else:
        computed(_grid.snap, constants, (estimate,), numbers, numbers)
    words = words_of(numbers)  # subnormal ones may have more bits
    np.bitwise_and(words, ~np.uint32((1 << (24 - grid.bits)) - 1), out=words)
    return numbers


def gradient_of(grid: Grid, l2: float, numbers: Floats, weight: Floats) -> Floats:
    """The gradient of grid numbers, with its L2 term."""
    constants = _grid.constants_of(grid, l2)
    if l2:
        return computed(_grid.scaled_decayed, constants, (numbers, weight), numbers)
    return computed(_grid.scaled, constants, (numbers,), numbers)


def l2_of(rule: Rule, numbers: Numbers) -> float:
    """The L2 term in the gradients of a rule's first role: captured ones are without."""
    return 0.0 if rule.moment == CAPTURED else numbers["l2"]


def decayed(values: Values, numbers: Numbers) -> Floats:
    """The gradient of a captured one."""
    new, l2 = values[f"{CAPTURED}'"], numbers["l2"]
    return gradient_of(_grid.UNSCALED["float32"], l2, new, values["weight"]) if l2 else new


def folded(numbers: Floats, grid: Grid) -> Words:
    """Signs lowest, and no bits that the grid does not have."""
    words = np.empty(numbers.size, _WORD)
    kernels().fold(words_of(numbers), 24 - grid.bits, words)
    return words


def unfolded(words: Words, grid: Grid) -> Floats:
    """Inverse of `folded`, in place."""
    kernels().unfold(words, 24 - grid.bits, words)
    return words.view(_FLOAT32)
