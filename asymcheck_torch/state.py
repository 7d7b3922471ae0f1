"""The state of a training run, as the core is shown it: what, when it is taken, who stores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import nn
from torch.optim import Optimizer

from asymcheck import tree
from asymcheck.partition import owned_range
from asymcheck.state import StateView
from asymcheck_torch import rng
from asymcheck_torch.extras import Extra, Moment, private
from asymcheck_torch.modules import module_extra, named_buffers, unwrap
from asymcheck_torch.optimizers import RESERVED, Parameters, record, tensor_state
from asymcheck_torch.tensors import (
    DeviceClocks,
    SteadyCopies,
    cuda_devices,
    identity,
    is_array,
    source_of,
)
from asymcheck_torch.world import World

_SPLIT_FROM_ELEMENTS = 16_384
_OF_RANK_0 = frozenset({"buffers", "module_extra", "world_size"})


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

    def parameters(self) -> Parameters:
        """All parameters as they are now."""
        return Parameters.of(unwrap(self.module), self.optimizers)

    def note_update(self) -> None:
        """Take what the loop moves on before the next forward pass: generators, positions."""
        self._own_copies.restart()
        devices = cuda_devices(self.parameters().by_name.values())
        self._at_update = {
            "rng": rng.capture(devices),
            "extra": self._extras(Moment.UPDATE),
        }

    def _extras(self, moment: Moment) -> dict[str, Any]:
        return {
            extra.name: private(extra.state(), self._own_copies)
            for extra in self.extras
            if extra.moment is moment
        }

    def view(self) -> StateView:
        """The state of the last update, before the next forward pass begins.

        Buffers, extras and options are copied now. Parameters and tensors of the optimizers are
        not: they are read later, and must not change before the next update.

        Raises:
            UnsupportedStateError: something cannot be stored; names its path.
        """
        self._common_copies.restart()
        self._clocks.restart()
        state = self._common() | {"ranks": {str(self.world.rank): self._own()}}
        flat = tree.flatten(state, is_array, identity)
        structure = _with_numpy_leaves(flat, self.world.rank)
        return self._of_this_writer(flat, structure)

    def _common(self) -> dict[str, Any]:
        parameters = self.parameters()
        state: dict[str, Any] = {"params": parameters.by_name}
        if self.world.shares_buffers:
            state["buffers"] = self._buffers(self._common_copies)
        for index, optimizer in enumerate(self.optimizers):
            state |= tensor_state(optimizer, index, parameters)
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
        return own

    def _buffers(self, copy: SteadyCopies) -> dict[str, torch.Tensor]:
        return {name: copy(buffer) for name, buffer in named_buffers(unwrap(self.module)).items()}

    def _of_this_writer(self, flat: tree.FlatState, structure: tree.Node) -> StateView:
        """Its share of the leaves, and of the structure: rank 0 gives what is common."""
        sources = []
        for path, value in flat.leaves.items():
            kind, _, name = path.partition("/")
            group = path if kind in RESERVED - {"params"} else name
            size = len(value) if isinstance(value, bytes) else _size(value)
            owned = self._owned(kind, group, size)
            if owned is not None:
                sources.append(source_of(path, value, group, owned, self._clocks))
        paths = {source.leaf.path for source in sources}
        aliases = {path: others for path, others in flat.aliases.items() if path in paths}
        return StateView(structure, tuple(sources), aliases)

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


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else value.size


def _with_numpy_leaves(flat: tree.FlatState, rank: int) -> tree.Node:
    """The structure, with a note of which leaves of this rank were no tensors.

    Other ranks than 0 give only what is theirs: the core unites the writers' structures.
    """
    own = [
        path
        for path, value in flat.leaves.items()
        if not isinstance(value, torch.Tensor) and (rank == 0 or path.startswith("ranks/"))
    ]
    pairs = [pair for pair in flat.structure["dict"] if rank == 0 or pair[0] == "ranks"]
    noted = {"dict": [[str(rank), {"list": own}]]}
    return {"dict": [*pairs, ["__numpy_leaves__", noted]]}
