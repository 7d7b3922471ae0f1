"""From a state and windows to units: every owned element once, co-located, bounded."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from states import states

from asymcheck.errors import UnsupportedStateError
from asymcheck.manifest import MAX_RANK, MAX_TEXT, Shard
from asymcheck.partition import Phase, Window, owned_range
from asymcheck.plan import BLOCK_NBYTES, Plan, make_plan, signature_of
from asymcheck.state import ArraySource, LeafSpec, ShardSpec, StateView, numpy_view

ONE_WINDOW = [Window(Phase.FORWARD, 0, 0.0)]
WINDOWS = st.lists(st.floats(0, 1), min_size=1, max_size=6).flatmap(
    lambda idle: st.integers(0, len(idle)).map(
        lambda forward: [
            Window(Phase.FORWARD, i, s) if i < forward else Window(Phase.BACKWARD, i - forward, s)
            for i, s in enumerate(idle)
        ]
    )
)


@dataclass
class Box:
    """A part of a leaf of shape (4, 4), as a source that is never read."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    leaf = LeafSpec("w", "float32", (4, 4))
    group = "w"

    @property
    def shard(self) -> ShardSpec:
        return ShardSpec(self.offset, self.shape)

    @property
    def owned(self) -> tuple[int, int]:
        return 0, self.shard.size

    def read_into(self, start: int, count: int, out: Any) -> None:
        raise NotImplementedError

    def check_unchanged(self) -> None:
        raise NotImplementedError


def planned(view: StateView, windows: Any = ONE_WINDOW, max_unit_nbytes: int = 1 << 20) -> Plan:
    return make_plan(view, windows, max_unit_nbytes)


def owned_by(view: StateView, writer: int, writers: int) -> StateView:
    """The view with every leaf split over writers."""
    sources = [
        msgspec.structs.replace(s, owned=owned_range(s.leaf.size, writer, writers))
        for s in view.sources
        if isinstance(s, ArraySource)
    ]
    return replace(view, sources=tuple(sources))


@st.composite
def groups_of_leaves(draw: st.DrawFn) -> dict[str, dict[str, np.ndarray]]:
    """Parameters with moments and copies: leaves of some kinds share names and shapes."""
    state: dict[str, dict[str, np.ndarray]] = {}
    for name in draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=2)))
        for kind in draw(st.lists(st.sampled_from(["p", "m", "v", "h"]), min_size=1, unique=True)):
            dtype = draw(st.sampled_from(["float32", "float64", "float16", "int8"]))
            state.setdefault(kind, {})[name] = np.zeros(shape, dtype)
    return state


@given(
    states() | groups_of_leaves(),
    WINDOWS,
    st.integers(64, 2000),
    st.integers(1, 3).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))),
)
def test_units_cover_every_owned_element_once(
    state: Any, windows: list[Window], max_unit_nbytes: int, part: tuple[int, int]
) -> None:
    view = owned_by(numpy_view(state), *part)
    plan = planned(view, windows, max_unit_nbytes)
    counts = [np.zeros(s.leaf.size, int) for s in view.sources]
    for unit in plan.units:
        for source in unit.sources:
            counts[source][unit.start : unit.start + unit.count] += 1
    for source, count in zip(view.sources, counts, strict=True):
        start, length = source.owned
        assert (count[start : start + length] == 1).all()
        assert count.sum() == length


@given(groups_of_leaves(), WINDOWS, st.integers(64, 2000))
def test_units_are_bounded_and_co_located(
    state: Any, windows: list[Window], max_unit_nbytes: int
) -> None:
    view = numpy_view(state)
    plan = planned(view, windows, max_unit_nbytes)
    for unit in plan.units:
        members = [view.sources[i] for i in unit.sources]
        assert {m.group for m in members} == {members[0].group}
        assert {m.shard for m in members} == {members[0].shard}
        together = [
            s for s in view.sources if (s.group, s.shard) == (members[0].group, members[0].shard)
        ]
        assert members == together
        assert sum(unit.count * m.leaf.itemsize for m in members) <= max_unit_nbytes
        assert all(unit.count * m.leaf.itemsize <= BLOCK_NBYTES for m in members)
    assert [u.partition for u in plan.units] == sorted(u.partition for u in plan.units)


