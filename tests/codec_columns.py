"""Columns for the tests of codecs: every dtype, and contents as real states have them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs import Column

DTYPES = [
    np.dtype(t)
    for t in (
        *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
        ml_dtypes.bfloat16,
        *(getattr(ml_dtypes, name) for name in dir(ml_dtypes) if name.startswith("float8_")),
    )
]
KINDS = ("zeros", "random", "real", "special", "runs")


def content(kind: str, dtype: np.dtype[np.generic], n: int, seed: int = 0) -> NDArray[np.uint8]:
    """The bytes of n elements.

    `real` are normal values as weights have them, `special` patterns of NaN, infinities, signed
    zeros and subnormals among random ones, `runs` mostly zeros with stretches of random bytes.
    """
    rng = np.random.default_rng(seed)
    nbytes = n * dtype.itemsize
    noise = rng.integers(0, 256, nbytes, np.uint8)
    if kind == "zeros":
        return np.zeros(nbytes, np.uint8)
    if kind == "random":
        return noise
    if kind == "runs":
        return np.where(
            np.repeat(rng.random(nbytes // 64 + 1) < 0.1, 64)[:nbytes], noise, 0
        ).astype(np.uint8)
    with np.errstate(all="ignore"):
        values = rng.normal(0, 0.02, n).astype(dtype)
        if kind == "special":
            extremes = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-310, 1e38])
            values[::3] = extremes[rng.integers(0, 6, values[::3].size)].astype(dtype)
    data = values.view(np.uint8).copy()
    if kind == "special":
        data[::5] = 0xFF
    return data


def changed(
    data: NDArray[np.uint8], dtype: np.dtype[np.generic], seed: int = 1
) -> NDArray[np.uint8]:
    """`data` with small changes of most bit patterns, as a step of training makes them."""
    rng = np.random.default_rng(seed)
    width = max(width for width in (1, 2, 4, 8) if dtype.itemsize % width == 0)
    words = data.copy().view(f"<u{width}")
    words += rng.integers(0, 3, words.size).astype(words.dtype)
    return words.view(np.uint8)


def column(
    new: NDArray[np.uint8], dtype: np.dtype[np.generic], old: NDArray[np.uint8] | None = None
) -> Column:
    return Column(kind="params", dtype=dtype, new=new, old=old)


def decoded(codec, payload, dtype, nbytes: int, old: NDArray[np.uint8] | None = None):
    """What `payload` decodes to, into memory that held something else before."""
    new = np.full(nbytes, 0xA5, np.uint8)
    codec.decode([column(new, dtype, old)], [memoryview(payload)])
    return new
