"""The kernels in numba: one thread each, without the GIL, at about the speed of memory.

Each kernel is compiled for each word width when it is first needed (about 0.1 s) and kept in
numba's cache on disk. The width is a constant of the closure, so that the loop over planes is
unrolled and the loop over words vectorised: with the width as a variable it is 30 times slower.
What is compiled cannot be seen by coverage.
"""

from __future__ import annotations

import functools
import importlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from asymcheck.codecs import _huffman_numba
from asymcheck.codecs.kernels import COMPILING, Bytes, Floats, Formula, Words, float_masks

_numba: Any = importlib.import_module("numba")  # has no types
_extending: Any = importlib.import_module("numba.extending")
Loop = Callable[..., None]


def _array(dtype: Any, *, readonly: bool) -> Any:
    """Type of a 1-d array of any alignment: with it one compilation serves every caller."""
    return _numba.types.Array(
        _numba.from_dtype(np.dtype(dtype)), 1, "C", readonly=readonly, aligned=False
    )


def _compile(loop: Callable[..., Any], *argument_types: Any, returns: Any = _numba.void) -> Any:
    signature = returns(*argument_types)
    options = {"nogil": True, "error_model": "numpy"}
    begun_s = time.perf_counter()
    try:
        return _numba.njit(signature, cache=True, **options)(loop)
    except RuntimeError as error:  # no directory to write the cache to
        logging.info("numba compiles in every process anew: %s", error)
        return _numba.njit(signature, **options)(loop)
    finally:
        COMPILING.spent_s += time.perf_counter() - begun_s


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
def _split_floats(word: Any) -> Loop:
    width = np.dtype(word).itemsize
    one, byte = word(1), word(8)
    exponent, sign, mantissa = (word(mask) for mask in float_masks(width))

    def split_floats(words: Any, planes: Any) -> None:  # pragma: no cover
        n = words.size
        for i in range(n):
            x = words[i]
            x = word(word(x << one) & exponent) | word(word(x >> byte) & sign) | (x & mantissa)
            for k in range(width):
                planes[k * n + i] = x >> word(8 * k)

    return _compile(split_floats, _array(word, readonly=True), _array(np.uint8, readonly=False))


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
def _merge_floats(word: Any) -> Loop:
    width = np.dtype(word).itemsize
    zero, one, byte = word(0), word(1), word(8)
    exponent, sign, mantissa = (word(mask) for mask in float_masks(width))

    def merge_floats(planes: Any, words: Any) -> None:  # pragma: no cover
        for i in range(words.size):
            x = zero
            for k in range(width):
                x |= word(planes[k][i]) << word(8 * k)
            words[i] = (
                word(word(x & exponent) >> one) | word(word(x & sign) << byte) | (x & mantissa)
            )

    return _compile(merge_floats, _plane_arrays(width), _array(word, readonly=False))


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


@functools.cache
def _compute(formula: Formula, constants: int) -> Loop:
    """The loop of a formula. What is compiled is kept on disk for as long as its code is the same:
    numba looks at the values of the closure, so `version` has to be used in it."""
    inline = _extending.register_jitable(formula)
    code = formula.__code__
    version = np.uint32(zlib.crc32(code.co_code + repr(code.co_consts).encode()) >> 1)
    never = np.uint32(1 << 31)
    bits = np.uint32

    def compute_1(k: Any, inputs: Any, otherwise: Any, words: Any) -> None:  # pragma: no cover
        (a,) = inputs
        for i in range(words.size if version < never else 0):
            p = np.float32(inline(k, a[i]))
            words[i] = p.view(bits) if p == p else otherwise[i]

    def compute_2(k: Any, inputs: Any, otherwise: Any, words: Any) -> None:  # pragma: no cover
        a, b = inputs
        for i in range(words.size if version < never else 0):
            p = np.float32(inline(k, a[i], b[i]))
            words[i] = p.view(bits) if p == p else otherwise[i]

    def compute_3(k: Any, inputs: Any, otherwise: Any, words: Any) -> None:  # pragma: no cover
        a, b, c = inputs
        for i in range(words.size if version < never else 0):
            p = np.float32(inline(k, a[i], b[i], c[i]))
            words[i] = p.view(bits) if p == p else otherwise[i]

    arity = code.co_argcount - 1
    return _compile(
        (compute_1, compute_2, compute_3)[arity - 1],
        _numba.types.UniTuple(_numba.float32, constants),
        _numba.types.UniTuple(_array(np.float32, readonly=True), arity),
        _array(np.uint32, readonly=True),
        _array(np.uint32, readonly=False),
    )


