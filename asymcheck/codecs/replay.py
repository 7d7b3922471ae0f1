"""Lossless coding of a change, level 3: the optimizer's step is replayed, its misses are stored.

Of a parameter's weight and moments only the gradient is new: everything else follows from it and
from the old state. The gradient is found from the old and the new first moment. Where it lies on
a grid (`_grid`), as that of mixed-precision training does, its grid number is stored, and the
first moment follows as well; else the first moment's bit difference is stored, and the gradient
follows from that. From it the others are computed by the optimizer's rule (`rules`), and the
difference of the bit patterns to what came out is stored, by which the result is exact whatever
the prediction missed. Where the difference to the old value is smaller, that is taken.

Copies of the weight in low precision are predicted by rounding it.

Where training has captured the gradient it is a column of its own, with the role `captured`: it
is stored as one that was found, and the first moment follows from it, too.

Roles of low precision are computed with in float32; what is predicted for them is rounded.

Layout of a payload, integers little-endian, P standing for what `plane_payload` describes:

| offset | bytes | field |
| --- | --- | --- |
| 0 | 1 | mode: 0 difference to the old value, 1 to the prediction, 2 gradient and the latter |
| 1 | 1 | number of the form (of the rule's first role also in mode 0) |
| 2 | | modes 0 and 1: P of the differences |

Mode 2, of the rule's first role only: the captured gradient, else the first moment:

| offset | bytes | field |
| --- | --- | --- |
| 2 | 1 | bits of a grid number's significand: 8, 11, or 24 (only of a captured gradient) |
| 3 | 4 | scale, float32, finite and not 0 |
| 7 | 8 | g |
| 15 | g | P of the folded grid numbers' differences to the folded reference |
| 15 + g | | P of the differences to the prediction |
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from asymcheck.codecs import _grid, plane_payload
from asymcheck.codecs._columns import as_words, base_of, paired, word_width
from asymcheck.codecs._floats import ieee_arithmetic
from asymcheck.codecs._grid import Grid
from asymcheck.codecs._replay_choice import (
    DIFFERENCE,
    GRADIENT,
    PREDICTION,
    Cells,
    Choice,
    Chooser,
    values_of,
)
from asymcheck.codecs._replayed import (
    Values,
    decayed,
    estimated,
    folded,
    gradient_of,
    l2_of,
    moment,
    narrowed,
    note_unrounded,
    predicted,
    snapped,
    unfolded,
    widened,
)
from asymcheck.codecs.base import Column, JsonValue, max_payload_nbytes
from asymcheck.codecs.kernels import Floats
from asymcheck.codecs.rules import CAPTURED, RULES, Rule, rule_for
from asymcheck.codecs.rules.base import Numbers
from asymcheck.errors import CodecError

COPY, OTHER = "copy", "other"

_HEADER = struct.Struct("<BB")
_GRID = struct.Struct("<BfQ")
_LOW_PRECISION = ("bfloat16", "float16")
_PRECISIONS = ("float32", *_LOW_PRECISION)


@dataclass(frozen=True, slots=True)
class ReplayCodec:
    """Weights and moments of a parameter, predicted by the rule of their optimizer.

    Exact for every bit pattern, also where the rule or its numbers are wrong: then it costs a
    little more than `delta` does.

    Args:
        rule: of `rules.RULES`.
        roles: of each column: one of the rule's, `copy` (of the weight, in low precision), or
            `other`. Each of the rule's stands once, and perhaps `captured`, for the gradient; all
            these and the copies have as many elements.
        numbers: the rule's hyperparameters at the step that is replayed.

    Raises:
        CodecError: there is no such rule, or roles and numbers are not those that it takes.
    """

    rule: str = "adam"
    roles: tuple[str, ...] = ("first", "second", "weight")
    numbers: Mapping[str, float] = field(default_factory=lambda: dict(_PLAIN_ADAM))

    id = "replay"
    needs_base = True
    lossy = False
    joint = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise CodecError("no update rule of that name", expected=[*RULES], found=self.rule)
        object.__setattr__(self, "roles", _checked_roles(self.rule, self.roles))
        _check_numbers(RULES[self.rule], self.numbers)

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """All arguments: what decoding replays."""
        return {"rule": self.rule, "roles": [*self.roles], "numbers": dict(self.numbers)}

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """What the prediction of each column missed.

        Raises:
            CodecError: a column has no predecessor, or the columns do not fit their roles.
        """
        self._check(columns)
        cells = self._cells(columns)
        with ieee_arithmetic():
            values = values_of(cells)
            payloads = _encode_roles(self._rule, self.numbers, cells, values)
            weight = values["weight'"]
            return [
                payloads[role] if role in payloads else _encode_extra(role, column, weight)
                for role, column in zip(self.roles, columns, strict=True)
            ]

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Fill every column from its predecessor, which may be the same memory.

        Raises:
            CodecError: the columns do not fit their roles, or a payload does not follow the layout.
        """
        self._check(columns)
        for column in columns:
            np.copyto(column.new, base_of(column))  # nothing to do where they are the same
        by_role = {r: p for r, (_, p) in zip(self.roles, paired(columns, payloads), strict=True)}
        with ieee_arithmetic():
            weight = _decode_roles(self._rule, self.numbers, self._cells(columns), by_role)
            for role, column, payload in zip(self.roles, columns, payloads, strict=True):
                if role in (COPY, OTHER):
                    _decode_extra(role, column, payload, weight)

    @property
    def _rule(self) -> Rule:
        return rule_for(self.rule, self.roles)

    def _cells(self, columns: Sequence[Column]) -> dict[str, Cells]:
        """The columns of the rule's roles."""
        pairs = zip(self.roles, columns, strict=True)
        return {role: _cells(column) for role, column in pairs if role not in (COPY, OTHER)}

    def _check(self, columns: Sequence[Column]) -> None:
        if len(columns) != len(self.roles):
            raise CodecError(
                "as many columns as roles are needed", expected=len(self.roles), found=len(columns)
            )
        counts = {
            _elements(role, column)
            for role, column in zip(self.roles, columns, strict=True)
            if role != OTHER
        }
        if len(counts) != 1:
            raise CodecError("columns of one parameter differ in length", found=sorted(counts))


