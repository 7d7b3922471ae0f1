"""The kernels in NumPy, for where numba is not: the same bytes, at a fraction of the speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from asymcheck.codecs.kernels import Bytes, Floats, Formula, Words, float_masks

_BLOCK_WORDS = 1 << 16  # temporaries that stay in the second-level cache


def _blocks(n_words: int) -> Iterator[slice]:
    for start in range(0, n_words, _BLOCK_WORDS):
        yield slice(start, min(start + _BLOCK_WORDS, n_words))


def _planes_of(words: Words, planes: Bytes, block: slice) -> None:
    """Write the planes of `words`, which are the words of `block`, to their place in `planes`."""
    width = words.itemsize
    rows = planes.reshape(width, -1)
    shifted = np.empty_like(words)
    np.copyto(rows[0, block], words, casting="unsafe")
    for k in range(1, width):
        np.right_shift(words, words.dtype.type(8 * k), out=shifted)
        np.copyto(rows[k, block], shifted, casting="unsafe")


def _zigzag(difference: Words) -> Words:
    word = difference.dtype.type
    sign = difference >> word(8 * difference.itemsize - 1)
    return (difference << word(1)) ^ np.negative(sign)


def _unzigzag(zigzag: Words) -> Words:
    word = zigzag.dtype.type
    return (zigzag >> word(1)) ^ np.negative(zigzag & word(1))


def _masks(words: Words) -> list[Any]:
    return [words.dtype.type(mask) for mask in float_masks(words.itemsize)]


def _sign_below_exponent(words: Words) -> Words:
    word = words.dtype.type
    exponent, sign, mantissa = _masks(words)
    return ((words << word(1)) & exponent) | ((words >> word(8)) & sign) | (words & mantissa)


def _sign_on_top(words: Words) -> Words:
    word = words.dtype.type
    exponent, sign, mantissa = _masks(words)
    return ((words & exponent) >> word(1)) | ((words & sign) << word(8)) | (words & mantissa)


class NumpyKernels:
    """`Kernels` in NumPy."""

    def split(self, words: Words, planes: Bytes) -> None:
        """See `Kernels.split`."""
        for block in _blocks(words.size):
            _planes_of(words[block], planes, block)

    def split_floats(self, words: Words, planes: Bytes) -> None:
        """See `Kernels.split_floats`."""
        for block in _blocks(words.size):
            _planes_of(_sign_below_exponent(words[block]), planes, block)

    def split_difference(self, new: Words, old: Words, planes: Bytes) -> None:
        """See `Kernels.split_difference`."""
        for block in _blocks(new.size):
            _planes_of(_zigzag(new[block] - old[block]), planes, block)

    def merge(self, planes: Sequence[Bytes], words: Words) -> None:
        """See `Kernels.merge`."""
        byte = words.dtype.type(8)
        for block in _blocks(words.size):
            part = words[block]
            np.copyto(part, planes[-1][block])
            for plane in reversed(planes[:-1]):
                np.left_shift(part, byte, out=part)
                np.bitwise_or(part, plane[block], out=part)

    def merge_floats(self, planes: Sequence[Bytes], words: Words) -> None:
        """See `Kernels.merge_floats`."""
        for block in _blocks(words.size):
            self.merge([plane[block] for plane in planes], words[block])
            words[block] = _sign_on_top(words[block])

    def merge_difference(self, planes: Sequence[Bytes], words: Words) -> None:
        """See `Kernels.merge_difference`."""
        for block in _blocks(words.size):
            zigzag = np.empty_like(words[block])
            self.merge([plane[block] for plane in planes], zigzag)
            words[block] += _unzigzag(zigzag)

    def compute(
        self,
        formula: Formula,
        constants: tuple[Any, ...],
        inputs: Sequence[Floats],
        otherwise: Words,
        words: Words,
    ) -> None:
        """See `Kernels.compute`."""
        with np.errstate(all="ignore"):
            for block in _blocks(words.size):
                p: Floats = formula(constants, *(each[block] for each in inputs))
                words[block] = np.where(p == p, p.view(np.uint32), otherwise[block])

    def fold(self, words: Words, shift: int, folded: Words) -> None:
        """See `Kernels.fold`."""
        for block in _blocks(words.size):
            x = words[block]
            magnitude = (x & np.uint32((1 << 31) - 1)) >> np.uint32(shift)
            folded[block] = (magnitude << np.uint32(1)) | (x >> np.uint32(31))

    def unfold(self, folded: Words, shift: int, words: Words) -> None:
        """See `Kernels.unfold`."""
        for block in _blocks(words.size):
            x = folded[block]
            magnitude = (x >> np.uint32(1)) << np.uint32(shift)
            words[block] = magnitude | ((x & np.uint32(1)) << np.uint32(31))

    def decode_literals(
        self, frame: Bytes, begin: int, max_block_bytes: int, content: Bytes
    ) -> bool:
        """See `Kernels.decode_literals`; bit by bit is nothing for NumPy."""
        return False
