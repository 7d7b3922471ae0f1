"""From a checkpoint back into a training run: compared first, then read in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from asymcheck.errors import StateMismatchError
from asymcheck.reader import Checkpoint, Destination
from asymcheck.state import LeafSpec, ShardSpec
from asymcheck_torch import rng
from asymcheck_torch.extras import map_arrays
from asymcheck_torch.modules import load_module_extra, named_buffers, stateful_names, unwrap
from asymcheck_torch.optimizers import Parameters, key_of, place_state
from asymcheck_torch.state import TrainingState
from asymcheck_torch.stored import Stored
from asymcheck_torch.tensors import byte_view, identity, torch_dtype

_MAX_BOUNCE_NBYTES = 256 << 20
_OF_OPTIMIZER_ONLY = re.compile(r"optim\d+/group\d+/\d+")


@dataclass
class _Plan:
    """Which leaf goes into which tensor, and everything that is wrong with that."""

    checkpoint: Checkpoint
    problems: list[str] = field(default_factory=list[str])
    targets: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def spec(self, path: str) -> LeafSpec:
        primary = self.checkpoint.aliases.get(path, path)
        return self.checkpoint.leaves[primary]

    def names(self, what: str, expected: Iterable[str], found: Iterable[str]) -> None:
        expected, found = list(expected), list(found)
        missing, unexpected = set(expected) - set(found), set(found) - set(expected)
        self.problems += [
            f"{what} {name!r} is missing in it" for name in expected if name in missing
        ]
        self.problems += [f"{what} {name!r} is only in it" for name in found if name in unexpected]

    def tensors(
        self, kind: str, expected: Mapping[str, torch.Tensor], paths: Mapping[str, str]
    ) -> None:
        """Existing tensors, to be filled by the leaves of the same names."""
        self.names(kind, expected, paths)
        for name in expected.keys() & paths.keys():
            self._tensor(f"{kind} {name!r}", expected[name], paths[name])
        self._check_ties(kind, expected, paths)

    def _tensor(self, what: str, tensor: torch.Tensor, path: str) -> None:
        spec = self.spec(path)
        if tuple(tensor.shape) != spec.shape:
            self.problems.append(f"{what} has shape {list(tensor.shape)}, in it {list(spec.shape)}")
        elif tensor.dtype != torch_dtype(spec.dtype, spec.path):
            self.problems.append(f"{what} is {tensor.dtype}, in it {spec.dtype}")
        else:
            self.targets[path] = tensor

    def _check_ties(
        self, kind: str, expected: Mapping[str, torch.Tensor], paths: Mapping[str, str]
    ) -> None:
        """What is one tensor here must be one leaf there, or one would overwrite the other."""
        first: dict[Any, str] = {}
        for name, tensor in expected.items():
            other = first.setdefault(identity(tensor), name)
            if {name, other} <= paths.keys() and self.spec(paths[name]) != self.spec(paths[other]):
                self.problems.append(f"{kind}s {other!r} and {name!r} are tied, in it they are two")

    def raise_problems(self) -> None:
        if self.problems:
            raise StateMismatchError(
                f"the checkpoint does not fit, in {len(self.problems)} place(s); nothing was "
                "changed:\n  " + "\n  ".join(self.problems),
                step=self.checkpoint.step,
            )

    def read(self) -> None:
        """Fill all targets: contiguous CPU memory directly, the rest by way of bounded buffers."""
        direct: list[Destination] = []
        bounced: list[tuple[str, torch.Tensor]] = []
        for path, tensor in self.targets.items():
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                direct.append(_destination(path, tensor))
            else:
                bounced.append((path, tensor.detach()))
        self.checkpoint.read_into(direct)
        for batch in _batches(bounced):
            self._read_bounced(batch)

    def _read_bounced(self, batch: list[tuple[str, torch.Tensor]]) -> None:
        beside = {
            path: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for path, tensor in batch
        }
        self.checkpoint.read_into(_destination(path, tensor) for path, tensor in beside.items())
        for path, tensor in batch:
            tensor.copy_(beside[path])


def _destination(path: str, tensor: torch.Tensor) -> Destination:
    return Destination(path, ShardSpec.whole(tensor.shape), byte_view(tensor))


def _batches(
    items: list[tuple[str, torch.Tensor]],
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    batch: list[tuple[str, torch.Tensor]] = []
    nbytes = 0
    for path, tensor in items:
        if batch and nbytes + tensor.nbytes > _MAX_BOUNCE_NBYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append((path, tensor))
        nbytes += tensor.nbytes
    if batch:
        yield batch


_State = dict[torch.Tensor, dict[Any, Any]]


def restore_into(checkpoint: Checkpoint, training: TrainingState) -> None:
    """Make `training` what it was at the step of `checkpoint`.

    Everything is compared before anything is changed. Without optimizers only the module and the
    extras given are restored, as for an evaluation; else all of the state must fit.

    Raises:
        StateMismatchError: listing every difference; nothing was changed.
        CorruptionError: stored bytes are wrong; the tensors' values are then undefined.
    """
    stored = Stored.open(checkpoint, training.world.rank)
    parameters = training.parameters()
    plan = _Plan(checkpoint)
    _match_module(plan, stored, training, parameters)
    _match_extras(plan, stored, training)
    states = _match_optimizers(plan, stored, training, parameters)
    plan.raise_problems()
    plan.read()
    for index, state in enumerate(states):
        _apply_optimizer(training.optimizers[index], state, stored.optimizers[index])
    load_module_extra(unwrap(training.module), stored.module_extra)
    for extra in training.extras:
        extra.load(stored.own["extra"][extra.name])
    if training.optimizers:
        rng.restore(stored.own["rng"])


def _match_module(
    plan: _Plan, stored: Stored, training: TrainingState, parameters: Parameters
) -> None:
    module = unwrap(training.module)
    paths = stored.kinds["params"]
    if not training.optimizers:
        paths = {n: p for n, p in paths.items() if not _OF_OPTIMIZER_ONLY.fullmatch(n)}
    plan.tensors("parameter", parameters.by_name, paths)
    plan.tensors("buffer", named_buffers(module), stored.kinds.get("buffers", {}))
    plan.names("extra state of module", stateful_names(module), stored.module_extra)


def _match_extras(plan: _Plan, stored: Stored, training: TrainingState) -> None:
    expected = [extra.name for extra in training.extras]
    found = list(stored.own["extra"])
    if not training.optimizers:
        found = [name for name in found if name in expected]
    plan.names("extra state", expected, found)


def _match_optimizers(
    plan: _Plan, stored: Stored, training: TrainingState, parameters: Parameters
) -> list[_State]:
    if not training.optimizers:
        return []
    here, there = len(training.optimizers), len(stored.optimizers)
    if here != there:
        plan.problems.append(f"here are {here} optimizers, in it {there}")
        return []
    return [
        _match_optimizer(plan, stored, index, optimizer, parameters)
        for index, optimizer in enumerate(training.optimizers)
    ]


def _match_optimizer(
    plan: _Plan, stored: Stored, index: int, optimizer: Optimizer, parameters: Parameters
) -> _State:
    """The optimizer's state by parameter, with tensors that are targets still to be filled."""
    saved = stored.optimizers[index]
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    if len(groups) != len(saved_groups):
        plan.problems.append(
            f"optimizer {index} has {len(groups)} parameter groups, in it {len(saved_groups)} "
            "(call add_param_group before restore)"
        )
        return {}
    owners: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {}
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        names = parameters.of_group(group)
        plan.names(f"optimizer {index}, group {number}: parameter", names, saved_group["params"])
        owners |= {
            name: (parameter, saved_group)
            for name, parameter in zip(names, group["params"], strict=True)
        }
    state: _State = {}
    for key, paths in _kinds_of(stored, index):
        for name in paths.keys() & owners.keys():
            parameter, group = owners[name]
            old = optimizer.state.get(parameter, {}).get(key)
            tensor = _place(plan.spec(paths[name]), key, old, group, parameter)
            plan.targets[paths[name]] = state.setdefault(parameter, {})[key] = tensor
    for name in saved["other"].keys() & owners.keys():
        parameter, _ = owners[name]
        entry = map_arrays(saved["other"][name], lambda t, to=parameter.device: t.to(to))
        state.setdefault(parameter, {}).update(entry)
    return state


def _kinds_of(stored: Stored, index: int) -> Iterator[tuple[str, dict[str, str]]]:
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
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for key, value in saved_group.items():
            if key != "params":
                group[key] = _option(group.get(key), value)


def _option(old: Any, new: Any) -> Any:
    """A restored option; a tensor (a capturable learning rate) is kept and filled."""
    tensors = isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)
    if tensors and old.shape == new.shape and old.dtype == new.dtype:
        return old.copy_(new)
    return new
