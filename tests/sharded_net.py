"""The network that the tests of sharded training share, whoever shards it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH = 24
_TOKENS = 29


class Net(nn.Module):
    """Tied weights, a frozen layer, dropout, a buffer, and sizes that no number of ranks divides.

    Of `few` there are fewer rows than ranks.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(_TOKENS, width)
        self.frozen = nn.Linear(width, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.odd = nn.Parameter(torch.randn(7))
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.few = nn.Parameter(torch.randn(2, 5))
        self.head = nn.Linear(width, _TOKENS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        x = self.frozen(self.embed(tokens))
        for layer in self.layers:
            x = x + nn.functional.dropout(torch.tanh(layer(x)), 0.1, self.training)
        return self.head(x * self.scale) + self.odd.sum() + self.few.sum()


def seed_and_build(width: int = WIDTH, seed: int = 7) -> Net:
    """A net whose parameters are the same on every rank."""
    torch.manual_seed(seed)
    return Net(width)


def parameters_of(model: nn.Module, groups: bool) -> Any:
    """The trained ones, all in one group or in two with options of their own."""
    trained = [p for _, p in model.named_parameters() if p.requires_grad]
    if not groups:
        return trained
    return [
        {"params": [p for p in trained if _ndim(p) >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if _ndim(p) < 2], "weight_decay": 0.0, "lr": 3e-3},
    ]


def _ndim(parameter: Any) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def random_tokens() -> torch.Tensor:
    """A batch, other ones on other ranks."""
    return torch.randint(_TOKENS, (4, 5))


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """How badly the model repeats what it is told."""
    logits = model(tokens).float()
    return nn.functional.cross_entropy(logits.reshape(-1, _TOKENS), tokens.reshape(-1))
