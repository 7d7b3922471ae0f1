"""Boxes of one layout read out of boxes of another (pure index arithmetic)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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


def boxes_of_range(box: ShardSpec, start: int, count: int) -> Iterator[ShardSpec]:
    """The boxes whose elements, one box after the other, are elements [start, start + count).

    Elements are counted in row-major order of `box`. Of d dimensions there are at most 2d - 1
    boxes.
    """
    for offset, shape in _ranges(box.shape, start, start + count):
        yield ShardSpec(tuple(b + o for b, o in zip(box.offset, offset, strict=True)), shape)


def _ranges(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    rest = shape[1:]
    row = math.prod(rest)
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _in_row(rest, last, start - last * row, stop - last * row)
        return
    yield from _in_row(rest, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    yield from _in_row(rest, last, 0, stop - last * row)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, lengths in _ranges(shape, start, stop):
        yield (row, *offset), (1, *lengths)
