"""What `engine.save_checkpoint` of DeepSpeed wrote, as a state of ours. No pickle runs code.

Every file is one of `torch.save`: model states (of rank 0, in stage 3 of every rank) and, with
ZeRO, the optimizer states of every rank. `docs/deepspeed_files.md` says what is read and lost.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asymcheck import tree
from asymcheck.errors import AsymCheckError, SourceError
from asymcheck.state import memory_of
from asymcheck_torch.deepspeed_archive import Archive, Tensor
from asymcheck_torch.deepspeed_partitions import Optimized, Partition, Shapes, join_partitions
from asymcheck_torch.inert_pickle import Names, Record, glimpse

OWN_KEYS = frozenset(
    {
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
        *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd"),
        *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size"),
        *("checkpoint_parallel_dimensions", "ds_config", "ds_version"),
        *("universal_checkpoint_info", "num_experts", "ds_autoep_layers"),
    }
)
"""What DeepSpeed itself puts among the model states; all else is the client's."""
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_NAMES: Names = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Record,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Record,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Record,
    "deepspeed.utils.tensor_fragment.fragment_address": Record,
}
_FILE = re.compile(
    r"(?:(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<model>\d+)"
    r"_(?P<kind>model|optim)_states\.pt"
)
_SCALARS = (bool, int, float, str)
_ELSEWHERE = {"zero": "a universal checkpoint", "offloaded_tensors": "state on NVMe"}
_MAX_VALUES = 1_000_000
_EXTRA_STATE = "_extra_state"


def from_deepspeed(path: Path) -> Any:
    """The state in a checkpoint of a DeepSpeed engine, of ZeRO stage 0 to 3 and any world size.

    Args:
        path: the directory that was given to `save_checkpoint` (its file `latest` says which
            checkpoint is meant), or that of one checkpoint.

    Raises:
        SourceError: it is not one, is damaged, refers to other objects than DeepSpeed's and
            torch's own, or was written with a kind of parallelism that is not known.
        UnsupportedStateError: a tensor has a dtype that the format does not have.
    """
    try:
        return _state(_Files.find(path))
    except (AsymCheckError, MemoryError):
        raise
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # values of other types than DeepSpeed's can make anything fail
        raise SourceError(f"{path} is malformed", found=glimpse(error)) from error


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint, by rank.

    Attributes:
        model: model states, of rank 0 alone or of all.
        optimizer: optimizer states.
        of_all: whether there should be model states of all ranks, as in stage 3.
    """

    model: list[Path]
    optimizer: list[Path]
    of_all: bool

    @classmethod
    def find(cls, path: Path) -> _Files:
        directory = _directory(path)
        for name, what in _ELSEWHERE.items():
            if (directory / name).exists():
                raise SourceError(f"{what} is not known", object=str(directory / name))
        found: dict[tuple[str, int], Path] = {}
        for file in sorted(directory.iterdir()):
            match = _FILE.fullmatch(file.name)
            if match is None:
                continue
            if int(match["model"]) != 0:
                raise SourceError("model parallelism is not known", object=str(file))
            key = match["kind"], int(match["rank"] or 0)
            if key in found:
                raise SourceError("two files are the same rank's", object=str(file))
            found[key] = file
        model = _in_order(found, "model")
        of_all = any(file.name.startswith("zero_pp_rank_") for file in model)
        return cls(model, _in_order(found, "optim"), of_all)


def _directory(path: Path) -> Path:
    """That of the checkpoint itself."""
    latest = path / "latest"
    if not latest.is_file():
        return path
    with latest.open("rb") as file:
        tag = file.read(4096).decode().strip()
    if tag in ("", ".", "..") or "/" in tag or "\\" in tag or "\0" in tag:
        raise SourceError("the file names no directory beside it", object=str(latest), found=tag)
    return path / tag


def _in_order(found: Mapping[tuple[str, int], Path], kind: str) -> list[Path]:
    ranks = sorted(rank for k, rank in found if k == kind)
    if ranks != list(range(len(ranks))):
        raise SourceError(f"files of ranks are missing ({kind} states)", found=f"ranks {ranks}")
    return [found[kind, rank] for rank in ranks]


def _state(files: _Files) -> dict[str, Any]:
    if not files.model:
        raise SourceError("there are no model states of DeepSpeed", expected="*_model_states.pt")
    models = [Archive(path, _NAMES) for path in files.model]
    own = models[0].state
    _refuse_unknown(files, models)
    shapes: list[Shapes] = own["param_shapes"] or []
    archives = [Archive(path, _NAMES) for path in files.optimizer]
    partitions = [
        Partition.of(archive, shapes, rank, len(archives)) for rank, archive in enumerate(archives)
    ]
    if partitions:
        optimized = join_partitions(partitions, shapes)
        groups = _groups(partitions[0], shapes)
        scaler = partitions[0].loss_scaler
    else:
        optimized, groups, scaler = _unpartitioned(models[0])
    record = {"param_groups": groups, "other": optimized.other, "shared": {}}
    return {
        "params": _params(models, optimized),
        **optimized.kinds,
        "optimizers": [record] if groups else [],
        "module_extra": _module_extra(models[0]),
        "engine": _engine(models[0], scaler),
        "world_size": own["dp_world_size"],
        **_by_rank(models),
    }


def _refuse_unknown(files: _Files, models: Sequence[Archive]) -> None:
    own, ranks = models[0].state, models[0].state["dp_world_size"]
    if own["mp_world_size"] != 1 or "num_experts" in own or own["module"] is None:
        raise SourceError("model, pipeline and expert parallelism are not known")
    if len(models) != (ranks if files.of_all else 1) or len(files.optimizer) not in (0, ranks):
        raise SourceError(
            "there are files of another number of ranks",
            expected=ranks,
            found=f"{len(models)} model states, {len(files.optimizer)} optimizer states",
            hint="Remove those of an earlier checkpoint of the same name",
        )
    for model in models:
        if any(model.state[key] != own[key] for key in ("global_steps", "param_shapes")):
            raise SourceError("the files are not of one checkpoint", object=str(model.path))


# -- parameters --------------------------------------------------------------------------------


def _params(models: Sequence[Archive], optimized: Optimized) -> dict[str, NDArray[Any]]:
    """All parameters in the order of the module; tied ones are one array."""
    own = models[0].state
    ties = _ties(models[0])
    apart = {*own["buffer_names"], *(name for name in own["module"] if _is_extra(name))}
    params: dict[str, NDArray[Any]] = {}
    for name in own["module"]:
        if name in apart:
            continue
        owner = str(ties.get(name, name))
        if owner in optimized.params:
            params[name] = optimized.params[owner]
        else:
            params[name] = _frozen(models, owner)
    if missing := optimized.params.keys() - params.keys():
        raise SourceError("the module lacks parameters", found=str(sorted(missing)[:8]))
    return params


def _frozen(models: Sequence[Archive], name: str) -> NDArray[Any]:
    """A parameter that is not trained: where stage 3 cuts it, it is in every rank's file."""
    own = models[0].state
    shape = (own["frozen_param_shapes"] or {}).get(name)
    whole = own["module"][name]
    if shape is None or tuple(whole.shape) == tuple(shape):
        return models[0].array(whole)
    pieces = [model.view(model.state["frozen_param_fragments"][name]) for model in models]
    elements = np.concatenate(pieces)[: math.prod(shape)]
    return elements.reshape(shape)


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE


