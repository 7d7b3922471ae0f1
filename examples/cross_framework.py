"""One checkpoint, two frameworks: the same GPT-2 in PyTorch and in Flax, and back.

Trains a small GPT-2 in PyTorch with AsymCheck attached, opens the checkpoint in JAX, runs the
same weights through a Flax implementation and compares the logits; then saves the weights from
JAX through Orbax, opens that in PyTorch, and compares again. The exit code is 0 if all agree.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import gpt2
import gpt2_flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import torch
from flax import nnx

import asymcheck_jax
import asymcheck_torch

CONFIG = gpt2.GPT2Config(width=64, layers=2, heads=4, dropout=0.0)
FLAX = gpt2_flax.GPT2Config(width=64, layers=2, heads=4)
LINEAR = ("qkv", "proj", "up", "down")
TOLERANCE = 1e-4


def train_in_torch(directory: Path) -> gpt2.GPT2:
    torch.manual_seed(0)
    model = gpt2.GPT2(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with asymcheck_torch.attach(model, optimizer, url=directory):
        for _ in range(3):
            tokens = torch.randint(CONFIG.vocabulary, (4, 33))
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def flax_params(named: dict[str, Any]) -> dict[str, Any]:
    """The Flax module's parameters from PyTorch's names: matrices are transposed there."""

    def norm(name: str) -> dict[str, Any]:
        return {"scale": named[f"{name}.weight"], "bias": named[f"{name}.bias"]}

    def linear(name: str) -> dict[str, Any]:
        return {"kernel": named[f"{name}.weight"].T, "bias": named[f"{name}.bias"]}

    blocks = {
        i: {n: norm(f"h.{i}.{n}") for n in ("ln_1", "ln_2")}
        | {n: linear(f"h.{i}.{n}") for n in LINEAR}
        for i in range(CONFIG.layers)
    }
    tables = {n: {"embedding": named[f"{n}.weight"]} for n in ("wte", "wpe")}
    return tables | {"h": blocks, "ln_f": norm("ln_f")}


def torch_params(params: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """PyTorch's names from the Flax module's parameters."""
    named = {f"{n}.weight": params[n]["embedding"] for n in ("wte", "wpe")}
    layers = {"ln_f": params["ln_f"]}
    for i in range(CONFIG.layers):
        block = params["h"][i]
        layers |= {f"h.{i}.{name}": block[name] for name in ("ln_1", "ln_2", *LINEAR)}
    for name, layer in layers.items():
        named[f"{name}.weight"] = layer["kernel"].T if "kernel" in layer else layer["scale"]
        named[f"{name}.bias"] = layer["bias"]
    return named | {"lm_head.weight": named["wte.weight"]}


def flax_logits(params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(gpt2_flax.GPT2(FLAX, nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    return np.asarray(nnx.merge(graph, state)(jnp.asarray(tokens)))


def save_from_jax(params: dict[str, Any], directory: Path) -> Path:
    with ocp.CheckpointManager(
        directory, item_handlers=asymcheck_jax.AsymCheckHandler()
    ) as manager:
        manager.save(0, args=asymcheck_jax.AsymCheckSave({"params": params}))
    return directory / "0" / "default"


def agree(what: str, found: np.ndarray, expected: np.ndarray) -> bool:
    worst = float(np.abs(found - expected).max())
    print(f"{what}: logits differ by {worst:.2e} at most")
    return worst < TOLERANCE


def main(directory: Path) -> int:
    model = train_in_torch(directory / "torch").eval()
    tokens = np.random.default_rng(0).integers(CONFIG.vocabulary, size=(2, 32))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).numpy()

    stored = asymcheck_jax.load(directory / "torch")
    params = flax_params(stored["params"])
    in_jax = agree("torch -> JAX", flax_logits(params, tokens), expected)

    item = save_from_jax(params, directory / "jax")
    again = gpt2.GPT2(CONFIG).eval()
    again.load_state_dict(torch_params(asymcheck_torch.load(item)["params"]))
    with torch.no_grad():
        found = again(torch.from_numpy(tokens)).numpy()
    in_torch = agree("JAX -> torch", found, expected)
    return 0 if in_jax and in_torch else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(scratch)))
