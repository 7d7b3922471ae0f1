"""The loops over elements: byte planes, and differences of bit patterns.

Two implementations give the same bytes: numba where it is installed (about the speed of memory)
and NumPy. Set the environment variable ASYMCHECK_NUMBA=0 to use NumPy although numba is there.
numba is imported at the first use, never with the package.
"""

from __future__ import annotations

import functools
import os
import sys
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


class Kernels(Protocol):
    """The loops. n is the number of words, w their width in bytes.

    Byte k of word i is byte i of plane k: plane 0 holds the least significant bytes.
    """

    def split(self, words: Words, planes: Bytes) -> None:
        """Write the w planes of `words`, one after the other, to `planes` (w·n bytes)."""
        ...

    def split_difference(self, new: Words, old: Words, planes: Bytes) -> None:
        """The same for zigzag(new − old), the difference taken modulo 2^(8w).

        zigzag maps the signed differences 0, −1, 1, −2, … to 0, 1, 2, 3, …: small ones of either
        sign have zeros in their high planes.
        """
        ...

    def merge(self, planes: Sequence[Bytes], words: Words) -> None:
        """Inverse of `split`, from w arrays of n bytes."""
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
