"""Lossless coding of a change, level 3: the optimizer's step is replayed, its misses are stored.

Of a parameter's weight and moments only the gradient is new: everything else follows from it and
from the old state. The gradient is found from the old and the new first moment. Where it lies on
a grid (`_grid`), as that of mixed-precision training does, its grid number is stored, and the
first moment follows as well; else the first moment's bit difference is stored, and the gradient
follows from that. From it the others are computed by the optimizer's rule (`rules`), and the
difference of the bit patterns to what came out is stored, by which the result is exact whatever
the prediction missed. Where the difference to the old value is smaller, that is taken.

Copies of the weight in low precision are predicted by rounding it.

Layout of a payload, integers little-endian, P standing for what `plane_payload` describes:

| offset | bytes | field |
| --- | --- | --- |
| 0 | 1 | mode: 0 difference to the old value, 1 to the prediction, 2 gradient and the latter |
| 1 | 1 | number of the form (of the first moment also in mode 0) |
| 2 | | modes 0 and 1: P of the differences |

Mode 2, of the first moment only:

| offset | bytes | field |
| --- | --- | --- |
| 2 | 1 | bits of a grid number's significand: 8 or 11 |
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
from numpy.typing import NDArray

from asymcheck.codecs import _grid, plane_payload
from asymcheck.codecs._columns import as_words, base_of, paired, word_width
from asymcheck.codecs._floats import ieee_arithmetic
from asymcheck.codecs._grid import Grid, find_grid
from asymcheck.codecs.base import Column, JsonValue
from asymcheck.codecs.kernels import Floats, Words, kernels
from asymcheck.codecs.rules import RULES, Rule
from asymcheck.codecs.rules.base import Form, MomentForm, Numbers
from asymcheck.errors import CodecError

COPY, OTHER = "copy", "other"

_DIFFERENCE, _PREDICTION, _GRADIENT = range(3)
_HEADER = struct.Struct("<BB")
_GRID = struct.Struct("<BfQ")
_SAMPLE_STRETCHES, _SAMPLE_STRETCH = 32, 128
_COPIES = ("bfloat16", "float16")

Values = dict[str, Floats]
"""Arrays by name: roles hold old values, roles with a prime new ones, and `gradient`."""


@dataclass(frozen=True, slots=True)
class ReplayCodec:
    """Weights and moments of a parameter, predicted by the rule of their optimizer.

    Exact for every bit pattern, also where the rule or its numbers are wrong: then it costs a
    little more than `delta` does.

    Args:
        rule: of `rules.RULES`.
        roles: of each column: one of the rule's, `copy` (of the weight, in low precision), or
            `other`. Each of the rule's stands once, for a float32 column; all these and the copies
            have as many elements.
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
        object.__setattr__(self, "roles", _checked_roles(RULES[self.rule], self.roles))
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
        rule = RULES[self.rule]
        values = self._values([_floats(base_of(column)) for column in columns])
        news = self._values([_floats(column.new) for column in columns])
        values |= {f"{role}'": new for role, new in news.items()}
        with ieee_arithmetic():
            chosen = _Chooser(rule, self.numbers, _sampled(values)).choices()
            payloads = _encode_roles(rule, self.numbers, values, chosen)
            return [
                payloads[role] if role in payloads else _encode_extra(role, column, values)
                for role, column in zip(self.roles, columns, strict=True)
            ]

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Fill every column from its predecessor, which may be the same memory.

        Raises:
            CodecError: the columns do not fit their roles, or a payload does not follow the layout.
        """
        self._check(columns)
        rule = RULES[self.rule]
        for column in columns:
            np.copyto(column.new, base_of(column))  # nothing to do where they are the same
        values = self._values([_floats(column.new) for column in columns])
        by_role = {r: p for r, (_, p) in zip(self.roles, paired(columns, payloads), strict=True)}
        with ieee_arithmetic():
            _decode_roles(rule, self.numbers, values, by_role)
            weight = values["weight"]
            for role, column, payload in zip(self.roles, columns, payloads, strict=True):
                if role in (COPY, OTHER):
                    _decode_extra(role, column, payload, weight)

    def _values(self, arrays: Sequence[Floats]) -> Values:
        """The arrays of the rule's roles, of those of all columns."""
        pairs = zip(self.roles, arrays, strict=True)
        return {role: array for role, array in pairs if role not in (COPY, OTHER)}

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


