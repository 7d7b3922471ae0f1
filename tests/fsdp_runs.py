"""What the processes of the FSDP2 tests run; started by `torch_ddp.start`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from sharded_net import loss_of, parameters_of, random_tokens, seed_and_build
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch_runs import differences

import asymcheck_torch
from asymcheck.errors import AsymCheckError
from asymcheck_torch.modules import unwrap

STOP, TOTAL = 3, 5

Run = tuple[nn.Module, torch.optim.Optimizer]


def build(kind: str, *, groups: bool = True, width: int = 24, seed: int = 7) -> Run:
    """A net that is sharded, or not, over all ranks.

    `fsdp`; `hsdp` over a 2-D mesh (copies of shards); `low`, computing in bfloat16; `columns`,
    matrices cut along their second dimension; `offload`, parameters on the CPU; `whole`, gathered
    from the forward to the backward pass; `tensor` parallel in two layers; `ddp`; `plain`.
    """
    model: nn.Module = seed_and_build(width, seed)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "tensor":
        _split_layers(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    elif kind != "plain":
        _shard(model, kind)
    return model, _adamw(model, groups)


def _adamw(model: nn.Module, groups: bool = True) -> torch.optim.AdamW:
    kinds = {type(parameter.data) for parameter in model.parameters()}
    foreach = None if len(kinds) == 1 else False  # torch's loops take tensors of one kind
    return torch.optim.AdamW(parameters_of(model, groups), lr=1e-2, foreach=foreach)


def _split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    by_columns = ColwiseParallel(output_layouts=Replicate())
    by_rows = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, {"layers.0": by_columns, "layers.1": by_rows})


def _shard(model: nn.Module, kind: str) -> None:
    world = dist.get_world_size()
    shape = (2, world // 2) if kind == "hsdp" else (world,)
    options: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    }
    if kind == "low":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16)
    if kind == "columns":
        options["shard_placement_fn"] = lambda p: (
            Shard(1) if p.shape[-1] == 24 and p.ndim > 1 else None
        )
    if kind == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if kind == "whole":
        options["reshard_after_forward"] = False
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def train(run: Run, steps: int, evaluate: bool = False) -> list[float]:
    """So many updates on this rank's random data; the losses."""
    model, optimizer = run
    losses: list[float] = []
    for _ in range(steps):
        if evaluate:
            losses.append(evaluation(model))
        model.train()
        loss = loss_of(model, random_tokens())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def evaluation(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return loss_of(model, random_tokens()).item()


def snapshot(run: Run) -> dict[str, Any]:
    """What the run holds, by logical names, gathered by torch itself."""
    module, optimizer = run
    model = module.module if isinstance(module, DistributedDataParallel) else module
    found: dict[str, Any] = {
        "options": [_options(group) for group in optimizer.param_groups],
        "buffers/seen": model.seen.clone(),
    }
    for name, parameter in model.named_parameters():
        found[f"params/{name}"] = _full(parameter)
        state = optimizer.state.get(parameter, {})
        found |= {f"{key}/{name}": _full(value) for key, value in state.items()}
    return found


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


# -- workers -------------------------------------------------------------------------------


def of_all(rank: int, worker: Any, runs: Mapping[Any, Any]) -> Any:
    """What `worker(rank, *arguments)` returns for each of the runs, one after the other."""
    return {name: worker(rank, *arguments) for name, arguments in runs.items()}


def save_and_go_on(rank: int, url: str, kind: str, evaluate: bool = False) -> Any:
    """Train with checkpoints to STOP, then without to TOTAL; state at both, and the losses."""
    run = build(kind)
    torch.manual_seed(100 + (kind != "tensor") * rank)  # ranks that split layers share data
    with asymcheck_torch.attach(*run, url=url, max_to_keep=None) as ckpt:
        train(run, STOP, evaluate)
        assert ckpt.step == STOP
    at_stop = snapshot(run)
    losses = train(run, TOTAL - STOP, evaluate)
    return at_stop, snapshot(run), losses


def resume(rank: int, url: str, kind: str, warm: int = 0, evaluate: bool = False) -> Any:
    """Restore, after `warm` updates on other data, and train to TOTAL."""
    run = build(kind, seed=8)
    torch.manual_seed(200 + (kind != "tensor") * rank)
    train(run, warm)
    with asymcheck_torch.attach(*run, url=url, every_steps=1000) as ckpt:
        assert ckpt.restore() == STOP
        at_start = snapshot(run)
        losses = train(run, TOTAL - STOP, evaluate)
    return at_start, snapshot(run), losses


def restore(rank: int, url: str, kind: str) -> Any:
    """Only restore; the state."""
    run = build(kind, seed=8)
    with asymcheck_torch.attach(*run, url=url, every_steps=1000) as ckpt:
        assert ckpt.restore() == STOP
    return snapshot(run)


def resume_after_evaluation(rank: int, url: str, kind: str) -> Any:
    """As `resume`, right after a forward pass without a backward pass."""
    run = build(kind, seed=8)
    torch.manual_seed(200 + rank)
    train(run, 1)
    evaluation(run[0])  # attached to like this, too
    with asymcheck_torch.attach(*run, url=url, every_steps=1000) as ckpt:
        evaluation(run[0])
        assert ckpt.restore() == STOP
        losses = train(run, TOTAL - STOP)
    return snapshot(run), losses


def restore_or_say(rank: int, url: str, kind: str, step: int | None) -> Any:
    """The step that is restored and the state then, or the error."""
    run = build(kind, seed=8)
    with asymcheck_torch.attach(*run, url=url, every_steps=1000) as ckpt:
        try:
            return ckpt.restore(step), snapshot(run)
        except AsymCheckError as error:
            return type(error).__name__, str(error)


def resume_amid_accumulation(rank: int, url: str, kind: str, reduced: bool) -> Any:
    """As `resume`, when a backward pass has left gradients, reduced or not yet."""
    run = build(kind, seed=8)
    torch.manual_seed(200 + rank)
    with asymcheck_torch.attach(*run, url=url, every_steps=1000) as ckpt:
        train(run, 1)
        run[0].train()
        if isinstance(run[0], FSDPModule):
            run[0].set_requires_gradient_sync(reduced)
        (loss_of(run[0], random_tokens()) * 3).backward()
        if isinstance(run[0], FSDPModule):
            run[0].set_requires_gradient_sync(True)
        assert ckpt.restore() == STOP
        losses = train(run, TOTAL - STOP)
    return snapshot(run), losses


def save_gradients(rank: int, url: str, kind: str) -> dict[str, torch.Tensor]:
    """Train with checkpoints to STOP, clipped gradients captured; the last ones, whole."""
    model, optimizer = build(kind)
    torch.manual_seed(100 + (kind != "tensor") * rank)
    with asymcheck_torch.attach(model, optimizer, url=url, capture_gradients=True):
        for _ in range(STOP):
            model.train()
            loss_of(model, random_tokens()).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 0.25  # as if clipped
            trained = unwrap(model).named_parameters()
            found = {name: _full(p.grad) for name, p in trained if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
    return found


def save_partial_gradients(rank: int, url: str) -> tuple[torch.Tensor, str]:
    """A gradient that ranks have yet to sum when the optimizer steps, summed; its placements."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.LayerNorm(8))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": SequenceParallel()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with asymcheck_torch.attach(model, optimizer, url=url, capture_gradients=True):
        model(torch.randn(2, 4, 8)).to_local().square().sum().backward()
        gradient: Any = model[0].weight.grad
        found = gradient.full_tensor().clone(), str(gradient.placements)
        optimizer.step()
    return found


def train_what_was_sharded_too_late(rank: int, url: str) -> str:
    """What training says whose optimizer has the parameters of before they were sharded."""
    model = seed_and_build()
    optimizer = torch.optim.AdamW(parameters_of(model, False), lr=1e-2)
    fully_shard(model)
    try:
        with asymcheck_torch.attach(model, optimizer, url=url) as ckpt:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            ckpt.save_now()
    except AsymCheckError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("saved")


def restore_what_does_not_fit(rank: int, url: str, options: dict[str, Any]) -> Any:
    """The error, and where the state is not what it was before."""
    run = build(**options, seed=8)
    train(run, 1)
    before = snapshot(run)
    with asymcheck_torch.attach(*run, url=url, every_steps=1000) as ckpt:
        try:
            ckpt.restore()
        except AsymCheckError as error:
            return type(error).__name__, str(error), differences(snapshot(run), before)
    raise AssertionError("restored into a model that does not fit")


def what_is_refused(rank: int, url: str) -> dict[str, str]:
    """What attaching to, or training, what cannot be stored says on four ranks."""
    module = FullyShardedDataParallel(
        seed_and_build(), use_orig_params=True, device_id=torch.device("cpu")
    )
    said = {"fsdp1": _error_of(nn.Sequential(module), url)}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    module = seed_and_build()
    _split_layers(module, square["model"])
    for layer in (*module.layers, module):
        fully_shard(layer, mesh=square["data"])
    said["meshes"] = _error_of(module, url)
    said["strides"] = _error_of(module, url, dist.group.WORLD)
    module = fully_shard(seed_and_build(), mesh=square["data"])
    said["twice"] = _error_of(module, url, dist.group.WORLD)
    return said


def _error_of(module: nn.Module, url: str, group: Any = None) -> str:
    run = module, _adamw(module)
    try:
        with asymcheck_torch.attach(*run, url=url, process_group=group):
            train(run, 2)
    except AsymCheckError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("saved")
