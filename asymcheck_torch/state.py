"""The state of a training run, as the core is shown it: what, when it is taken, who stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from asymcheck import tree
from asymcheck.partition import owned_range
from asymcheck.state import LeafSource, LeafSpec, ShardSpec, StateView
from asymcheck_torch import rng
from asymcheck_torch.extras import Extra, Moment, private
from asymcheck_torch.modules import (
    module_extra,
    named_buffers,
    renormed_in_forward,
    unwrap,
)
from asymcheck_torch.optimizers import RESERVED, Parameters, record, tensor_state
from asymcheck_torch.tensors import (
    DeviceClocks,
    SteadyCopies,
    TensorSource,
    cuda_devices,
    identity,
    is_array,
    size_of,
    source_of,
)
from asymcheck_torch.world import World

_SPLIT_FROM_ELEMENTS = 16_384
_OF_RANK_0 = frozenset({"buffers", "module_extra", "world_size"})

Live = Mapping[str, Mapping[str, torch.Tensor]]


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
    """Module, optimizers, extras and generators, and how their state is laid out.

    The tree that is saved::

        params        {name: tensor}, tied ones under each name
        buffers       {name: tensor}, the persistent ones
        exp_avg, ...  {parameter name: tensor}, one entry for each key of the optimizer's state
        optimizers    [{param_groups, other, shared}], what is no tensor of a parameter
        module_extra  {module name: get_extra_state()}
        ranks         {rank: {rng, extra}}, and buffers where every rank has its own
        world_size    int
        __numpy_leaves__  {rank: paths of leaves that were NumPy's, not torch's}
    """

    module: nn.Module
    optimizers: Sequence[Optimizer]
    extras: Sequence[Extra]
    world: World
    _common_copies: SteadyCopies = field(default_factory=SteadyCopies)
    _own_copies: SteadyCopies = field(default_factory=SteadyCopies)
    _clocks: DeviceClocks = field(default_factory=DeviceClocks)
    _at_update: dict[str, Any] = field(default_factory=dict[str, Any])
    _live_part: tuple[list[Any], _Part] | None = None

    def parameters(self) -> Parameters:
        """All parameters as they are now."""
        return Parameters.of(unwrap(self.module), self.optimizers)

    def note_update(self) -> None:
        """Take what the loop moves on before the next forward pass: generators, positions."""
        self._own_copies.restart()
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
        self._common_copies.restart()
        parameters = self.parameters()
        live = self._live(self._live_tensors(parameters))
        copied = self._part(self._common(parameters) | {"ranks": self._own()})
        self._clocks.restart()
        rank = str(self.world.rank)
        noted = {"dict": [[rank, {"list": live.numpy_leaves + copied.numpy_leaves}]]}
        pairs = [*live.pairs, *copied.pairs, ["__numpy_leaves__", noted]]
        return StateView(
            {"dict": pairs}, live.sources + copied.sources, live.aliases | copied.aliases
        )

    # -- what there is ---------------------------------------------------------------------

    def _live_tensors(self, parameters: Parameters) -> Live:
        params = dict(parameters.by_name)
        for name in renormed_in_forward(unwrap(self.module)):
            params[name] = self._common_copies(params[name])
        state: dict[str, Mapping[str, torch.Tensor]] = {"params": params}
        for index, optimizer in enumerate(self.optimizers):
            state |= tensor_state(optimizer, index, parameters)
        return state

    def _common(self, parameters: Parameters) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self.world.shares_buffers:
            state["buffers"] = self._buffers(self._common_copies)
        state["optimizers"] = [
            record(optimizer, parameters, self._common_copies) for optimizer in self.optimizers
        ]
        extra = module_extra(unwrap(self.module))
        state["module_extra"] = private(extra, self._common_copies)
        state["world_size"] = self.world.size
        return state

    def _own(self) -> dict[str, Any]:
        extra = self._at_update["extra"] | self._extras(Moment.FORWARD)
        own: dict[str, Any] = {"rng": self._at_update["rng"], "extra": extra}
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
        return {name: copy(buffer) for name, buffer in named_buffers(unwrap(self.module)).items()}

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
                if not isinstance(value, torch.Tensor) and (rank == 0 or path.startswith("ranks/"))
            ],
            sources=tuple(sources),
            aliases={path: others for path, others in flat.aliases.items() if path in paths},
        )

    def _sources(self, leaves: Mapping[str, object]) -> list[LeafSource]:
        sources: list[LeafSource] = []
        for path, value in leaves.items():
            kind, _, name = path.partition("/")
            owned = self._owned(kind, group := _group(kind, name, path, value), size_of(value))
            if owned is not None:
                sources.append(source_of(path, value, group, owned, self._clocks))
        return sources

    def _owned(self, kind: str, group: str, size: int) -> tuple[int, int] | None:
        """The range of a leaf that this rank stores; None if another one stores all of it.

        Large leaves are split evenly, small ones go to a rank chosen by name, so that the leaves
        of one parameter stay together.
        """
        rank, world = self.world.rank, self.world.size
        if kind == "ranks" or world == 1:
            return 0, size
        if kind in _OF_RANK_0:
            return (0, size) if rank == 0 else None
        if size < _SPLIT_FROM_ELEMENTS:
            return (0, size) if crc32(group.encode()) % world == rank else None
        return owned_range(size, rank, world)


@dataclass(frozen=True, slots=True)
class _Refused:
    """A source that fails when it is read."""

    error: Exception
    leaf = LeafSpec("refused", "uint8", (1,))
    shard = ShardSpec.whole((1,))
    group = "refused"
    owned = (0, 1)

    def read_into(self, start: int, count: int, out: NDArray[np.uint8]) -> None:
        """Raise the error."""
        raise self.error


def refused(error: Exception) -> StateView:
    """The view of a rank that cannot show its state: the other ranks learn that, and why."""
    return StateView({"dict": []}, (_Refused(error),))


def _group(kind: str, name: str, path: str, value: object) -> str:
    """What moves together: the leaves of a parameter; all numbers of a kind (`step`)."""
    if kind in RESERVED - {"params"}:
        return path
    return name if cast("torch.Tensor", value).ndim else kind


def _fingerprint(state: Live) -> list[Any]:
    """Equal as long as the same names stand for the same memory.

    Sources keep the memory that they read from alive, so no other tensor can get its address.
    """
    return [
        (kind, name, t.shape, identity(t))
        for kind, tensors in state.items()
        for name, t in tensors.items()
    ]
