"""What the processes of the tests of collectives run; started by `torch_ddp.start`."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import asymcheck_torch
from asymcheck_torch.collectives import Collective, observe_collectives
from asymcheck_torch.testing import slow_collectives

PATIENCE_S = 60


class Recorder:
    """Counts begins and ends; knows how long each collective took, and whether all have ended."""

    def __init__(self) -> None:
        self.begun: list[Collective] = []
        self.took_s: list[float] = []
        self._all_ended = threading.Condition()

    def __call__(self, collective: Collective) -> Callable[[], None]:
        self.begun.append(collective)
        begun_s = time.monotonic()

        def end() -> None:
            with self._all_ended:
                self.took_s.append(time.monotonic() - begun_s)
                self._all_ended.notify_all()

        return end

    def await_ends(self) -> None:
        """Return when all that began have ended, once each."""
        with self._all_ended:
            assert self._all_ended.wait_for(
                lambda: len(self.took_s) >= len(self.begun), PATIENCE_S
            ), f"{len(self.begun)} begun, {len(self.took_s)} ended"
            assert len(self.took_s) == len(self.begun)

    def take(self) -> list[tuple[str, int]]:
        """What began since the last call, when all of it has ended."""
        self.await_ends()
        begun, self.begun, self.took_s = self.begun, [], []
        return [tuple(collective) for collective in begun]


# -- one collective at a time ------------------------------------------------------------------


def _input(rank: int) -> torch.Tensor:
    return torch.arange(6.0) / 3 + rank


def _all_gather(rank: int) -> Any:
    outputs = [torch.empty(6), torch.empty(6)]
    dist.all_gather(outputs, _input(rank))
    return outputs


def _into_tensor(rank: int, output: torch.Tensor, call: Callable[..., Any], **more: Any) -> Any:
    work = call(output, _input(rank), **more)
    if work is not None:
        work.wait()
    return output


def _in_place(rank: int, call: Callable[..., Any], **more: Any) -> torch.Tensor:
    tensor = _input(rank)
    work = call(tensor, **more)
    if work is not None:
        work.wait()
    return tensor


def _reduce_scatter(rank: int) -> torch.Tensor:
    output = torch.empty(3)
    dist.reduce_scatter(output, list(_input(rank).split(3)))
    return output


def _all_to_all_single(rank: int) -> torch.Tensor:
    output = torch.empty(6)
    dist.all_to_all_single(output, _input(rank))
    return output


def _scatter(rank: int) -> torch.Tensor:
    output = torch.empty(3)
    dist.scatter(output, list(_input(rank).split(3)) if rank == 0 else None, src=0)
    return output


def _gather(rank: int) -> list[torch.Tensor] | None:
    outputs = [torch.empty(6), torch.empty(6)] if rank == 0 else None
    dist.gather(_input(rank), outputs, dst=0)
    return outputs


def _inference(rank: int) -> torch.Tensor:
    with torch.inference_mode():
        tensor = _input(rank)
        dist.all_reduce(tensor)
    return tensor.clone()


def _functional(rank: int) -> torch.Tensor:
    return functional.all_reduce(_input(rank), "sum", dist.group.WORLD) + 0


CALLS: dict[str, Callable[[int], Any]] = {
    "all_reduce": lambda r: _in_place(r, dist.all_reduce),
    "all_reduce, async": lambda r: _in_place(r, dist.all_reduce, async_op=True),
    "all_reduce, inference": _inference,
    "all_reduce, functional": _functional,
    "broadcast": lambda r: _in_place(r, dist.broadcast, src=1),
    "reduce": lambda r: _in_place(r, dist.reduce, dst=0) if r == 0 else _reduced_elsewhere(r),
    "all_gather": _all_gather,
    "all_gather_into_tensor": lambda r: _into_tensor(
        r, torch.empty(12), dist.all_gather_into_tensor
    ),
    "all_gather_into_tensor, async": lambda r: _into_tensor(
        r, torch.empty(12), dist.all_gather_into_tensor, async_op=True
    ),
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": lambda r: _into_tensor(r, torch.empty(3), dist.reduce_scatter_tensor),
    "all_to_all_single": _all_to_all_single,
    "scatter": _scatter,
    "gather": _gather,
    "barrier": lambda _: dist.barrier(),
}


def _reduced_elsewhere(rank: int) -> None:
    """The tensor of a rank that is not the destination holds partial sums, or not."""
    dist.reduce(_input(rank), dst=0)


def call_each(rank: int) -> dict[str, tuple[Any, Any, Any, list[tuple[str, int]]]]:
    """For every call: its value alone, observed and slowed, and what was observed."""
    found = {}
    for name, call in CALLS.items():
        recorder = Recorder()
        alone = call(rank)
        with observe_collectives(recorder):
            observed = call(rank)
            seen = recorder.take()
        with slow_collectives(1e-3, 1e6):
            slowed = call(rank)
        call(rank)
        assert recorder.begun == []
        found[name] = alone, observed, slowed, seen
    return found


def kernels(_rank: int) -> tuple[str, str, str]:
    """The dispatcher's table of one collective before, while and after something observes."""

    def table() -> str:
        return torch._C._dispatch_dump_table("c10d::allreduce_")

    before = table()
    with observe_collectives(Recorder()), slow_collectives(0):
        within = table()
    return before, within, table()


