"""The processes that train together, and the little that they must agree on."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from asymcheck.errors import UnsupportedStateError
from asymcheck_torch.parts import reshard
from asymcheck_torch.sharding_types import is_dtensor, is_fsdp1


@dataclass(frozen=True, slots=True)
class World:
    """A process group as the adapter uses it; a single process needs none.

    Attributes:
        group: the process group, or None for a single process.
        rank, size: this process in the group, and how many there are.
        shares_buffers: the buffers of rank 0 are everybody's (DDP sends them before each forward
            pass); else each rank has its own.
    """

    group: Any
    rank: int
    size: int
    shares_buffers: bool

    @classmethod
    def of(cls, module: nn.Module, group: dist.ProcessGroup | None) -> World:
        """The group given, else that of DDP or FSDP2, else a single process.

        Raises:
            UnsupportedStateError: the module is sharded over a part of a mesh's ranks, or by FSDP1.
        """
        if any(map(is_fsdp1, module.modules())):
            raise UnsupportedStateError(
                "FullyShardedDataParallel (FSDP1) cannot be checkpointed", hint="Use fully_shard"
            )
        reshard(module)  # else what is gathered just now looks as if it were not sharded
        ddp = _ddp_of(module)
        if group is None:
            group = ddp.process_group if ddp is not None else _group_of_shards(module)
        if group is None:
            return cls(None, 0, 1, shares_buffers=True)
        shares = ddp is not None and ddp.broadcast_buffers
        size = dist.get_world_size(group)
        return cls(group, dist.get_rank(group), size, shares or size == 1)

    def broadcast(self, number: int) -> int:
        """The number that rank 0 gives."""
        if self.size > 1:
            tensor = self._tensor(number)
            dist.broadcast(tensor, group=self.group, group_src=0)
            number = int(tensor.item())
        return number

    def broadcast_text(self, text: str) -> str:
        """The text that rank 0 gives; no matter what the others do."""
        if self.size == 1:
            return text
        data = text.encode() if self.rank == 0 else b""
        size = self.broadcast(len(data))
        tensor = self._tensor(list(data.ljust(size)))
        dist.broadcast(tensor, group=self.group, group_src=0)
        return bytes(tensor.tolist()).decode()

    def extremes(self, number: int) -> tuple[int, int]:
        """The smallest and the largest number that any rank gives."""
        if self.size == 1:
            return number, number
        tensor = self._tensor([-number, number])
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return -int(tensor[0]), int(tensor[1])

    def fresh_name(self) -> str:
        """A name that no other run has, the same on all ranks."""
        return f"run{self.broadcast(secrets.randbits(62)):x}"

    def _tensor(self, number: int | list[int]) -> torch.Tensor:
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        return torch.tensor(number, dtype=torch.int64, device=device)


def _group_of_shards(module: nn.Module) -> Any:
    """The ranks that hold the parts of a module's `DTensor`s; None if it has none."""
    meshes = {p.device_mesh for p in module.parameters() if is_dtensor(p)}
    if not meshes:
        return None
    if all(mesh.size() == dist.get_world_size() for mesh in meshes):
        return dist.group.WORLD
    (mesh,) = meshes if len(meshes) == 1 else (None,)
    if mesh is None or mesh.ndim != 1:
        raise UnsupportedStateError(
            "the module is sharded over several meshes, or over a part of the ranks",
            found=", ".join(str(mesh) for mesh in meshes)[:200],
            hint="Pass process_group: the ranks that together hold the module",
        )
    return mesh.get_group()


def _ddp_of(module: nn.Module) -> DistributedDataParallel | None:
    while not isinstance(module, DistributedDataParallel):
        inner = getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        module = inner
    return module