_PLAIN_ADAM: dict[str, float] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "decay": 0.0,
    "l2": 0.0,
    "step": 1,
    "corrects_bias": 1,
}


def _checked_roles(rule: str, roles: Sequence[Any]) -> tuple[str, ...]:
    given = tuple(roles) if isinstance(roles, list | tuple) else ()
    if not are_roles(rule, given):
        raise CodecError(
            f"roles of rule {rule!r} are missing or unknown",
            expected=rule_for(rule, given).roles,
            found=roles,
        )
    return given


def are_roles(rule: str, roles: Sequence[Any]) -> bool:
    """Whether there is every role of the rule once, and none that is unknown."""
    named = [role for role in roles if role not in (COPY, OTHER)]
    return sorted(named, key=repr) == sorted(rule_for(rule, roles).roles)


def _check_numbers(rule: Rule, numbers: Any) -> None:
    wrong = f"numbers of rule {rule.id!r} are missing, unknown or not finite"
    if not isinstance(numbers, dict) or set(cast("dict[Any, Any]", numbers)) != set(rule.numbers):
        raise CodecError(wrong, expected=rule.numbers, found=repr(cast("object", numbers))[:200])
    for name, value in cast("dict[str, Any]", numbers).items():
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            raise CodecError(wrong, expected=f"{name}: a number", found=repr(value)[:80])


_LARGEST = 2.0**1000  # so that float64 holds every product of two


def fits(role: str, dtype: str) -> bool:
    """Whether leaves of that dtype can have the role."""
    return role == OTHER or dtype in (_LOW_PRECISION if role == COPY else _PRECISIONS)


def _elements(role: str, column: Column) -> int:
    """How many elements a column of that role has; `CodecError` if it has the wrong dtype."""
    if not fits(role, column.dtype.name) or column.new.nbytes % column.dtype.itemsize:
        raise CodecError(f"a column cannot have the role {role!r}", found=str(column.dtype))
    return column.new.nbytes // column.dtype.itemsize


