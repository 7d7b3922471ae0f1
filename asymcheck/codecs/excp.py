"""Pruning and quantisation of a weight with its two moments, after ExCP. Lossy, only by name.

From the change d of the weight, taken to what a reader has for the predecessor, and the moments m
and v of the same elements (float32 arithmetic, sums in float64):

    kept of the weight    |d| > min(2.5, alpha / sqrt(mean |v|)) * median |d|
    kept of the moments   |m| > beta * mean |m|, where the weight was kept, too

The kept values of each are replaced by the nearest of 2^bits - 1 centres (k-means); elsewhere the
weight stays as it was and the moments become 0. That is much: what a payload states is the largest
error, for the moments often the largest value that was pruned. What is left out of the weight is
part of the next difference (error feedback); what is left out of the moments is lost.

Columns are told apart by their kinds: `params`, `exp_avg` and `exp_avg_sq`, one of each, of the
same number of float16, bfloat16 or float32 elements. All others, and all of a group that lacks one
of the three, are exact. They are encoded together but each decodes alone.

The layout is that of `_lossy`, but in mode 0 the rest is what `plane_payload` describes for the
*differences* to the predecessor, as codec `delta` stores them. Mode 1 is for values, mode 2 for
changes of the predecessor; the body, for n elements:

| offset | bytes | field |
| --- | --- | --- |
| 0 | 1 | b: 1, 2, 4 or 8 |
| 1 | 4 (2^b - 1) | the centres c[1], c[2], ..., float32, finite |
| 1 + 4 (2^b - 1) | | coded planes of ceil(b n / 8) words of 1 byte: the indices, b bits for each element, from the lowest bits of the first byte on; unused bits are 0 |

With index 0 an element is 0 (mode 1) or unchanged (mode 2); with index j it is c[j], or the sum of
the predecessor and c[j] in float32, rounded to the nearest number of its dtype, ties to even.
"""  # noqa: E501 (a table cannot be wrapped)

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs import plane_payload
from asymcheck.codecs._columns import as_words, base_of, paired, word_width
from asymcheck.codecs._kmeans import centres, nearest
from asymcheck.codecs._lossy import (
    EXACT,
    FLOATS_TO_32,
    StatesBound,
    check_mode,
    open_payload,
    seal,
)
from asymcheck.codecs.base import Column, JsonValue
from asymcheck.codecs.kernels import Words
from asymcheck.errors import CodecError

ROLES = ("params", "exp_avg", "exp_avg_sq")
_VALUES, _CHANGES = 1, 2
_WIDTHS = (1, 2, 4, 8)
_MAX_FACTOR = 2.5

