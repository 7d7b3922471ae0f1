"""The state of a training run, as the core is shown it: what, when it is taken, who stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast
from zlib import crc32

import torch
from torch import nn

from asymcheck import tree
from asymcheck.errors import UnsupportedStateError
from asymcheck.state import LeafSource, StateView, Update
from asymcheck_torch import rng
from asymcheck_torch.extras import Extra, Moment, private
from asymcheck_torch.gradients import GRADIENTS
from asymcheck_torch.modules import module_extra, named_buffers, renormed_in_forward
from asymcheck_torch.optimizers import RESERVED
from asymcheck_torch.parts import Part, part_of, reshard, share, whole
from asymcheck_torch.sharding_types import is_dtensor
from asymcheck_torch.tensors import (
    DeviceClocks,
    SteadyCopies,
    TensorSource,
    array_source,
    cuda_devices,
    identity,
    is_array,
    size_of,
    tensor_source,
)
from asymcheck_torch.trained import Live, Trained
from asymcheck_torch.world import World

_OF_RANK_0 = frozenset({"buffers", "module_extra", "engine", "world_size"})


@dataclass(frozen=True, slots=True)
class _Part:
    """Some top-level entries of the state, flattened: what this rank stores of them.

    Attributes:
        pairs: the members of the structure's dictionary.
        numpy_leaves: paths of the leaves that are no tensors.
    """

    pairs: list[list[Any]]
    numpy_leaves: list[str]
    sources: tuple[LeafSource, ...]
    aliases: dict[str, list[str]]


@dataclass
class TrainingState:
    """What is trained, extras and generators, and how their state is laid out.

    The tree that is saved::

        params        {name: tensor}, tied ones under each name
        buffers       {name: tensor}, the persistent ones
        exp_avg, ...  {parameter name: tensor}, one entry for each key of the optimizer's state
        gradients     {parameter name: tensor}, those of the update, if they are captured
        optimizers    [{param_groups, other, shared}], what is no tensor of a parameter
        module_extra  {module name: get_extra_state()}
        engine        counters, loss scale and schedule of an engine such as DeepSpeed's
        ranks         {rank: {rng, extra}}, and buffers where every rank has its own,
                      and what else is a rank's own: `own_more`
        world_size    int
        __numpy_leaves__  {rank: paths of leaves that were NumPy's, not torch's}
    """

    trained: Trained
    extras: Sequence[Extra]
    world: World
    own_more: dict[str, Any] = field(default_factory=dict[str, Any])
    _common_copies: SteadyCopies = field(default_factory=SteadyCopies)
    _own_copies: SteadyCopies = field(default_factory=SteadyCopies)
    _clocks: DeviceClocks = field(default_factory=DeviceClocks)
    _at_update: dict[str, Any] = field(default_factory=dict[str, Any])
    _updates: dict[str, Update] = field(default_factory=dict[str, Update])
    _master_of: Mapping[str, str] = field(default_factory=dict[str, str])
    _live_part: tuple[list[Any], _Part] | None = None

    @property
    def module(self) -> nn.Module:
        """The module, without wrappers."""
        return self.trained.module

    def note_update(self, step: int) -> None:
        """Take what the loop moves on before the next forward pass: generators, positions.

        And learning rates: the update's number `step` was made with those that stand now.
        """
        self._own_copies.restart()
        self._updates = self.trained.updates(step)
        self._master_of = self.trained.masters()
        for name, master in self._master_of.items():
            if (update := self._updates.get(master)) is not None:
                roles = *update.roles, (f"params/{_group_of(name)}", "copy")
                self._updates[master] = replace(update, roles=roles)
        on_cuda = torch.cuda.is_initialized()
        devices = cuda_devices(self.module.parameters()) if on_cuda else []
        self._at_update = {
            "rng": rng.capture(devices),
            "extra": self._extras(Moment.UPDATE),
        }

    def view(self) -> StateView:
        """The state of the last update, before the next forward pass begins.

        Buffers, extras and options are copied now. Parameters and tensors of the optimizers are
        not: they are read later, and must not change before the next update.

        Raises:
            UnsupportedStateError: something cannot be stored; names its path.
        """
        reshard(self.module)
        self._common_copies.restart()
        live = self._live(self._live_tensors())
        copied = self._part(self._common() | {"ranks": self._own()})
        self._clocks.restart()
        rank = str(self.world.rank)
        noted = {"dict": [[rank, {"list": live.numpy_leaves + copied.numpy_leaves}]]}
        pairs = [*live.pairs, *copied.pairs, ["__numpy_leaves__", noted]]
        return StateView(
            {"dict": pairs},
            live.sources + copied.sources,
            live.aliases | copied.aliases,
            {_group_of(name): update for name, update in self._updates.items()},
        )

    # -- what there is ---------------------------------------------------------------------

    def _live_tensors(self) -> Live:
        state = dict(self.trained.tensors())
        renormed = renormed_in_forward(self.module)
        if renormed:
            params = state["params"]
            memory = {
                identity(params[name]) for name in renormed
            }  # tied ones have other names, too
            state["params"] = {
                name: self._common_copies(_dense(value)) if identity(value) in memory else value
                for name, value in params.items()
            }
        return state

    def _common(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self.world.shares_buffers:
            state["buffers"] = self._buffers(self._common_copies)
        state["optimizers"] = self.trained.records(self._common_copies)
        state["module_extra"] = private(module_extra(self.module), self._common_copies)
        engine = self.trained.engine_state()
        if engine is not None:
            state["engine"] = private(engine, self._common_copies)
        state["world_size"] = self.world.size
        return state

    def _own(self) -> dict[str, Any]:
        extra = self._at_update["extra"] | self._extras(Moment.FORWARD)
        own: dict[str, Any] = {"rng": self._at_update["rng"], "extra": extra}
        own |= private(self.own_more, self._own_copies)
        if not self.world.shares_buffers:
            own["buffers"] = self._buffers(self._own_copies)
        return {str(self.world.rank): own}

    def _extras(self, moment: Moment) -> dict[str, Any]:
        return {
            extra.name: private(extra.state(), self._own_copies)
            for extra in self.extras
            if extra.moment is moment
        }

    def _buffers(self, copy: SteadyCopies) -> dict[str, torch.Tensor]:
        return {name: copy(buffer) for name, buffer in named_buffers(self.module).items()}

    # -- who stores it ---------------------------------------------------------------------

    def _live(self, state: Live) -> _Part:
        """The part of the live tensors: the same objects as long as the tensors are the same."""
        tensors = _fingerprint(state)
        if self._live_part is None or self._live_part[0] != tensors:
            self._live_part = tensors, self._part(state)
        for source in self._live_part[1].sources:
            cast("TensorSource", source).renew()
        return self._live_part[1]

    def _part(self, state: Mapping[str, Any]) -> _Part:
        """Of what is common rank 0 gives the structure; the core unites that of all writers."""
        flat = tree.flatten(dict(state), is_array, identity)
        rank = self.world.rank
        sources = self._sources(flat.leaves)
        paths = {source.leaf.path for source in sources}
        return _Part(
            pairs=[pair for pair in flat.structure["dict"] if rank == 0 or pair[0] == "ranks"],
            numpy_leaves=[
                path
                for path, value in flat.leaves.items()
                if not isinstance(value, torch.Tensor | Part)
                and (rank == 0 or path.startswith("ranks/"))
            ],
            sources=tuple(sources),
            aliases={path: others for path, others in flat.aliases.items() if path in paths},
        )

    def _sources(self, leaves: Mapping[str, object]) -> list[LeafSource]:
        masters = {  # copies in low precision move with their masters
            f"params/{_group_of(name)}": _group_of(master)
            for name, master in self._master_of.items()
        }
        sources = (self._source(path, value, masters.get(path)) for path, value in leaves.items())
        return [source for source in sources if source is not None]

    def _source(self, path: str, value: object, master: str | None) -> LeafSource | None:
        """A leaf as this rank stores it; None if others store all of it.

        Small leaves go to a rank chosen by name, so that those of one parameter stay together.
        """
        kind, _, name = path.partition("/")
        rank, size = self.world.rank, self.world.size
        if kind in _OF_RANK_0 and rank:
            return None
        replica, replicas = (0, 1) if kind in _OF_RANK_0 | {"ranks"} else (rank, size)
        group = master or _group(kind, name, path, value)
        small = crc32(group.encode())
        if not isinstance(value, torch.Tensor | Part):
            owned = share(size_of(value), replica, replicas, small)
            return None if owned is None else array_source(path, value, group, owned)
        part = _part_of(path, value, replica, replicas)
        owned = part.owned(small)
        return None if owned is None else tensor_source(path, part, group, owned, self._clocks)


def _part_of(path: str, value: torch.Tensor | Part, replica: int, replicas: int) -> Part:
    if isinstance(value, Part):
        return value
    if is_dtensor(value):
        return part_of(value, path)
    return whole(value, replica, replicas, identity(value))


def _dense(value: torch.Tensor | Part) -> torch.Tensor:
    """A tensor that is copied whole; `UnsupportedStateError` for a part of one."""
    if isinstance(value, Part) or is_dtensor(value):
        raise UnsupportedStateError(
            "an embedding with max_norm changes in the forward pass and cannot be sharded"
        )
    return value


def _group_of(name: str) -> str:
    """The group of a parameter's leaves: its name as it stands in paths."""
    return tree.join_path("", name)


def _group(kind: str, name: str, path: str, value: object) -> str:
    """What moves together: the leaves of a parameter; all numbers of a kind (`step`)."""
    if kind in RESERVED - {"params", GRADIENTS}:
        return path
    return name if cast("torch.Tensor | Part", value).ndim else kind


def _fingerprint(state: Live) -> list[Any]:
    """Equal as long as the same names stand for the same memory.

    Sources keep the memory that they read from alive, so no other tensor can get its address.
    """
    return [
        (kind, name, t.shape, identity(t))
        for kind, tensors in state.items()
        for name, t in tensors.items()
    ]