def _ties(model: Archive) -> dict[str, str]:
    """{name: the name under which the parameter is kept}; stage 0 does not note them."""
    if model.state["shared_params"] is not None:
        return model.state["shared_params"]
    first: dict[Tensor, str] = {}
    for name, tensor in model.state["module"].items():
        if isinstance(tensor, Tensor):
            first.setdefault(tensor, name)
    return {n: first[t] for n, t in model.state["module"].items() if isinstance(t, Tensor)}


def _unpartitioned(model: Archive) -> tuple[Optimized, list[dict[str, Any]], Any]:
    """Parameters and groups of stage 0, where the optimizer's state is that of torch."""
    saved = model.state["optimizer"]
    found = Optimized()
    if saved is None:
        return found, [], None
    base = saved.get("optimizer_state_dict", saved)
    groups = base["param_groups"]
    is_named = all(len(g.get("param_names", ())) == len(g["params"]) for g in groups)
    if "fp32_groups_flat" in saved or not is_named:
        raise SourceError(
            "the optimizer state of stage 0 does not say which parameters it belongs to",
            object=str(model.path),
            hint="Save with stage 1, or make the optimizer of module.named_parameters()",
        )
    for number, group in enumerate(groups):
        for k, (index, name) in enumerate(zip(group["params"], group["param_names"], strict=True)):
            master = saved["fp32_groups"][number][k] if base is not saved else None
            found.params[name] = model.array(master or model.state["module"][name])
            for key, value in base["state"].get(index, {}).items():
                is_tensor = isinstance(value, Tensor)
                found.keep(name, key, model.array(value).copy() if is_tensor else value)
    plain = _Plain(model)
    options = [
        plain.of(_options(group)) | {"params": list(group["param_names"])} for group in groups
    ]
    return found, options, saved if base is not saved else None


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the user: names with `_ds_` are DeepSpeed's own."""
    return {k: v for k, v in group.items() if k != "params" and not k.startswith("_ds_")}


