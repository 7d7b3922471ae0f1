"""float32 as bfloat16: half the bytes, for moments. Lossy, and only by name.

Every float32 is rounded to the nearest bfloat16, ties to even: the relative error of normal
numbers is at most 2^-8, of subnormal ones up to 1. What would become infinite by that is an
exception. Columns of other dtypes are exact.

The layout is that of `_lossy`; its body, for n elements, is what `plane_payload` describes for n
words of 2 bytes, the bfloat16s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from asymcheck.codecs import plane_payload
from asymcheck.codecs._lossy import FLOAT32, Columnwise
from asymcheck.codecs._rounding import round_to_even
from asymcheck.codecs.base import JsonValue
from asymcheck.codecs.kernels import Words

_LOWER = np.uint32(16)


@dataclass(frozen=True, slots=True)
class Bf16Codec(Columnwise):
    """float32 columns rounded to bfloat16."""

    id = "bf16"
    dtypes = (FLOAT32,)

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """None."""
        return {}

    def approximate(
        self, words: Words, dtype: np.dtype[np.generic]
    ) -> tuple[bytes | memoryview, Words]:
        """See `Columnwise.approximate`."""
        rounded = round_to_even(words, 16)
        return plane_payload.encode((rounded >> _LOWER).astype("<u2")), rounded

    def restore(self, body: memoryview, n: int, dtype: np.dtype[np.generic]) -> Words:
        """See `Columnwise.restore`."""
        halves = np.empty(n, "<u2")
        plane_payload.decode(body, halves)
        return halves.astype("<u4") << _LOWER