def _cells(column: Column) -> Cells:
    width = word_width(column.dtype)
    return Cells(column.dtype, as_words(base_of(column), width), as_words(column.new, width))


# -- roles of the rule -------------------------------------------------------------------------


def _encode_roles(
    rule: Rule, numbers: Numbers, cells: Mapping[str, Cells], values: Values
) -> dict[str, memoryview]:
    choices = Chooser(rule, numbers, cells).choices()
    choice = choices[rule.moment]
    payloads = {rule.moment: _encode_moment(rule, numbers, cells, values, choice)}
    for role, forms in rule.forms.items():
        cell, choice = cells[role], choices[role]
        words, found = cell.old, None
        if choice.mode == PREDICTION:
            found = predicted(forms[choice.form], numbers, values, role)
            words = narrowed(found, cell.dtype, cell.old)
        note_unrounded(values, role, cell.dtype, found)
        header = _HEADER.pack(choice.mode, choice.form)
        payloads[role] = plane_payload.encode_difference(cell.new, words, header)
    return payloads


def _encode_moment(
    rule: Rule, numbers: Numbers, cells: Mapping[str, Cells], values: Values, choice: Choice
) -> memoryview:
    """Also adds the gradient to the values, which is not stored where that would take too much."""
    form, cell = rule.moments[choice.form], cells[rule.moment]
    new, old = values[f"{rule.moment}'"], values[rule.moment]
    estimate = estimated(form, numbers, new, old)
    header = _HEADER.pack(choice.mode, choice.form)
    words, grid = cell.old, choice.grid
    values["gradient"] = estimate
    if grid is not None:
        weight, l2 = values["weight"], l2_of(rule, numbers)
        grid_numbers = snapped(grid, l2, estimate, weight)
        values["gradient"] = gradient_of(grid, l2, grid_numbers, weight)
        reference = folded(predicted(rule.reference, numbers, values, rule.moment), grid)
        stored = plane_payload.encode_difference(folded(grid_numbers, grid), reference)
        header += _GRID.pack(grid.bits, grid.scale, len(stored)) + bytes(stored)
        words = narrowed(moment(form, numbers, values["gradient"], old), cell.dtype, cell.old)
    if rule.moment == CAPTURED:
        values["gradient"] = decayed(values, numbers)
    payload = plane_payload.encode_difference(cell.new, words, header)
    if grid is not None and len(payload) > max_payload_nbytes(cell.new.nbytes):
        # The sample has shown something else.
        return _encode_moment(rule, numbers, cells, values, Choice(DIFFERENCE, choice.form))
    return payload


def _decode_roles(
    rule: Rule, numbers: Numbers, cells: Mapping[str, Cells], payloads: Mapping[str, memoryview]
) -> Floats:
    """In place; the new weight."""
    values = {role: widened(cell.new, cell.dtype) for role, cell in cells.items()}
    _decode_moment(rule, numbers, cells[rule.moment], values, payloads[rule.moment])
    for role, forms in rule.forms.items():
        cell = cells[role]
        mode, number, rest = _read_header(payloads[role], len(forms), (DIFFERENCE, PREDICTION))
        if _is_read_later(rule, role):
            values[role] = values[role].copy()
        found = None
        if mode == PREDICTION:
            found = predicted(forms[number], numbers, values, role, _memory_of(cell))
            _fill(cell, found)
        plane_payload.decode_difference(rest, cell.new)
        values[f"{role}'"] = widened(cell.new, cell.dtype)
        note_unrounded(values, role, cell.dtype, found)
    return values["weight'"]


def _memory_of(cell: Cells) -> Floats | None:
    """Where float32 numbers may be computed into; None for a role of low precision."""
    return widened(cell.new, cell.dtype) if cell.new.itemsize == 4 else None


def _fill(cell: Cells, found: Floats) -> None:
    if cell.new.itemsize != 4:  # else they are there
        cell.new[:] = narrowed(found, cell.dtype, cell.new)


