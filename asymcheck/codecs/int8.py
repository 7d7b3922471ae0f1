"""Floats as 8-bit integers with a scale for every block of 256, for moments. Lossy, only by name.

With s the largest magnitude of a block over 127, in float32, an element x is coded as the integer
nearest to x / s and decoded as that times s: the error is about s / 2 at most. What float32 does
not hold is an exception. Columns that are not float16, bfloat16, float32 or float64 are exact.

The layout is that of `_lossy`; its body, for n elements:

| offset | bytes | field |
| --- | --- | --- |
| 0 | 8 | c |
| 8 | c | coded planes of ceil(n / 256) words of 4 bytes: the scales, float32, finite, >= 0 |
| 8 + c | | coded planes of n words of 1 byte: the integers, two's complement, not -128 |
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs import plane_payload
from asymcheck.codecs._lossy import FLOATS, Columnwise
from asymcheck.codecs.base import JsonValue
from asymcheck.codecs.kernels import Words
from asymcheck.errors import CodecError

BLOCK = 256
_LARGEST = 127
_SMALLEST_SCALE = np.finfo(np.float32).tiny  # products are normal, also where others are flushed
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Int8Codec(Columnwise):
    """Columns of floats in blocks of 256 integers."""

    id = "int8"
    dtypes = FLOATS

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """None."""
        return {}

    def approximate(
        self, words: Words, dtype: np.dtype[np.generic]
    ) -> tuple[bytes | memoryview, Words]:
        """See `Columnwise.approximate`."""
        scales, integers = _quantised(words.view(dtype))
        coded_scales = plane_payload.encode(scales.view("<u4"))
        coded_integers = plane_payload.encode(integers.view("u1"))
        body = b"".join((_LENGTH.pack(coded_scales.nbytes), coded_scales, coded_integers))
        return body, _words(scales, integers, dtype)

    def restore(self, body: memoryview, n: int, dtype: np.dtype[np.generic]) -> Words:
        """See `Columnwise.restore`."""
        if body.nbytes < _LENGTH.size:
            raise CodecError("int8 payload ends within its header")
        (coded,) = _LENGTH.unpack_from(body)
        end = _LENGTH.size + coded
        scales, integers = np.empty(-(-n // BLOCK), "<u4"), np.empty(n, "u1")
        plane_payload.decode(body[_LENGTH.size : end], scales)
        plane_payload.decode(body[end:], integers)
        return _words(_checked_scales(scales), _checked_integers(integers), dtype)


def _quantised(values: NDArray[np.generic]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    with np.errstate(all="ignore"):
        singles = values.astype(np.float32)
    singles[~np.isfinite(singles)] = 0
    blocks = np.arange(0, singles.size, BLOCK)
    largest = np.maximum.reduceat(np.abs(singles), blocks) if singles.size else singles
    scales = largest / np.float32(_LARGEST)
    scales[scales < _SMALLEST_SCALE] = 0
    divisors = _per_element(np.where(scales == 0, np.float32(np.inf), scales), singles.size)
    integers = np.clip(np.rint(singles / divisors), -_LARGEST, _LARGEST).astype(np.int8)
    return scales, integers


def _words(
    scales: NDArray[np.float32], integers: NDArray[np.int8], dtype: np.dtype[np.generic]
) -> Words:
    with np.errstate(all="ignore"):
        values = integers.astype(np.float32) * _per_element(scales, integers.size)
        return values.astype(dtype).view(f"<u{dtype.itemsize}")


def _per_element(scales: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    return np.repeat(scales, BLOCK)[:n]


def _checked_scales(words: Words) -> NDArray[np.float32]:
    scales = words.view("<f4")
    if not (np.isfinite(scales) & ~np.signbit(scales)).all():
        raise CodecError("wrong scale of an int8 payload", expected="finite, >= 0")
    return scales


def _checked_integers(words: Words) -> NDArray[np.int8]:
    integers = words.view(np.int8)
    if (integers < -_LARGEST).any():
        raise CodecError("wrong integer of an int8 payload", expected="-127 to 127", found=-128)
    return integers
