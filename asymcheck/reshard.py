"""Boxes of one layout read out of boxes of another (pure index arithmetic)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asymcheck.index import intersect
from asymcheck.state import ShardSpec


@dataclass(frozen=True, slots=True)
class Overlap:
    """A part of a wanted box that a stored box holds.

    Attributes:
        stored: the stored box.
        start, stop: the range of its row-major elements from the first to the last wanted one.
        rows: the box of `stored` whose row-major elements are exactly [start, stop).
        part: the wanted part, a box of the leaf.
    """

    stored: ShardSpec
    start: int
    stop: int
    rows: ShardSpec
    part: ShardSpec


def overlaps(wanted: ShardSpec, stored_boxes: Sequence[ShardSpec]) -> list[Overlap]:
    """How to put a box together from stored ones; together they cover it once if those do."""
    found: list[Overlap] = []
    for stored in stored_boxes:
        part = intersect(stored, wanted)
        if part is not None:
            found.append(_overlap(stored, part))
    return found


def _overlap(stored: ShardSpec, part: ShardSpec) -> Overlap:
    """Whole rows: the hull of the part in row-major order, widened to full trailing dimensions.

    Leading dimensions in which the part has length 1 do not widen, so a row costs a row.
    """
    rank = len(part.shape)
    split = next((d for d in range(rank) if part.shape[d] > 1), rank)
    keep = min(split + 1, rank)
    offset = part.offset[:keep] + stored.offset[keep:]
    shape = part.shape[:keep] + stored.shape[keep:]
    rows = ShardSpec(offset, shape)
    local = tuple(o - s for o, s in zip(offset, stored.offset, strict=True))
    start = int(np.ravel_multi_index(local, stored.shape)) if rank else 0
    return Overlap(stored, start, start + rows.size, rows, part)


def within(part: ShardSpec, box: ShardSpec) -> tuple[slice, ...]:
    """The slices that select `part` in an array of the shape of `box`."""
    return tuple(
        slice(p - b, p - b + n) for p, b, n in zip(part.offset, box.offset, part.shape, strict=True)
    )
