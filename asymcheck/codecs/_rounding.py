"""Rounding of floats in integer arithmetic: the same bits everywhere."""

from __future__ import annotations

from asymcheck.codecs.kernels import Words


def round_to_even(words: Words, bits: int) -> Words:
    """`words` with their lowest `bits` >= 1 bits rounded away, to the nearest, ties to even.

    A carry goes on into the exponent, as it should; out of the largest finite number it makes
    infinity. Of NaN it may make anything.
    """
    word = words.dtype.type
    odd = (words >> word(bits)) & word(1)
    rounded = words + (odd + word((1 << (bits - 1)) - 1))
    return rounded >> word(bits) << word(bits)
