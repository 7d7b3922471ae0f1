"""How far decoded floats are from the true ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs.kernels import Words

_PIECE = 1 << 16  # elements whose float64 temporaries stay in cache


def is_float(dtype: np.dtype[np.generic]) -> bool:
    """Whether `dtype` holds real floating-point numbers that a float64 holds, too."""
    if dtype.kind == "f":
        return dtype.itemsize <= 8
    if dtype.kind != "V":  # the kind of bfloat16 and of most float8
        return False
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Errors:
    """The largest finite errors, and the positions of those that are not."""

    absolute: float
    relative: float
    infinite: NDArray[np.intp]


def sizes_of_error(
    dtype: np.dtype[np.generic], true: Words, other: Words
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|other - true| for every element, infinite where it is not a number but the bits differ.

    Also the true values.
    """
    with np.errstate(all="ignore"):
        values = true.view(dtype).astype(np.float64)
        sizes = np.abs(other.view(dtype).astype(np.float64) - values)
    undefined = np.flatnonzero(~np.isfinite(sizes))
    sizes[undefined] = np.where(true[undefined] != other[undefined], math.inf, 0)
    return sizes, values


def errors_of(dtype: np.dtype[np.generic], true: Words, decoded: Words) -> Errors:
    """How far `decoded` is from `true`, both the words of elements of `dtype`."""
    absolute = relative = 0.0
    infinite: list[NDArray[np.intp]] = [np.empty(0, np.intp)]
    for start in range(0, true.size, _PIECE):
        piece = slice(start, start + _PIECE)
        sizes, values = sizes_of_error(dtype, true[piece], decoded[piece])
        positions = np.flatnonzero(np.isinf(sizes))
        sizes[positions] = 0
        absolute = max(absolute, float(sizes.max()))
        relative = max(relative, _largest_relative(sizes, values))
        infinite.append(positions + start)
    return Errors(absolute, relative, np.concatenate(infinite))


def _largest_relative(sizes: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    wrong = sizes > 0
    with np.errstate(all="ignore"):
        return float((sizes[wrong] / np.abs(values[wrong])).max(initial=0))
