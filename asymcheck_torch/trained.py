"""What a loop trains: where its tensors are, how they come back, and when they are updated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from asymcheck.state import LeafSpec, Update
from asymcheck_torch.extras import map_arrays
from asymcheck_torch.gradients import GRADIENTS, Gradients, spoils_gradients
from asymcheck_torch.matching import Held, Matching
from asymcheck_torch.numbers import is_torch, read_numbers
from asymcheck_torch.optimizers import (
    Copy,
    Parameters,
    class_problem,
    is_own,
    key_of,
    place_state,
    record,
    tensor_state,
)
from asymcheck_torch.parts import drop_gradients
from asymcheck_torch.stored import Stored
from asymcheck_torch.tensors import torch_dtype
from asymcheck_torch.updates import step_of, update_of

Live = Mapping[str, Mapping[str, Held]]
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_OF_OPTIMIZER_ONLY = re.compile(r"optim\d+/group\d+/\d+")


class Trained(Protocol):
    """A module and whatever updates it, as `TrainingState` lays it out."""

    @property
    def module(self) -> nn.Module:
        """The module, without wrappers."""
        ...

    @property
    def is_updated(self) -> bool:
        """Whether there is anything that updates it; else it is only restored."""
        ...

    def weights(self) -> Trained:
        """The same module, of which only the weights are to be restored."""
        ...

    def tensors(self) -> Live:
        """{kind: {name: tensor}} of `params`, the optimizers' tensors and captured gradients.

        They are the live ones (of gradients copies), and change only in updates.
        """
        ...

    def records(self, copy: Copy) -> list[dict[str, Any]]:
        """What else each optimizer keeps, as `optimizers.record` describes it."""
        ...

    def updates(self, step: int) -> dict[str, Update]:
        """{parameter name: the update that it has just had}, where it is known.

        Called right after update number `step`, with the options that it was made with.
        """
        ...

    def masters(self) -> dict[str, str]:
        """{parameter: the one in full precision that it is a rounded copy of}, by their names."""
        ...

    def engine_state(self) -> dict[str, Any] | None:
        """Counters, loss scale and schedule of an engine; None without one."""
        ...

    def match(self, matching: Matching, stored: Stored) -> Callable[[], None]:
        """Compare all of that with a checkpoint and name what to read into it.

        Returns what to do when everything fitted and was read on all ranks. Neither waits for
        another rank: that is for `refresh`.
        """
        ...

    def refresh(self) -> None:
        """Derive from what was restored what else the ranks compute with, all of them together."""
        ...

    def hook_updates(
        self, before: Callable[[], None], after: Callable[[], None]
    ) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Have `before` called when an update is about to begin, and `after` when it is done."""
        ...


