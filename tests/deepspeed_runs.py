"""What the processes of the DeepSpeed tests run; started by `start`, so it stands in its own module."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: E402

import asymcheck_torch  # noqa: E402

WIDTH = 24


class Net(nn.Module):
    """Tied weights, a frozen layer, sizes that no number of ranks divides, dropout, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.odd = nn.Parameter(torch.randn(7))
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(WIDTH, 29, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        x = self.frozen(self.embed(tokens))
        for layer in self.layers:
            x = x + nn.functional.dropout(torch.tanh(layer(x)), 0.1, self.training)
        return self.head(x * self.scale) + self.odd.sum()


@dataclass
class Setting:
    """How an engine is set up."""

    stage: int = 3
    dtype: str = "fp32"
    groups: bool = False
    accumulate: int = 1
    clip: float = 0.0
    scheduler: bool = False
    optimizer: str = "adamw"
    more: dict[str, Any] = field(default_factory=dict)


def parameters_of(model: nn.Module, groups: bool) -> Any:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not groups:
        return [p for _, p in trained]
    flat = [p for n, p in trained if p.ndim < 2]
    return [
        {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": flat, "weight_decay": 0.0, "lr": 3e-3},
    ]


def optimizer_of(setting: Setting, parameters: Any) -> torch.optim.Optimizer:
    if setting.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-2)


def build(setting: Setting) -> Any:
    """An engine; parameters are the same on every rank."""
    torch.manual_seed(7)
    model = Net()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": setting.accumulate,
        "gradient_clipping": setting.clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
        "zero_optimization": {
            "stage": setting.stage,
            "reduce_bucket_size": 5_000,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        }
        | setting.more,
    }
    if setting.dtype != "fp32":
        config[setting.dtype] = {"enabled": True}
    parameters = parameters_of(model, setting.groups)
    schedule = None
    if setting.scheduler:
        schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)  # noqa: E731
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(setting, parameters),
        config=config,
        lr_scheduler=schedule,
    )
    return engine


def train(engine: Any, steps: int, accumulate: int = 1) -> list[float]:
    """So many updates on this rank's random data; the losses."""
    losses: list[float] = []
    engine.train()
    for _ in range(steps * accumulate):
        tokens = torch.randint(29, (4, 5))
        logits = engine(tokens).float()
        loss = nn.functional.cross_entropy(logits.reshape(-1, 29), tokens.reshape(-1))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def seed(rank: int) -> None:
    torch.manual_seed(100 + rank)


def snapshot(engine: Any) -> dict[str, Any]:
    """What the engine holds, by logical names, gathered by DeepSpeed's own functions."""
    state: dict[str, Any] = {"counters": [engine.global_steps, engine.skipped_steps]}
    state["lr"] = [group["lr"] for group in engine.optimizer.param_groups]
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[f"model/{name}"] = parameter.detach().clone()
        if parameter.requires_grad:
            state |= {f"{key}/{name}": t.clone() for key, t in _trained(engine, parameter).items()}
    state["seen"] = engine.module.seen.clone()
    return state


def _trained(engine: Any, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if isinstance(engine.optimizer, torch.optim.Optimizer):
        state = engine.optimizer.state[parameter]
        return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return {}  # of whole masters the model's copy and further training tell
    keys = ("exp_avg", "exp_avg_sq") if "AdamW" in str(engine.basic_optimizer) else ()
    moments = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
    return {"master": safe_get_full_fp32_param(parameter)} | moments


def start(worker: Callable[..., Any], folder: Path, *args: Any, world: int = 2) -> list[Any]:
    """Run `worker(rank, world, *args)` in `world` processes; what each returned."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_enter, (worker, folder, world, port, args), nprocs=world)
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
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    # Without it DeepSpeed compiles an extension for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    torch.save(worker(rank, world, *args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def save_and_go_on(
    rank: int, world: int, url: str, setting: Setting, stop: int = 3, total: int = 5
) -> Any:
    """Train with checkpoints to `stop`, then without to `total`; state and losses at both."""
    engine = build(setting)
    seed(rank)
    with asymcheck_torch.attach(engine, url=url, max_to_keep=None) as ckpt:
        train(engine, stop, setting.accumulate)
        assert ckpt.step == stop
    at_stop = snapshot(engine)
    losses = train(engine, total - stop, setting.accumulate)
    return at_stop, snapshot(engine), losses


def resume(
    rank: int, world: int, url: str, setting: Setting, total: int = 5, warm: int = 0
) -> Any:
    """Restore (after `warm` updates of another run) and train to `total`."""
    engine = build(setting)
    seed(rank + 50)
    train(engine, warm, setting.accumulate)
    with asymcheck_torch.attach(engine, url=url, max_to_keep=None) as ckpt:
        step = ckpt.restore()
        at_start = snapshot(engine)
        losses = train(engine, total - step, setting.accumulate)
    return step, at_start, snapshot(engine), losses
