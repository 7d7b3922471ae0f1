"""The kernels in numba: one thread each, without the GIL, at about the speed of memory.

Each kernel is compiled for each word width when it is first needed (about 0.1 s) and kept in
numba's cache on disk. The width is a constant of the closure, so that the loop over planes is
unrolled and the loop over words vectorised: with the width as a variable it is 30 times slower.
What is compiled cannot be seen by coverage.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from asymcheck.codecs.kernels import Bytes, Words

_numba: Any = importlib.import_module("numba")  # has no types
Loop = Callable[..., None]


def _array(dtype: Any, *, readonly: bool) -> Any:
    """Type of a 1-d array of any alignment: with it one compilation serves every caller."""
    return _numba.types.Array(
        _numba.from_dtype(np.dtype(dtype)), 1, "C", readonly=readonly, aligned=False
    )


def _compile(loop: Loop, *argument_types: Any) -> Loop:
    signature = _numba.void(*argument_types)
    try:
        return _numba.njit(signature, nogil=True, cache=True)(loop)
    except RuntimeError as error:  # no directory to write the cache to
        logging.info("numba compiles in every process anew: %s", error)
        return _numba.njit(signature, nogil=True)(loop)


@functools.cache
def _split(word: Any) -> Loop:
    width = np.dtype(word).itemsize

    def split(words: Any, planes: Any) -> None:  # pragma: no cover
        n = words.size
        for i in range(n):
            x = words[i]
            for k in range(width):
                planes[k * n + i] = x >> word(8 * k)

    return _compile(split, _array(word, readonly=True), _array(np.uint8, readonly=False))


@functools.cache
def _split_difference(word: Any) -> Loop:
    width = np.dtype(word).itemsize
    zero, one, sign = word(0), word(1), word(8 * width - 1)

    def split_difference(new: Any, old: Any, planes: Any) -> None:  # pragma: no cover
        n = new.size
        for i in range(n):
            d = word(new[i] - old[i])  # numba widens to 64 bits: back to the word each time
            z = word((d << one) ^ word(zero - word(d >> sign)))
            for k in range(width):
                planes[k * n + i] = z >> word(8 * k)

    words = _array(word, readonly=True)
    return _compile(split_difference, words, words, _array(np.uint8, readonly=False))


@functools.cache
def _merge(word: Any) -> Loop:
    width = np.dtype(word).itemsize
    zero = word(0)

    def merge(planes: Any, words: Any) -> None:  # pragma: no cover
        for i in range(words.size):
            x = zero
            for k in range(width):
                x |= word(planes[k][i]) << word(8 * k)
            words[i] = x

    return _compile(merge, _plane_arrays(width), _array(word, readonly=False))


@functools.cache
def _merge_difference(word: Any) -> Loop:
    width = np.dtype(word).itemsize
    zero, one = word(0), word(1)

    def merge_difference(planes: Any, words: Any) -> None:  # pragma: no cover
        for i in range(words.size):
            z = zero
            for k in range(width):
                z |= word(planes[k][i]) << word(8 * k)
            words[i] += word(word(z >> one) ^ word(zero - word(z & one)))

    return _compile(merge_difference, _plane_arrays(width), _array(word, readonly=False))


def _plane_arrays(width: int) -> Any:
    return _numba.types.UniTuple(_array(np.uint8, readonly=True), width)


class NumbaKernels:
    """`Kernels` in numba."""

    def split(self, words: Words, planes: Bytes) -> None:
        """See `Kernels.split`."""
        _split(words.dtype.type)(words, planes)

    def split_difference(self, new: Words, old: Words, planes: Bytes) -> None:
        """See `Kernels.split_difference`."""
        _split_difference(new.dtype.type)(new, old, planes)

    def merge(self, planes: Sequence[Bytes], words: Words) -> None:
        """See `Kernels.merge`."""
        _merge(words.dtype.type)(tuple(planes), words)

    def merge_difference(self, planes: Sequence[Bytes], words: Words) -> None:
        """See `Kernels.merge_difference`."""
        _merge_difference(words.dtype.type)(tuple(planes), words)