@dataclass(frozen=True, slots=True)
class ModuleAndOptimizers:
    """A module and optimizers of torch's, in one process or under DDP or FSDP2."""

    module: nn.Module
    optimizers: Sequence[Optimizer]
    gradients: Gradients | None = None

    @property
    def is_updated(self) -> bool:
        """Whether there is an optimizer."""
        return bool(self.optimizers)

    def weights(self) -> ModuleAndOptimizers:
        """See `Trained`."""
        return ModuleAndOptimizers(self.module, ())

    def _parameters(self) -> Parameters:
        return Parameters.of(self.module, self.optimizers)

    def tensors(self) -> Live:
        """See `Trained`."""
        parameters = self._parameters()
        found: dict[str, Mapping[str, torch.Tensor]] = {"params": parameters.by_name}
        for index, optimizer in enumerate(self.optimizers):
            found |= tensor_state(optimizer, index, parameters)
        if self.gradients is not None:
            trained = _parameters_of(self.optimizers)
            names = parameters.name_of
            found[GRADIENTS] = {names[id(p)]: self.gradients.of(p) for p in trained}
        return found

    def records(self, copy: Copy) -> list[dict[str, Any]]:
        """See `Trained`."""
        parameters = self._parameters()
        return [record(optimizer, parameters, copy) for optimizer in self.optimizers]

    def updates(self, step: int) -> dict[str, Update]:
        """See `Trained`."""
        parameters = self._parameters()
        found: dict[str, Update] = {}
        for index, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                found |= _updates(optimizer, index, group, parameters, step)
        return found

    def masters(self) -> dict[str, str]:
        """Parameters that only optimizers have, if they match those of the module one by one.

        A pair that is none costs bytes and nothing else: copies are checked bit for bit.
        """
        copies: dict[str, torch.Tensor] = {}
        masters: dict[str, torch.Tensor] = {}
        trained = {id(parameter) for parameter in _parameters_of(self.optimizers)}
        for name, parameter in self._parameters().distinct():
            if _OF_OPTIMIZER_ONLY.fullmatch(name) and parameter.dtype == torch.float32:
                masters[name] = parameter
            elif id(parameter) not in trained and parameter.dtype in _LOW_PRECISION:
                copies[name] = parameter
        shapes = [[p.shape for p in each.values()] for each in (copies, masters)]
        return dict(zip(copies, masters, strict=True)) if shapes[0] == shapes[1] else {}

    def engine_state(self) -> dict[str, Any] | None:
        """There is no engine."""
        return None

    def match(self, matching: Matching, stored: Stored) -> Callable[[], None]:
        """Without optimizers only the module's parameters count, else everything must fit."""
        parameters = self._parameters()
        paths = stored.kinds["params"]
        if not self.optimizers:
            paths = {n: p for n, p in paths.items() if not _OF_OPTIMIZER_ONLY.fullmatch(n)}
        matching.tensors("parameter", parameters.by_name, paths)
        states = _match_optimizers(matching, stored, self.optimizers, parameters)

        def apply() -> None:
            drop_gradients(self.module, parameters.by_name.values())
            for index, state in enumerate(states):
                _apply_optimizer(self.optimizers[index], state, stored.optimizers[index])

        return apply

    def refresh(self) -> None:
        """Nothing is derived."""

    def hook_updates(
        self, before: Callable[[], None], after: Callable[[], None]
    ) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """An update is done when the last optimizer has stepped."""
        last = self.optimizers[-1]
        for optimizer in self.optimizers:
            yield optimizer.register_step_pre_hook(lambda *_: before())
            if self.gradients is not None:
                yield from hook_gradients(optimizer, self.gradients)
        yield last.register_step_post_hook(lambda *_: after())


