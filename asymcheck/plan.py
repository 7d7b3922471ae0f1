"""What is the same for every snapshot of an unchanged state: groups, partitions, units, tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from asymcheck.codecs.replay import OTHER, are_roles, fits
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
from asymcheck.state import LeafSpec, ShardSpec, StateView, Update, kinds_of, role_of

BLOCK_NBYTES = 4 << 20
"""Largest block of one leaf: small enough for the cache, large enough to amortise Python."""
RUN_NBYTES = 1 << 20
"""Smaller units are captured together up to this: a lock and a clock for each would cost more."""
_REPLAYED_FROM_ELEMENTS = 4096  # to find out how to predict fewer takes longer than storing them


Class = tuple[str, str]
"""Kind and dtype of leaves."""


class Unit(msgspec.Struct, frozen=True, gc=False):
    """The same elements of co-located sources, coded together; one block for each source.

    `replays`: the update that made them is known, so that they may be coded by replaying it.
    """

    partition: int
    sources: tuple[int, ...]
    start: int
    count: int
    replays: bool = False


@dataclass(frozen=True, slots=True)
class PartitionPlace:
    """Where a partition stands in the cycle, and its bytes by leaf kind and dtype.

    `replayed_by_class`: those in units that may be replayed; `nbytes_by_class`: all others.
    """

    ordinal: int
    phase: Phase
    window: int
    nbytes: int
    nbytes_by_class: Mapping[Class, int]
    replayed_by_class: Mapping[Class, int]


@dataclass(frozen=True)
class Plan:
    """The schedule of a snapshot, down to the units, with the tables of its manifest.

    `nbytes` are all, `block_nbytes` those of the longest block, before coding. `runs` are the
    units, by their numbers, in pieces of one partition each that are captured in one go.
    `specs`, `itemsizes` (bytes), `classes` (kind, dtype), `owned`, `groups` and `roles` (in the
    update of the group) are by source.
    """

    signature: tuple[object, ...]
    nbytes: int
    block_nbytes: int
    leaves: list[Leaf]
    shards: list[Shard]
    specs: tuple[LeafSpec, ...]
    itemsizes: tuple[int, ...]
    classes: tuple[Class, ...]
    owned: tuple[tuple[int, int], ...]
    groups: tuple[str, ...]
    roles: tuple[str, ...]
    partitions: tuple[PartitionPlace, ...]
    units: tuple[Unit, ...]
    runs: tuple[range, ...]
    block_count: int


@dataclass(frozen=True, slots=True)
class _Sources:
    """What is asked of the sources of a view, by source: asked once, as they may be many."""

    leaves: list[LeafSpec]
    boxes: list[ShardSpec]
    groups: list[str]
    owned: list[tuple[int, int]]
    itemsizes: list[int]
    classes: list[Class]


def _sources(view: StateView) -> _Sources:
    leaves = [source.leaf for source in view.sources]
    kinds = kinds_of(leaves)
    return _Sources(
        leaves,
        [source.shard for source in view.sources],
        [source.group for source in view.sources],
        [source.owned for source in view.sources],
        [leaf.itemsize for leaf in leaves],
        [(kind, leaf.dtype) for kind, leaf in zip(kinds, leaves, strict=True)],
    )


def signature_of(view: StateView) -> tuple[object, ...]:
    """Equal for views that the same plan serves."""
    parts = tuple((s.leaf, s.shard, s.group, s.owned) for s in view.sources)
    aliases = tuple((path, tuple(others)) for path, others in view.aliases.items())
    return parts, aliases, tuple((g, u.rule, u.roles) for g, u in view.updates.items())


def make_plan(
    view: StateView,
    windows: Sequence[Window],
    max_unit_nbytes: int,
    block_nbytes: int = BLOCK_NBYTES,
) -> Plan:
    """Schedule a view's sources over windows.

    Args:
        view: what is to be stored.
        windows: the cycle's windows in order of time.
        max_unit_nbytes: bound on the bytes of one unit (a host buffer).
        block_nbytes: bound on those of one block.

    Raises:
        UnsupportedStateError: two leaves have the same path, or a leaf exceeds the format's
            limits, or one element the host memory.
    """
    sources, aliases = _sources(view), view.aliases
    specs = list(dict.fromkeys(sources.leaves))
    _check_leaves(specs, aliases)
    _check_boxes(sources)
    groups = _groups(sources)
    schedule = plan_partitions(groups, windows)
    ordinals = {(w.phase, w.index): i for i, w in enumerate(windows)}
    roles = _roles(sources, view.updates)
    replayed = [_is_replayed(group, sources, roles, view.updates) for group in groups]
    units: list[Unit] = []
    bounds = max_unit_nbytes, block_nbytes
    for partition in schedule.partitions:
        for piece in partition.pieces:
            for unit in _units(sources, schedule, partition.index, piece, *bounds):
                if replayed[piece.group] and unit.count >= _REPLAYED_FROM_ELEMENTS:
                    unit = msgspec.structs.replace(unit, replays=True)
                units.append(unit)
    replayed_by_class = _by_class(sources, [unit for unit in units if unit.replays])
    others_by_class = _by_class(sources, [unit for unit in units if not unit.replays])
    return Plan(
        signature=signature_of(view),
        nbytes=schedule.nbytes,
        block_nbytes=max(
            (unit.count * sources.itemsizes[i] for unit in units for i in unit.sources), default=0
        ),
        leaves=[_leaf(spec, aliases.get(spec.path, ())) for spec in specs],
        shards=_shards(sources, {spec: i for i, spec in enumerate(specs)}),
        specs=tuple(sources.leaves),
        itemsizes=tuple(sources.itemsizes),
        classes=tuple(sources.classes),
        owned=tuple(sources.owned),
        groups=tuple(sources.groups),
        roles=roles,
        partitions=tuple(
            PartitionPlace(
                ordinals.get((p.phase, p.window), 0),
                p.phase,
                p.window,
                p.nbytes,
                others_by_class.get(p.index, {}),
                replayed_by_class.get(p.index, {}),
            )
            for p in schedule.partitions
        ),
        units=tuple(units),
        runs=tuple(_runs(units, sources.itemsizes, min(RUN_NBYTES, max_unit_nbytes))),
        block_count=sum(len(unit.sources) for unit in units),
    )


def _shards(sources: _Sources, leaf_index: Mapping[LeafSpec, int]) -> list[Shard]:
    return [
        Shard(leaf_index[leaf], box.offset, box.shape)
        for leaf, box in zip(sources.leaves, sources.boxes, strict=True)
    ]


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


def _check_boxes(sources: _Sources) -> None:
    boxes = Counter(
        (leaf.path, box) for leaf, box in zip(sources.leaves, sources.boxes, strict=True)
    )
    repeated = [path for (path, _), n in boxes.items() if n > 1]
    if repeated:
        raise UnsupportedStateError("two leaves have the same path", leaf=repeated[0])


def _groups(sources: _Sources) -> list[SourceGroup]:
    members: dict[tuple[str, ShardSpec, tuple[int, int]], list[int]] = {}
    for i, place in enumerate(zip(sources.groups, sources.boxes, sources.owned, strict=True)):
        members.setdefault(place, []).append(i)
    return [
        SourceGroup(tuple(indices), *owned, sum(sources.itemsizes[i] for i in indices))
        for (_, _, owned), indices in members.items()
    ]


def _units(
    sources: _Sources,
    schedule: PartitionSchedule,
    partition: int,
    piece: GroupRange,
    max_unit_nbytes: int,
    block_nbytes: int,
) -> list[Unit]:
    """Cut a piece on a fixed grid of its group, so that blocks of successive steps line up."""
    group = schedule.groups[piece.group]
    widest = max(sources.itemsizes[i] for i in group.sources)
    grid = min(block_nbytes // widest, max_unit_nbytes // group.bytes_per_element)
    if grid < 1 or widest > MAX_BLOCK_NBYTES:
        raise UnsupportedStateError(
            "too many leaves belong to one parameter for the host memory allowed",
            leaf=sources.leaves[group.sources[0]].path,
            hint="Raise max_host_bytes",
        )
    units: list[Unit] = []
    start, stop = piece.start, piece.start + piece.count
    while start < stop:
        end = min(stop, (start // grid + 1) * grid)
        units.append(Unit(partition, group.sources, start, end - start))
        start = end
    return units


def _runs(units: Sequence[Unit], itemsizes: Sequence[int], max_nbytes: int) -> Iterator[range]:
    """As many units as fit, of one partition; a larger unit is a run of its own."""
    start, run_nbytes = 0, 0
    for number, unit in enumerate(units):
        nbytes = unit.count * sum(itemsizes[i] for i in unit.sources)
        same = unit.partition == units[start].partition
        if number > start and not (same and run_nbytes + nbytes <= max_nbytes):
            yield range(start, number)
            start, run_nbytes = number, 0
        run_nbytes += nbytes
    if units:
        yield range(start, len(units))


def _leaf(spec: LeafSpec, aliases: Sequence[str]) -> Leaf:
    return Leaf(spec.path, spec.dtype, spec.shape, tuple(aliases))


def _by_class(sources: _Sources, units: Sequence[Unit]) -> dict[int, Counter[Class]]:
    """Bytes by class, of each partition."""
    nbytes: dict[int, Counter[Class]] = defaultdict(Counter)
    for unit in units:
        for i in unit.sources:
            nbytes[unit.partition][sources.classes[i]] += unit.count * sources.itemsizes[i]
    return nbytes


def _roles(sources: _Sources, updates: Mapping[str, Update]) -> tuple[str, ...]:
    """The role of each source in the update of its group."""
    found: list[str] = []
    for leaf, group in zip(sources.leaves, sources.groups, strict=True):
        update = updates.get(group)
        found.append((update and role_of(update, leaf.path, group)) or OTHER)
    return tuple(found)


def _is_replayed(
    group: SourceGroup,
    sources: _Sources,
    roles: Sequence[str],
    updates: Mapping[str, Update],
) -> bool:
    """Whether the update of a group is known, and all that it takes is in the group."""
    update = updates.get(sources.groups[group.sources[0]])
    if update is None:
        return False
    found = [(roles[i], sources.leaves[i].dtype) for i in group.sources]
    return are_roles(update.rule, [role for role, _ in found]) and all(
        fits(role, dtype) for role, dtype in found
    )


NOTHING = make_plan(StateView({"dict": []}, ()), [Window(Phase.FORWARD, 0, 0.0)], BLOCK_NBYTES)
"""The plan of a state without leaves."""
