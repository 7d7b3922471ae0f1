"""A step as a universal checkpoint of DeepSpeed, which its engines load at any world size.

With `"checkpoint": {"load_universal": true}` in the configuration, `engine.load_checkpoint(output)`
reads the following; `docs/deepspeed_files.md` says what it leaves out.

    latest_universal                            the name of the directory beside it
    global_stepN/
      zero/NAME/{fp32,exp_avg,...}.pt           a trained parameter, what the optimizer keeps for it
      zero/NAME/step.pt
      zero/optimizer_state.pt                   options of the parameter groups, loss scale
      mp_rank_00_model_states.pt                counters, schedule, client state; stage 3 reads
      zero_pp_rank_0_mp_rank_00_model_states.pt the second of these, other stages the first
      module.pt                                 frozen parameters and buffers, which no stage reads
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asymcheck import tree
from asymcheck.errors import StateMismatchError, StoreError, UnsupportedStateError
from asymcheck.inspection.optional import load_optional
from asymcheck.reader import Checkpoint
from asymcheck_torch.deepspeed_files import OWN_KEYS
from asymcheck_torch.optimizers import RESERVED, key_of
from asymcheck_torch.stored import dict_node, members, numpy_leaves_of, read_arrays, rebuild
from asymcheck_torch.tensors import tensor_of

_VERSION = "0.19.8"
"""Of DeepSpeed, whose layout this is."""
_MASTERS = "fp32"
_EXACT_IN_FLOAT32 = frozenset({"float32", "float16", "bfloat16"})
_SCALERS = "deepspeed.runtime.fp16.loss_scaler"


def to_universal(checkpoint: Checkpoint, output: Path, done: Callable[[int], None]) -> None:
    """Write a step that was saved of a training run with one optimizer, leaf by leaf.

    Raises:
        UnsupportedStateError: the step is none such, or holds what DeepSpeed cannot; names the
            leaf.
        MissingLibraryError: a dynamic loss scale needs DeepSpeed, which is not installed.
        StoreError: the directory cannot be written.
    """
    try:
        run = _Run.of(checkpoint)
    except (KeyError, TypeError, AttributeError) as error:  # entries of these names, but of others
        raise _not_of_a_run() from error
    tag = output / f"global_step{checkpoint.step}"
    try:
        (tag / "zero").mkdir(parents=True)
        (output / "latest_universal").write_text(tag.name)
        _Writer(checkpoint, run, tag, done).write()
    except (OSError, RuntimeError) as error:  # torch wraps errors of the operating system
        raise StoreError(f"cannot write {output}: {error}") from error


# -- what is in the step -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A training run as it was saved: where its leaves are, and what is no leaf.

    Attributes:
        trained: {parameter name: {"fp32" or the optimizer's key: leaf path}}.
        steps: {parameter name: completed updates}, for those of which the optimizer counts them.
        frozen: {name: leaf path} of parameters for which the optimizer keeps nothing.
        buffers: {name: leaf path}.
        groups: the parameter groups, options and names.
        engine: what a DeepSpeed engine has of its own; empty if another kind of run was saved.
        world_size: the number of ranks that saved it.
    """

    trained: dict[str, dict[str, str]]
    steps: dict[str, float]
    frozen: dict[str, str]
    buffers: dict[str, str]
    groups: list[dict[str, Any]]
    engine: dict[str, Any]
    world_size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Run:
        """Look at everything before anything is written; errors as of `to_universal`."""
        top = _members(checkpoint.structure)
        if not {"params", "optimizers", "world_size"} <= top.keys():
            raise _not_of_a_run()
        plain = dict_node({k: top[k] for k in ("optimizers", "engine", "world_size") if k in top})
        values = rebuild(checkpoint, plain, numpy_leaves_of(checkpoint.structure))
        groups = _groups(values["optimizers"])
        trained, steps = _trained(checkpoint, top, groups)
        owned = {paths[_MASTERS] for paths in trained.values() if len(paths) > 1}
        params = _paths(top["params"])
        return cls(
            trained,
            steps,
            {name: path for name, path in params.items() if path not in owned},
            _paths(_buffers(top)),
            groups,
            values.get("engine") or {},
            values["world_size"],
        )


def _not_of_a_run() -> UnsupportedStateError:
    return UnsupportedStateError(
        "the step is not one of a training run",
        hint="It must come from asymcheck_torch.attach() or `asymcheck import --from deepspeed`",
    )


def _members(node: tree.Node) -> dict[Any, tree.Node]:
    try:
        return members(node)
    except StateMismatchError as error:
        raise _not_of_a_run() from error


def _paths(node: tree.Node) -> dict[str, str]:
    """{name: leaf path} of a dictionary of leaves."""
    found = _members(node)
    if any(not isinstance(leaf, dict) or "leaf" not in leaf for leaf in found.values()):
        raise _not_of_a_run()
    return {name: leaf["leaf"] for name, leaf in found.items()}


def _buffers(top: Mapping[str, tree.Node]) -> tree.Node:
    """Those that all ranks share, or rank 0's."""
    if "buffers" in top:
        return top["buffers"]
    return _members(_members(top["ranks"])["0"]).get("buffers", dict_node({}))