# -- several, and failures ---------------------------------------------------------------------


def observe_twice(_rank: int) -> tuple[int, int]:
    """Two observers, of which the first leaves first; what each saw."""
    one, two = Recorder(), Recorder()
    first = observe_collectives(one)
    second = observe_collectives(two)
    dist.all_reduce(torch.ones(1))
    first.remove()
    first.remove()
    dist.all_reduce(torch.ones(1))
    second.remove()
    dist.all_reduce(torch.ones(1))
    one.await_ends()
    two.await_ends()
    return len(one.begun), len(two.begun)


def end_without_waiting(_rank: int) -> int:
    """The end of an asynchronous collective is told although nobody waits for it."""
    recorder = Recorder()
    with observe_collectives(recorder):
        dist.all_reduce(torch.ones(4), async_op=True)
        return len(recorder.take())


def many_in_flight(_rank: int) -> int:
    """The backend's threads free works and tensors, for which they need the interpreter's lock.

    They hold a lock of their own meanwhile, which whoever issues a collective waits for.
    """
    recorder = Recorder()
    with observe_collectives(recorder):
        for _ in range(2000):
            dist.all_gather_into_tensor(torch.empty(200), torch.ones(100), async_op=True)
        return len(recorder.take())


def groups_of_one(rank: int) -> list[tuple[str, int]]:
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    recorder = Recorder()
    with observe_collectives(recorder), slow_collectives(3600):
        dist.all_reduce(torch.ones(1), group=alone)
    return recorder.take()


def refused(_rank: int) -> tuple[str, int]:
    """A collective that the backend refuses: the error passes, and its end is told."""
    recorder = Recorder()
    with observe_collectives(recorder), slow_collectives(0):
        try:
            dist.all_gather_into_tensor(torch.empty(5), torch.empty(3))
        except (RuntimeError, ValueError) as error:
            message = str(error)
        else:
            message = ""
    return message, len(recorder.take())


def lose_a_peer(rank: int) -> tuple[str, int]:
    """Rank 1 leaves while rank 0 waits for it; how rank 0 hears of that."""
    recorder = Recorder()
    dist.barrier()
    if rank == 1:
        dist.destroy_process_group()
        return "", 0
    said, seen = "no error", 0
    with observe_collectives(recorder), slow_collectives(1e-3):
        try:
            dist.all_reduce(torch.ones(1000))
        except RuntimeError as error:
            said, seen = str(error), len(recorder.take())
    dist.destroy_process_group()
    return said, seen


# -- slow ones ---------------------------------------------------------------------------------


