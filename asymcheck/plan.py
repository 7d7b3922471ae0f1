"""What is the same for every snapshot of an unchanged state: groups, partitions, units, tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asymcheck.errors import UnsupportedStateError
from asymcheck.manifest import MAX_BLOCK_NBYTES, MAX_RANK, MAX_TEXT, Leaf, Shard
from asymcheck.partition import (
    GroupRange,
    PartitionSchedule,
    Phase,
    SourceGroup,
    Window,
    plan_partitions,
)
from asymcheck.state import LeafSource, LeafSpec, ShardSpec

BLOCK_NBYTES = 4 << 20
"""Largest block of one leaf: small enough for the cache, large enough to amortise Python."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A step of capturing: the same elements of co-located sources; one block for each source."""

    partition: int
    sources: tuple[int, ...]
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class PartitionPlace:
    """Where a partition stands in the cycle, and its bytes by leaf kind and dtype."""

    ordinal: int
    phase: Phase
    window: int
    nbytes: int
    nbytes_by_class: Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class Plan:
    """The schedule of a snapshot, down to the units, with the tables of its manifest.

    `specs`, `itemsizes` (bytes), `classes` (kind, dtype) and `owned` are by source.
    """

    signature: tuple[object, ...]
    nbytes: int
    leaves: list[Leaf]
    shards: list[Shard]
    specs: tuple[LeafSpec, ...]
    itemsizes: tuple[int, ...]
    classes: tuple[tuple[str, str], ...]
    owned: tuple[tuple[int, int], ...]
    partitions: tuple[PartitionPlace, ...]
    units: tuple[Unit, ...]
    block_count: int


def signature_of(
    sources: Sequence[LeafSource], aliases: Mapping[str, Sequence[str]]
) -> tuple[object, ...]:
    """Equal for views that the same plan serves."""
    parts = tuple((s.leaf, s.shard, s.group, s.owned) for s in sources)
    return (parts, tuple((path, tuple(others)) for path, others in aliases.items()))


def make_plan(
    sources: Sequence[LeafSource],
    aliases: Mapping[str, Sequence[str]],
    windows: Sequence[Window],
    max_unit_nbytes: int,
) -> Plan:
    """Schedule a view's sources over windows.

    Args:
        sources, aliases: of the `StateView`.
        windows: the cycle's windows in order of time.
        max_unit_nbytes: bound on the bytes of one unit (a host buffer).

    Raises:
        UnsupportedStateError: two leaves have the same path, or a leaf exceeds the format's
            limits, or one element the host memory.
    """
    specs = list(dict.fromkeys(s.leaf for s in sources))
    _check_leaves(specs, aliases)
    _check_boxes(sources)
    groups = _groups(sources)
    schedule = plan_partitions(groups, windows)
    ordinals = {(w.phase, w.index): i for i, w in enumerate(windows)}
    units: list[Unit] = []
    for partition in schedule.partitions:
        for piece in partition.pieces:
            units.extend(_units(sources, schedule, partition.index, piece, max_unit_nbytes))
    return Plan(
        signature=signature_of(sources, aliases),
        nbytes=schedule.nbytes,
        leaves=[_leaf(spec, aliases.get(spec.path, ())) for spec in specs],
        shards=_shards(sources, {spec: i for i, spec in enumerate(specs)}),
        specs=tuple(s.leaf for s in sources),
        itemsizes=tuple(s.leaf.itemsize for s in sources),
        classes=tuple((s.leaf.kind, s.leaf.dtype) for s in sources),
        owned=tuple(s.owned for s in sources),
        partitions=tuple(
            PartitionPlace(
                ordinals.get((p.phase, p.window), 0),
                p.phase,
                p.window,
                p.nbytes,
                _by_class(sources, schedule, p.pieces),
            )
            for p in schedule.partitions
        ),
        units=tuple(units),
        block_count=sum(len(unit.sources) for unit in units),
    )


def _shards(sources: Sequence[LeafSource], leaf_index: Mapping[LeafSpec, int]) -> list[Shard]:
    return [Shard(leaf_index[s.leaf], list(s.shard.offset), list(s.shard.shape)) for s in sources]


def _check_leaves(specs: Sequence[LeafSpec], aliases: Mapping[str, Sequence[str]]) -> None:
    paths = [spec.path for spec in specs] + [path for others in aliases.values() for path in others]
    repeated = [p for p, n in Counter(paths).items() if n > 1]
    if repeated:
        raise UnsupportedStateError("two leaves have the same path", leaf=repeated[0])
    too_long = [p for p in paths if len(p) > MAX_TEXT]
    if too_long:
        raise UnsupportedStateError(
            f"a path is longer than {MAX_TEXT} characters", leaf=f"{too_long[0][:80]}..."
        )
    for leaf in specs:
        if len(leaf.shape) > MAX_RANK:
            raise UnsupportedStateError(
                f"an array has more than {MAX_RANK} dimensions",
                leaf=leaf.path,
                found=len(leaf.shape),
            )


def _check_boxes(sources: Sequence[LeafSource]) -> None:
    boxes = Counter((s.leaf.path, s.shard) for s in sources)
    repeated = [path for (path, _), n in boxes.items() if n > 1]
    if repeated:
        raise UnsupportedStateError("two leaves have the same path", leaf=repeated[0])


def _groups(sources: Sequence[LeafSource]) -> list[SourceGroup]:
    members: dict[tuple[str, ShardSpec, tuple[int, int]], list[int]] = {}
    for i, source in enumerate(sources):
        members.setdefault((source.group, source.shard, source.owned), []).append(i)
    return [
        SourceGroup(tuple(indices), *owned, sum(sources[i].leaf.itemsize for i in indices))
        for (_, _, owned), indices in members.items()
    ]


def _units(
    sources: Sequence[LeafSource],
    schedule: PartitionSchedule,
    partition: int,
    piece: GroupRange,
    max_unit_nbytes: int,
) -> list[Unit]:
    """Cut a piece on a fixed grid of its group, so that blocks of successive steps line up."""
    group = schedule.groups[piece.group]
    widest = max(sources[i].leaf.itemsize for i in group.sources)
    grid = min(BLOCK_NBYTES // widest, max_unit_nbytes // group.bytes_per_element)
    if grid < 1 or widest > MAX_BLOCK_NBYTES:
        raise UnsupportedStateError(
            "too many leaves belong to one parameter for the host memory allowed",
            leaf=sources[group.sources[0]].leaf.path,
            hint="Raise max_host_bytes",
        )
    units: list[Unit] = []
    start, stop = piece.start, piece.start + piece.count
    while start < stop:
        end = min(stop, (start // grid + 1) * grid)
        units.append(Unit(partition, group.sources, start, end - start))
        start = end
    return units


def _leaf(spec: LeafSpec, aliases: Sequence[str]) -> Leaf:
    return Leaf(spec.path, spec.dtype, list(spec.shape), list(aliases))


def _by_class(
    sources: Sequence[LeafSource], schedule: PartitionSchedule, pieces: Sequence[GroupRange]
) -> dict[tuple[str, str], int]:
    nbytes: Counter[tuple[str, str]] = Counter()
    for piece in pieces:
        for i in schedule.groups[piece.group].sources:
            leaf = sources[i].leaf
            nbytes[leaf.kind, leaf.dtype] += piece.count * leaf.itemsize
    return dict(nbytes)
