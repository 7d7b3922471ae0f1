"""Arrays of any dtype of the format as numbers, piece by piece, so that memory stays bounded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PIECE_SIZE = 4 << 20
"""Elements of a piece: at most 64 MiB as complex128."""


def pieces(shape: Sequence[int]) -> Iterator[tuple[int | slice, ...]]:
    """Indices that together select every element once, each at most `MAX_PIECE_SIZE`."""
    if math.prod(shape) == 0:
        return
    inner = math.prod(shape)
    for d, length in enumerate(shape):
        inner //= length
        if inner <= MAX_PIECE_SIZE:
            rows = MAX_PIECE_SIZE // inner
            for lead in itertools.product(*map(range, shape[:d])):
                for start in range(0, length, rows):
                    yield (*lead, slice(start, min(start + rows, length)))
            return
    yield ()


def as_numbers(array: NDArray[Any]) -> NDArray[Any]:
    """The values as float64 (complex128 if complex); integers of 64 bits are rounded."""
    wide = np.complex128 if array.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        return array.astype(wide)


@dataclass(frozen=True)
class Statistics:
    """Of the elements of an array; of complex numbers, the magnitudes.

    `minimum` to `standard_deviation` are those of the finite elements, None if there are none.
    The extremes of integers are exact; mean and deviation are computed in float64.
    """

    count: int = 0
    zeros: int = 0
    nans: int = 0
    infinities: int = 0
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    standard_deviation: float | None = None


class StatisticsBuilder:
    """`Statistics` of pieces that are added one by one (mean and deviation after Chan et al.)."""

    def __init__(self) -> None:
        self._count = self._zeros = self._nans = self._infinities = self._finite = 0
        self._minimum: float | None = None
        self._maximum: float | None = None
        self._mean = 0.0
        self._squares = 0.0

    def add(self, piece: NDArray[Any]) -> None:
        """Count these elements, of any dtype of the format."""
        numbers = as_numbers(piece).reshape(-1)
        values = np.abs(numbers) if np.iscomplexobj(numbers) else numbers
        extremes = piece.reshape(-1) if piece.dtype.kind in "iu" else values
        nans, finite = np.isnan(values), np.isfinite(values)
        self._count += values.size
        self._zeros += int(np.count_nonzero(values == 0))
        self._nans += int(np.count_nonzero(nans))
        self._infinities += int(np.count_nonzero(~finite & ~nans))
        if finite.any():
            self._extend(extremes[finite].min().item(), extremes[finite].max().item())
            self._merge(values[finite])

    def _extend(self, low: float, high: float) -> None:
        self._minimum = low if self._minimum is None else min(self._minimum, low)
        self._maximum = high if self._maximum is None else max(self._maximum, high)

    def _merge(self, values: NDArray[np.float64]) -> None:
        with np.errstate(over="ignore"):
            mean = float(values.mean())
            squares = float(np.square(values - mean).sum())
            total = self._finite + values.size
            step = mean - self._mean
            self._mean += step * values.size / total
            self._squares += squares + step * step * self._finite * values.size / total
        self._finite = total

    def build(self) -> Statistics:
        """The result."""
        known = self._finite > 0
        return Statistics(
            self._count,
            self._zeros,
            self._nans,
            self._infinities,
            self._minimum,
            self._maximum,
            self._mean if known else None,
            math.sqrt(self._squares / self._finite) if known else None,
        )
