"""How `replay` stores each role of a block in the fewest bits, found out on a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asymcheck.codecs import _grid
from asymcheck.codecs._grid import Grid, find_grid
from asymcheck.codecs._replayed import (
    Values,
    decayed,
    estimated,
    gradient_of,
    l2_of,
    moment,
    narrowed,
    note_unrounded,
    predicted,
    snapped,
    widened,
)
from asymcheck.codecs.kernels import Floats, Words
from asymcheck.codecs.rules.base import Form, MomentForm, Numbers, Rule
from asymcheck.codecs.rules.captured import CAPTURED, takes_unrounded

DIFFERENCE, PREDICTION, GRADIENT = range(3)
"""Modes of a column: the difference to the old value, to the prediction, a gradient and that."""

_SAMPLE_STRETCHES, _SAMPLE_STRETCH = 32, 128
_EXPONENT_BITS = 3.0  # about what the exponents of gradients take


@dataclass(frozen=True, slots=True)
class Cells:
    """The elements of a role.

    Attributes:
        dtype: theirs.
        old, new: their words before and after the update.
    """

    dtype: np.dtype[Any]
    old: Words
    new: Words

    def bits(self, prediction: Floats) -> float:
        """About how many bits an element takes as difference to a prediction."""
        return _bits(self.new, narrowed(prediction, self.dtype, self.old))

    @property
    def bits_of_difference(self) -> float:
        """About how many bits an element takes as difference to the old value."""
        return _bits(self.new, self.old)

    def sample(self) -> Cells:
        """Stretches, the same elements of columns of one length."""
        size = self.new.size
        if size <= _SAMPLE_STRETCHES * _SAMPLE_STRETCH:
            return self
        begins = np.arange(_SAMPLE_STRETCHES) * (size // _SAMPLE_STRETCHES)
        index = (begins[:, None] + np.arange(_SAMPLE_STRETCH)).ravel()
        return Cells(self.dtype, self.old[index], self.new[index])


def values_of(cells: Mapping[str, Cells]) -> Values:
    """Old and new values of all roles, to compute with."""
    values = {role: widened(cell.old, cell.dtype) for role, cell in cells.items()}
    return values | {f"{role}'": widened(cell.new, cell.dtype) for role, cell in cells.items()}


def _bits(new: Words, prediction: Words) -> float:
    if not new.size:
        return 0.0
    signed = np.dtype(f"<i{new.itemsize}")
    difference = new.view(signed).astype(np.int64) - prediction.view(signed)
    return float(np.mean(np.log2(1 + 2 * np.abs(difference))))


@dataclass(frozen=True, slots=True)
class Choice:
    """How a role is stored: mode, number of the form, and the grid of a stored gradient."""

    mode: int
    form: int
    grid: Grid | None = None


class Chooser:
    """Finds out on a sample how each role is stored in the fewest bits."""

    def __init__(self, rule: Rule, numbers: Numbers, cells: Mapping[str, Cells]) -> None:
        self._rule = rule
        self._numbers = numbers
        self._cells = {role: cell.sample() for role, cell in cells.items()}
        self._values = values_of(self._cells)
        self._l2 = l2_of(rule, numbers)
        self._rounds = any(self._cells[role].dtype.itemsize != 4 for role in rule.forms)

    def choices(self) -> dict[str, Choice]:
        """One for every role of the rule."""
        rule = self._rule
        of_moment = {rule.moment: self._choose_moment()}  # before all others
        return of_moment | {role: self._choose_form(role, f) for role, f in rule.forms.items()}

    def _choose_form(self, role: str, forms: Sequence[Form]) -> Choice:
        """Leaves what it predicts among the values."""
        cell, values = self._cells[role], self._values
        best = cell.bits_of_difference, Choice(DIFFERENCE, 0), None
        for number, form in enumerate(forms):
            if not self._rounds and takes_unrounded(form):
                continue
            found = predicted(form, self._numbers, values, role)
            if (bits := cell.bits(found)) < best[0]:
                best = bits, Choice(PREDICTION, number), found
        note_unrounded(values, role, cell.dtype, best[2])
        return best[1]

    def _choose_moment(self) -> Choice:
        """Leaves the gradient of the choice among the values."""
        role, forms = self._rule.moment, self._rule.moments
        cells, old, new = self._cells[role], self._values[role], self._values[f"{role}'"]
        weight = self._values["weight"]
        estimates = [estimated(form, self._numbers, new, old) for form in forms]
        best = cells.bits_of_difference, Choice(DIFFERENCE, 0), estimates[0]
        for grid in self._grids(estimates[0], new, old):
            for number, form in enumerate(forms):
                grid_numbers = snapped(grid, self._l2, estimates[number], weight)
                gradient = gradient_of(grid, self._l2, grid_numbers, weight)
                missed = cells.bits(moment(form, self._numbers, gradient, old))
                cost = missed + grid.bits + _EXPONENT_BITS
                if cost < best[0]:
                    best = cost, Choice(GRADIENT, number, grid), gradient
        self._values["gradient"] = best[2]
        if role == CAPTURED:
            self._values["gradient"] = decayed(self._values, self._numbers)
        return best[1]

    def _grids(self, estimate: Floats, new: Floats, old: Floats) -> list[Grid]:
        """Those on which gradients may lie."""
        with np.errstate(all="ignore"):
            undecayed: Any = estimate - np.float32(self._l2) * self._values["weight"]
        found = find_grid(undecayed, self._errors(self._rule.moments[0], new, old))
        grids = [] if found is None else _neighbours(found)
        if self._rule.moment == CAPTURED:
            grids.append(_grid.UNSCALED[self._cells[CAPTURED].dtype.name])
        return grids

    def _errors(self, form: MomentForm, new: Floats, old: Floats) -> Floats:
        """By how much gradients change if `new` does by a unit in the last place."""
        with np.errstate(all="ignore"):
            next_to_new = np.nextafter(new, np.float32(np.inf))
            return np.abs(
                estimated(form, self._numbers, next_to_new, old)
                - estimated(form, self._numbers, new, old)
            )


def _neighbours(grid: Grid) -> list[Grid]:
    """The grid, and those of the next scales: it was found to within a unit in the last place."""
    scale = np.float32(grid.scale)
    near = (scale, np.nextafter(scale, np.float32(0)), np.nextafter(scale, np.float32(4)))
    return [Grid(grid.bits, float(each)) for each in near]
