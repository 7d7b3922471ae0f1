"""What the processes of the DDP tests run; they import it, so it stands in its own module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_processes import call_in_ranks, leave_together
from test_strategies import GivenCosts
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_runs import Run, differences, everything, plain_step, seed_all

from asymcheck import Always, AsymCheck
from asymcheck.errors import CorruptionError, StoreError
from asymcheck_torch import training

STOP, TOTAL = 3, 5
CHAINED = 16


class Position:
    """A data position: where in its own stream a rank is."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Position:
        return self

    def __next__(self) -> int:
        self.drawn += 1
        return self.drawn

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


def build(distributed: bool, broadcast_buffers: bool = True) -> Run:
    """A model with one leaf large enough to be split, batch norm, dropout and a position."""
    torch.manual_seed(7)  # DDP wants equal models; everything else differs by rank
    bare = nn.Sequential(
        nn.Linear(12, 1500), nn.BatchNorm1d(1500), nn.Dropout(0.2), nn.Linear(1500, 12)
    )
    module = DistributedDataParallel(bare) if distributed else bare
    if distributed:
        module.broadcast_buffers = broadcast_buffers
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    position = Position()

    def iterate(_i: int) -> torch.Tensor:
        scale = next(position)
        with torch.no_grad():
            torch.randn(scale)
        return plain_step(module, optimizer)

    return Run(module, [optimizer], iterate, {"position": position})


def start(worker: Callable[..., None], folder: Path, *args: Any, world: int = 2) -> list[Any]:
    """Run `worker(rank, *args)` in `world` processes; what each returned."""
    folder.mkdir()
    call_in_ranks(_enter, worker, folder, world, args, ranks=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(
    rank: int, worker: Callable[..., Any], folder: Path, world: int, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    torch.save(worker(rank, *args), folder / f"{rank}.pt")
    leave_together()


def save_and_go_on(
    rank: int, url: str, broadcast_buffers: bool = True, mirror: str | None = None
) -> Any:
    """Train with checkpoints to STOP, then without to TOTAL; the state at both."""
    run = build(True, broadcast_buffers)
    seed_all(100 + rank)
    with run.attach(url, max_to_keep=None, mirror=mirror) as ckpt:
        run.train(0, STOP)
        assert ckpt.step == STOP
    at_stop = everything(run)
    run.train(STOP, TOTAL)
    return at_stop, everything(run)


def resume(rank: int, url: str, broadcast_buffers: bool = True, mirror: str | None = None) -> Any:
    """Restore and train to TOTAL; the state right after restoring and at the end."""
    run = build(True, broadcast_buffers)
    seed_all(200 + rank)
    with run.attach(url, max_to_keep=None, mirror=mirror) as ckpt:
        step = ckpt.restore()
        at_start = everything(run)
        run.train(step, TOTAL)
    return step, at_start, everything(run)


def restore_with_damage_on_one_rank(rank: int, url: str, go_on: bool) -> Any:
    """Rank 1 cannot read the newest step; which step is restored, and the steps after going on."""
    run = build(True)
    read_into = training.read_into

    def damaged(checkpoint: Any, state: Any) -> Any:
        apply = read_into(checkpoint, state)
        if rank == 1 and checkpoint.step == STOP:
            raise CorruptionError("only this rank's disk is bad")
        return apply

    training.read_into = damaged
    with run.attach(url, max_to_keep=None) as ckpt:
        step = ckpt.restore()
        state = everything(run)
        if go_on:
            run.train(step, step + 2)
            ckpt.wait()
        return step, state["module"], ckpt.checkpointer.steps()


def restore_where_one_rank_sees_no_store(rank: int, url: str) -> Any:
    """The errors of both ranks, and that the model is as it was."""
    run = build(True)
    before = everything(run)
    said = ""
    with run.attach(url) as ckpt:
        if rank == 1:
            ckpt.checkpointer.steps = _unreachable
        for restore in (ckpt.restore, ckpt.restore_weights):
            try:
                restore()
            except Exception as error:
                said += type(error).__name__ + " "
    return said, differences(everything(run), before)


def _unreachable() -> Any:
    raise StoreError("this rank's network is down")


def restore_into_another_model_on_one_rank(rank: int, url: str) -> Any:
    """Rank 1 fails for good; the errors of both ranks, and that the model is as it was."""
    run = build(True)
    if rank == 1:
        run.extras["more"] = Position()
    before = everything(run)
    with run.attach(url) as ckpt:
        try:
            ckpt.restore()
        except Exception as error:
            return type(error).__name__, str(error), before, everything(run)
    raise AssertionError("restored into a model that does not fit")


def train_in_a_plain_group(rank: int, url: str) -> Any:
    """Ranks that keep their parameters equal by themselves, each with its own buffers."""
    run = build(False)
    seed_all(300 + rank)
    run.module(torch.randn(4, 12))  # buffers differ from here on
    with run.attach(url, process_group=dist.group.WORLD) as ckpt:
        for parameter in run.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.optimizers[0].step()
        ckpt.wait()
    expected = everything(run)
    with run.attach(url, process_group=dist.group.WORLD) as ckpt:
        run.module(torch.randn(4, 12))
        assert ckpt.restore() == 1
    return expected, everything(run)


def build_chains(rank: int, url: str) -> Any:
    """Increments at every step, all of which both ranks know to be stored before the next."""
    run = build(True)
    seed_all(400 + rank)
    strategy = AsymCheck(policy=Always("replay"))
    states: list[Any] = []
    with run.attach(url, strategy=strategy, max_to_keep=None) as ckpt:
        ckpt.checkpointer._cost = GivenCosts(1e-9)
        ckpt.checkpointer._calibrated = True
        for step in range(CHAINED):
            run.train(step, step + 1)
            ckpt.wait()
            states.append(everything(run)["optimizers"])
    return states


def fail_on_one_rank_for_a_step(rank: int, url: str, by_hand: bool) -> Any:
    """Rank 1 cannot store its state of step 2; the steps that there are in the end."""
    run = build(True)
    position = run.extras["position"]
    state_dict = position.state_dict

    def sometimes_odd() -> dict[str, Any]:
        odd = rank == 1 and position.drawn == 2
        return state_dict() | ({"odd": object()} if odd else {})

    position.state_dict = sometimes_odd
    options = {"on_error": "warn", "max_to_keep": None, "commit_timeout_s": 60.0, "max_chain": 0}
    with run.attach(url, **options) as ckpt:
        for step in range(4):
            run.train(step, step + 1)
            if by_hand:
                ckpt.save_now()  # of what is due anyway
                ckpt.save_now()  # nothing more to do, nor on the rank that could not
        ckpt.wait()
        return ckpt.checkpointer.steps()
