"""What is the same for every snapshot of an unchanged state: groups, partitions, units, tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from asymcheck.codecs.replay import COPY, OTHER, fits
from asymcheck.codecs.rules import RULES
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
from asymcheck.state import LeafSource, LeafSpec, ShardSpec, StateView, Update, role_of

BLOCK_NBYTES = 4 << 20
"""Largest block of one leaf: small enough for the cache, large enough to amortise Python."""
_REPLAYED_FROM_ELEMENTS = 4096  # to find out how to predict fewer takes longer than storing them


Class = tuple[str, str]
"""Kind and dtype of leaves."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A step of capturing: the same elements of co-located sources; one block for each source.

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

    `specs`, `itemsizes` (bytes), `classes` (kind, dtype), `owned`, `groups` and `roles` (in the
    update of the group) are by source.
    """

    signature: tuple[object, ...]
    nbytes: int
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
    block_count: int


def signature_of(view: StateView) -> tuple[object, ...]:
    """Equal for views that the same plan serves."""
    parts = tuple((s.leaf, s.shard, s.group, s.owned) for s in view.sources)
    aliases = tuple((path, tuple(others)) for path, others in view.aliases.items())
    return parts, aliases, tuple((g, u.rule, u.roles) for g, u in view.updates.items())


def make_plan(view: StateView, windows: Sequence[Window], max_unit_nbytes: int) -> Plan:
    """Schedule a view's sources over windows.

    Args:
        view: what is to be stored.
        windows: the cycle's windows in order of time.
        max_unit_nbytes: bound on the bytes of one unit (a host buffer).

    Raises:
        UnsupportedStateError: two leaves have the same path, or a leaf exceeds the format's
            limits, or one element the host memory.
    """
    sources, aliases = view.sources, view.aliases
    specs = list(dict.fromkeys(s.leaf for s in sources))
    _check_leaves(specs, aliases)
    _check_boxes(sources)
    groups = _groups(sources)
    schedule = plan_partitions(groups, windows)
    ordinals = {(w.phase, w.index): i for i, w in enumerate(windows)}
    roles = tuple(_role(source, view.updates) for source in sources)
    replayed = [_is_replayed(group, sources, roles, view.updates) for group in groups]
    units: list[Unit] = []
    for partition in schedule.partitions:
        for piece in partition.pieces:
            for unit in _units(sources, schedule, partition.index, piece, max_unit_nbytes):
                replays = replayed[piece.group] and unit.count >= _REPLAYED_FROM_ELEMENTS
                units.append(replace(unit, replays=True) if replays else unit)
    replayed_by_class = _by_class(sources, [unit for unit in units if unit.replays])
    others_by_class = _by_class(sources, [unit for unit in units if not unit.replays])
    return Plan(
        signature=signature_of(view),
        nbytes=schedule.nbytes,
        leaves=[_leaf(spec, aliases.get(spec.path, ())) for spec in specs],
        shards=_shards(sources, {spec: i for i, spec in enumerate(specs)}),
        specs=tuple(s.leaf for s in sources),
        itemsizes=tuple(s.leaf.itemsize for s in sources),
        classes=tuple((s.leaf.kind, s.leaf.dtype) for s in sources),
        owned=tuple(s.owned for s in sources),
        groups=tuple(s.group for s in sources),
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


def _by_class(sources: Sequence[LeafSource], units: Sequence[Unit]) -> dict[int, Counter[Class]]:
    """Bytes by class, of each partition."""
    nbytes: dict[int, Counter[Class]] = defaultdict(Counter)
    for unit in units:
        for i in unit.sources:
            leaf = sources[i].leaf
            nbytes[unit.partition][leaf.kind, leaf.dtype] += unit.count * leaf.itemsize
    return nbytes


def _role(source: LeafSource, updates: Mapping[str, Update]) -> str:
    update = updates.get(source.group)
    role = update and role_of(update, source.leaf.path, source.group)
    return role or OTHER


def _is_replayed(
    group: SourceGroup,
    sources: Sequence[LeafSource],
    roles: Sequence[str],
    updates: Mapping[str, Update],
) -> bool:
    """Whether the update of a group is known, and all that it takes is in the group, in float32."""
    update = updates.get(sources[group.sources[0]].group)
    if update is None:
        return False
    needed = RULES[update.rule].roles
    found = [(roles[i], sources[i].leaf.dtype) for i in group.sources]
    named = [role for role, _ in found if role not in (COPY, OTHER)]
    return sorted(named) == sorted(needed) and all(fits(role, dtype) for role, dtype in found)