def _checked_roles(rule: Rule, roles: Sequence[Any]) -> tuple[str, ...]:
    given = tuple(roles) if isinstance(roles, list | tuple) else ()
    named = [role for role in given if role not in (COPY, OTHER)]
    if sorted(named, key=repr) != sorted(rule.roles):
        raise CodecError(
            f"roles of rule {rule.id!r} are missing or unknown", expected=rule.roles, found=roles
        )
    return given


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
    return role == OTHER or dtype in (_COPIES if role == COPY else ("float32",))


def _elements(role: str, column: Column) -> int:
    """How many elements a column of that role has; `CodecError` if it has the wrong dtype."""
    if not fits(role, column.dtype.name) or column.new.nbytes % column.dtype.itemsize:
        raise CodecError(f"a column cannot have the role {role!r}", found=str(column.dtype))
    return column.new.nbytes // column.dtype.itemsize


def _floats(data: NDArray[np.uint8]) -> Floats:
    """As float32, whole elements; of no meaning for columns of other dtypes."""
    return data[: data.size // 4 * 4].view(np.dtype("<f4"))


def _words(values: Floats) -> Words:
    return values.view(np.dtype("<u4"))


# -- formulas over whole blocks ----------------------------------------------------------------


def _computed(
    formula: Any, constants: Any, inputs: Sequence[Floats], otherwise: Floats, out: Any = None
) -> Floats:
    """formula(constants, *inputs), and where that is NaN `otherwise`."""
    result: Floats = np.empty_like(otherwise) if out is None else out
    kernels().compute(formula, constants, inputs, _words(otherwise), _words(result))
    return result


def _predicted(form: Form, numbers: Numbers, values: Values, role: str, out: Any = None) -> Floats:
    inputs = [values[name] for name in form.inputs]
    constants = form.constants_of(numbers)
    return _computed(form.compute, constants, inputs, values[role], out)


def _moment(
    form: MomentForm, numbers: Numbers, gradient: Floats, old: Floats, out: Any = None
) -> Floats:
    return _computed(form.forward, form.constants_of(numbers), (gradient, old), old, out)


def _estimated(form: MomentForm, numbers: Numbers, new: Floats, old: Floats) -> Floats:
    """The gradient that made `new` of `old`, about; where there is none, `old`."""
    return _computed(form.inverse, form.constants_of(numbers), (new, old), old)


def _snapped(grid: Grid, l2: float, estimate: Floats, weight: Floats) -> Floats:
    """Grid numbers, as they come back when they are folded and unfolded."""
    constants, snapped = _grid.constants_of(grid, l2), np.zeros_like(estimate)
    if l2:
        _computed(_grid.snap_decayed, constants, (estimate, weight), snapped, snapped)
    else:
        _computed(_grid.snap, constants, (estimate,), snapped, snapped)
    words = _words(snapped)  # subnormal ones may have more bits
    np.bitwise_and(words, ~np.uint32((1 << (24 - grid.bits)) - 1), out=words)
    return snapped


def _gradient(grid: Grid, l2: float, numbers: Floats, weight: Floats) -> Floats:
    """The gradient of grid numbers."""
    constants = _grid.constants_of(grid, l2)
    if l2:
        return _computed(_grid.scaled_decayed, constants, (numbers, weight), numbers)
    return _computed(_grid.scaled, constants, (numbers,), numbers)


def _folded(numbers: Floats, grid: Grid) -> Words:
    folded = np.empty(numbers.size, np.dtype("<u4"))
    kernels().fold(_words(numbers), 24 - grid.bits, folded)
    return folded


# -- choosing ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Choice:
    mode: int
    form: int
    grid: Grid | None = None


def _sampled(values: Values) -> Values:
    """Stretches of all arrays, the same elements of each."""
    size = next(iter(values.values())).size
    if size <= _SAMPLE_STRETCHES * _SAMPLE_STRETCH:
        return dict(values)
    begins = np.arange(_SAMPLE_STRETCHES) * (size // _SAMPLE_STRETCHES)
    index = (begins[:, None] + np.arange(_SAMPLE_STRETCH)).ravel()
    return {name: value[index] for name, value in values.items()}


class _Chooser:
    """Finds out on a sample how each role is stored in the fewest bits."""

    def __init__(self, rule: Rule, numbers: Numbers, sample: Values) -> None:
        self._rule = rule
        self._numbers = numbers
        self._sample = sample
        self._l2 = numbers["l2"]

    def choices(self) -> dict[str, _Choice]:
        """One for every role of the rule."""
        rule, sample = self._rule, self._sample
        choices = {rule.moment: self._choose_moment()}
        for role, forms in rule.forms.items():
            new, old = sample[f"{role}'"], sample[role]
            costs = [_bits(new, _predicted(f, self._numbers, sample, role)) for f in forms]
            best = int(np.argmin(costs))
            better = costs[best] < _bits(new, old)
            choices[role] = _Choice(_PREDICTION if better else _DIFFERENCE, best)
        return choices

    def _choose_moment(self) -> _Choice:
        """Leaves the gradient of the choice in the sample."""
        role, forms = self._rule.moment, self._rule.moments
        new, old, weight = (self._sample[name] for name in (f"{role}'", role, "weight"))
        estimates = [_estimated(form, self._numbers, new, old) for form in forms]
        best = _bits(new, old), _Choice(_DIFFERENCE, 0), estimates[0]
        with np.errstate(all="ignore"):
            undecayed: Any = estimates[0] - np.float32(self._l2) * weight
        grid = find_grid(undecayed, new)
        for grid_here in _neighbours(grid):
            for number, form in enumerate(forms):
                snapped = _snapped(grid_here, self._l2, estimates[number], weight)
                gradient = _gradient(grid_here, self._l2, snapped, weight)
                missed = _bits(new, _moment(form, self._numbers, gradient, old))
                cost = missed + grid_here.bits + _EXPONENT_BITS
                if cost < best[0]:
                    best = cost, _Choice(_GRADIENT, number, grid_here), gradient
        self._sample["gradient"] = best[2]
        return best[1]


_EXPONENT_BITS = 3.0  # about what the exponents of gradients take


def _neighbours(grid: Grid | None) -> list[Grid]:
    """The grid, and those of the next scales: it was found to within a unit in the last place."""
    if grid is None:
        return []
    scale = np.float32(grid.scale)
    near = (scale, np.nextafter(scale, np.float32(0)), np.nextafter(scale, np.float32(4)))
    return [Grid(grid.bits, float(each)) for each in near]


def _bits(new: Floats, predicted: Floats) -> float:
    """About how many bits an element takes as difference to a prediction."""
    if not new.size:
        return 0.0
    difference = _words(new).view("<i4").astype(np.int64) - _words(predicted).view("<i4")
    return float(np.mean(np.log2(1 + 2 * np.abs(difference))))


# -- roles of the rule -------------------------------------------------------------------------


def _encode_roles(
    rule: Rule, numbers: Numbers, values: Values, choices: Mapping[str, _Choice]
) -> dict[str, memoryview]:
    payloads = {rule.moment: _encode_moment(rule, numbers, values, choices[rule.moment])}
    for role, forms in rule.forms.items():
        choice = choices[role]
        predicted = values[role]
        if choice.mode == _PREDICTION:
            predicted = _predicted(forms[choice.form], numbers, values, role)
        header = _HEADER.pack(choice.mode, choice.form)
        new = values[f"{role}'"]
        payloads[role] = plane_payload.encode_difference(_words(new), _words(predicted), header)
    return payloads


def _encode_moment(rule: Rule, numbers: Numbers, values: Values, choice: _Choice) -> memoryview:
    """Also adds the gradient to the values."""
    form = rule.moments[choice.form]
    new, old = values[f"{rule.moment}'"], values[rule.moment]
    estimate = _estimated(form, numbers, new, old)
    header = _HEADER.pack(choice.mode, choice.form)
    grid = choice.grid
    if grid is None:
        values["gradient"] = estimate
        return plane_payload.encode_difference(_words(new), _words(old), header)
    weight, l2 = values["weight"], numbers["l2"]
    snapped = _snapped(grid, l2, estimate, weight)
    values["gradient"] = _gradient(grid, l2, snapped, weight)
    reference = _predicted(rule.reference, numbers, values, rule.moment)
    stored = plane_payload.encode_difference(_folded(snapped, grid), _folded(reference, grid))
    header += _GRID.pack(grid.bits, grid.scale, len(stored)) + bytes(stored)
    predicted = _moment(form, numbers, values["gradient"], old)
    return plane_payload.encode_difference(_words(new), _words(predicted), header)


def _decode_roles(
    rule: Rule, numbers: Numbers, values: Values, payloads: Mapping[str, memoryview]
) -> None:
    """In place: `values` hold the old state before and the new one after."""
    _decode_moment(rule, numbers, values, payloads[rule.moment])
    for role, forms in rule.forms.items():
        mode, number, rest = _read_header(payloads[role], len(forms), (_DIFFERENCE, _PREDICTION))
        if mode == _PREDICTION:
            _predicted(forms[number], numbers, values, role, values[role])
        plane_payload.decode_difference(rest, _words(values[role]))
        values[f"{role}'"] = values[role]


def _decode_moment(rule: Rule, numbers: Numbers, values: Values, payload: memoryview) -> None:
    modes = (_DIFFERENCE, _GRADIENT)
    mode, number, rest = _read_header(payload, len(rule.moments), modes)
    form, new = rule.moments[number], values[rule.moment]
    old = values[rule.moment] = new.copy()
    values[f"{rule.moment}'"] = new
    if mode == _DIFFERENCE:
        plane_payload.decode_difference(rest, _words(new))
        values["gradient"] = _estimated(form, numbers, new, old)
        return
    grid, stored, rest = _read_grid(rest)
    reference = _predicted(rule.reference, numbers, values, rule.moment)
    folded = _folded(reference, grid)
    plane_payload.decode_difference(stored, folded)
    kernels().unfold(folded, 24 - grid.bits, folded)
    gradient = _gradient(grid, numbers["l2"], folded.view("<f4"), values["weight"])
    values["gradient"] = gradient
    _moment(form, numbers, gradient, new, new)
    plane_payload.decode_difference(rest, _words(new))


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


def _read_grid(payload: memoryview) -> tuple[Grid, memoryview, memoryview]:
    """The grid, what is stored of the gradient, and the rest."""
    if payload.nbytes < _GRID.size:
        raise CodecError("a stored gradient ends within its header", found=payload.nbytes)
    bits, scale, nbytes = _GRID.unpack_from(payload)
    if bits not in (_grid.BFLOAT16, _grid.FLOAT16) or not math.isfinite(scale) or scale == 0:
        raise CodecError("a gradient on no known grid", found=f"{bits} bits, scale {scale}")
    rest = payload[_GRID.size :]
    if nbytes > rest.nbytes:
        raise CodecError("a stored gradient is cut off", expected=nbytes, found=rest.nbytes)
    return Grid(bits, scale), rest[:nbytes], rest[nbytes:]


# -- copies and other columns ------------------------------------------------------------------


def _encode_extra(role: str, column: Column, values: Values) -> memoryview:
    width = word_width(column.dtype)
    new, old = as_words(column.new, width), as_words(base_of(column), width)
    if role == COPY:
        predicted = _rounded(values["weight'"], column.dtype, old)
        if np.count_nonzero(new == predicted) >= np.count_nonzero(new == old):
            return plane_payload.encode_difference(new, predicted, _HEADER.pack(_PREDICTION, 0))
    return plane_payload.encode_difference(new, old, _HEADER.pack(_DIFFERENCE, 0))


def _decode_extra(role: str, column: Column, payload: memoryview, weight: Floats) -> None:
    modes = (_DIFFERENCE, _PREDICTION) if role == COPY else (_DIFFERENCE,)
    mode, _, rest = _read_header(payload, 1, modes)
    words = as_words(column.new, word_width(column.dtype))
    if mode == _PREDICTION:
        words[:] = _rounded(weight, column.dtype, words)
    plane_payload.decode_difference(rest, words)


def _rounded(weight: Floats, dtype: np.dtype[Any], otherwise: Words) -> Words:
    """A weight in low precision, to the nearest, ties to even; where it is NaN, `otherwise`."""
    with np.errstate(all="ignore"):
        low = weight.astype(dtype).view(np.dtype("<u2"))
    return np.where(np.isnan(weight), otherwise, low)