def _groups(optimizers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups of the only optimizer."""
    if len(optimizers) != 1 or optimizers[0]["other"] or optimizers[0]["shared"]:
        raise UnsupportedStateError(
            "DeepSpeed has one optimizer, which keeps tensors for parameters and nothing else",
            found=f"{len(optimizers)} optimizers",
        )
    return optimizers[0]["param_groups"]


def _trained(
    checkpoint: Checkpoint, top: Mapping[str, tree.Node], groups: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """Where the trained parameters are, with what the optimizer keeps for them."""
    params = _paths(top["params"])
    trained = {n: {_MASTERS: params[n]} for group in groups for n in group["params"]}
    for kind in top.keys() - RESERVED:
        for name, path in _paths(top[kind]).items():
            trained[name][key_of(kind)[1]] = path
    for name, paths in trained.items():
        _check(checkpoint, name, paths)
    counted = {name: paths.pop("step") for name, paths in trained.items() if "step" in paths}
    values = read_arrays(checkpoint, set(counted.values()))
    steps = {name: float(values[path]) for name, path in counted.items()}
    for group in groups:
        counts = {steps[name] for name in group["params"] if name in steps}
        if len(counts) > 1:
            raise UnsupportedStateError(
                "DeepSpeed counts the updates of a group, not of each parameter",
                found=str(sorted(counts))[:80],
            )
    return trained, steps


def _check(checkpoint: Checkpoint, name: str, paths: Mapping[str, str]) -> None:
    """Refuse names that are no directories, and numbers that DeepSpeed would not hold."""
    if "/" in name or "\0" in name or name in ("", ".", "..") or len(name.encode()) > 255:
        raise UnsupportedStateError("the name cannot be that of a directory", leaf=name)
    shape = checkpoint.leaves[paths[_MASTERS]].shape
    for key, path in paths.items():
        spec, expected = checkpoint.leaves[path], () if key == "step" else shape
        if "/" in key or spec.shape != expected or spec.dtype not in _EXACT_IN_FLOAT32:
            raise UnsupportedStateError(
                "DeepSpeed keeps float32, as many of them as the parameter has elements",
                leaf=path,
                expected=f"float32 of shape {list(expected)}",
                found=f"{spec.dtype} of shape {list(spec.shape)}",
            )


# -- what is written ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Writer:
    checkpoint: Checkpoint
    run: _Run
    directory: Path
    done: Callable[[int], None]

    def write(self) -> None:
        """Write all files."""
        for name, paths in self.run.trained.items():
            self._write_parameter(self.directory / "zero" / name, name, paths)
        torch.save(self._optimizer(), self.directory / "zero" / "optimizer_state.pt")
        for prefix in ("", "zero_pp_rank_0_"):
            path = self.directory / f"{prefix}mp_rank_00_model_states.pt"
            torch.save(self._model_states(), path)
        untrained = self.run.frozen | self.run.buffers
        module = {name: self._tensor(path) for name, path in untrained.items()}
        torch.save(module, self.directory / "module.pt")

    def _write_parameter(self, directory: Path, name: str, paths: Mapping[str, str]) -> None:
        directory.mkdir()
        for key, path in paths.items():
            torch.save({"param": self._tensor(path).float()}, directory / f"{key}.pt")
        if name in self.run.steps:
            torch.save(self._step(name), directory / "step.pt")

    def _tensor(self, path: str) -> torch.Tensor:
        array = np.asarray(self.checkpoint[path][...])
        self.done(array.nbytes)
        return tensor_of(array, path)

    def _step(self, name: str) -> torch.Tensor | int:
        """The count as the optimizer has it: torch's are tensors, DeepSpeed's own are not."""
        group = next(group for group in self.run.groups if name in group["params"])
        step = self.run.steps[name]
        return torch.tensor(step, dtype=torch.float32) if "foreach" in group else int(step)

    def _optimizer(self) -> dict[str, Any]:
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.run.groups]
        found: dict[str, Any] = {"ds_version": _VERSION, "param_groups": options}
        if scaler := self._loss_scaler():
            found |= {"loss_scaler": scaler, "dynamic_loss_scale": True}
        if common := self._of_all_groups(options):
            found["optimizer_state_dict"] = common
        return found

    def _of_all_groups(self, options: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """What stage 3 gives to every group: so only options that all share, or nothing.

        Without it stage 3 refuses to load: where groups differ in the number of updates, or in
        the learning rate, which schedules move on from what it is.
        """
        shared = {k: v for k, v in options[0].items() if all(_same(o.get(k), v) for o in options)}
        if len(set(self.run.steps.values())) != 1 or "lr" not in shared:
            return None
        state = {0: {"step": self._step(next(iter(self.run.steps)))}}
        return {"state": state, "param_groups": [shared | {"params": []}]}

    def _loss_scaler(self) -> Any:
        """A dynamic one of DeepSpeed's; static ones come from the configuration."""
        members = self.run.engine.get("loss_scaler") or {}
        if not members.get("dynamic"):
            return None
        kind = load_optional(_SCALERS, "deepspeed", "for a dynamic loss scale").DynamicLossScaler
        scaler = kind.__new__(kind)
        vars(scaler).update({"dtype": torch.half} | members)
        return scaler

    def _model_states(self) -> dict[str, Any]:
        """What DeepSpeed reads beside parameters; the client state lies among it."""
        engine, client = self.run.engine, self.run.engine.get("client_state") or {}
        if clash := OWN_KEYS & client.keys():
            raise UnsupportedStateError("DeepSpeed has values of this name", found=sorted(clash))
        counters = {"global_steps": self.checkpoint.step, "skipped_steps": 0} | {
            key: engine[key]
            for key in ("global_steps", "global_samples", "skipped_steps")
            if key in engine
        }
        return {
            **client,
            **counters,
            "module": None,
            "optimizer": None,
            "buffer_names": list(self.run.buffers),
            "lr_scheduler": engine.get("lr_scheduler"),
            "dp_world_size": self.run.world_size,
            "mp_world_size": 1,
            "ds_version": _VERSION,
        }


def _same(a: Any, b: Any) -> bool:
    """Whether two options are equal; they may be tensors."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return type(a) is type(b) and a == b
