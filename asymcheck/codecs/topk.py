"""Signed top-k of the change, after the AsymCheck paper: lossy, and only by name.

Of every float column the `keep_fraction` of the elements that changed most are stored, exactly;
all others keep the value of their predecessor. With E the set of those,

    |decoded − new| <= bound = max over E of |new − old|, in float64,

and the bound is stored in the payload (`TopKCodec.error_bound`). The caller gives the
*reconstructed* predecessor as `old`, what a reader has after the step before. Then what is left
out is part of the next difference and is caught up with once it is large (error feedback), instead
of adding up unseen.

That bound is not small. The steps of AdamW are nearly of one size: the largest 1 % of the
differences hold 7 % of their energy, and 94 % of the error of keeping the old weights remains.
Resumed from it, a run's loss was 0.050 higher where wholly stale weights cost 0.056.

Layout of a payload, integers little-endian:

| offset | bytes | field |
| --- | --- | --- |
| 0 | 1 | mode: 0 exact, 1 top-k |

Mode 0, for columns that are not floats of 1, 2, 4 or 8 bytes: the rest is what `plane_payload`
describes. Mode 1, for n float elements, of which k are kept:

| offset | bytes | field |
| --- | --- | --- |
| 1 | 8 | bound, float64, finite, >= 0 |
| 9 | 8 | k, unsigned, <= n |
| 17 | 8 | g, unsigned |
| 25 | g | coded planes of k words, 4 bytes each if n < 2^32, else 8: the index of the first kept element, then how far each is from the one before it |
| 25 + g | | coded planes of the k new elements, as words of their own width |
"""  # noqa: E501 (a table cannot be wrapped)

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs._columns import as_words, base_of, paired, word_width
from asymcheck.codecs._errors import is_float, sizes_of_error
from asymcheck.codecs._kept import encode_kept, replace_kept
from asymcheck.codecs._lossy import (
    APPROXIMATE,
    EXACT,
    StatesBound,
    check_bound,
    check_mode,
    decode_exact,
    encode_exact,
)
from asymcheck.codecs.base import Column, Fidelity, JsonValue
from asymcheck.errors import CodecError

_HEADER = struct.Struct("<BdQQ")


@dataclass(frozen=True, slots=True)
class TopKCodec(StatesBound):
    """The largest changes of float columns, exactly, and nothing of the others.

    Differences that are not finite (to or from NaN and infinity, or too large for a float64) are
    always kept, beyond `keep_fraction` if need be; elements of the same value never.

    Args:
        keep_fraction: of the elements, above 0 and at most 1; rounded up to whole elements.

    Raises:
        CodecError: if `keep_fraction` is no such number.
    """

    keep_fraction: float = 0.01

    id = "topk"
    needs_base = True

    def __post_init__(self) -> None:
        if type(self.keep_fraction) not in (int, float) or not 0 < self.keep_fraction <= 1:
            raise CodecError(
                "no such fraction to keep",
                expected="above 0 and at most 1",
                found=repr(self.keep_fraction),
            )

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """The fraction; decoding does not depend on it."""
        return {"keep_fraction": self.keep_fraction}

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """The kept elements of each float column, all elements of the others.

        Raises:
            CodecError: if a column has no predecessor, or what was encoded does not decode within
                the bound that it states.
        """
        return self.checked(columns, [self._encode(column) for column in columns])

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Fill every column from its predecessor, which may be the same memory.

        Raises:
            CodecError: if a column has no predecessor, or a payload does not follow the layout
                for the column's dtype and length.
        """
        for column, payload in paired(columns, payloads):
            old, words = base_of(column), as_words(column.new, word_width(column.dtype))
            if not is_float(column.dtype):
                decode_exact(payload, words)
                continue
            _, count, gap_bytes = _read_header(payload)
            np.copyto(column.new, old)
            start = _HEADER.size + gap_bytes
            replace_kept(words, count, payload[_HEADER.size : start], payload[start:])

    def fidelity(self, payload: bytes | memoryview) -> Fidelity:
        """See `LossyCodec.fidelity`; no relative bound is stated."""
        if check_mode(payload, [EXACT, *self.modes]) == EXACT:
            return Fidelity(True, 0.0, 0.0)
        return Fidelity(False, _read_header(payload)[0], math.inf)

    def _encode(self, column: Column) -> bytes:
        width = word_width(column.dtype)
        words, old = as_words(column.new, width), as_words(base_of(column), width)
        if not is_float(column.dtype):
            return encode_exact(words)
        sizes, _ = sizes_of_error(column.dtype, words, old)
        positions = _largest(sizes, math.ceil(self.keep_fraction * sizes.size))
        sizes[positions] = 0
        bound = float(sizes.max(initial=0))
        gaps, kept = encode_kept(words, positions)
        header = _HEADER.pack(APPROXIMATE, bound, positions.size, gaps.nbytes)
        return b"".join((header, gaps, kept))


def _largest(sizes: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Positions, ascending, of the `count` largest; all infinite ones; none of size 0.

    Of equal ones the first are taken.
    """
    if not sizes.size:
        return np.empty(0, np.intp)
    smallest = np.partition(sizes, sizes.size - count)[sizes.size - count]
    above = np.flatnonzero(sizes > smallest)
    if smallest == 0:
        return above
    level = np.flatnonzero(sizes == smallest)
    if smallest < math.inf:
        level = level[: count - above.size]
    return np.sort(np.concatenate((above, level)))


def _read_header(payload: bytes | memoryview) -> tuple[float, int, int]:
    """Bound, number of kept elements, bytes of their gaps."""
    check_mode(payload, [APPROXIMATE])
    if len(payload) < _HEADER.size:
        raise CodecError(
            "top-k payload ends within its header", expected=_HEADER.size, found=len(payload)
        )
    _, bound, count, gap_bytes = _HEADER.unpack_from(payload)
    check_bound(bound)
    return bound, count, gap_bytes