def slow(_rank: int) -> dict[str, Any]:
    """Times that are at least what the link takes; how work looks while it is under way."""
    found: dict[str, Any] = {}
    tensor = torch.ones(250)  # 1000 bytes
    with slow_collectives(0.2):
        begun_s = time.monotonic()
        dist.all_reduce(tensor)
        found["sync"] = time.monotonic() - begun_s
        begun_s = time.monotonic()
        work = dist.all_reduce(tensor, async_op=True)
        found["is work"] = isinstance(work, dist.Work)
        found["waited"] = [work.wait(), work.wait()]
        found["async"] = time.monotonic() - begun_s
        found["late"] = work.is_completed()
    with slow_collectives(3600):
        work = dist.all_reduce(tensor, async_op=True)
    dist.barrier()
    found["early"] = work.is_completed()
    with slow_collectives(0.0, bytes_per_s=10_000):
        begun_s = time.monotonic()
        for work in [dist.all_reduce(tensor, async_op=True) for _ in range(3)]:
            work.wait()
        found["bytes"] = time.monotonic() - begun_s
    recorder = Recorder()
    with observe_collectives(recorder), slow_collectives(0.2):
        dist.all_reduce(tensor, async_op=True)
        recorder.await_ends()
        found["observed"] = recorder.took_s
    return found


# -- who uses them -----------------------------------------------------------------------------


def _model() -> nn.Module:
    torch.manual_seed(3)
    blocks = [nn.Sequential(nn.Linear(12, 12), nn.GELU()) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(12, 2))


def _train(
    module: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int = 3
) -> list[float]:
    generator = torch.Generator().manual_seed(10 + rank)
    losses = []
    for _ in range(steps):
        loss = module(torch.randn(4, 12, generator=generator)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _ddp(rank: int) -> list[float]:
    module = DistributedDataParallel(_model())
    return _train(module, torch.optim.AdamW(module.parameters(), lr=1e-2), rank)


def _fsdp2(rank: int) -> list[float]:
    module = _sharded()
    return _train(module, torch.optim.AdamW(module.parameters(), lr=1e-2), rank)


def _sharded() -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    module = _model()
    for block in module:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def attached(rank: int, url: str) -> list[float]:
    """Train with a checkpoint at every step over a slow link, and keep the trace."""
    module = _sharded()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    with (
        slow_collectives(2e-3),
        asymcheck_torch.attach(module, optimizer, url=url, keep_trace=True),
    ):
        losses = _train(module, optimizer, rank, steps=12)
    dist.barrier()  # which nothing attached sees
    return losses


def _zero(rank: int, stage: int) -> list[float]:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    module = _model()
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": 100,
                "allgather_bucket_size": 100,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            },
        },
    )
    generator = torch.Generator().manual_seed(10 + rank)
    losses = []
    for _ in range(3):
        loss = engine(torch.randn(4, 12, generator=generator)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def all_of_gloo(rank: int) -> dict[str, Any]:
    """Everything that needs no DeepSpeed, in one start of the processes."""
    return {
        "calls": call_each(rank),
        "kernels": kernels(rank),
        "twice": observe_twice(rank),
        "unwaited": end_without_waiting(rank),
        "many": many_in_flight(rank),
        "alone": groups_of_one(rank),
        "refused": refused(rank),
        "slow": slow(rank),
        "trained": train(rank, ["ddp", "fsdp2"]),
    }


TRAININGS: dict[str, Callable[[int], list[float]]] = {
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "zero1": lambda rank: _zero(rank, 1),
    "zero2": lambda rank: _zero(rank, 2),
    "zero3": lambda rank: _zero(rank, 3),
}


def train(
    rank: int, names: list[str]
) -> dict[str, tuple[list[float], list[float], dict[str, int]]]:
    """For every way of training: losses alone and observed and slowed, and what was observed."""
    found = {}
    for name in names:
        alone = TRAININGS[name](rank)
        recorder = Recorder()
        with observe_collectives(recorder), slow_collectives(1e-4, 1e9):
            observed = TRAININGS[name](rank)
        seen = Counter(collective for collective, _ in recorder.take())
        found[name] = alone, observed, dict(seen)
    return found
