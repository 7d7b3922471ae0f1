"""Gradients that are captured, so that the rest of an update follows from them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from asymcheck_torch.sharding_types import is_dtensor

GRADIENTS = "gradients"
"""Their top-level entry in a checkpoint."""


class Gradients:
    """Copies of the gradients that parameters were updated with, beside each of them.

    As the optimizer was given them: reduced, unscaled and clipped. They take as much memory as
    the gradients themselves, which is allocated once, and written at every update.
    """

    def __init__(self) -> None:
        self._copies: Any = WeakTensorKeyDictionary()
        self._taken: Any = WeakTensorKeyDictionary()  # in this update
        self._spent_s = 0.0

    def take(self, parameters: Iterable[torch.Tensor]) -> None:
        """Copy those of parameters whose optimizer steps; zeros where there is none."""
        begun_s = time.monotonic()
        with torch.no_grad():
            for parameter in parameters:
                self._take(parameter)
                self._taken[parameter] = True
        self._spent_s += time.monotonic() - begun_s

    def _take(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            self.of(parameter).zero_()
            return
        if is_dtensor(gradient) and is_dtensor(parameter):  # it may be summed only as it is used
            gradient = gradient.redistribute(placements=parameter.placements)
        copy = self._copies.get(parameter)
        if copy is None or _kind(copy) != _kind(gradient):
            copy = self._copies[parameter] = _room_for(gradient)
        copy.copy_(gradient if gradient.layout == torch.strided else gradient.to_dense())

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The copy for a parameter; zeros before its first update."""
        if parameter not in self._copies:
            self._copies[parameter] = _room_for(parameter.detach()).zero_()
        return self._copies[parameter]

    def end_update(self) -> float:
        """All optimizers have stepped; the seconds that copying took (on a device: asking for it).

        What none of them has updated has no gradient: its copy becomes zero.
        """
        for parameter, copy in self._copies.items():
            if parameter not in self._taken:
                copy.zero_()
        self._taken.clear()
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.device


def _room_for(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, layout=torch.strided, memory_format=torch.contiguous_format)


def spoils_gradients(optimizer: Optimizer) -> bool:
    """Whether a step leaves something else in the gradients than it was given.

    Torch's SGD with Nesterov momentum does, if it steps many tensors at once.
    """
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["nesterov"] and not group.get("fused") for group in optimizer.param_groups
    )
