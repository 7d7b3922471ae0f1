"""Numbers that optimizers keep for a parameter: bare ones, or tensors without dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from asymcheck_torch.matching import Matching
from asymcheck_torch.stored import read_arrays
from asymcheck_torch.tensors import torch_dtype


def dtype_of_bare(key: str, value: bool | int | float) -> torch.dtype:
    """In which a bare number is stored: exactly, but for steps: as torch keeps, and reads, them."""
    if isinstance(value, bool):
        return torch.bool
    if isinstance(value, int):
        return torch.float32 if key == "step" else torch.int64
    return torch.float64


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was kept.

    Attributes:
        value: the number.
        dtype: of the tensor that it was; None for a bare one.
        is_own: it was kept by an optimizer of the same class as the one here.
    """

    value: bool | int | float
    dtype: torch.dtype | None
    is_own: bool

    def kept_by(
        self, optimizer: Optimizer, old: Any, place: Callable[[torch.dtype], torch.Tensor]
    ) -> Any:
        """The number as the optimizer here keeps it: in the form in which one of its class did,
        else in that of the `old` number, else torch's as tensors and others' bare.

        Args:
            optimizer: the one here.
            old: what it keeps now, if anything. A tensor is filled where it fits.
            place: gives a fresh tensor of a dtype where the optimizer wants it.
        """
        if isinstance(old, torch.Tensor) and (not self.is_own or self.dtype == old.dtype):
            return old.fill_(self.value)
        if self.is_own:
            return self.value if self.dtype is None else place(self.dtype).fill_(self.value)
        if old is None and is_torch(optimizer):
            return place(torch.float32).fill_(self.value)
        is_whole = float(self.value).is_integer() and not isinstance(old, float)
        return int(self.value) if is_whole else self.value


def is_torch(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of torch's, or derived from one."""
    modules = [each.__module__ for each in type(optimizer).__mro__ if each is not Optimizer]
    return any(module.startswith("torch.") for module in modules)


def read_numbers(
    matching: Matching, paths: Mapping[str, str], *, is_bare: bool, is_own: bool
) -> dict[str, Number]:
    """The numbers in leaves, by the names of the parameters; `is_bare`: they were no tensors."""
    specs = {name: matching.spec(path) for name, path in paths.items()}
    leaves = dict.fromkeys(spec.path for spec in specs.values())
    arrays = read_arrays(matching.checkpoint, leaves)
    values = {path: np.asarray(array).item() for path, array in arrays.items()}
    return {
        name: Number(_bare(values[spec.path], spec.dtype), None, is_own)
        if is_bare
        else Number(values[spec.path], torch_dtype(spec.dtype, spec.path), is_own)
        for name, spec in specs.items()
    }


def _bare(value: bool | int | float, dtype: str) -> bool | int | float:
    """See `dtype_of_bare`."""
    return int(value) if dtype == "float32" else value
