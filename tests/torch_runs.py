"""Small training runs, and the question whether two of them are the same to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import asymcheck_torch


@dataclass
class Run:
    """A model in training: everything that a loop holds, and one iteration of it."""

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    iterate: Callable[[int], torch.Tensor]
    extras: dict[str, Any] = field(default_factory=dict)

    def train(self, first: int, last: int) -> list[float]:
        """The losses of iterations first .. last - 1."""
        return [float(self.iterate(i).detach()) for i in range(first, last)]

    def attach(self, url: str, **options: Any) -> asymcheck_torch.TrainingCheckpointer:
        return asymcheck_torch.attach(
            self.module, self.optimizers, url=url, extra_state=self.extras or None, **options
        )


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def everything(run: Run) -> dict[str, Any]:
    """All state of a run and of the generators, as copies."""
    return copied(
        {
            "module": dict(run.module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "extras": {
                name: extra.get_state()
                if isinstance(extra, torch.Generator)
                else extra.state_dict()
                for name, extra in run.extras.items()
            },
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(legacy=False),
            "python": random.getstate(),
        }
    )


def copied(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, np.ndarray):
        return state.copy()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states are not bit for bit the same, types and dtypes included."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
        return [] if same else [f"{path}: tensors differ"]
    if isinstance(a, np.ndarray):
        return [] if a.dtype == b.dtype and a.tobytes() == b.tobytes() else [f"{path}: arrays"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a))} and {sorted(map(str, b))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{path}: lengths {len(a)} and {len(b)}"]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r} and {b!r}"]


def raw(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, as bytes."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def assert_resumes(
    build: Callable[[], Run], url: str, *, stop: int = 4, total: int = 7, **options: Any
) -> None:
    """A run that is stopped after `stop` iterations and resumed ends as one that was not.

    The resumed run is built under other seeds, so whatever it does not restore shows.
    """
    seed_all(1)
    reference = build()
    losses = reference.train(0, total)
    expected = everything(reference)

    seed_all(1)
    interrupted = build()
    with interrupted.attach(url, **options) as ckpt:
        before = interrupted.train(0, stop)
        step = ckpt.step
    assert before == losses[:stop], "attaching changed the training"

    seed_all(99)
    resumed = build()
    with resumed.attach(url, **options) as ckpt:
        assert ckpt.restore() == step == ckpt.step
        after = resumed.train(stop, total)
        found = everything(resumed)
    assert after == losses[stop:]
    assert differences(found, expected) == []


def mlp(width: int = 12) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))


def plain_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Forward on fresh random data, backward, update."""
    x = torch.randn(6, 12)
    loss = (module(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def simple(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[], Run]:
    """A builder: an MLP trained by the optimizer that `make` gives for its parameters."""

    def build() -> Run:
        module = mlp()
        optimizer = make(module.parameters())
        return Run(module, [optimizer], lambda _i: plain_step(module, optimizer))

    return build
