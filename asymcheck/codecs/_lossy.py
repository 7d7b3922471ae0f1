"""What the lossy codecs share: stated bounds, elements that are kept exactly, the check of both.

Layout of a payload (top-k has a header of its own), integers little-endian:

| offset | bytes | field |
| --- | --- | --- |
| 0 | 1 | mode: 0 exact, others as the codec says |

Mode 0: the rest is what `plane_payload` describes. Any other mode, for n words:

| offset | bytes | field |
| --- | --- | --- |
| 1 | 8 | bound on the absolute error, float64, finite, >= 0 |
| 9 | 8 | bound on the relative error, float64, >= 0, may be infinite |
| 17 | 8 | K, the number of exceptions, <= n |
| 25 | 8 | g |
| 33 | 8 | e |
| 41 | g | coded planes of K words, 4 bytes each if n < 2^32, else 8: the index of the first exception, then how far each is from the one before it |
| 41 + g | e | coded planes of the K exceptions, as words of their own width |
| 41 + g + e | | body, as the codec says |

Exceptions replace what the body gives. An element is one if it, its approximation or the difference
of the two is not finite, unless the bits agree: what is not finite always survives exactly.
"""  # noqa: E501 (a table cannot be wrapped)

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs import plane_payload
from asymcheck.codecs._columns import as_words, paired, word_width
from asymcheck.codecs._errors import errors_of
from asymcheck.codecs._kept import encode_kept, replace_kept
from asymcheck.codecs.base import Column, Fidelity
from asymcheck.codecs.kernels import Words
from asymcheck.errors import CodecError

FLOAT32 = np.dtype(np.float32)
FLOATS_TO_32 = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), FLOAT32)
FLOATS = (*FLOATS_TO_32, np.dtype(np.float64))
"""Of which fewer bytes can be made; the smaller ones are exact."""

EXACT, APPROXIMATE = range(2)
_HEADER = struct.Struct("<BddQQQ")


# -- payloads ----------------------------------------------------------------------------------


def check_mode(payload: bytes | memoryview, modes: Sequence[int]) -> int:
    """The mode of a payload.

    Raises:
        CodecError: if it is not one of `modes`.
    """
    if not len(payload) or payload[0] not in modes:
        raise CodecError(
            "wrong mode of a lossy payload", expected=list(modes), found=bytes(payload[:1])
        )
    return payload[0]


def check_bound(bound: float) -> None:
    """Refuse what is no bound on an absolute error.

    Raises:
        CodecError: if it is negative, infinite or not a number.
    """
    if not 0 <= bound < math.inf:
        raise CodecError("wrong bound of a lossy payload", expected="finite, >= 0", found=bound)


def encode_exact(words: Words) -> bytes:
    """The payload in mode 0."""
    return b"".join((bytes([EXACT]), plane_payload.encode(words)))


def decode_exact(payload: memoryview, words: Words) -> None:
    """Inverse of `encode_exact`.

    Raises:
        CodecError: if it is something else; `words` is then unchanged.
    """
    check_mode(payload, [EXACT])
    plane_payload.decode(payload[1:], words)


@dataclass(frozen=True, slots=True)
class Opened:
    """A payload that is not exact, taken apart but not decoded."""

    mode: int
    fidelity: Fidelity
    count: int
    gaps: memoryview
    kept: memoryview
    body: memoryview

    def finish(self, approximation: Words, words: Words) -> None:
        """Fill `words` from what the body gives, which is changed, and the exceptions.

        Raises:
            CodecError: if the exceptions are malformed; `words` is then unchanged.
        """
        replace_kept(approximation, self.count, self.gaps, self.kept)
        np.copyto(words, approximation)


def seal(column: Column, mode: int, body: bytes | memoryview, approximation: Words) -> bytes:
    """A payload that states its true errors; `approximation`, what `body` gives, is changed."""
    words = as_words(column.new, word_width(column.dtype))
    found = errors_of(column.dtype, words, approximation)
    gaps, kept = encode_kept(words, found.infinite)
    sizes = found.infinite.size, gaps.nbytes, kept.nbytes
    return b"".join((_HEADER.pack(mode, found.absolute, found.relative, *sizes), gaps, kept, body))


def open_payload(payload: memoryview, modes: Sequence[int]) -> Opened:
    """Inverse of `seal`, for one of `modes`.

    Raises:
        CodecError: if the payload does not follow the layout.
    """
    mode = check_mode(payload, modes)
    stated, count, gap_bytes, kept_bytes = _read_header(payload)
    end = _HEADER.size + gap_bytes + kept_bytes
    if end > payload.nbytes:
        raise CodecError(
            "lossy payload ends within its exceptions", expected=end, found=payload.nbytes
        )
    start = _HEADER.size + gap_bytes
    parts = payload[_HEADER.size : start], payload[start:end], payload[end:]
    return Opened(mode, stated, count, *parts)


