"""What a rank holds of a tensor that several ranks hold together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from asymcheck.errors import UnsupportedStateError
from asymcheck.partition import owned_range
from asymcheck.state import ShardSpec
from asymcheck_torch.sharding_types import is_fsdp2

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

_SPLIT_FROM_ELEMENTS = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A part of a tensor: a box of it, or a stretch of the elements of a box.

    Attributes:
        tensor: the elements that this rank holds; may be none.
        shape: of the whole tensor.
        shard: the box in whose row-major order the elements lie.
        start: where in the box they begin.
        replica, replicas: this rank is number `replica` of those that hold the same elements.
        key: equal for parts of one tensor, as a tied parameter has under each of its names.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    shard: ShardSpec
    start: int
    replica: int
    replicas: int
    key: Hashable

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor."""
        return self.tensor.dtype

    @property
    def ndim(self) -> int:
        """Dimensions of the whole tensor."""
        return len(self.shape)

    def owned(self, small: int) -> tuple[int, int] | None:
        """The (start, count) of the elements of the box that this rank stores; see `share`."""
        count = self.tensor.numel()
        if count == 0 and math.prod(self.shape):
            return None
        mine = share(count, self.replica, self.replicas, small)
        return None if mine is None else (self.start + mine[0], mine[1])


def share(count: int, replica: int, replicas: int, small: int) -> tuple[int, int] | None:
    """(start, count) of the elements that one of several holders of the same `count` stores.

    Many are split evenly; few are stored by replica `small` modulo their number, and by no other.
    """
    if replicas == 1:
        return 0, count
    if count < _SPLIT_FROM_ELEMENTS:
        return (0, count) if small % replicas == replica else None
    return owned_range(count, replica, replicas)


def whole(tensor: torch.Tensor, replica: int, replicas: int, key: Hashable) -> Part:
    """A tensor that each of `replicas` ranks holds whole."""
    shape = tuple(tensor.shape)
    return Part(tensor, shape, ShardSpec.whole(shape), 0, replica, replicas, key)


def stretch(tensor: torch.Tensor, shape: tuple[int, ...], start: int, key: Hashable) -> Part:
    """The elements of a tensor of `shape` from `start` on, flat, which no other rank holds."""
    return Part(tensor, shape, ShardSpec.whole(shape), start, 0, 1, key)


def part_of(tensor: DTensor, path: str) -> Part:
    """What this rank holds of a `DTensor`; shares its memory.

    Raises:
        UnsupportedStateError: its placements are neither shards nor copies; names the path.
    """
    from torch.distributed.tensor import Replicate, Shard

    local, mesh = tensor.to_local(), tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None or any(type(p) not in (Shard, Replicate) for p in tensor.placements):
        raise UnsupportedStateError(
            f"a DTensor placed {tensor.placements} cannot be stored",
            leaf=path,
            expected="placements Shard and Replicate, on a mesh with this rank",
        )
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    replica, replicas = 0, 1
    for size, at, placement in zip(mesh.shape, coordinate, tensor.placements, strict=True):
        if isinstance(placement, Shard):
            _cut(offset, shape, placement.dim, size, at)
        else:
            replica, replicas = replica * size + at, replicas * size
    if tuple(shape) != tuple(local.shape):
        raise UnsupportedStateError(
            "a DTensor is not cut into even parts",
            leaf=path,
            expected=shape,
            found=list(local.shape),
        )
    box = ShardSpec(tuple(offset), tuple(shape))
    return Part(local, tuple(tensor.shape), box, 0, replica, replicas, id(tensor))


def _cut(offset: list[int], shape: list[int], dim: int, parts: int, at: int) -> None:
    """Cut a box into `parts` along a dimension as torch does: equal ones but for the last."""
    share = -(-shape[dim] // parts)
    begin = min(at * share, shape[dim])
    offset[dim] += begin
    shape[dim] = min(share, shape[dim] - begin)


def sharded_among(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    """Those that FSDP2 shards."""
    return [module for module in modules if is_fsdp2(module)]


def reshard(module: nn.Module) -> None:
    """Have FSDP2 show a module's shards: a forward pass alone leaves parameters gathered."""
    for child in sharded_among(module.modules()):
        child.reshard()


def drop_gradients(module: nn.Module, others: Iterable[torch.Tensor] = ()) -> None:
    """Forget all gradients of a module's parameters and of others.

    Also those that FSDP2 has not reduced yet (`set_requires_gradient_sync(False)`), which
    `zero_grad` leaves.
    """
    for parameter in (*module.parameters(), *others):
        parameter.grad = None
    for child in sharded_among(module.modules()):
        state: Any = child._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in filter(None, groups):
            group._partial_reduce_output = None
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


def numel(parameter: nn.Parameter) -> int:
    """Elements of a whole parameter, also where ZeRO-3 has left only a part of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
