"""GPT-2 in plain PyTorch, built from its published configuration; no download needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPT2Config:
    vocabulary: int = 256
    context: int = 128
    width: int = 384
    layers: int = 6
    heads: int = 6
    dropout: float = 0.1


TINY = GPT2Config()  # 10.8 M parameters, byte-level tokens
SMALL = GPT2Config(vocabulary=50257, context=1024, width=768, layers=12, heads=12)  # 124 M


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.ln_1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.ln_2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self._attend(self.ln_1(x)))
        hidden = F.gelu(self.up(self.ln_2(x)), approximate="tanh")
        return x + self._drop(self.down(hidden))

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class GPT2(nn.Module):
    """Token and position embeddings, pre-norm blocks, and a head tied to the token embedding."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(self._initialise)
        self.lm_head.weight = self.wte.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocabulary), or the mean loss if there are targets."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class ByteBatches:
    """Random windows of a text as bytes: an endless iterator whose position can be saved."""

    def __init__(self, text: bytes, *, batch: int, context: int, seed: int) -> None:
        self._data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._batch, self._context = batch, context
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> ByteBatches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        limit = len(self._data) - self._context
        starts = torch.randint(limit, (self._batch, 1), generator=self._generator)
        index = starts + torch.arange(self._context + 1)
        tokens = self._data[index]
        return tokens[:, :-1], tokens[:, 1:]

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])
