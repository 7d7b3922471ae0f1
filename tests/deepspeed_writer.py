"""One rank of DeepSpeed runs, which save or load with DeepSpeed's own calls; and their model.

Called as `deepspeed_writer.py JOBS` (a list in JSON) with torchrun's variables in the environment.
What an engine holds in the end is written by rank 0 to `state`, as DeepSpeed itself gives it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

import asymcheck_torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Model(torch.nn.Module):
    """Tied, frozen, odd and tiny parameters, and buffers that change."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.body = torch.nn.Linear(6, 13)
        self.norm = torch.nn.LayerNorm(13)
        self.fixed = torch.nn.Linear(13, 7)
        self.out = torch.nn.Linear(7, 6, bias=False)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("running", torch.zeros(13))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("forgotten", torch.ones(2), persistent=False)
        if frozen:
            self.fixed.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.relu(self.body(self.embed(tokens))))
        self.running.mul_(0.9).add_(hidden.detach().float().mean(0))
        self.passes.add_(1)
        return self.head(self.out(torch.relu(self.fixed(hidden))))


def optimizer_of(model: Model, job: dict[str, Any]) -> torch.optim.Optimizer:
    """Over all parameters in one group, named or not, or in one group for each number of axes."""
    named = list(model.named_parameters())
    if job.get("named"):
        parameters: list[Any] = named
    elif "groups" in job:
        by_axes = [p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim <= 1]
        parameters = [{"params": p} | o for p, o in zip(by_axes, job["groups"], strict=True)]
    else:
        parameters = [p for _, p in named]
    kind = getattr(torch.optim, job.get("optimizer", "AdamW"))
    return kind(parameters, lr=1e-3, **job.get("options", {}))


def configuration(job: dict[str, Any]) -> dict[str, Any]:
    zero = {"stage": job["stage"], "reduce_bucket_size": 5_000_000}
    if job["stage"] == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    if "sub_group_size" in job:
        zero["sub_group_size"] = job["sub_group_size"]
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": zero | job.get("zero", {}),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": job.get("dtype") == "bf16"},
        "checkpoint": {"load_universal": "universal" in job},
    } | job.get("config", {})


def engine_of(job: dict[str, Any]) -> Any:
    torch.manual_seed(job.get("seed", 0))
    model = Model(job.get("frozen", True))
    if "module" in job:
        model.load_state_dict(torch.load(job["module"]), strict=False)
    optimizer = optimizer_of(model, job)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=8)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=configuration(job)
    )
    return engine


def train(engine: Any, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(100 * engine.global_steps + engine.global_rank)
        tokens = torch.randint(11, (4,), generator=generator)
        logits = engine(tokens)
        engine.backward(torch.nn.functional.cross_entropy(logits.float(), tokens))
        engine.step()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def held(engine: Any, moments: list[str]) -> dict[str, Any]:
    """What the engine holds, gathered by DeepSpeed."""
    if engine.zero_optimization_stage() in (1, 2):  # 0.19.8 links the first group only
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    kinds = ("params", "lp", *moments)
    found: dict[str, Any] = {kind: {} for kind in kinds}
    for name, parameter in engine.module.named_parameters():
        found["lp"][name] = whole(parameter)
        trained = parameter.requires_grad and engine.zero_optimization_stage() > 0
        found["params"][name] = (
            safe_get_full_fp32_param(parameter) if trained else found["lp"][name]
        )
        for key in moments if trained else ():
            found[key][name] = safe_get_full_optimizer_state(parameter, key)
    buffers = dict(engine.module.named_buffers())
    found["buffers"] = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    states = engine.optimizer.state.values()
    found["steps"] = [float(s["step"]) for s in states if "step" in s]
    found["options"] = [
        {k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups
    ]
    found["global_steps"] = engine.global_steps
    found["lr_scheduler"] = engine.lr_scheduler.state_dict()
    return found


def run(job: dict[str, Any]) -> None:
    """Load if told to, train, save by either way, and note what the engine holds."""
    engine = engine_of(job)
    client_state: dict[str, Any] | None = {}
    if "universal" in job:
        path, client_state = engine.load_checkpoint(job["universal"], **job.get("loading", {}))
        assert path is not None
        if job.get("own_steps"):
            give_own_steps(engine)
    if "attach" in job:
        with asymcheck_torch.attach(engine, url=job["attach"]) as checkpointer:
            train(engine, job["steps"])
            checkpointer.wait()
    else:
        train(engine, job.get("steps", 0))
    if "save" in job:
        client = client_state_of(job, engine.global_rank)
        engine.save_checkpoint(job["save"], client_state=client, **job.get("saving", {}))
    moments = job.get("moments", ["exp_avg", "exp_avg_sq"])
    state = held(engine, moments) | {"client_state": client_state}
    if engine.global_rank == 0:
        torch.save(state, job["state"])
    engine.destroy()


def client_state_of(job: dict[str, Any], rank: int) -> dict[str, Any]:
    state = {"epoch": 3, "seen": torch.arange(4.0), "nested": {"a": (1, None, "b")}}
    return state | ({"rank": rank} if job.get("client_by_rank") else {})


def give_own_steps(engine: Any) -> None:
    """Stage 3 of 0.19.8 gives all groups one tensor, which then each of them counts on."""
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()


def main(jobs: list[dict[str, Any]]) -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for job in jobs:
        try:
            run(job)
        except Exception as error:
            if "fails" not in job:
                raise
            if torch.distributed.get_rank() == 0:
                torch.save({"error": repr(error)}, job["state"])
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may abort while it is torn down


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
