"""Columns as unsigned words, and the checks that all codecs share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs.base import Column
from asymcheck.codecs.kernels import Words
from asymcheck.errors import CodecError


def word_width(dtype: np.dtype[np.generic]) -> int:
    """Bytes of the words that elements of `dtype` are coded as.

    The element's own width; half of it for complex numbers (real and imaginary part are words
    of their own); 1 where that is not 1, 2, 4 or 8.
    """
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return width if width in (1, 2, 4, 8) else 1


def as_words(data: NDArray[np.uint8], width: int) -> Words:
    """The bytes `data` as little-endian words of `width` bytes: the same memory.

    Raises:
        CodecError: if they are not whole words.
    """
    if data.size % width:
        raise CodecError("column does not hold whole elements", found=f"{data.size} bytes")
    return data.view(np.dtype(f"<u{width}"))


def base_of(column: Column) -> NDArray[np.uint8]:
    """The predecessor of `column`.

    Raises:
        CodecError: if it has none, or one of another length.
    """
    if column.old is None:
        raise CodecError(
            f"column of {column.kind!r} has no predecessor", hint="Code it without a base."
        )
    if column.old.size != column.new.size:
        raise CodecError(
            f"column of {column.kind!r} and its predecessor differ in length",
            expected=column.new.size,
            found=column.old.size,
        )
    return column.old


def paired(
    columns: Sequence[Column], payloads: Sequence[memoryview]
) -> Iterable[tuple[Column, memoryview]]:
    """Each column with its payload.

    Raises:
        CodecError: if there are not as many of the ones as of the others.
    """
    if len(columns) != len(payloads):
        raise CodecError(
            "as many payloads as columns are needed", expected=len(columns), found=len(payloads)
        )
    return zip(columns, payloads, strict=True)
