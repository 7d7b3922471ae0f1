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
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs import plane_payload
from asymcheck.codecs._columns import as_words, base_of, paired, word_width
from asymcheck.codecs.base import Column, JsonValue
from asymcheck.codecs.kernels import Words
from asymcheck.errors import CodecError

_EXACT, _TOP_K = range(2)
_HEADER = struct.Struct("<BdQQ")


@dataclass(frozen=True, slots=True)
class TopKCodec:
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
    lossy = True
    joint = False

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
            CodecError: if a column has no predecessor.
        """
        return [self._encode(column) for column in columns]

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Fill every column from its predecessor, which may be the same memory.

        Raises:
            CodecError: if a column has no predecessor, or a payload does not follow the layout
                for the column's dtype and length.
        """
        for column, payload in paired(columns, payloads):
            old, words = base_of(column), as_words(column.new, word_width(column.dtype))
            if _read_mode(payload, column.dtype) == _TOP_K:
                np.copyto(column.new, old)
                _replace_kept(payload, words)
            else:
                plane_payload.decode(payload[1:], words)

    def error_bound(self, payload: bytes | memoryview) -> float:
        """The largest |decoded − new| of a payload, 0.0 where it is exact.

        Raises:
            CodecError: if the payload's header does not follow the layout.
        """
        exact = bytes(payload[:1]) == bytes([_EXACT])
        return 0.0 if exact else _read_header(memoryview(payload))[0]

    def _encode(self, column: Column) -> bytes:
        width = word_width(column.dtype)
        words = as_words(column.new, width)
        old = base_of(column)
        if not _is_float(column.dtype):
            return b"".join((bytes([_EXACT]), plane_payload.encode(words)))
        sizes = _sizes_of_change(column, old)
        positions = _largest(sizes, math.ceil(self.keep_fraction * sizes.size))
        sizes[positions] = 0
        bound = float(sizes.max(initial=0))
        gaps = plane_payload.encode(np.diff(positions, prepend=0).astype(_gap_dtype(words.size)))
        kept = plane_payload.encode(words[positions])
        header = _HEADER.pack(_TOP_K, bound, positions.size, gaps.nbytes)
        return b"".join((header, gaps, kept))


def _is_float(dtype: np.dtype[np.generic]) -> bool:
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


def _gap_dtype(n: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype("<u4") if n < 1 << 32 else np.dtype("<u8")


def _sizes_of_change(column: Column, old: NDArray[np.uint8]) -> NDArray[np.float64]:
    """|new − old| for every element; infinite where it is not a number but the bits differ."""
    with np.errstate(all="ignore"):
        new_values = column.new.view(column.dtype).astype(np.float64)
        sizes = np.abs(new_values - old.view(column.dtype).astype(np.float64))
    width = word_width(column.dtype)
    undefined = np.flatnonzero(np.isnan(sizes))
    differ = as_words(column.new, width)[undefined] != as_words(old, width)[undefined]
    sizes[undefined] = np.where(differ, np.inf, 0)
    return sizes


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


def _read_mode(payload: memoryview, dtype: np.dtype[np.generic]) -> int:
    mode = _TOP_K if _is_float(dtype) else _EXACT
    if bytes(payload[:1]) != bytes([mode]):
        raise CodecError(
            f"wrong mode of a top-k payload of {dtype}", expected=mode, found=bytes(payload[:1])
        )
    return mode


def _read_header(payload: memoryview) -> tuple[float, int, int]:
    """Bound, number of kept elements, bytes of their gaps."""
    if payload.nbytes < _HEADER.size:
        raise CodecError(
            "top-k payload ends within its header", expected=_HEADER.size, found=payload.nbytes
        )
    mode, bound, count, gap_bytes = _HEADER.unpack_from(payload)
    if mode != _TOP_K:
        raise CodecError("unknown mode of a top-k payload", expected=_TOP_K, found=mode)
    if not 0 <= bound < math.inf:
        raise CodecError("wrong bound of a top-k payload", expected=">= 0", found=bound)
    return bound, count, gap_bytes


def _replace_kept(payload: memoryview, words: Words) -> None:
    _, count, gap_bytes = _read_header(payload)
    if count > words.size:
        raise CodecError("more kept elements than there are", expected=words.size, found=count)
    start = _HEADER.size + gap_bytes
    gaps = np.empty(count, _gap_dtype(words.size))
    plane_payload.decode(payload[_HEADER.size : start], gaps)
    kept = np.empty(count, words.dtype)
    plane_payload.decode(payload[start:], kept)
    words[_positions(gaps, words.size)] = kept


def _positions(gaps: Words, n: int) -> NDArray[np.uint64]:
    """Sums of `gaps`, which must be ascending and below n."""
    if gaps.size and gaps.max() >= n:
        raise CodecError("kept element outside of the column", expected=f"below {n}")
    positions = np.cumsum(gaps, dtype=np.uint64)
    if positions.size and positions[-1] >= n:
        raise CodecError(
            "kept element outside of the column", expected=f"below {n}", found=positions[-1]
        )
    if not gaps[1:].all():
        raise CodecError("kept element given twice")
    return positions