def _groups(partition: Partition, shapes: Sequence[Shapes]) -> list[dict[str, Any]]:
    """The parameter groups: options, and the names of their parameters."""
    flats = [number for group in partition.groups for number in group["params"]]
    if sorted(flats) != list(range(len(shapes))):
        raise SourceError("the groups are of other parameters", object=str(partition.archive.path))
    plain = _Plain(partition.archive)
    return [
        plain.of(_options(group))
        | {"params": [name for number in group["params"] for name in shapes[number]]}
        for group in partition.groups
    ]


# -- all else ----------------------------------------------------------------------------------


def _engine(model: Archive, scaler: Any) -> dict[str, Any]:
    """DeepSpeed's own: counters, schedule, loss scale, and what the client has added."""
    own, plain = model.state, _Plain(model)
    members = getattr(scaler, "state", scaler) or {}
    found: dict[str, Any] = {key: plain.of(own[key]) for key in _COUNTERS if key in own}
    found["lr_scheduler"] = plain.of(own["lr_scheduler"])
    found["loss_scaler"] = {k: v for k, v in members.items() if type(v) in _SCALARS}
    for key in ("data_sampler", "random_ltd"):
        if own.get(key) is not None:
            found[key] = plain.of(own[key])
    return found | {"client_state": _client_state(model)}


def _client_state(model: Archive) -> Any:
    return _Plain(model).of({k: v for k, v in model.state.items() if k not in OWN_KEYS})


def _buffers(model: Archive) -> dict[str, NDArray[Any]]:
    module = model.state["module"]
    return {name: model.array(module[name]) for name in model.state["buffer_names"]}


def _module_extra(model: Archive) -> dict[str, Any]:
    """{module name: extra state}."""
    plain = _Plain(model)
    return {
        name.removesuffix(_EXTRA_STATE).removesuffix("."): plain.of(value)
        for name, value in model.state["module"].items()
        if _is_extra(name)
    }


def _by_rank(models: Sequence[Archive]) -> dict[str, Any]:
    """Buffers, and what ranks have of their own: in stage 3 each saves buffers and client state."""
    buffers = [_buffers(model) for model in models]
    clients = [_client_state(model) for model in models]
    own: dict[str, dict[str, Any]] = {str(rank): {"extra": {}} for rank in range(len(models))}
    if differ := not _same(buffers):
        for rank, each in enumerate(buffers):
            own[str(rank)]["buffers"] = each
    if not _same(clients):
        for rank, each in enumerate(clients):
            own[str(rank)]["client_state"] = each
    elif not differ:
        own = {"0": own["0"]}
    return {"ranks": own} if differ else {"buffers": buffers[0], "ranks": own}


def _same(states: Sequence[Any]) -> bool:
    """Whether nested states are alike, bit for bit."""
    flats = [tree.flatten(state, _is_array, memory_of) for state in states]
    prints = [(flat.structure, {p: _bits(v) for p, v in flat.leaves.items()}) for flat in flats]
    return all(each == prints[0] for each in prints)


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)


def _bits(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, bytes) else (value.dtype, value.shape, value.tobytes())


@dataclass
class _Plain:
    """Makes plain values and arrays of what an archive holds; bounded, for values may be shared."""

    archive: Archive
    left: int = _MAX_VALUES

    def of(self, value: Any, depth: int = 0) -> Any:
        """A value without records.

        Raises:
            SourceError: it holds objects that are neither tensors nor plain, or is too large.
        """
        self.left -= 1
        if depth > tree.MAX_DEPTH or self.left < 0:
            raise SourceError("a value is nested too deep, or too large", object=self._place)
        if type(value) in (dict, OrderedDict):
            return type(value)({k: self.of(v, depth + 1) for k, v in value.items()})
        if type(value) in (list, tuple):
            return type(value)(self.of(item, depth + 1) for item in value)
        if isinstance(value, Tensor):
            return self.archive.array(value)
        if value is None or type(value) in (*_SCALARS, complex, bytes):
            return value
        name = value.kind if isinstance(value, Record) else type(value).__name__
        raise SourceError("an object cannot be imported", object=self._place, found=name)

    @property
    def _place(self) -> str:
        return str(self.archive.path)