def _is_read_later(rule: Rule, role: str) -> bool:
    """Whether a role that is decoded after this one is predicted from its old values."""
    order = [*rule.forms]
    later = [form for other in order[order.index(role) + 1 :] for form in rule.forms[other]]
    return any(role in form.inputs for form in later)


def _decode_moment(
    rule: Rule, numbers: Numbers, cell: Cells, values: Values, payload: memoryview
) -> None:
    """Adds the gradient and the new moment to the values."""
    role = rule.moment
    mode, number, rest = _read_header(payload, len(rule.moments), (DIFFERENCE, GRADIENT))
    form = rule.moments[number]
    old = values[role] = values[role].copy()
    if mode == GRADIENT:
        grid, stored, rest = _read_grid(rest, role)
        reference = folded(predicted(rule.reference, numbers, values, role), grid)
        plane_payload.decode_difference(stored, reference)
        grid_numbers = unfolded(reference, grid)
        l2 = l2_of(rule, numbers)
        values["gradient"] = gradient_of(grid, l2, grid_numbers, values["weight"])
        _fill(cell, moment(form, numbers, values["gradient"], old, _memory_of(cell)))
    plane_payload.decode_difference(rest, cell.new)
    new = values[f"{role}'"] = widened(cell.new, cell.dtype)
    if mode == DIFFERENCE:
        values["gradient"] = estimated(form, numbers, new, old)
    if role == CAPTURED:
        values["gradient"] = decayed(values, numbers)


def _read_header(
    payload: memoryview, forms: int, modes: Sequence[int]
) -> tuple[int, int, memoryview]:
    if payload.nbytes < _HEADER.size:
        raise CodecError(
            "a replayed column ends within its header", expected=_HEADER.size, found=payload.nbytes
        )
    mode, form = _HEADER.unpack_from(payload)
    if mode not in modes:
        raise CodecError("unknown mode of a replayed column", expected=list(modes), found=mode)
    if form >= forms:
        raise CodecError("unknown form of a replayed column", expected=f"< {forms}", found=form)
    return mode, form, payload[_HEADER.size :]


def _read_grid(payload: memoryview, role: str) -> tuple[Grid, memoryview, memoryview]:
    """The grid, what is stored of the gradient, and the rest."""
    if payload.nbytes < _GRID.size:
        raise CodecError("a stored gradient ends within its header", found=payload.nbytes)
    bits, scale, nbytes = _GRID.unpack_from(payload)
    known = (_grid.BFLOAT16, _grid.FLOAT16, *([_grid.FLOAT32] if role == CAPTURED else []))
    if bits not in known or not math.isfinite(scale) or scale == 0:
        raise CodecError("a gradient on no known grid", found=f"{bits} bits, scale {scale}")
    rest = payload[_GRID.size :]
    if nbytes > rest.nbytes:
        raise CodecError("a stored gradient is cut off", expected=nbytes, found=rest.nbytes)
    return Grid(bits, scale), rest[:nbytes], rest[nbytes:]


# -- copies and other columns ------------------------------------------------------------------


def _encode_extra(role: str, column: Column, weight: Floats) -> memoryview:
    cell = _cells(column)
    if role == COPY:
        copied = narrowed(weight, column.dtype, cell.old)
        if np.count_nonzero(cell.new == copied) >= np.count_nonzero(cell.new == cell.old):
            return plane_payload.encode_difference(cell.new, copied, _HEADER.pack(PREDICTION, 0))
    return plane_payload.encode_difference(cell.new, cell.old, _HEADER.pack(DIFFERENCE, 0))


def _decode_extra(role: str, column: Column, payload: memoryview, weight: Floats) -> None:
    modes = (DIFFERENCE, PREDICTION) if role == COPY else (DIFFERENCE,)
    mode, _, rest = _read_header(payload, 1, modes)
    words = as_words(column.new, word_width(column.dtype))
    if mode == PREDICTION:
        words[:] = narrowed(weight, column.dtype, words)
    plane_payload.decode_difference(rest, words)