def hook_gradients(
    optimizer: Optimizer, gradients: Gradients
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Take them after the step: a closure makes them in it, and fused optimizers unscale them."""

    def takes_before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        has_closure = any(callable(each) for each in (*args[1:], *kwargs.values()))
        return spoils_gradients(optimizer) and not has_closure

    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if takes_before(args, kwargs):
            gradients.take(_parameters_of([optimizer]))

    def after(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not takes_before(args, kwargs):
            gradients.take(_parameters_of([optimizer]))

    yield optimizer.register_step_pre_hook(before)
    yield optimizer.register_step_post_hook(after)


def _parameters_of(optimizers: Iterable[Optimizer]) -> Iterator[torch.Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def _updates(
    optimizer: Optimizer,
    index: int,
    group: dict[str, Any],
    parameters: Parameters,
    step: int,
) -> dict[str, Update]:
    """Those of one group: one object for all parameters that have had as many updates."""
    by_step: dict[float, Update | None] = {}
    found: dict[str, Update] = {}
    for name, parameter in zip(parameters.of_group(group), group["params"], strict=True):
        number = step_of(optimizer.state.get(parameter, {}), step)
        if number not in by_step:
            by_step[number] = update_of(optimizer, index, group, number)
        if (update := by_step[number]) is not None:
            found[name] = update
    return found


_State = dict[torch.Tensor, dict[Any, Any]]


def _match_optimizers(
    matching: Matching,
    stored: Stored,
    optimizers: Sequence[Optimizer],
    parameters: Parameters,
) -> list[_State]:
    if not optimizers:
        return []
    here, there = len(optimizers), len(stored.optimizers)
    if here != there:
        matching.problems.append(f"here are {here} optimizers, in it {there}")
        return []
    return [
        _match_optimizer(matching, stored, index, optimizer, parameters)
        for index, optimizer in enumerate(optimizers)
    ]


def _match_optimizer(
    matching: Matching, stored: Stored, index: int, optimizer: Optimizer, parameters: Parameters
) -> _State:
    """The optimizer's state by parameter, with tensors that are targets still to be filled."""
    saved = stored.optimizers[index]
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    if len(groups) != len(saved_groups):
        matching.problems.append(
            f"optimizer {index} has {len(groups)} parameter groups, in it {len(saved_groups)} "
            "(call add_param_group before restore)"
        )
        return {}
    problem = class_problem(saved, optimizer)
    if problem is not None:
        matching.problems.append(problem)
        return {}
    owners: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {}
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        names = parameters.of_group(group)
        frozen = {n for n, p in zip(names, group["params"], strict=True) if not p.requires_grad}
        matching.names(  # engines leave frozen ones out
            f"optimizer {index}, group {number}: parameter",
            [name for name in names if name not in frozen],
            [name for name in saved_group["params"] if name not in frozen],
        )
        owners |= {
            name: (parameter, saved_group)
            for name, parameter in zip(names, group["params"], strict=True)
        }
    state: _State = {}
    bare = _bare_numbers(matching, stored, index, optimizer)
    for key, paths in kinds_of(stored, index):
        if key in bare:
            for name in paths.keys() & owners.keys():
                parameter, _ = owners[name]
                state.setdefault(parameter, {})[key] = bare[key][name]
            continue
        for name in paths.keys() & owners.keys():
            parameter, group = owners[name]
            old = optimizer.state.get(parameter, {}).get(key)
            tensor = _place(matching.spec(paths[name]), key, old, group, parameter)
            matching.targets[paths[name]] = state.setdefault(parameter, {})[key] = tensor
    for name in saved["other"].keys() & owners.keys():
        parameter, _ = owners[name]
        entry = map_arrays(saved["other"][name], lambda t, to=parameter.device: t.to(to))
        state.setdefault(parameter, {}).update(entry)
    return state


def _bare_numbers(
    matching: Matching, stored: Stored, index: int, optimizer: Optimizer
) -> dict[str, dict[str, Any]]:
    """{key: {parameter name: number}} of what an engine stored as tensors, and which is none here.

    Torch's optimizers want tensors of what others count in bare numbers.
    """
    saved = stored.optimizers[index]
    own = is_own(saved, optimizer)
    return {
        key: {name: number.value for name, number in numbers.items()}
        for key, paths in kinds_of(stored, index)
        if key in saved.get("bare", ()) and (own or not is_torch(optimizer))
        for numbers in [read_numbers(matching, paths, is_bare=True, is_own=own)]
    }


def kinds_of(stored: Stored, index: int) -> Iterator[tuple[str, dict[str, str]]]:
    """(key, {parameter name: leaf path}) of what an optimizer keeps for parameters."""
    for kind, paths in stored.kinds.items():
        of, key = key_of(kind)
        if kind not in ("params", "buffers") and of == index:
            yield key, paths


def _place(
    spec: LeafSpec, key: str, old: Any, group: Mapping[str, Any], parameter: torch.Tensor
) -> torch.Tensor:
    """The optimizer's own tensor where it fits, else a fresh one where torch would keep it."""
    dtype = torch_dtype(spec.dtype, spec.path)
    if isinstance(old, torch.Tensor) and old.dtype == dtype and tuple(old.shape) == spec.shape:
        return old
    meta = torch.empty(spec.shape, dtype=dtype, device="meta")
    return place_state(key, meta, group, parameter)


def _apply_optimizer(optimizer: Optimizer, state: _State, saved: dict[str, Any]) -> None:
    optimizer.state.clear()
    optimizer.state.update(state)
    optimizer.state.update(saved["shared"])
    apply_options(optimizer, saved["param_groups"])


def apply_options(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Give the parameter groups their options back."""
    for group, saved_group in zip(optimizer.param_groups, saved, strict=True):
        for key, value in saved_group.items():
            if key != "params":
                group[key] = _option(group.get(key), value)


def _option(old: Any, new: Any) -> Any:
    """A restored option; a tensor (a capturable learning rate) is kept and filled."""
    tensors = isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)
    if tensors and old.shape == new.shape and old.dtype == new.dtype:
        return old.copy_(new)
    return new
