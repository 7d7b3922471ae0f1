"""k-means of numbers on a line, without randomness: the same input gives the same centres.

Sums are taken one element after the other, in float64, so that they do not depend on the width of
a processor's registers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 16


def centres(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """`count` centres of finite `values`, ascending: begun at quantiles, then 16 rounds of Lloyd.

    All 0 if there are no values. A centre that is nearest to none stays where it is.
    """
    if not values.size:
        return np.zeros(count, np.float32)
    ordered = np.sort(values).astype(np.float64) + 0.0  # -0.0 becomes 0.0
    sums = np.concatenate(([0.0], np.cumsum(ordered)))
    found = ordered[(2 * np.arange(count) + 1) * ordered.size // (2 * count)]
    for _ in range(_ROUNDS):
        ends = np.searchsorted(ordered, _borders(found), side="right")
        ends = np.concatenate(([0], ends, [ordered.size]))
        sizes, totals = np.diff(ends), np.diff(sums[ends])
        found = np.sort(np.where(sizes > 0, totals / np.maximum(sizes, 1), found))
    return found.astype(np.float32)


def nearest(values: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.uint8]:
    """For every value the index of the nearest centre, the lower one of two at the same distance.

    Args:
        values: what to assign.
        found: at most 256 centres, ascending.
    """
    return np.searchsorted(_borders(found.astype(np.float64)), values, side="left").astype(np.uint8)


def _borders(found: NDArray[np.float64]) -> NDArray[np.float64]:
    return (found[1:] + found[:-1]) / 2
