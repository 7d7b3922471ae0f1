"""Master weights and optimizer state in flat tensors, of which every rank holds a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from asymcheck.errors import UnsupportedStateError
from asymcheck.state import ShardSpec, Update
from asymcheck_torch.deepspeed.zero import Masters, frozen_part
from asymcheck_torch.extras import private
from asymcheck_torch.gradients import GRADIENTS, Gradients
from asymcheck_torch.matching import Held, Matching
from asymcheck_torch.modules import named_parameters
from asymcheck_torch.numbers import Number, dtype_of_bare, read_numbers
from asymcheck_torch.optimizers import (
    Copy,
    class_problem,
    classes_of,
    is_own,
    kind_of,
    place_state,
)
from asymcheck_torch.parts import Part
from asymcheck_torch.stored import Stored
from asymcheck_torch.tensors import torch_dtype
from asymcheck_torch.trained import Live, apply_options, hook_gradients, kinds_of
from asymcheck_torch.updates import step_of, update_of


@dataclass(frozen=True, slots=True)
class _Trained:
    """A parameter that is trained: its first name, and the number of the flat tensor it is in."""

    name: str
    parameter: nn.Parameter
    flat: int


class Partitioned:
    """See `asymcheck_torch.trained.Trained`.

    Args:
        module: the module.
        masters: where its master weights are on this rank.
        rank, size: this rank among those that train it.
        gradients: where those of the masters are captured, if they are.
        is_updated: more than the weights counts.
    """

    def __init__(
        self,
        module: nn.Module,
        masters: Masters,
        rank: int,
        size: int,
        *,
        gradients: Gradients | None = None,
        is_updated: bool = True,
    ) -> None:
        self.module = module
        self.is_updated = is_updated
        self._masters = masters
        self._rank, self._size = rank, size
        self._gradients = gradients
        self._trained = list(_named(module, masters))
        self._scalars: dict[tuple[int, str], torch.Tensor] = {}
        self._live: tuple[list[Any], Live] | None = None
        # By the number of the flat tensor: DeepSpeed shows an optimizer one group at a time.
        self._stepped_with: dict[int, dict[str, Any]] = {}

    def weights(self) -> Partitioned:
        """See `Trained`."""
        return Partitioned(self.module, self._masters, self._rank, self._size, is_updated=False)

    def updates(self, step: int) -> dict[str, Update]:
        """See `Trained`."""
        optimizer = self._masters.optimizer
        updates = {
            flat: update_of(optimizer, 0, options, step_of(self._state(flat), step))
            for flat, options in self._stepped_with.items()
        }
        found = ((each.name, updates.get(each.flat)) for each in self._trained)
        return {name: update for name, update in found if update is not None}

    def masters(self) -> dict[str, str]:
        """Parameters are the masters here."""
        return {}

    def engine_state(self) -> None:
        """An engine has its own."""
        return

    # -- to be saved -----------------------------------------------------------------------

    def tensors(self) -> Live:
        """Master weights, and of the optimizer's state what it keeps for every element.

        Numbers that it keeps for a flat tensor (`step`) count for each of its parameters.
        """
        for flat in range(len(self._masters.flats)):
            self._note_numbers(flat)
        memory = self._memory()
        if self._live is None or self._live[0] != memory:
            live: Live = {"params": self._parameters(), **self._moments(), **self._captured()}
            self._live = memory, live
        return self._live[1]

    def _memory(self) -> list[Any]:
        """Equal as long as the same tensors lie in the same memory."""
        return [
            (
                flat.data_ptr(),
                self._captured_at(flat),
                [(key, t.data_ptr()) for key, t in self._tensors_of(number).items()],
            )
            for number, flat in enumerate(self._masters.flats)
        ]

    def _parameters(self) -> dict[str, Held]:
        trained = {id(each.parameter): each for each in self._trained}
        return {
            name: self._part(trained[id(parameter)], "params", self._masters.flats)
            if id(parameter) in trained
            else frozen_part(parameter)
            for name, parameter in named_parameters(self.module).items()
        }

    def _moments(self) -> dict[str, dict[str, Held]]:
        found: dict[str, dict[str, Held]] = {}
        for each in self._trained:
            for key, tensor in self._tensors_of(each.flat).items():
                part = self._part(each, key, {each.flat: tensor}) if tensor.ndim else tensor
                found.setdefault(kind_of(0, key), {})[each.name] = part
        return found

    def _captured_at(self, flat: torch.Tensor) -> int:
        return 0 if self._gradients is None else self._gradients.of(flat).data_ptr()

    def _captured(self) -> dict[str, Mapping[str, Held]]:
        if self._gradients is None:
            return {}
        copies = [self._gradients.of(flat) for flat in self._masters.flats]
        parts = {each.name: self._part(each, GRADIENTS, copies) for each in self._trained}
        return {GRADIENTS: parts}

    def _part(self, each: _Trained, kind: str, flats: Any) -> Part:
        """What this rank holds of a parameter, in flat tensors laid out as the masters are."""
        parameter = each.parameter
        shape = _shape(parameter)
        place = self._masters.places.get(id(parameter))
        flat: torch.Tensor = flats[each.flat].detach().reshape(-1)
        start, tensor = 0, flat[:0]
        if place is not None:
            start, tensor = place.start, flat[place.offset : place.offset + place.count]
        alone = not self._masters.is_shared and 0 not in shape
        replica = (0, 1) if alone else (self._rank, self._size)
        return Part(tensor, shape, ShardSpec.whole(shape), start, *replica, (id(parameter), kind))

    def _state(self, flat: int) -> dict[str, Any]:
        state: Mapping[torch.Tensor, dict[str, Any]] = self._masters.optimizer.state
        return state.get(self._masters.flats[flat], {})

    def _note_numbers(self, flat: int) -> None:
        """Numbers that are no tensors become ones, each always the same."""
        for key, value in self._state(flat).items():
            if isinstance(value, int | float):
                number = self._scalars.get((flat, key))
                dtype = dtype_of_bare(key, value)
                if number is None or number.dtype != dtype:
                    number = self._scalars[flat, key] = torch.zeros((), dtype=dtype)
                number.fill_(value)

    def _tensors_of(self, flat: int) -> dict[str, torch.Tensor]:
        """The optimizer's state of a flat tensor: tensors like it, and numbers as 0-d ones."""
        found: dict[str, torch.Tensor] = {}
        shape = self._masters.flats[flat].shape
        for key, value in self._state(flat).items():
            tensor = self._scalars[flat, key] if isinstance(value, int | float) else value
            if isinstance(tensor, torch.Tensor) and tensor.shape in (shape, ()):
                found[key] = tensor
            elif tensor is not None:
                raise UnsupportedStateError(
                    "the optimizer keeps something that belongs to no parameter",
                    leaf=key,
                    expected=f"numbers, and tensors of shape {list(shape)}",
                    found=str(getattr(tensor, "shape", type(tensor).__name__)),
                )
        return found

    def records(self, copy: Copy) -> list[dict[str, Any]]:
        """Options of the parameter groups, and the names of the parameters in them."""
        groups = [
            {key: private(value, copy) for key, value in group.items() if _is_option(key)}
            | {"params": self._names_of(number)}
            for number, group in enumerate(self._masters.optimizer.param_groups)
        ]
        optimizer = self._masters.optimizer
        bare = {
            key
            for flat in range(len(self._masters.flats))
            for key, value in self._state(flat).items()
            if isinstance(value, int | float)
        }
        return [
            {
                "param_groups": groups,
                "other": {},
                "shared": {},
                "class": classes_of(optimizer),
                "bare": sorted(bare),
            }
        ]

    def _names_of(self, group: int) -> list[str]:
        return [each.name for each in self._trained if self._masters.groups[each.flat] == group]

    # -- to be restored --------------------------------------------------------------------

    def match(self, matching: Matching, stored: Stored) -> Callable[[], None]:
        """Everything must fit: parameters, groups, and the state of every trained parameter."""
        matching.tensors("parameter", self._parameters(), stored.kinds["params"])
        if not self.is_updated:
            return lambda: None
        if len(stored.optimizers) != 1:
            matching.problems.append(f"here is 1 optimizer, in it {len(stored.optimizers)}")
            return lambda: None
        record = stored.optimizers[0]
        self._match_groups(matching, record["param_groups"])
        problem = class_problem(record, self._masters.optimizer)
        if problem is not None:
            matching.problems.append(problem)
        states: dict[int, dict[str, Any]] = {}
        for key, paths in kinds_of(stored, 0):
            matching.names(key, [each.name for each in self._trained], paths)
            if not matching.problems:
                self._match_kind(matching, key, paths, states, record)
        self._match_other(matching, record, states)

        def apply() -> None:
            self._apply(states)
            apply_options(self._masters.optimizer, record["param_groups"])

        return apply

    def refresh(self) -> None:
        """Round the master weights to the model's, and give each rank those of the others."""
        self._masters.refresh()

    def _match_groups(self, matching: Matching, saved: list[dict[str, Any]]) -> None:
        groups = self._masters.optimizer.param_groups
        if len(groups) != len(saved):
            matching.problems.append(f"here are {len(groups)} parameter groups, in it {len(saved)}")
            return
        trained = {each.name for each in self._trained}
        frozen = named_parameters(self.module).keys() - trained
        for number, group in enumerate(saved):
            found = [name for name in group["params"] if name not in frozen]
            matching.names(f"group {number}: parameter", self._names_of(number), found)

    def _match_kind(
        self,
        matching: Matching,
        key: str,
        paths: Mapping[str, str],
        states: dict[int, dict[str, Any]],
        record: Mapping[str, Any],
    ) -> None:
        specs = {each.name: matching.spec(paths[each.name]) for each in self._trained}
        if key == "step" or all(spec.shape == () for spec in specs.values()):
            is_bare, own = key in record.get("bare", ()), is_own(record, self._masters.optimizer)
            numbers = read_numbers(matching, paths, is_bare=is_bare, is_own=own)
            self._match_numbers(matching, key, numbers, states)
            return
        for each in self._trained:
            dtype = torch_dtype(specs[each.name].dtype, specs[each.name].path)
            tensors = states.setdefault(each.flat, {})
            if key not in tensors:
                tensors[key] = self._place(each.flat, key, dtype)
            part = self._part(each, key, {each.flat: tensors[key]})
            matching.tensor(f"{key} {each.name!r}", part, paths[each.name])

    def _place(self, flat: int, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The optimizer's own tensor where there is one, else a fresh one, its padding zero."""
        old = self._state(flat).get(key)
        if isinstance(old, torch.Tensor):
            return old
        return torch.zeros_like(self._masters.flats[flat].detach(), dtype=dtype)

    def _match_other(
        self,
        matching: Matching,
        record: Mapping[str, Any],
        states: dict[int, dict[str, Any]],
    ) -> None:
        """What is no tensor in it: a bare number is one here, too; nothing else can be."""
        own = is_own(record, self._masters.optimizer)
        numbers: dict[str, dict[str, Number]] = {}
        for name, entry in record["other"].items():
            for key, value in entry.items():
                if isinstance(value, int | float):
                    numbers.setdefault(key, {})[name] = Number(value, None, own)
                elif value is not None:
                    kind = type(value).__name__
                    matching.problems.append(f"{key} of {name!r} is a {kind} in it")
        for key, values in numbers.items():
            matching.names(key, [each.name for each in self._trained], values)
            if not matching.problems:
                self._match_numbers(matching, key, values, states)

    def _match_numbers(
        self,
        matching: Matching,
        key: str,
        numbers: Mapping[str, Number],
        states: dict[int, dict[str, Any]],
    ) -> None:
        """One number for a flat tensor, so those of its parameters must be equal."""
        for each in self._trained:
            number = numbers[each.name]
            first = states.setdefault(each.flat, {}).setdefault(key, number)
            if first != number:
                matching.problems.append(
                    f"{key} of {each.name!r} is {number.value} in it, of others of its group "
                    f"{first.value}; DeepSpeed keeps one for all"
                )

    def _apply(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        optimizer = self._masters.optimizer
        for number, flat in enumerate(self._masters.flats):
            state: dict[str, Any] = optimizer.state[flat]
            found = states.get(number, {})
            for key in state.keys() - found.keys():
                del state[key]
            group = optimizer.param_groups[self._masters.groups[number]]
            for key, value in found.items():
                if isinstance(value, Number):
                    place = partial(_scalar, key, group, flat)
                    value = value.kept_by(optimizer, state.get(key), place)
                state[key] = value

    def hook_updates(
        self, before: Callable[[], None], after: Callable[[], None]
    ) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """The optimizer steps the flat tensors one after the other, or all at once."""
        numbers = {id(flat): number for number, flat in enumerate(self._masters.flats)}
        last = len(numbers) - 1

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            stepped = {numbers[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
            if 0 in stepped:
                self._stepped_with.clear()
            self._stepped_with.update({flat: dict(group) for flat, group in stepped.items()})
            if last in stepped:
                after()

        yield self._masters.optimizer.register_step_pre_hook(lambda *_: before())
        if self._gradients is not None:
            yield from hook_gradients(self._masters.optimizer, self._gradients)
        yield self._masters.optimizer.register_step_post_hook(after_step)


def _named(module: nn.Module, masters: Masters) -> Iterator[_Trained]:
    names = {id(p): name for name, p in reversed(named_parameters(module).items())}
    for flat, parameters in enumerate(masters.parameters):
        for parameter in parameters:
            if id(parameter) not in names:
                raise UnsupportedStateError(
                    "the engine's optimizer trains a parameter that is none of its module's",
                    found=f"a parameter of shape {list(_shape(parameter))}",
                    hint="Make it a parameter of the module that deepspeed.initialize is given",
                )
            yield _Trained(names[id(parameter)], parameter, flat)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _scalar(
    key: str, group: Mapping[str, Any], flat: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return place_state(key, torch.empty((), dtype=dtype, device="meta"), group, flat)


def _is_option(key: str) -> bool:
    return key != "params" and not key.startswith("_ds_")