@functools.cache
def _fold() -> Loop:
    sign, one = np.uint32(31), np.uint32(1)
    magnitude = np.uint32((1 << 31) - 1)

    def fold(words: Any, shift: Any, folded: Any) -> None:  # pragma: no cover
        for i in range(words.size):
            x = words[i]
            folded[i] = ((x & magnitude) >> shift) << one | x >> sign

    return _compile(
        fold, _array(np.uint32, readonly=True), _numba.uint32, _array(np.uint32, readonly=False)
    )


@functools.cache
def _unfold() -> Loop:
    sign, one = np.uint32(31), np.uint32(1)

    def unfold(folded: Any, shift: Any, words: Any) -> None:  # pragma: no cover
        for i in range(words.size):
            x = folded[i]
            words[i] = (x >> one) << shift | (x & one) << sign

    return _compile(
        unfold, _array(np.uint32, readonly=True), _numba.uint32, _array(np.uint32, readonly=False)
    )


@functools.cache
def _decode_literals() -> Callable[..., bool]:
    return _compile(
        _huffman_numba.decode,
        _array(np.uint8, readonly=True),
        _numba.int64,
        _numba.int64,
        _array(np.uint8, readonly=False),
        _numba.int64,
        returns=_numba.boolean,
    )


class NumbaKernels:
    """`Kernels` in numba."""

    def split(self, words: Words, planes: Bytes) -> None:
        """See `Kernels.split`."""
        _split(words.dtype.type)(words, planes)

    def split_floats(self, words: Words, planes: Bytes) -> None:
        """See `Kernels.split_floats`."""
        _split_floats(words.dtype.type)(words, planes)

    def split_difference(self, new: Words, old: Words, planes: Bytes) -> None:
        """See `Kernels.split_difference`."""
        _split_difference(new.dtype.type)(new, old, planes)

    def merge(self, planes: Sequence[Bytes], words: Words) -> None:
        """See `Kernels.merge`."""
        _merge(words.dtype.type)(tuple(planes), words)

    def merge_floats(self, planes: Sequence[Bytes], words: Words) -> None:
        """See `Kernels.merge_floats`."""
        _merge_floats(words.dtype.type)(tuple(planes), words)

    def merge_difference(self, planes: Sequence[Bytes], words: Words) -> None:
        """See `Kernels.merge_difference`."""
        _merge_difference(words.dtype.type)(tuple(planes), words)

    def compute(
        self,
        formula: Formula,
        constants: tuple[Any, ...],
        inputs: Sequence[Floats],
        otherwise: Words,
        words: Words,
    ) -> None:
        """See `Kernels.compute`."""
        k = constants or (np.float32(0),)  # numba has no type for the elements of ()
        _compute(formula, len(k))(k, tuple(inputs), otherwise, words)

    def fold(self, words: Words, shift: int, folded: Words) -> None:
        """See `Kernels.fold`."""
        _fold()(words, np.uint32(shift), folded)

    def unfold(self, folded: Words, shift: int, words: Words) -> None:
        """See `Kernels.unfold`."""
        _unfold()(folded, np.uint32(shift), words)

    def decode_literals(
        self, frame: Bytes, begin: int, max_block_bytes: int, content: Bytes
    ) -> bool:
        """See `Kernels.decode_literals`."""
        lookups = _huffman_numba.LOOKUPS
        return _decode_literals()(frame, begin, max_block_bytes, content, lookups)
