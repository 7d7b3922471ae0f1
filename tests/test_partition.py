import random
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.partition import (
    Extent,
    GroupRange,
    Partition,
    PartitionSchedule,
    Phase,
    SourceGroup,
    Window,
    even_windows,
    owned_range,
    plan_partitions,
)

IDLE_S = st.one_of(
    st.just(0.0),
    st.floats(0, 1e3, allow_nan=False),
    st.floats(0, allow_nan=False, allow_infinity=False),
)
WINDOWS = st.lists(st.builds(Window, st.sampled_from(Phase), st.integers(0, 99), IDLE_S))


@st.composite
def source_groups(draw: st.DrawFn, max_count: int = 10**6) -> list[SourceGroup]:
    shapes = draw(
        st.lists(
            st.tuples(
                st.integers(1, 4),
                st.integers(0, 50),
                st.one_of(st.integers(0, 3), st.integers(0, max_count)),
                st.integers(1, 32),
            )
        )
    )
    groups: list[SourceGroup] = []
    first = 0
    for sources, start, count, nbytes in shapes:
        groups.append(SourceGroup(tuple(range(first, first + sources)), start, count, nbytes))
        first += sources
    return groups


def windows_of(forward_s: list[float], backward_s: list[float]) -> list[Window]:
    return [Window(Phase.FORWARD, i, s) for i, s in enumerate(forward_s)] + [
        Window(Phase.BACKWARD, i, s) for i, s in enumerate(backward_s)
    ]


def nbytes_of(pieces: tuple[GroupRange, ...], groups: list[SourceGroup]) -> int:
    return sum(piece.count * groups[piece.group].bytes_per_element for piece in pieces)


def assert_covers_once(schedule: PartitionSchedule, groups: list[SourceGroup]) -> None:
    """Every element of every group once, in order; every empty group in one empty piece."""
    pieces = [piece for partition in schedule.partitions for piece in partition.pieces]
    assert [piece.group for piece in pieces] == sorted(piece.group for piece in pieces)
    by_group: dict[int, list[GroupRange]] = {}
    for piece in pieces:
        by_group.setdefault(piece.group, []).append(piece)
    assert sorted(by_group) == list(range(len(groups)))
    for index, group in enumerate(groups):
        position = group.start
        for piece in by_group[index]:
            assert piece.start == position
            assert piece.count > 0 or (group.count == 0 and len(by_group[index]) == 1)
            position += piece.count
        assert position == group.start + group.count


@given(source_groups(), WINDOWS)
def test_every_element_moves_exactly_once(groups: list[SourceGroup], windows: list[Window]) -> None:
    schedule = plan_partitions(groups, windows)
    assert_covers_once(schedule, groups)
    assert schedule.nbytes == sum(group.nbytes for group in groups)
    for index, partition in enumerate(schedule.partitions):
        assert partition.index == index
        assert partition.pieces
        assert partition.nbytes == nbytes_of(partition.pieces, groups)


@given(source_groups(), WINDOWS)
def test_same_input_gives_same_schedule(groups: list[SourceGroup], windows: list[Window]) -> None:
    assert plan_partitions(groups, windows) == plan_partitions(tuple(groups), tuple(windows))


@given(source_groups(max_count=10**12), WINDOWS.filter(bool))
def test_cuts_are_within_half_an_element_of_the_ideal(
    groups: list[SourceGroup], windows: list[Window]
) -> None:
    # An index of its own for every window, so that partitions can be told apart.
    windows = [Window(w.phase, i, w.idle_s) for i, w in enumerate(windows)]
    sizes = {p.window: p.nbytes for p in plan_partitions(groups, windows).partitions}
    weights = [Fraction(w.idle_s) for w in windows]
    if not any(weights):
        weights = [Fraction(1) for _ in windows]
    total_nbytes = sum(group.nbytes for group in groups)
    half_element = Fraction(max((g.bytes_per_element for g in groups), default=0), 2)
    position = 0
    for index, end in enumerate(accumulate(weights)):
        position += sizes.get(index, 0)
        assert abs(position - total_nbytes * end / sum(weights)) <= half_element


@given(source_groups(), WINDOWS)
def test_extents_are_the_same_range_of_every_source_of_a_group(
    groups: list[SourceGroup], windows: list[Window]
) -> None:
    schedule = plan_partitions(groups, windows)
    taken: dict[int, int] = {}
    for partition in schedule.partitions:
        expected = [
            Extent(source, piece.start, piece.count)
            for piece in partition.pieces
            for source in groups[piece.group].sources
        ]
        assert list(schedule.extents(partition)) == expected
        for extent in expected:
            taken[extent.source] = taken.get(extent.source, 0) + extent.count
    assert taken == {source: group.count for group in groups for source in group.sources}


def test_known_gaps_give_known_sizes() -> None:
    groups = [SourceGroup((0, 1, 2), 0, 1000, 12)]
    schedule = plan_partitions(groups, windows_of([0.010, 0.010], [0.030, 0.050]))
    assert [p.nbytes for p in schedule.partitions] == [1200, 1200, 3600, 6000]
    assert [(p.phase, p.window) for p in schedule.partitions] == [
        (Phase.FORWARD, 0),
        (Phase.FORWARD, 1),
        (Phase.BACKWARD, 0),
        (Phase.BACKWARD, 1),
    ]
    assert list(schedule.extents(schedule.partitions[1])) == [
        Extent(0, 100, 100),
        Extent(1, 100, 100),
        Extent(2, 100, 100),
    ]


