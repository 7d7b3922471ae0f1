"""Attached optimizers are replayed: their steps take few bytes and come back exactly."""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_runs import differences  # noqa: E402

import asymcheck_torch  # noqa: E402
from asymcheck.index import load_index  # noqa: E402
from asymcheck.policy import Always  # noqa: E402
from asymcheck.stores import open_store  # noqa: E402
from asymcheck.strategies import AsymCheck  # noqa: E402
from asymcheck_torch.updates import update_of  # noqa: E402

REPLAY = AsymCheck(policy=Always("replay"))
WIDTH = 400
STEPS = 4

# The largest part of a float32 state of weight and moments that a step may take where gradients
# are computed in bfloat16; what was seen was a tenth less.
OPTIMIZERS: dict[str, tuple[Any, float]] = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False), 0.14),
    "adamw-foreach": (lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True), 0.14),
    "adamw-fused": (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), 0.14),
    "adam": (lambda p: torch.optim.Adam(p, lr=1e-3), 0.14),
    "adam-l2": (lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=1e-2), 0.18),
    "adam-maximize": (lambda p: torch.optim.Adam(p, lr=1e-5, maximize=True), 0.14),
    "adam-amsgrad": (lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True), 0.14),
    "adam-tensor-lr": (lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)), 0.14),
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), 0.22),
    "sgd-plain": (lambda p: torch.optim.SGD(p, lr=1e-2), 0.44),
    "sgd-l2": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2), 0.26),
    "sgd-nesterov": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True), 0.22),
    "sgd-dampening": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5), 0.22),
}


def train(url: Any, make: Any, *, low: bool = True, every_steps: int = 1) -> list[dict[str, Any]]:
    """Checkpoint every step of a run with clipped gradients; module and optimizer after each."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    optimizer = make(module.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    states: list[dict[str, Any]] = []
    with asymcheck_torch.attach(
        module,
        optimizer,
        url=url,
        strategy=REPLAY,
        every_steps=every_steps,
        max_chain=10,
        max_to_keep=None,
    ) as checkpointer:
        for _ in range(STEPS * every_steps):
            x = torch.randn(64, WIDTH)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = (module(x) - x).float().square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            states.append(copy.deepcopy([module.state_dict(), optimizer.state_dict()["state"]]))
        checkpointer.wait()
    return states[every_steps - 1 :: every_steps]


def weights_ratio(url: Any, step: int) -> float:
    """Stored to raw bytes of the matrices and their moments."""
    stored = raw = 0
    with closing(open_store(url)) as store:
        for block in load_index(store, step).blocks():
            if block.box.leaf.path.endswith("weight") and block.box.leaf.shape:
                assert block.codec.id == "replay" or block.block.count < 4096
                stored, raw = stored + block.block.nbytes, raw + block.nbytes
    return stored / raw


def assert_comes_back(url: Any, make: Any, states: list[Any], every_steps: int = 1) -> None:
    for number, expected in enumerate(states, 1):
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        optimizer = make(module.parameters())
        with asymcheck_torch.attach(module, optimizer, url=url) as checkpointer:
            assert checkpointer.restore(number * every_steps) == number * every_steps
        found = [module.state_dict(), optimizer.state_dict()["state"]]
        assert differences(found, expected) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_low_precision_are_stored_as_such(name, tmp_path):
    make, limit = OPTIMIZERS[name]
    states = train(tmp_path, make)
    for step in range(2, STEPS + 1):
        assert weights_ratio(tmp_path, step) < limit
    assert_comes_back(tmp_path, make, states)


def test_copies_in_low_precision_of_masters_take_nothing(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    module = module.bfloat16()
    masters = [p.detach().float().requires_grad_() for p in module.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3)
    expected = None
    with asymcheck_torch.attach(
        module, optimizer, url=tmp_path, strategy=REPLAY, max_chain=10
    ) as checkpointer:
        for _ in range(STEPS):
            x = torch.randn(64, WIDTH).bfloat16()
            (module(x) - x).float().square().mean().backward()
            for parameter, master in zip(module.parameters(), masters, strict=True):
                master.grad = parameter.grad.float()
            nn.utils.clip_grad_norm_(masters, 1e-3)
            optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(module.parameters(), masters, strict=True):
                    parameter.copy_(master)
                    parameter.grad = None
            expected = copy.deepcopy([module.state_dict(), masters, optimizer.state_dict()])
        checkpointer.wait()
    stored: dict[str, int] = {}
    raw = 0
    with closing(open_store(tmp_path)) as store:
        for block in load_index(store, STEPS).blocks():
            if block.codec.id == "replay":
                dtype = block.box.leaf.dtype
                stored[dtype] = stored.get(dtype, 0) + block.block.nbytes
                raw += block.nbytes
    assert stored["bfloat16"] < 1000
    assert sum(stored.values()) < 0.125 * raw
    assert raw > 0.95 * 14 * 2 * WIDTH * WIDTH
    for tensor in (*module.parameters(), *masters):
        tensor.data.zero_()
    with asymcheck_torch.attach(module, optimizer, url=tmp_path) as checkpointer:
        assert checkpointer.restore() == STEPS
    found = [module.state_dict(), masters, optimizer.state_dict()]
    assert differences(found, expected) == []


def test_gradients_of_full_precision_take_the_first_moment(tmp_path):
    make, _ = OPTIMIZERS["adamw"]
    states = train(tmp_path, make, low=False)
    assert weights_ratio(tmp_path, STEPS) < 0.33
    assert_comes_back(tmp_path, make, states)


def test_several_updates_between_checkpoints_cost_what_differences_do(tmp_path):
    make, _ = OPTIMIZERS["adamw"]
    states = train(tmp_path, make, every_steps=3)
    assert 0.3 < weights_ratio(tmp_path, 3 * STEPS) < 0.9
    assert_comes_back(tmp_path, make, states, every_steps=3)


def group(**options: Any) -> dict[str, Any]:
    return {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1} | options


def named(name: str, base: type = torch.optim.Optimizer) -> Any:
    kind = type(name, (base,), {})
    return kind([nn.Parameter(torch.zeros(2))], {})


def test_what_an_optimizer_of_an_engine_is_taken_for():
    cpu_adam = named("DeepSpeedCPUAdam")
    update = update_of(cpu_adam, 0, group(bias_correction=False), 3)
    assert update is not None
    assert update.rule == "adam"
    assert (update.numbers["decay"], update.numbers["l2"]) == (0.0, 0.1)
    assert (update.numbers["corrects_bias"], update.numbers["step"]) == (0.0, 3)
    cpu_adam.adam_w_mode = True
    update = update_of(cpu_adam, 1, group(), 3)
    assert update is not None
    assert (update.numbers["decay"], update.numbers["l2"]) == (0.1, 0.0)
    assert dict(update.roles) == {
        "params": "weight",
        "gradients": "captured",
        "optim1.exp_avg": "first",
        "optim1.exp_avg_sq": "second",
    }
    lion = update_of(named("FusedLion"), 0, group(), 1)
    assert lion is not None and lion.rule == "lion"


@pytest.mark.parametrize("options", [{"lr": float("nan")}, {"betas": None}, {"eps": "tiny"}])
def test_options_that_cannot_be_replayed_leave_the_update_unknown(options):
    assert update_of(named("AdamW"), 0, group(**options), 1) is None
    assert update_of(named("Adagrad"), 0, group(), 1) is None
