"""GPT-2 in Flax (nnx), with the shardings of a two-dimensional mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class GPT2Config:
    vocabulary: int = 256
    context: int = 128
    width: int = 192
    layers: int = 4
    heads: int = 6


TINY = GPT2Config()
SMALL = GPT2Config(vocabulary=50257, context=1024, width=768, layers=12, heads=12)  # 124 M


class Block(nnx.Module):
    def __init__(self, config: GPT2Config, rngs: nnx.Rngs) -> None:
        self.heads = config.heads
        width = config.width
        self.ln_1 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.proj = nnx.Linear(width, width, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self._attend(self.ln_1(x))
        return x + self.down(nnx.gelu(self.up(self.ln_2(x)), approximate=True))

    def _attend(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.reshape(batch, length, width))


class GPT2(nnx.Module):
    """Token and position embeddings, pre-norm blocks, and a head tied to the token embedding."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.wpe = nnx.Embed(config.context, config.width, rngs=rngs)
        self.h = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.ln_f = nnx.LayerNorm(config.width, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (batch, length, vocabulary)."""
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


def spec_of(path: tuple[Any, ...], leaf: Any) -> P:
    """How a leaf lies on a mesh ("data", "model"): the wide matrices are split over "model"."""
    names = {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
    if leaf.ndim == 2 and names & {"qkv", "up"}:
        return P(None, "model")
    if leaf.ndim == 2 and names & {"proj", "down"}:
        return P("model", None)
    return P()


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The shardings of a pytree of parameters, or of anything that has their names in it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path, leaf)), tree
    )


def loss_of(graph: Any, params: Any, tokens: jax.Array) -> jax.Array:
    """Mean loss of predicting every token from those before it; `tokens` (batch, length + 1)."""
    logits = nnx.merge(graph, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