def read_fidelity(payload: bytes | memoryview, modes: Sequence[int]) -> Fidelity:
    """What a payload, or the beginning of it, states.

    Raises:
        CodecError: if its mode is neither 0 nor one of `modes`, or a bound is none.
    """
    if check_mode(payload, [EXACT, *modes]) == EXACT:
        return Fidelity(True, 0.0, 0.0)
    return _read_header(payload)[0]


def _read_header(payload: bytes | memoryview) -> tuple[Fidelity, int, int, int]:
    """Bounds, number of exceptions, bytes of their gaps and of their words."""
    if len(payload) < _HEADER.size:
        raise CodecError(
            "lossy payload ends within its header", expected=_HEADER.size, found=len(payload)
        )
    _, absolute, relative, count, gap_bytes, kept_bytes = _HEADER.unpack_from(payload)
    check_bound(absolute)
    if not relative >= 0:
        raise CodecError("wrong bound of a lossy payload", expected=">= 0", found=relative)
    return Fidelity(False, absolute, relative), count, gap_bytes, kept_bytes


# -- codecs ------------------------------------------------------------------------------------


class StatesBound(ABC):
    """A lossy codec whose payloads follow the layout; the modes besides 0 are `modes`."""

    __slots__ = ()

    id: ClassVar[str]
    modes: ClassVar[Sequence[int]] = (APPROXIMATE,)
    lossy = True
    joint = False

    @abstractmethod
    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """See `Codec.decode`."""

    def fidelity(self, payload: bytes | memoryview) -> Fidelity:
        """See `LossyCodec.fidelity`."""
        return read_fidelity(payload, self.modes)

    def error_bound(self, payload: bytes | memoryview) -> float:
        """The largest |decoded - true| of a payload, 0.0 where it is exact.

        Raises:
            CodecError: if the payload's header does not follow the layout.
        """
        return self.fidelity(payload).absolute

    def checked(
        self, columns: Sequence[Column], payloads: Sequence[bytes]
    ) -> list[bytes | memoryview]:
        """The payloads of the columns, after they were decoded and compared.

        Raises:
            CodecError: if one does not hold what it states.
        """
        outputs = [Column(c.kind, c.dtype, np.empty_like(c.new), c.old) for c in columns]
        self.decode(outputs, [memoryview(payload) for payload in payloads])
        for column, output, payload in zip(columns, outputs, payloads, strict=True):
            if not _holds(self.fidelity(payload), column, output.new):
                raise CodecError(f"a payload of {self.id!r} does not hold the bound that it states")
        return [*payloads]


def _holds(stated: Fidelity, column: Column, decoded: NDArray[np.uint8]) -> bool:
    if stated.exact:
        return np.array_equal(column.new, decoded)
    width = word_width(column.dtype)
    found = errors_of(column.dtype, as_words(column.new, width), as_words(decoded, width))
    within = found.absolute <= stated.absolute and found.relative <= stated.relative
    return within and not found.infinite.size


class Columnwise(StatesBound):
    """A lossy codec that codes each column by itself, without predecessor, in mode 1.

    Columns of other dtypes than `dtypes` are exact.
    """

    __slots__ = ()

    dtypes: ClassVar[Sequence[np.dtype[Any]]]
    needs_base = False

    @abstractmethod
    def approximate(
        self, words: Words, dtype: np.dtype[np.generic]
    ) -> tuple[bytes | memoryview, Words]:
        """The body for these elements, and what `restore` will make of it."""

    @abstractmethod
    def restore(self, body: memoryview, n: int, dtype: np.dtype[np.generic]) -> Words:
        """The words of n elements.

        Raises:
            CodecError: if `body` does not follow the layout.
        """

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """The approximation of each column of the codec's dtypes, all bits of the others.

        Raises:
            CodecError: if what was encoded does not decode within the bound that it states.
        """
        return self.checked(columns, [self._encode(column) for column in columns])

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Fill every column from its payload.

        Raises:
            CodecError: if a payload does not follow the layout for the column's dtype and length.
        """
        for column, payload in paired(columns, payloads):
            words = as_words(column.new, word_width(column.dtype))
            if column.dtype in self.dtypes:
                opened = open_payload(payload, self.modes)
                opened.finish(self.restore(opened.body, words.size, column.dtype), words)
            else:
                decode_exact(payload, words)

    def _encode(self, column: Column) -> bytes:
        words = as_words(column.new, word_width(column.dtype))
        if column.dtype not in self.dtypes:
            return encode_exact(words)
        body, approximation = self.approximate(words, column.dtype)
        return seal(column, APPROXIMATE, body, approximation)