@given(groups_of_leaves(), WINDOWS, st.integers(64, 2000))
def test_partitions_add_up(state: Any, windows: list[Window], max_unit_nbytes: int) -> None:
    view = numpy_view(state)
    plan = planned(view, windows, max_unit_nbytes)
    assert plan.nbytes == sum(s.leaf.nbytes for s in view.sources)
    assert sum(p.nbytes for p in plan.partitions) == plan.nbytes
    for index, place in enumerate(plan.partitions):
        assert windows[place.ordinal].phase == place.phase
        assert windows[place.ordinal].index == place.window
        found: dict[tuple[str, str], int] = {}
        for unit in plan.units:
            for leaf in (view.sources[i].leaf for i in unit.sources):
                if unit.partition == index:
                    key = (leaf.kind, leaf.dtype)
                    found[key] = found.get(key, 0) + unit.count * leaf.itemsize
        assert found == {k: n for k, n in place.nbytes_by_class.items() if n}
        assert sum(place.nbytes_by_class.values()) == place.nbytes
    ordinals = [p.ordinal for p in plan.partitions]
    assert ordinals == sorted(ordinals)


@given(groups_of_leaves(), WINDOWS, WINDOWS)
def test_other_windows_move_few_cuts(
    state: Any, windows: list[Window], others: list[Window]
) -> None:
    """Blocks of successive steps line up: all cuts but those between partitions are the same."""
    view = numpy_view(state)

    def inner_cuts(plan: Plan) -> set[tuple[tuple[int, ...], int]]:
        return {
            (b.sources, b.start)
            for a, b in zip(plan.units, plan.units[1:], strict=False)
            if a.partition == b.partition
        }

    one = inner_cuts(planned(view, ONE_WINDOW, 256))
    assert inner_cuts(planned(view, windows, 256)) <= one
    assert inner_cuts(planned(view, others, 256)) <= one


def test_small_units_are_captured_in_runs_of_one_partition() -> None:
    state = {f"w{i}": np.zeros(1000 + i, np.uint8) for i in range(100)} | {"x": np.zeros(9000)}
    windows = [Window(Phase.FORWARD, i, 1.0) for i in range(3)]
    plan = planned(numpy_view(state), windows, max_unit_nbytes=1 << 14)
    assert [i for run in plan.runs for i in run] == list(range(len(plan.units)))
    sizes: list[int] = []
    for run in plan.runs:
        units = [plan.units[i] for i in run]
        assert len({unit.partition for unit in units}) == 1
        sizes.append(sum(u.count * plan.itemsizes[s] for u in units for s in u.sources))
        assert sizes[-1] <= 1 << 14
    assert len(plan.runs) < len(plan.units) / 2
    for before, after in itertools.pairwise(plan.runs):
        first = plan.units[after.start]
        nbytes = first.count * plan.itemsizes[first.sources[0]]
        ends = first.partition != plan.units[before.start].partition
        assert ends or sizes[plan.runs.index(before)] + nbytes > 1 << 14


def test_a_flat_state_has_no_kinds() -> None:
    few = planned(numpy_view({f"w{i}": np.zeros(1, np.int8) for i in range(60)}))
    assert len(set(few.classes)) == 60
    many = planned(numpy_view({f"w{i}": np.zeros(1, np.int8) for i in range(100)}))
    assert set(many.classes) == {("", "int8")}
    assert [dict(p.nbytes_by_class) for p in many.partitions] == [{("", "int8"): 100}]


def test_tables_for_the_manifest() -> None:
    w = np.zeros((2, 3), np.float32)
    plan = planned(numpy_view({"a": w, "b": w, "c": np.int8(3)}))
    assert [(leaf.path, leaf.dtype, leaf.shape, leaf.aliases) for leaf in plan.leaves] == [
        ("a", "float32", (2, 3), ("b",)),
        ("c", "int8", (), ()),
    ]
    assert plan.shards == [Shard(0, (0, 0), (2, 3)), Shard(1, (), ())]
    assert plan.owned == ((0, 6), (0, 1))


