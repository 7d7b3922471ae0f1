"""What the processes of the DeepSpeed tests run, started by `start`; so it is a module."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
)
from rank_processes import call_in_ranks
from sharded_net import (
    WIDTH,
    loss_of,
    parameters_of,
    random_tokens,
    seed_and_build,
)
from torch import nn

import asymcheck_torch
from asymcheck.errors import AsymCheckError
from asymcheck.policy import Always
from asymcheck.strategies import AsymCheck

STOP, TOTAL = 3, 5
REPLAY = AsymCheck(policy=Always("replay"))


@dataclass(frozen=True)
class Setting:
    """How an engine is set up."""

    stage: int = 3
    dtype: str = "fp32"
    groups: bool = False
    accumulate: int = 1
    clip: float = 0.0
    scheduler: bool = False
    optimizer: str = "adamw"
    width: int = WIDTH
    zero_init: bool = False
    overflow: bool = False  # the second update has infinite gradients
    replay: bool = False  # increments replay the optimizer
    zero: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """DeepSpeed's configuration; every use of a parameter gathers it again."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": 5_000,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
            }
            | self.zero,
        }
        if self.dtype != "fp32":
            config[self.dtype] = {"enabled": True}
        if self.optimizer == "configured":
            options = {"lr": 1e-2, "torch_adam": True}
            config["optimizer"] = {"type": "AdamW", "params": options}
        return config | self.more


class OwnAdamW(torch.optim.AdamW):
    """An optimizer that a user derived from one of torch's."""


def optimizer_of(setting: Setting, parameters: Any) -> torch.optim.Optimizer | None:
    if setting.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    if setting.optimizer == "nesterov":  # leaves something else in the gradients
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True, foreach=True)
    if setting.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-2)
    if setting.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=1e-2)
    if setting.optimizer == "own":
        return OwnAdamW(parameters, lr=1e-2)
    if setting.optimizer == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, lr=1e-2)
    return None


def build(setting: Setting, seed: int = 7) -> Any:
    """An engine; parameters are the same on every rank."""
    config = setting.config()
    sharded = deepspeed.zero.Init(config_dict_or_path=config) if setting.zero_init else None
    with sharded or nullcontext():
        model = seed_and_build(setting.width, seed)
    parameters = parameters_of(model, setting.groups)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(setting, parameters),
        model_parameters=parameters,
        config=config,
        lr_scheduler=_schedule if setting.scheduler else None,
    )
    return engine


def _schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


@contextmanager
def engine_of(setting: Setting, seed: int = 7) -> Iterator[Any]:
    """An engine that is gone afterwards, so that a process can have several."""
    engine = build(setting, seed)
    try:
        yield engine
    finally:
        engine.destroy()


def train(engine: Any, steps: int, spoil: float = 1.0) -> list[float]:
    """So many updates on this rank's random data, an evaluation before each; all losses."""
    losses: list[float] = []
    for _ in range(steps):
        engine.eval()
        with torch.no_grad():
            losses.append(loss_of(engine, random_tokens()).item())
        engine.train()
        for _ in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, random_tokens()) * spoil
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


# -- what an engine holds ------------------------------------------------------------------


def snapshot(engine: Any) -> dict[str, Any]:
    """What the engine holds, by logical names, gathered by DeepSpeed's own functions."""
    _link_moments(engine.optimizer)
    found: dict[str, Any] = {
        "counters": [engine.global_steps, engine.skipped_steps, engine.micro_steps],
        "samples": engine.global_samples,
        "options": [_options(group) for group in engine.optimizer.param_groups],
        "updates": sorted(_updates(engine.optimizer)),
        "schedule": engine.lr_scheduler.state_dict() if engine.lr_scheduler else None,
        "buffers/seen": engine.module.seen.clone(),
    }
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[f"model/{name}"] = parameter.detach().clone()
        found[f"params/{name}"] = found[f"model/{name}"]
        if parameter.requires_grad:
            trained = _trained(engine, parameter)
            found |= {f"{kind}/{name}": tensor.clone() for kind, tensor in trained.items()}
    return found


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _link_moments(zero: Any) -> None:
    """DeepSpeed links those of all groups when it has stepped the first, so some are missing."""
    if getattr(zero, "_hp_optimizer_states_linked", False):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _updates(zero: Any) -> set[float]:
    return {float(state["step"]) for state in zero.state.values() if "step" in state}


