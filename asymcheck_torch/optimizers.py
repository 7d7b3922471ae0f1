"""Optimizer state by parameter name, and back.

Each tensor that an optimizer keeps for a parameter goes under a top-level entry named by its key
(`exp_avg`, `momentum_buffer`, `step`), so that it lies beside the parameter it belongs to;
optimizers after the first have the prefix `optim1.`, `optim2.`, ... What is no tensor (LBFGS'
lists, counters) and the options of the groups form the optimizer's record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from asymcheck.errors import UnsupportedStateError
from asymcheck_torch.extras import private
from asymcheck_torch.gradients import GRADIENTS
from asymcheck_torch.modules import named_parameters
from asymcheck_torch.parts import sharded_among
from asymcheck_torch.sharding_types import is_dtensor

Copy = Callable[[torch.Tensor], torch.Tensor]
RESERVED = frozenset(
    {
        "params",
        "buffers",
        "module_extra",
        "optimizers",
        "engine",
        GRADIENTS,
        "ranks",
        "world_size",
        "__numpy_leaves__",
    }
)
_PREFIXED = re.compile(r"optim(\d+)\.(.*)", re.DOTALL)


def kind_of(index: int, key: str) -> str:
    """The top-level entry for a state key of the optimizer with this index."""
    if index == 0 and key not in RESERVED and not _PREFIXED.fullmatch(key):
        return key
    return f"optim{index}.{key}"


def key_of(kind: str) -> tuple[int, str]:
    """(index, key): the inverse of `kind_of`."""
    match = _PREFIXED.fullmatch(kind)
    return (int(match[1]), match[2]) if match else (0, kind)


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse optimizers whose state is more than, or only a part of, what torch's is.

    Raises:
        UnsupportedStateError: `state_dict` is overridden (as in ZeroRedundancyOptimizer).
    """
    if type(optimizer).state_dict is not Optimizer.state_dict:
        raise UnsupportedStateError(
            f"{type(optimizer).__name__} overrides state_dict(): what it keeps is not known",
            hint="Attach the torch.optim optimizer that it wraps",
        )


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a module and of its optimizers.

    Attributes:
        by_name: tied parameters under each of their names; those which only an optimizer has
            (of a loss, say) under `optim{i}/group{g}/{k}`.
        name_of: the first name, by the `id` of the parameter.
    """

    by_name: dict[str, torch.Tensor]
    name_of: dict[int, str]

    @classmethod
    def of(cls, module: torch.nn.Module, optimizers: Sequence[Optimizer]) -> Parameters:
        """As they are now; groups may have been added since the last time.

        Raises:
            UnsupportedStateError: an optimizer of a sharded module trains something else.
        """
        found = cls({}, {})
        for name, parameter in named_parameters(module).items():
            found._add(name, parameter)
        for index, optimizer in enumerate(optimizers):
            for number, group in enumerate(optimizer.param_groups):
                for k, parameter in enumerate(group["params"]):
                    if id(parameter) not in found.name_of:
                        _check_alone(module, index)
                        found._add(f"optim{index}/group{number}/{k}", parameter)
        return found

    def _add(self, name: str, parameter: torch.Tensor) -> None:
        self.by_name[name] = parameter
        self.name_of.setdefault(id(parameter), name)

    def distinct(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter once, under its first name."""
        seen: set[int] = set()
        for name, parameter in self.by_name.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def of_group(self, group: Mapping[str, Any]) -> list[str]:
        """The names of a group's parameters."""
        return [self.name_of[id(parameter)] for parameter in group["params"]]


def _check_alone(module: torch.nn.Module, index: int) -> None:
    """Where ranks hold parts, nothing says which part a parameter without a name would be."""
    if sharded_among(module.modules()) or any(map(is_dtensor, module.parameters())):
        raise UnsupportedStateError(
            f"optimizer {index} trains a parameter that is none of the sharded module's",
            hint="Shard the module before its optimizer is made, of the module's parameters only",
        )


def _entries(optimizer: Optimizer, parameters: Parameters) -> Iterator[tuple[str, dict[Any, Any]]]:
    for group in optimizer.param_groups:
        for name, parameter in zip(parameters.of_group(group), group["params"], strict=True):
            if parameter in optimizer.state:
                yield name, optimizer.state[parameter]


def tensor_state(
    optimizer: Optimizer, index: int, parameters: Parameters
) -> dict[str, dict[str, torch.Tensor]]:
    """{kind: {parameter name: tensor}}, the live tensors."""
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for name, entry in _entries(optimizer, parameters):
        for key, value in entry.items():
            if _is_direct(key, value):
                kinds.setdefault(kind_of(index, key), {})[name] = value
    return kinds


def _is_direct(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor)


_ADAM = frozenset({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"})
"""These keep the same."""


def classes_of(optimizer: Optimizer) -> list[str]:
    """The name of an optimizer's class and of those that it is derived from."""
    return [each.__name__ for each in type(optimizer).__mro__ if each not in (Optimizer, object)]


def keep_the_same(classes: Iterable[str], others: Iterable[str]) -> bool:
    """Whether optimizers of these classes (see `classes_of`) keep the same for a parameter."""
    return not _families(classes).isdisjoint(_families(others))


def _families(classes: Iterable[str]) -> set[str]:
    return {"Adam" if name in _ADAM else name for name in classes}


def is_own(saved: Mapping[str, Any], optimizer: Optimizer) -> bool:
    """Whether a record is one of an optimizer of the same class; False where it does not say."""
    return saved.get("class", [])[:1] == classes_of(optimizer)[:1]


def class_problem(saved: Mapping[str, Any], optimizer: Optimizer) -> str | None:
    """What is wrong where a record's optimizer kept other things; None where it does not say."""
    there, here = saved.get("class"), classes_of(optimizer)
    if there is None or keep_the_same(there, here):
        return None
    return (
        f"the optimizer is {here[0]}, in it {there[0]}, which keeps other state "
        "(restore_weights() takes the weights alone)"
    )


def record(optimizer: Optimizer, parameters: Parameters, copy: Copy) -> dict[str, Any]:
    """Everything else: options of the groups, state that is no tensor, state of no parameter.

    Tensors in the options are copied, since schedulers write them at any time; those nested in
    the state are live: only `step()` changes them.
    """
    groups = [
        {key: private(value, copy) for key, value in group.items() if key != "params"}
        | {"params": parameters.of_group(group)}
        for group in optimizer.param_groups
    ]
    other = {
        name: rest
        for name, entry in _entries(optimizer, parameters)
        if (rest := {key: value for key, value in entry.items() if not _is_direct(key, value)})
    }
    shared = {
        key: value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)
    }
    return {
        "param_groups": groups,
        "other": other,
        "shared": shared,
        "class": classes_of(optimizer),
    }


def place_state(
    key: str, meta: torch.Tensor, group: Mapping[str, Any], parameter: torch.Tensor
) -> torch.Tensor:
    """An uninitialised state tensor of the shape and dtype of `meta`, where torch keeps it.

    As `load_state_dict` does: `step` on the CPU unless the group is capturable or fused, others
    beside the parameter and laid out like it. Unlike it, the dtype stays as it was saved.
    """
    on_device = key != "step" or group.get("capturable") or group.get("fused")
    device = parameter.device if on_device else torch.device("cpu")
    if meta.shape == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=meta.dtype, device=device)
    return torch.empty(meta.shape, dtype=meta.dtype, device=device)