Singles = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ExcpCodec(StatesBound):
    """Changes of weights and the moments beside them: few elements, of few different values.

    Args:
        alpha: scales the threshold of weights, above 0.
        beta: scales the threshold of moments, above 0.
        bits: of an index, 1, 2, 4 or 8.

    Raises:
        CodecError: if a parameter is no such number.
    """

    alpha: float = 5e-5
    beta: float = 2.0
    bits: int = 4

    id = "excp"
    modes = (_VALUES, _CHANGES)
    needs_base = True

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise CodecError(f"no such {name}", expected="above 0", found=repr(value))
        if type(self.bits) is not int or self.bits not in _WIDTHS:
            raise CodecError("no such number of bits", expected=_WIDTHS, found=repr(self.bits))

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """The thresholds and the bits of an index; decoding does not depend on them."""
        return {"alpha": self.alpha, "beta": self.beta, "bits": self.bits}

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """Weight and moments pruned and quantised, all other columns exactly.

        Raises:
            CodecError: if a column has no predecessor, or what was encoded does not decode within
                the bound that it states.
        """
        coded = self._encode_joint(columns)
        payloads = [coded.get(i) or _encode_exact(column) for i, column in enumerate(columns)]
        return self.checked(columns, payloads)

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Fill every column from its predecessor, which may be the same memory.

        Raises:
            CodecError: if a column has no predecessor, or a payload does not follow the layout
                for the column's dtype and length.
        """
        for column, payload in paired(columns, payloads):
            _decode(column, payload)

    def _encode_joint(self, columns: Sequence[Column]) -> dict[int, bytes]:
        """The payloads of weight and moments by position in `columns`; none if one lacks."""
        places = _places(columns)
        if places is None:
            return {}
        weight, first, second = (columns[i] for i in places)
        change = _change(weight)
        m, v = _singles(first.new, first.dtype), _singles(second.new, second.dtype)
        kept = _finite_size(change) > self._weight_threshold(change, v)
        kept_moments = kept & (_finite_size(m) > _scaled(self.beta, _mean_size(m)))
        quantised = [
            (weight, _CHANGES, *self._quantise(change, kept)),
            (first, _VALUES, *self._quantise(m, kept_moments)),
            (second, _VALUES, *self._quantise(v, kept_moments)),
        ]
        return {i: _seal(self.bits, *parts) for i, parts in zip(places, quantised, strict=True)}

    def _weight_threshold(self, change: Singles, v: Singles) -> np.float32:
        spread = math.sqrt(_mean_size(v))
        factor = min(_MAX_FACTOR, self.alpha / spread) if spread else _MAX_FACTOR
        return _scaled(factor, float(_median(_finite_size(change))))

    def _quantise(
        self, values: Singles, kept: NDArray[np.bool_]
    ) -> tuple[Singles, NDArray[np.uint8]]:
        """The centres, and the index of every element: 0 where it is not kept, or not finite."""
        kept = kept & np.isfinite(values)
        found = centres(values[kept], (1 << self.bits) - 1)
        indices = np.zeros(values.size, np.uint8)
        indices[kept] = nearest(values[kept], found) + 1
        return found, indices


# -- what is kept ------------------------------------------------------------------------------


def _places(columns: Sequence[Column]) -> list[int] | None:
    """Where weight, first and second moment are, if there is one of each and they match."""
    places: list[int] = []
    for kind in ROLES:
        found = [i for i, column in enumerate(columns) if column.kind == kind]
        if len(found) != 1 or columns[found[0]].dtype not in FLOATS_TO_32:
            return None
        places += found
    sizes = {columns[i].new.size // columns[i].dtype.itemsize for i in places}
    return places if len(sizes) == 1 and sizes != {0} else None


def _singles(data: NDArray[np.uint8], dtype: np.dtype[np.generic]) -> Singles:
    with np.errstate(all="ignore"):
        return as_words(data, dtype.itemsize).view(dtype).astype(np.float32)


def _change(weight: Column) -> Singles:
    new, old = _singles(weight.new, weight.dtype), _singles(base_of(weight), weight.dtype)
    with np.errstate(all="ignore"):
        return new - old


def _finite_size(values: Singles) -> Singles:
    """Magnitudes, 0 for what is not finite: that is never kept, but an exception if it matters."""
    sizes = np.abs(values)
    sizes[~np.isfinite(sizes)] = 0
    return sizes


def _mean_size(values: Singles) -> float:
    return float(np.cumsum(_finite_size(values), dtype=np.float64)[-1]) / values.size


def _median(sizes: Singles) -> np.float32:
    """The lower one of two."""
    middle = (sizes.size - 1) // 2
    return np.partition(sizes, middle)[middle]


def _scaled(factor: float, size: float) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(factor * size)


# -- payloads ----------------------------------------------------------------------------------


def _seal(
    bits: int, column: Column, mode: int, found: Singles, indices: NDArray[np.uint8]
) -> bytes:
    packed = plane_payload.encode(_packed(indices, bits))
    body = b"".join((bytes([bits]), found.astype("<f4").tobytes(), packed))
    return seal(column, mode, body, _approximation(column, mode, found, indices))


def _packed(indices: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    padded = np.zeros(-(-indices.size // per_byte) * per_byte, np.uint8)
    padded[: indices.size] = indices
    packed = np.zeros(padded.size // per_byte, np.uint8)
    for i in range(per_byte):
        packed |= padded[i::per_byte] << np.uint8(i * bits)
    return packed


def _unpacked(packed: NDArray[np.uint8], bits: int, n: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    padded = np.empty(packed.size * per_byte, np.uint8)
    for i in range(per_byte):
        padded[i::per_byte] = (packed >> np.uint8(i * bits)) & np.uint8((1 << bits) - 1)
    if padded[n:].any():
        raise CodecError("unused bits of an ExCP payload are not 0")
    return padded[:n]


def _approximation(column: Column, mode: int, found: Singles, indices: NDArray[np.uint8]) -> Words:
    """What the indices say, as words of the column."""
    word = f"<u{column.dtype.itemsize}"
    at = np.flatnonzero(indices)
    values = found[indices[at] - np.uint8(1)]
    words = np.zeros(indices.size, word)
    with np.errstate(all="ignore"):
        if mode == _CHANGES:
            old = as_words(base_of(column), column.dtype.itemsize)
            np.copyto(words, old)
            values = _singles(old[at].view(np.uint8), column.dtype) + values
        words[at] = values.astype(column.dtype).view(word)
    return words


def _encode_exact(column: Column) -> bytes:
    width = word_width(column.dtype)
    new, old = as_words(column.new, width), as_words(base_of(column), width)
    return b"".join((bytes([EXACT]), plane_payload.encode_difference(new, old)))


def _decode(column: Column, payload: memoryview) -> None:
    old, words = base_of(column), as_words(column.new, word_width(column.dtype))
    modes = [EXACT, _VALUES, _CHANGES] if column.dtype in FLOATS_TO_32 else [EXACT]
    if check_mode(payload, modes) == EXACT:
        np.copyto(column.new, old)
        plane_payload.decode_difference(payload[1:], words)
        return
    opened = open_payload(payload, modes[1:])
    found, indices = _read_body(opened.body, words.size)
    opened.finish(_approximation(column, opened.mode, found, indices), words)


def _read_body(body: memoryview, n: int) -> tuple[Singles, NDArray[np.uint8]]:
    bits = body[0] if body.nbytes else 0
    start = 1 + 4 * ((1 << bits) - 1) if bits in _WIDTHS else math.inf
    if start > body.nbytes:
        raise CodecError("ExCP payload of a wrong width, or ends within its centres", found=bits)
    found: NDArray[Any] = np.frombuffer(body[1 : int(start)], "<f4")
    if not np.isfinite(found).all():
        raise CodecError("centre of an ExCP payload is not finite")
    packed = np.empty(-(-n * bits // 8), np.uint8)
    plane_payload.decode(body[int(start) :], packed)
    return found, _unpacked(packed, bits, n)