@given(
    st.lists(st.floats(1e-3, 1e-2), min_size=1, max_size=20),
    st.lists(st.floats(2e-2, 1e-1), min_size=1, max_size=20),
)
def test_forward_partitions_are_smaller_where_forward_windows_are_shorter(
    forward_s: list[float], backward_s: list[float]
) -> None:
    schedule = plan_partitions([SourceGroup((0,), 0, 10**7, 4)], windows_of(forward_s, backward_s))
    sizes = {phase: [p.nbytes for p in schedule.partitions if p.phase == phase] for phase in Phase}
    assert len(sizes[Phase.FORWARD]) == len(forward_s)
    assert len(sizes[Phase.BACKWARD]) == len(backward_s)
    assert max(sizes[Phase.FORWARD]) < min(sizes[Phase.BACKWARD])


def test_sizes_sum_to_the_snapshot_not_to_twice_it() -> None:
    schedule = plan_partitions([SourceGroup((0,), 0, 999, 4)], windows_of([1.0], [1.0]))
    assert [p.nbytes for p in schedule.partitions] == [2000, 1996]


def test_no_idle_time_at_all_gives_an_even_schedule() -> None:
    schedule = plan_partitions([SourceGroup((0,), 0, 12, 1)], even_windows(2, 4))
    assert [p.nbytes for p in schedule.partitions] == [2] * 6
    assert [p.phase for p in schedule.partitions] == [Phase.FORWARD] * 2 + [Phase.BACKWARD] * 4


def test_a_window_without_idle_time_gets_nothing() -> None:
    schedule = plan_partitions([SourceGroup((0,), 0, 100, 1)], windows_of([0.0, 2.0], [0.0]))
    assert [(p.window, p.nbytes) for p in schedule.partitions] == [(1, 100)]


def test_without_windows_everything_is_one_partition() -> None:
    groups = [SourceGroup((0,), 7, 3, 4), SourceGroup((1,), 0, 0, 4)]
    assert plan_partitions(groups, []).partitions == (
        Partition(0, 0, Phase.FORWARD, (GroupRange(0, 7, 3), GroupRange(1, 0, 0)), 12),
    )


def test_nothing_to_move_gives_no_partitions() -> None:
    assert plan_partitions([], windows_of([1.0], [2.0])).partitions == ()
    assert plan_partitions([], []).partitions == ()


def test_only_empty_groups_are_still_stored() -> None:
    groups = [SourceGroup((i,), 0, 0, 4) for i in range(3)]
    schedule = plan_partitions(groups, windows_of([1.0, 1.0], [1.0]))
    assert_covers_once(schedule, groups)


@pytest.mark.parametrize("idle_s", [-1e-9, float("nan"), float("inf"), float("-inf")])
def test_impossible_idle_times_are_refused(idle_s: float) -> None:
    with pytest.raises(ValueError, match="idle time"):
        plan_partitions([SourceGroup((0,), 0, 4, 4)], [Window(Phase.FORWARD, 0, idle_s)])


@pytest.mark.parametrize(
    ("sources", "start", "count", "bytes_per_element"),
    [((), 0, 1, 4), ((0,), -1, 1, 4), ((0,), 0, -1, 4), ((0,), 0, 1, 0)],
)
def test_impossible_groups_are_refused(
    sources: tuple[int, ...], start: int, count: int, bytes_per_element: int
) -> None:
    with pytest.raises(ValueError, match="group"):
        SourceGroup(sources, start, count, bytes_per_element)


def test_negative_window_index_is_refused() -> None:
    with pytest.raises(ValueError, match="index"):
        Window(Phase.FORWARD, -1, 0.0)


def test_ten_terabytes_are_exact() -> None:
    groups = [SourceGroup((0,), 0, 10**13, 1)]
    schedule = plan_partitions(groups, windows_of([0.1] * 3, [0.1] * 4))
    # All idle times are the same float, so that the exact shares are sevenths.
    ends = list(accumulate(p.nbytes for p in schedule.partitions))
    assert ends == [round(Fraction(10**13 * i, 7)) for i in range(1, 8)]


def test_a_hundred_thousand_groups_and_a_thousand_windows() -> None:
    # The work is linear: groups * windows = 10**8 steps would run into the test's time limit.
    rng = random.Random(1)
    groups = [SourceGroup((i,), 0, rng.randrange(1000), 12) for i in range(100_000)]
    windows = windows_of([rng.random() for _ in range(500)], [rng.random() for _ in range(500)])
    schedule = plan_partitions(groups, windows)
    assert schedule.nbytes == sum(group.nbytes for group in groups)
    assert len(schedule.partitions) == 1000


@given(st.integers(0, 10**13), st.integers(1, 200))
def test_owned_ranges_cover_a_replicated_leaf_disjointly(count: int, writers: int) -> None:
    ranges = [owned_range(count, writer, writers) for writer in range(writers)]
    position = 0
    for start, owned in ranges:
        assert start == position
        position += owned
    assert position == count
    lengths = [owned for _, owned in ranges]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize(
    ("count", "writer", "writers"), [(-1, 0, 1), (4, 2, 2), (4, -1, 2), (4, 0, 0)]
)
def test_owned_range_refuses_writers_that_do_not_exist(
    count: int, writer: int, writers: int
) -> None:
    with pytest.raises(ValueError, match="writer"):
        owned_range(count, writer, writers)
