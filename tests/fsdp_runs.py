"""What the processes of the FSDP2 tests run; started by `torch_ddp.start`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import asymcheck_torch


class Net(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, tied weights, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 24)
        self.layers = nn.ModuleList([nn.Linear(24, 24) for _ in range(3)])
        self.few = nn.Parameter(torch.randn(2, 5))
        self.head = nn.Linear(24, 29, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + nn.functional.dropout(torch.tanh(layer(x)), 0.1, self.training)
        return self.head(x) + self.few.sum()


def build(world: int, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`fsdp` over all ranks, `hsdp` over a 2-D mesh (copies of shards), `low` precision, `plain`."""
    torch.manual_seed(7)
    model = Net()
    if kind != "plain":
        shape = (2, world // 2) if kind == "hsdp" else (world,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
        policy = MixedPrecisionPolicy(torch.bfloat16) if kind == "low" else MixedPrecisionPolicy()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses: list[float] = []
    model.train()
    for _ in range(steps):
        tokens = torch.randint(29, (4, 5))
        logits = model(tokens).float()
        loss = nn.functional.cross_entropy(logits.reshape(-1, 29), tokens.reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All of it by logical names, gathered."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"params/{name}"] = _full(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = _full(value)
    found["seen"] = model.seen.clone()
    return found


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def save_and_go_on(rank: int, url: str, world: int, kind: str) -> Any:
    model, optimizer = build(world, kind)
    torch.manual_seed(100 + rank)
    with asymcheck_torch.attach(model, optimizer, url=url, max_to_keep=None) as ckpt:
        train(model, optimizer, 3)
        assert ckpt.step == 3
    at_stop = snapshot(model, optimizer)
    losses = train(model, optimizer, 2)
    return at_stop, snapshot(model, optimizer), losses


def resume(rank: int, url: str, world: int, kind: str, warm: int = 0) -> Any:
    model, optimizer = build(world, kind)
    torch.manual_seed(200 + rank)
    train(model, optimizer, warm)
    with asymcheck_torch.attach(model, optimizer, url=url, every_steps=1000) as ckpt:
        assert ckpt.restore() == 3
        at_start = snapshot(model, optimizer)
        losses = train(model, optimizer, 2)
    return at_start, snapshot(model, optimizer), losses