def _trained(engine: Any, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """The master weight and the moments of a parameter, whole."""
    zero = engine.optimizer
    if isinstance(zero, torch.optim.Optimizer):
        return _tensors(zero.state[parameter])
    if isinstance(zero, FP16_UnfusedOptimizer):
        masters = _masters_of_unfused(zero)
        return {"params": masters[parameter].detach()} | _tensors(zero.state[masters[parameter]])
    if getattr(zero, "round_robin_gradients", False):
        return {}  # what DeepSpeed says of them is wrong: it looks for them in the other order
    state = next(iter(zero.optimizer.state.values()), {})
    moments = {
        key: safe_get_full_optimizer_state(parameter, key)
        for key in _tensors(state)
        if key != "step"
    }
    return {"params": safe_get_full_fp32_param(parameter)} | moments


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim}


def _masters_of_unfused(zero: Any) -> dict[nn.Parameter, torch.Tensor]:
    return {
        model: master
        for models, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True)
        for model, master in zip(models, masters, strict=True)
    }


# -- processes -----------------------------------------------------------------------------


def start(worker: Callable[..., Any], folder: Path, *args: Any, world: int = 2) -> list[Any]:
    """Run `worker(rank, world, *args)` in `world` processes; what each returned."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call_in_ranks(_enter, worker, folder, world, port, args, ranks=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(
    rank: int,
    worker: Callable[..., Any],
    folder: Path,
    world: int,
    port: int,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCH_EXTENSIONS_DIR=str(folder.parent / "built"))
    # Without it DeepSpeed compiles an extension for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    torch.save(worker(rank, world, *args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def of_all(rank: int, world: int, runs: Mapping[Any, tuple[Any, ...]]) -> Any:
    """What each of the runs gives, one after the other: {name: (worker, its arguments)}."""
    return {name: worker(rank, *arguments) for name, (worker, *arguments) in runs.items()}


def save_and_go_on(rank: int, url: str, setting: Setting) -> Any:
    """Train with checkpoints to STOP, then without to TOTAL; state at both, and the losses."""
    with engine_of(setting) as engine:
        torch.manual_seed(100 + rank)
        options: dict[str, Any] = {"strategy": REPLAY, "max_chain": 10} if setting.replay else {}
        with asymcheck_torch.attach(engine, url=url, max_to_keep=None, **options) as ckpt:
            train(engine, 1)
            if setting.overflow:
                train(engine, 1, spoil=math.inf)
            train(engine, STOP - 1)
            assert ckpt.step == STOP
        at_stop = snapshot(engine)
        losses = train(engine, TOTAL - STOP)
        return at_stop, snapshot(engine), losses


def save_gradients(rank: int, url: str, setting: Setting) -> Any:
    """Train with checkpoints to STOP, gradients captured; the last ones before clipping."""
    with engine_of(setting) as engine:
        torch.manual_seed(100 + rank)
        options: dict[str, Any] = {"strategy": REPLAY, "max_chain": 10}
        with asymcheck_torch.attach(engine, url=url, capture_gradients=True, **options):
            for _ in range(STOP):
                engine.backward(loss_of(engine, random_tokens()))
                found = dict(_gradients(engine))
                engine.step()
        return found, float(engine.get_global_grad_norm() or 0)


def _gradients(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
        if gradient is not None:
            yield name, gradient.detach().float().clone()


def resume(rank: int, url: str, setting: Setting, warm: int = 0) -> Any:
    """Restore, after `warm` updates on other data, and train to TOTAL."""
    with engine_of(setting, seed=8) as engine:
        torch.manual_seed(200 + rank)
        train(engine, warm)
        with asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt:
            assert ckpt.restore() == STOP
            at_start = snapshot(engine)
            losses = train(engine, TOTAL - STOP)
            assert ckpt.step == TOTAL
        return at_start, snapshot(engine), losses


def resume_unseen(rank: int, url: str, setting: Setting, warm: int) -> Any:
    """As `resume`, but nothing gathers the parameters between restoring and training."""
    with engine_of(setting, seed=8) as engine:
        torch.manual_seed(200 + rank)
        train(engine, warm)
        with asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt:
            assert ckpt.restore() == STOP
            losses = train(engine, TOTAL - STOP)
        return snapshot(engine), losses


def restore(rank: int, url: str, setting: Setting, step: int = STOP, spoil: bool = False) -> Any:
    """Only restore, after an update by infinite gradients if that is wanted; the state."""
    with engine_of(setting, seed=8) as engine:
        train(engine, int(spoil), math.inf)
        with asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt:
            assert ckpt.restore() == step
        return snapshot(engine)


def restore_and_go_on_saving(rank: int, url: str, setting: Setting) -> Any:
    """Restore and train to TOTAL with checkpoints; the state then."""
    with engine_of(setting, seed=8) as engine:
        with asymcheck_torch.attach(engine, url=url, max_to_keep=None) as ckpt:
            ckpt.restore()
            train(engine, TOTAL - STOP)
        return snapshot(engine)


def save_before_the_first_update(rank: int, url: str, setting: Setting) -> Any:
    """Checkpoint what was built, and restore that after some updates; state and losses, twice."""
    with engine_of(setting) as engine:
        torch.manual_seed(100 + rank)
        with asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt:
            ckpt.save_now()
            ckpt.wait()
            at_start = snapshot(engine)
            expected = at_start, train(engine, 2), snapshot(engine)
            assert ckpt.restore() == 0
            at_start = snapshot(engine)
            return expected, (at_start, train(engine, 2), snapshot(engine))


def restore_what_does_not_fit(rank: int, url: str, setting: Setting) -> Any:
    """The error, and the state before and after it."""
    with engine_of(setting, seed=8) as engine:
        torch.manual_seed(300 + rank)
        train(engine, 1)
        before, generator = snapshot(engine), torch.get_rng_state()
        with asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt:
            try:
                ckpt.restore()
            except AsymCheckError as error:
                assert torch.equal(generator, torch.get_rng_state())
                return type(error).__name__, str(error), before, snapshot(engine)
        raise AssertionError("restored into an engine that does not fit")


def warnings_of_restoring(rank: int, url: str, setting: Setting) -> tuple[list[str], Any]:
    """What restoring logs, and the schedule then."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("asymcheck").addHandler(handler)
    state = restore(rank, url, setting)
    logging.getLogger("asymcheck").removeHandler(handler)
    return said, state["schedule"]


