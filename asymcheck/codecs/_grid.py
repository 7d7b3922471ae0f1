"""The low precision in which gradients were computed, found again in their float32 values.

Gradients of mixed-precision training are bfloat16 or float16 numbers, widened to float32 and
multiplied by one number for all (gradient clipping, loss scale, averaging): a *grid*. The first
moment of an optimizer gives them back to about 20 bits, which is enough to find the grid point.
So they are stored in as many bits as they were computed in, though nobody has captured them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs.kernels import Floats
from asymcheck.codecs.rules.base import Constants, f32, f64

BFLOAT16, FLOAT16, FLOAT32 = 8, 11, 24
"""Bits of the significand, the implicit one included."""

_PROBES = 64
_ANCHORS = 3
_MIN_ELEMENTS = 16
_MIN_PRECISION = 2.0**15.7  # sixteenths of a first moment with a beta of .9
_TOLERANCE = 0.02  # of the distance of grid points; of random numbers 4 % lie as close


@dataclass(frozen=True, slots=True)
class Grid:
    """Gradients are float32 numbers of `bits` significant bits, times `scale`."""

    bits: int
    scale: float


UNSCALED = {
    "bfloat16": Grid(BFLOAT16, 1.0),
    "float16": Grid(FLOAT16, 1.0),
    "float32": Grid(FLOAT32, 1.0),
}
"""By dtype, the grid of all its numbers."""


def snap(k: Constants, estimate: Any) -> Any:
    """The nearest grid number to estimate / scale. Constants: scale, 2^(53 − bits), and L2.

    Splits as T. J. Dekker does (Numerische Mathematik 18, 1971).
    """
    y = f64(estimate) / f64(k[0])
    t = y * (f64(k[1]) + 1.0)
    return f32(t - (t - y))


def snap_decayed(k: Constants, estimate: Any, weight: Any) -> Any:
    """The same without the L2 term."""
    y = (f64(estimate) - f64(k[2]) * f64(weight)) / f64(k[0])
    t = y * (f64(k[1]) + 1.0)
    return f32(t - (t - y))


def scaled(k: Constants, number: Any) -> Any:
    """The gradient of a grid number."""
    return k[0] * number


def scaled_decayed(k: Constants, number: Any, weight: Any) -> Any:
    """The same with the L2 term."""
    return f32(f64(k[2]) * f64(weight) + f64(k[0] * number))


def constants_of(grid: Grid, l2: float) -> Constants:
    """What these formulas take."""
    with np.errstate(all="ignore"):
        return f32(grid.scale), f32(2.0 ** (53 - grid.bits)), f32(l2)


def find_grid(estimates: Floats, errors: Floats) -> Grid | None:
    """The grid on which a sample of gradients lies, the coarsest one, or None.

    Args:
        estimates: the gradients.
        errors: about what each may be wrong by.
    """
    with np.errstate(all="ignore"):
        sizes = np.abs(f64(estimates))
        usable = np.isfinite(sizes) & (sizes > 1e-35) & (sizes >= _MIN_PRECISION * f64(errors))
        significands = 2 * np.frexp(sizes[usable])[0]  # within [1, 2)
    if significands.size < _MIN_ELEMENTS:
        return None
    for bits in (BFLOAT16, FLOAT16):
        scale = _scale(significands, bits)
        if scale is not None:
            return Grid(bits, float(f32(_refined(significands, bits, scale))))
    return None


def _scale(significands: NDArray[np.float64], bits: int) -> float | None:
    """A scale within [1, 2) by which the numbers have `bits` significant bits, roughly."""
    probes = significands[:: max(1, significands.size // _PROBES)][:_PROBES]
    points = np.arange(1 << (bits - 1), 1 << bits) / (1 << (bits - 1))
    anchored = [(anchor / points) for anchor in probes[:_ANCHORS]]
    candidates = _screened(np.concatenate([np.ones(1), *anchored]), probes, bits)
    if candidates.size == 0:
        return None
    distance = np.abs(_off_grid(probes / candidates[:, None], bits))
    errors = np.quantile(distance, 0.9, axis=1)
    best = int(np.argmin(errors))
    if candidates[0] == 1 and errors[0] < _TOLERANCE:  # not scaled, or by a power of two
        best = 0
    if errors[best] >= _TOLERANCE:
        return None
    scale = float(candidates[best])
    return scale if scale >= 1 else 2 * scale


def _screened(
    candidates: NDArray[np.float64], probes: NDArray[np.float64], bits: int
) -> NDArray[np.float64]:
    """Those by which more than half of a few numbers lie on the grid: of thousands mostly none."""
    for few in (probes[: _PROBES // 8], probes[_PROBES // 8 : _PROBES // 2]):
        on_grid = np.abs(_off_grid(few / candidates[:, None], bits)) < _TOLERANCE
        candidates = candidates[2 * np.count_nonzero(on_grid, axis=1) > few.size]
    return candidates


def _off_grid(quotients: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """How far quotients of significands are from the grid, in distances of its points."""
    positions = _positions(quotients, bits)
    return positions - np.rint(positions)


def _positions(quotients: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    return np.where(quotients < 1, 2 * quotients, quotients) * (1 << (bits - 1))


def _refined(significands: NDArray[np.float64], bits: int, scale: float) -> float:
    """The scale by which most of the numbers lie exactly on the grid."""
    for _ in range(3):
        positions = _positions(significands / scale, bits)
        near = np.abs(positions - np.rint(positions)) < 0.25
        factors = positions[near] / np.rint(positions[near])
        scale *= float(np.median(factors))
    return scale
