"""Floats with a shorter mantissa, as short as a relative bound allows. Lossy, and only by name.

Every element is rounded to the nearest number with m bits of mantissa, ties to even, m the fewest
with 2^-(m + 1) <= `relative_bound`. The bits below are 0, so that the low byte planes cost nothing.
What is not a normal number, and what would become infinite, stays as it is: the relative bound
holds for every element. Columns that are not float16, bfloat16, float32 or float64 are exact.

The layout is that of `_lossy`, without exceptions; its body is what `plane_payload` describes for
the rounded words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ml_dtypes
import numpy as np

from asymcheck.codecs import plane_payload
from asymcheck.codecs._lossy import FLOATS, Columnwise
from asymcheck.codecs._rounding import round_to_even
from asymcheck.codecs.base import Column, JsonValue
from asymcheck.codecs.kernels import Words
from asymcheck.errors import CodecError


@dataclass(frozen=True, slots=True)
class RoundedCodec(Columnwise):
    """Columns of floats within a relative bound.

    Args:
        relative_bound: on |decoded - true| / |true|, above 0 and below 0.5. The default leaves
            three of four bytes of a float32.

    Raises:
        CodecError: if `relative_bound` is no such number.
    """

    relative_bound: float = 2.0**-16

    id = "rounded"
    dtypes = FLOATS

    def __post_init__(self) -> None:
        if type(self.relative_bound) is not float or not 0 < self.relative_bound < 0.5:
            raise CodecError(
                "no such relative bound",
                expected="above 0 and below 0.5",
                found=repr(self.relative_bound),
            )

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """The bound; decoding does not depend on it."""
        return {"relative_bound": self.relative_bound}

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """See `Columnwise.encode`.

        Raises:
            CodecError: as there, and if an error is larger than `relative_bound`.
        """
        payloads = Columnwise.encode(self, columns)
        if any(self.fidelity(payload).relative > self.relative_bound for payload in payloads):
            raise CodecError("a rounded value is not within the relative bound")
        return payloads

    def approximate(
        self, words: Words, dtype: np.dtype[np.generic]
    ) -> tuple[bytes | memoryview, Words]:
        """See `Columnwise.approximate`."""
        rounded = _rounded(words, dtype, self.relative_bound)
        return plane_payload.encode(rounded), rounded

    def restore(self, body: memoryview, n: int, dtype: np.dtype[np.generic]) -> Words:
        """See `Columnwise.restore`."""
        words = np.empty(n, f"<u{dtype.itemsize}")
        plane_payload.decode(body, words)
        return words


def _rounded(words: Words, dtype: np.dtype[np.generic], relative_bound: float) -> Words:
    mantissa_bits = int(cast("Any", ml_dtypes.finfo(dtype)).nmant)
    surplus = mantissa_bits - _bits_for(relative_bound)
    if surplus <= 0:
        return words.copy()
    rounded = round_to_even(words, surplus)
    exponent = words.dtype.type((1 << (8 * dtype.itemsize - 1)) - (1 << mantissa_bits))
    before, after = words & exponent, rounded & exponent
    keep = (before == 0) | (before == exponent) | (after == exponent)
    return np.where(keep, words, rounded)


def _bits_for(relative_bound: float) -> int:
    """The smallest m with 2^-(m + 1) <= `relative_bound`."""
    _, exponent = math.frexp(relative_bound)  # 2^(exponent - 1) <= relative_bound < 2^exponent
    return -exponent