def what_attach_says(engine: Any, url: str, *more: Any) -> str:
    """The error of attaching to an engine."""
    try:
        asymcheck_torch.attach(engine, *more, url=url)
    except (AsymCheckError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("attached")


def attach_to_what_is_refused(rank: int, world: int, url: str) -> dict[str, str]:
    """What attaching says to engines of other kinds, and to a version that is not known."""
    said: dict[str, str] = {}
    with engine_of(Setting()) as engine:
        optimizer = torch.optim.AdamW(engine.module.parameters())
        said["two optimizers"] = what_attach_says(engine, url, optimizer)
        known, deepspeed.__version__ = deepspeed.__version__, "0.190.1"
        said["version"] = what_attach_says(engine, url)
        deepspeed.__version__ = known
        for name in ("curriculum_learning", "random_ltd"):  # as if it were in the configuration
            setattr(engine, f"{name}_enabled", lambda: True)
            said[name] = what_attach_says(engine, url)
            delattr(engine, f"{name}_enabled")
    with _pipeline() as engine:
        said["pipeline"] = what_attach_says(engine, url)
    with _mixture_of_experts() as engine:
        said["experts"] = what_attach_says(engine, url)
    for name, setting in _refused_settings(world).items():
        with engine_of(setting) as engine:
            said[name] = what_attach_says(engine, url)
    return said


def attach_to_muon(rank: int, world: int, url: str) -> str:
    """What attaching says to an engine with Muon, for which DeepSpeed compiles something."""
    muon = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2}}}
    with engine_of(Setting(2, optimizer="none", more=muon)) as engine:
        return what_attach_says(engine, url)


def _refused_settings(world: int) -> dict[str, Setting]:
    half = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    return {
        "no optimizer": Setting(optimizer="none"),
        "secondary partitions": Setting(zero={"zero_hpz_partition_size": world}),
        "autocast": Setting(0, more=half),
        "autocast-3": Setting(3, more=half),
    }


@contextmanager
def _pipeline() -> Iterator[Any]:
    module = PipelineModule([nn.Linear(4, 4)], num_stages=1, loss_fn=nn.MSELoss())
    yield from _initialized(module, module.parameters())


@contextmanager
def _mixture_of_experts() -> Iterator[Any]:
    module = nn.Sequential(MoE(4, nn.Linear(4, 4), num_experts=2))
    group = {"params": list(module.parameters()), "name": "all"}
    yield from _initialized(module, split_params_into_different_moe_groups_for_optimizer(group))


def _initialized(module: nn.Module, parameters: Any) -> Iterator[Any]:
    optimizer = torch.optim.AdamW(parameters)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=Setting(1).config())
    try:
        yield engine
    finally:
        engine.destroy()
