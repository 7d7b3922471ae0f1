"""The loops over elements: byte planes, and differences of bit patterns.

Two implementations give the same bytes: numba where it is installed (about the speed of memory)
and NumPy. Set the environment variable ASYMCHECK_NUMBA=0 to use NumPy although numba is there.
numba is imported at the first use, never with the package.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.unsignedinteger[Any]]
"""Elements as little-endian unsigned integers of 1, 2, 4 or 8 bytes, of any alignment."""
Floats = NDArray[np.float32]
Formula = Callable[..., Any]
"""(constants, *inputs) -> float32, elementwise; see `asymcheck.codecs.rules.base`."""


def float_masks(width: int) -> tuple[int, int, int]:
    """Where `split_floats` puts exponent, sign and mantissa in words of `width` bytes."""
    sign = 1 << (8 * width - 9)
    return 0xFF << (8 * width - 8), sign, sign - 1


class Kernels(Protocol):
    """The loops. n is the number of words, w their width in bytes.

    Byte k of word i is byte i of plane k: plane 0 holds the least significant bytes.
    """

    def split(self, words: Words, planes: Bytes) -> None:
        """Write the w planes of `words`, one after the other, to `planes` (w·n bytes)."""
        ...

    def split_floats(self, words: Words, planes: Bytes) -> None:
        """The same for floats with exponents of 8 bits, their sign moved to below the exponent.

        So the whole exponent is the top plane, and a sign that is as good as random does not
        make it longer. 2 or 4 bytes (bfloat16, float32).
        """
        ...

    def split_difference(self, new: Words, old: Words, planes: Bytes) -> None:
        """The same as `split` for zigzag(new − old), the difference taken modulo 2^(8w).

        zigzag maps the signed differences 0, −1, 1, −2, … to 0, 1, 2, 3, …: small ones of either
        sign have zeros in their high planes.
        """
        ...

    def merge(self, planes: Sequence[Bytes], words: Words) -> None:
        """Inverse of `split`, from w arrays of n bytes."""
        ...

    def merge_floats(self, planes: Sequence[Bytes], words: Words) -> None:
        """Inverse of `split_floats`."""
        ...

    def merge_difference(self, planes: Sequence[Bytes], words: Words) -> None:
        """Inverse of `split_difference`, in place: `words` holds old before and new after."""
        ...

    def compute(
        self,
        formula: Formula,
        constants: tuple[Any, ...],
        inputs: Sequence[Floats],
        otherwise: Words,
        words: Words,
    ) -> None:
        """Write the bit patterns of formula(constants, *inputs) to `words` (4 bytes each).

        Where the result is NaN, whose bits differ between processors, those of `otherwise`.
        `words` may be the memory of `otherwise` or of an input.
        """
        ...

    def fold(self, words: Words, shift: int, folded: Words) -> None:
        """The sign of each float32 into the lowest bit, the magnitude without `shift` low bits."""
        ...

    def unfold(self, folded: Words, shift: int, words: Words) -> None:
        """Inverse of `fold`; the low bits become zero. May work in place."""
        ...

    def decode_literals(
        self, frame: Bytes, begin: int, max_block_bytes: int, content: Bytes
    ) -> bool:
        """Fill `content` from a zstd frame whose blocks, from `begin` on, are all of the kinds that
        `_zstd.HUFFMAN` makes. False if they are not, or this is not implemented: `content` is then
        anything."""
        ...


class Compiling(threading.local):
    """What this thread has spent on compiling kernels, waiting for others that do, and loading.

    Attributes:
        spent_s: seconds so far.
    """

    def __init__(self) -> None:
        self.spent_s = 0.0


COMPILING = Compiling()


@functools.cache
def kernels() -> Kernels:
    """The fastest implementation that can be had here."""
    from asymcheck.codecs._kernels_numpy import NumpyKernels

    if os.environ.get("ASYMCHECK_NUMBA") == "0" or sys.byteorder != "little":
        return NumpyKernels()
    try:
        from asymcheck.codecs._kernels_numba import NumbaKernels
    except ImportError as error:
        logging.info("byte planes are split with NumPy, more slowly: no numba (%s)", error)
        return NumpyKernels()
    return NumbaKernels()