def test_an_empty_state_has_a_plan() -> None:
    plan = planned(numpy_view({}))
    assert (plan.nbytes, plan.units, plan.leaves) == (0, (), [])
    plan = planned(numpy_view({"a": np.zeros((0, 4))}))
    assert (plan.nbytes, plan.units, len(plan.leaves)) == (0, (), 1)


def test_large_leaves_are_cut_into_blocks() -> None:
    elements = 3 * BLOCK_NBYTES // 4 + 5
    view = numpy_view({"w": np.broadcast_to(np.float32(0), (elements,))})
    plan = planned(view, max_unit_nbytes=64 << 20)
    assert [u.count for u in plan.units] == [BLOCK_NBYTES // 4] * 3 + [5]


@given(groups_of_leaves(), groups_of_leaves())
def test_views_with_equal_signatures_have_equal_plans(first: Any, second: Any) -> None:
    a, b = numpy_view(first), numpy_view(second)
    same = signature_of(a) == signature_of(b)
    described = [(s.leaf, s.group) for s in a.sources] == [(s.leaf, s.group) for s in b.sources]
    assert same == described
    if same:
        assert planned(a) == planned(b)


def test_signatures_tell_ties_and_shares_apart() -> None:
    w = np.zeros(4)
    tied, free = numpy_view({"a": w, "b": w}), numpy_view({"a": w, "b": w.copy()})
    half = owned_by(free, 0, 2)
    signatures = [signature_of(v) for v in (tied, free, half)]
    assert len(set(signatures)) == 3


def test_several_boxes_of_one_leaf_are_shards_of_it() -> None:
    halves = [Box((0, 0), (2, 3)), Box((2, 0), (2, 3)), Box((0, 3), (4, 1))]
    plan = planned(StateView({"leaf": "w"}, tuple(halves)))
    assert [leaf.path for leaf in plan.leaves] == ["w"]
    assert plan.shards == [Shard(0, b.offset, b.shape) for b in halves]
    assert plan.nbytes == 4 * 16 and plan.block_count == 3


def test_refuses_two_leaves_of_one_path() -> None:
    view = numpy_view({"a": np.zeros(2)})
    with pytest.raises(UnsupportedStateError, match="same path") as raised:
        planned(replace(view, sources=view.sources * 2))
    assert raised.value.leaf == "a"
    with pytest.raises(UnsupportedStateError, match="same path"):
        planned(replace(view, aliases={"x": ["a"]}))


def test_refuses_what_no_manifest_can_say() -> None:
    with pytest.raises(UnsupportedStateError, match="longer than"):
        planned(numpy_view({"a" * (MAX_TEXT + 1): np.zeros(2)}))
    planned(numpy_view({"a" * MAX_TEXT: np.zeros(2)}))
    with pytest.raises(UnsupportedStateError, match="dimensions") as raised:
        planned(numpy_view({"a": np.zeros((1,) * (MAX_RANK + 1))}))
    assert raised.value.leaf == "a"


def test_refuses_a_parameter_too_wide_for_the_memory() -> None:
    state = {f"kind{i}": {"w": np.zeros(2)} for i in range(20)}
    with pytest.raises(UnsupportedStateError, match="host memory") as raised:
        planned(numpy_view(state), max_unit_nbytes=159)
    assert raised.value.leaf == "kind0/w" and "max_host_bytes" in str(raised.value)
    assert len(planned(numpy_view(state), max_unit_nbytes=160).units) == 2


def test_sources_of_other_boxes_are_other_groups() -> None:
    view = numpy_view({"p": {"w": np.zeros((2, 3))}, "m": {"w": np.zeros((3, 2))}})
    assert [u.sources for u in planned(view).units] == [(0,), (1,)]
    assert view.sources[0].leaf == LeafSpec("p/w", "float64", (2, 3))
