"""Some of the elements of a column, exactly: where they are and what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs import plane_payload
from asymcheck.codecs.kernels import Words
from asymcheck.errors import CodecError


def encode_kept(words: Words, positions: NDArray[np.intp]) -> tuple[memoryview, memoryview]:
    """Two payloads: where the kept words are (`positions`, ascending), and what they are."""
    gaps = np.diff(positions, prepend=0).astype(_gap_dtype(words.size))
    return plane_payload.encode(gaps), plane_payload.encode(words[positions])


def replace_kept(words: Words, count: int, gaps: memoryview, kept: memoryview) -> None:
    """Put the `count` kept words into their places.

    Raises:
        CodecError: if the payloads do not hold so many, each below `words.size`; `words` is then
            unchanged.
    """
    if count > words.size:
        raise CodecError("more kept elements than there are", expected=words.size, found=count)
    distances = np.empty(count, _gap_dtype(words.size))
    plane_payload.decode(gaps, distances)
    values = np.empty(count, words.dtype)
    plane_payload.decode(kept, values)
    words[_positions(distances, words.size)] = values


def _gap_dtype(n: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype("<u4") if n < 1 << 32 else np.dtype("<u8")


def _positions(gaps: Words, n: int) -> NDArray[np.uint64]:
    """Sums of `gaps`, which must be ascending and below n."""
    if gaps.size and gaps.max() >= n:
        raise CodecError("kept element outside of the column", expected=f"below {n}")
    positions = np.cumsum(gaps, dtype=np.uint64)
    if positions.size and positions[-1] >= n:
        raise CodecError(
            "kept element outside of the column", expected=f"below {n}", found=positions[-1]
        )
    if not gaps[1:].all():
        raise CodecError("kept element given twice")
    return positions
