"""Asymmetric partitions: what moves in which window, sized by the idle time of the windows.

Pure functions of their arguments; every size is exact (no floating-point drift).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from itertools import accumulate

import msgspec


class Phase(StrEnum):
    """The pass of a training step to which a window belongs."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of the forward or backward pass in which the link is idle.

    Attributes:
        phase, index: name the window; the adapter opens it under the same name.
        idle_s: idle time of the link in this window, seconds; 0 where nothing was measured.

    Raises:
        ValueError: if `idle_s` is negative, NaN or infinite, or `index` negative.
    """

    phase: Phase
    index: int
    idle_s: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.idle_s) and self.idle_s >= 0):
            raise ValueError(f"idle time of {self.phase} window {self.index} is {self.idle_s} s")
        if self.index < 0:
            raise ValueError(f"index of a {self.phase} window is {self.index}")


class SourceGroup(msgspec.Struct, frozen=True, gc=False):
    """Co-located sources (weight and moments of one parameter), taken over the same elements.

    Attributes:
        sources: indices of the sources (shards that this writer reads).
        start, count: the elements [start, start + count) of every source are this writer's.
        bytes_per_element: sum of the sources' item sizes.

    Raises:
        ValueError: if there is no source, a range is negative, or an element has no bytes.
    """

    sources: tuple[int, ...]
    start: int
    count: int
    bytes_per_element: int

    def __post_init__(self) -> None:
        if not self.sources or self.start < 0 or self.count < 0 or self.bytes_per_element < 1:
            raise ValueError(f"not a group of sources: {self}")

    @property
    def nbytes(self) -> int:
        """Bytes of all sources over the group's range."""
        return self.count * self.bytes_per_element


@dataclass(frozen=True, slots=True)
class Extent:
    """The elements [start, start + count) of the source with this index."""

    source: int
    start: int
    count: int


class GroupRange(msgspec.Struct, frozen=True, gc=False):
    """The elements [start, start + count) of every source of the group with this index.

    Elements are counted as in `Extent`: from the start of the sources, not of the group's range.
    """

    group: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Partition:
    """What moves together in one window.

    Attributes:
        index: position in the schedule, 0, 1, ...
        window, phase: index and phase of the window that it is meant for.
        pieces: at least one, in the order of the groups.
        nbytes: bytes of all pieces.
    """

    index: int
    window: int
    phase: Phase
    pieces: tuple[GroupRange, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class PartitionSchedule:
    """The partitions of a snapshot in the order in which they move.

    Together they hold every element of every group exactly once.
    """

    groups: tuple[SourceGroup, ...]
    partitions: tuple[Partition, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole snapshot."""
        return sum(partition.nbytes for partition in self.partitions)

    def extents(self, partition: Partition) -> Iterator[Extent]:
        """The extents of a partition: piece by piece, the sources of a group side by side."""
        for piece in partition.pieces:
            for source in self.groups[piece.group].sources:
                yield Extent(source, piece.start, piece.count)


def plan_partitions(groups: Sequence[SourceGroup], windows: Sequence[Window]) -> PartitionSchedule:
    """Cut a snapshot into one partition per window, sized by the window's share of idle time.

    Window i gets S_i = R * idle_i / (sum of all idle times, forward and backward) of the R bytes
    of all groups (AsymCheck, DAC 2026). Cuts are made where the *cumulative* share ends, at the
    nearest boundary between elements, so that errors do not add up: every cut is within half an
    element of the group in which it falls, every partition within one element of S_i.

    The groups are taken in order, each element exactly once. A group without elements is one
    empty piece of one partition, so that empty leaves are stored too. A window whose share rounds
    to nothing gets no partition. If no idle time was measured the shares are even; if there are no
    windows everything is one partition of forward window 0. Takes O(groups + windows) time.
    """
    groups = tuple(groups)
    windows = tuple(windows) or (Window(Phase.FORWARD, 0, 0.0),)
    cursor = _Cursor(groups)
    partitions: list[Partition] = []
    for window, cut in zip(windows, _cuts(sum(g.nbytes for g in groups), windows), strict=True):
        begin_nbytes = cursor.position_nbytes
        if pieces := cursor.take_up_to(cut):
            nbytes = cursor.position_nbytes - begin_nbytes
            partitions.append(
                Partition(len(partitions), window.index, window.phase, pieces, nbytes)
            )
    return PartitionSchedule(groups, tuple(partitions))


def even_windows(forward: int, backward: int) -> list[Window]:
    """Windows of which nothing is known yet (idle time 0): a schedule of even partitions."""
    return [Window(Phase.FORWARD, i, 0.0) for i in range(forward)] + [
        Window(Phase.BACKWARD, i, 0.0) for i in range(backward)
    ]


def owned_range(count: int, writer: int, writers: int) -> tuple[int, int]:
    """(start, count) of the elements of a replicated leaf that a writer stores.

    The ranges of all writers cover [0, count) disjointly and in order; the first `count mod
    writers` of them are longer by one element.

    Raises:
        ValueError: if `count` is negative or `writer` is not one of `writers`.
    """
    if count < 0 or not 0 <= writer < writers:
        raise ValueError(f"no part of {count} elements for writer {writer} of {writers}")
    share, longer = divmod(count, writers)
    return writer * share + min(writer, longer), share + (writer < longer)


def _cuts(nbytes: int, windows: Sequence[Window]) -> list[Fraction]:
    """Ideal end of every window's partition in the snapshot, in bytes from its start, exactly."""
    shares = [Fraction(window.idle_s) for window in windows]
    if not any(shares):
        shares = [Fraction(1)] * len(windows)
    ends = list(accumulate(shares))
    return [nbytes * end / ends[-1] for end in ends]


class _Cursor:
    """A place in the sequence of groups, moving forward from cut to cut."""

    def __init__(self, groups: Sequence[SourceGroup]) -> None:
        self._groups = groups
        self._group = 0
        self._group_begin_nbytes = 0
        self._taken = 0  # elements of the current group

    @property
    def position_nbytes(self) -> int:
        """Bytes taken so far."""
        if self._group == len(self._groups):
            return self._group_begin_nbytes
        return self._group_begin_nbytes + self._taken * self._current.bytes_per_element

    @property
    def _current(self) -> SourceGroup:
        return self._groups[self._group]

    def take_up_to(self, cut: Fraction) -> tuple[GroupRange, ...]:
        """Everything from here to the element boundary nearest to `cut` (bytes)."""
        pieces: list[GroupRange] = []
        whole_nbytes = math.floor(cut)
        while self._group < len(self._groups):
            if self._group_begin_nbytes + self._current.nbytes > whole_nbytes:
                elements = (cut - self._group_begin_nbytes) / self._current.bytes_per_element
                nearest = math.floor(elements + Fraction(1, 2))
                if nearest > self._taken:
                    pieces.append(self._take(nearest))
                break
            pieces.append(self._take(self._current.count))
        return tuple(pieces)

    def _take(self, end: int) -> GroupRange:
        group = self._current
        piece = GroupRange(self._group, group.start + self._taken, end - self._taken)
        self._taken = end
        if end == group.count:
            self._group += 1
            self._group_begin_nbytes += group.nbytes
            self._taken = 0
        return piece
