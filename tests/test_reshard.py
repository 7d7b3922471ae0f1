"""Boxes of one layout out of boxes of another: every element once, and no more rows than needed."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.index import intersect
from asymcheck.reshard import boxes_of_range, overlaps, within
from asymcheck.state import ShardSpec


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[ShardSpec]:
    """Boxes that cover an array once: cut in two along some dimension, again and again."""
    boxes = [ShardSpec.whole(shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        if not shape:
            return [box]
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.shape[axis]))
        for begin, length in ((0, cut), (cut, box.shape[axis] - cut)):
            offset = tuple(o + begin * (d == axis) for d, o in enumerate(box.offset))
            sides = tuple(length if d == axis else n for d, n in enumerate(box.shape))
            boxes.append(ShardSpec(offset, sides))
    return boxes


SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> ShardSpec:
    ranges = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return ShardSpec(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))


def at(box: ShardSpec) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))


@given(SHAPES.flatmap(lambda s: st.tuples(st.just(s), tilings(s), boxes_in(s))))
def test_any_box_is_put_together_from_any_tiling(
    drawn: tuple[tuple[int, ...], list[ShardSpec], ShardSpec],
) -> None:
    shape, stored, wanted = drawn
    whole = np.arange(math.prod(shape)).reshape(shape)
    result = np.full(wanted.shape, -1)
    covered = np.zeros(wanted.shape, int)
    for overlap in overlaps(wanted, stored):
        flat = whole[at(overlap.stored)].reshape(-1)[overlap.start : overlap.stop]
        rows = flat.reshape(overlap.rows.shape)
        assert np.array_equal(rows, whole[at(overlap.rows)])
        target = within(overlap.part, wanted)
        result[target] = rows[within(overlap.part, overlap.rows)]
        covered[target] += 1
    assert (covered == 1).all()
    assert np.array_equal(result, whole[at(wanted)])


@given(SHAPES.flatmap(lambda s: st.tuples(boxes_in(s), boxes_in(s))))
def test_intersections_hold_the_common_elements(drawn: tuple[ShardSpec, ShardSpec]) -> None:
    a, b = drawn

    def elements(box: ShardSpec | None) -> set[tuple[int, ...]]:
        if box is None:
            return set()
        return set(product(*(range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))))

    assert elements(intersect(a, b)) == elements(a) & elements(b)
    assert intersect(a, b) == intersect(b, a)


def test_a_row_costs_a_row() -> None:
    stored = ShardSpec((0, 0, 0), (100, 20, 30))
    (overlap,) = overlaps(ShardSpec((7, 0, 0), (1, 20, 30)), [stored])
    assert (overlap.start, overlap.stop) == (7 * 600, 8 * 600)
    (overlap,) = overlaps(ShardSpec((7, 3, 0), (1, 1, 30)), [stored])
    assert (overlap.start, overlap.stop) == (7 * 600 + 90, 7 * 600 + 120)
    (overlap,) = overlaps(ShardSpec((7, 3, 5), (1, 1, 2)), [stored])
    assert (overlap.start, overlap.stop) == (7 * 600 + 95, 7 * 600 + 97)
    (overlap,) = overlaps(ShardSpec((7, 3, 5), (2, 1, 1)), [stored])
    assert (overlap.start, overlap.stop) == (7 * 600, 9 * 600)


def test_scalars_are_boxes_without_dimensions() -> None:
    (overlap,) = overlaps(ShardSpec((), ()), [ShardSpec((), ())])
    assert (overlap.start, overlap.stop, overlap.rows) == (0, 1, ShardSpec((), ()))


@given(SHAPES.flatmap(lambda s: st.tuples(boxes_in(s), st.integers(0, 1296), st.integers(0, 1296))))
def test_a_range_is_the_elements_of_its_boxes_in_order(drawn: tuple[ShardSpec, int, int]) -> None:
    box, a, b = drawn
    start, stop = sorted((min(a, box.size), min(b, box.size)))
    outer = tuple(o + n for o, n in zip(box.offset, box.shape, strict=True))
    whole = np.full(outer, -1, np.int64)
    whole[at(box)] = np.arange(box.size).reshape(box.shape)
    boxes = list(boxes_of_range(box, start, stop - start))
    found = [int(i) for part in boxes for i in whole[at(part)].reshape(-1)]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(box.shape) - 1)
