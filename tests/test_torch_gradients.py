"""Captured gradients are those that the optimizer was given, whoever computed them."""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_runs import differences  # noqa: E402

import asymcheck  # noqa: E402
import asymcheck_torch  # noqa: E402
from asymcheck.index import load_index  # noqa: E402
from asymcheck.policy import Always  # noqa: E402
from asymcheck.stores import open_store  # noqa: E402
from asymcheck.strategies import AsymCheck  # noqa: E402
from asymcheck_torch.gradients import Gradients  # noqa: E402

REPLAY = AsymCheck(policy=Always("replay"))
WIDTH = 256
STEPS = 4


def net(dtype: Any = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    module.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return module.to(dtype)


def loss_of(module: Any, x: Any) -> Any:
    return (module(x) * module.scale - x).float().square().mean()


def captured(url: Any, step: int) -> dict[str, Any]:
    with asymcheck.open_checkpoint(url, step) as checkpoint:
        paths = [path for path in checkpoint.leaves if path.startswith("gradients/")]
        arrays = {path: np.array(checkpoint[path][...]) for path in paths}
    return {path.removeprefix("gradients/"): array for path, array in arrays.items()}


def attach(url: Any, module: Any, optimizer: Any, **options: Any) -> Any:
    return asymcheck_torch.attach(
        module, optimizer, url=url, strategy=REPLAY, max_chain=10, max_to_keep=None, **options
    )


def test_they_are_those_that_the_optimizer_was_given(tmp_path):
    module = net()
    first, second = module[0].parameters(), [*module[2].parameters(), module.scale, module.unused]
    optimizers = [torch.optim.AdamW(first, lr=1e-3), torch.optim.SGD(second, lr=1e-3)]
    expected: list[dict[str, Any]] = []
    with attach(tmp_path, module, optimizers, capture_gradients=True) as checkpointer:
        for _ in range(STEPS):
            loss_of(module, torch.randn(8, WIDTH)).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in module.named_parameters()
            }
            expected.append(gradients)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()  # before the other one has stepped
        checkpointer.wait()
        assert sum(checkpointer.stall_s.values()) > 0
    for step, gradients in enumerate(expected, 1):
        found = captured(tmp_path, step)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert np.array_equal(found[name], gradient.numpy()), name


def test_they_are_unscaled(tmp_path):
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with attach(tmp_path, module, optimizer, capture_gradients=True):
        x = torch.randn(8, WIDTH)
        scaler.scale(loss_of(module, x)).backward()
        scaled = module[0].weight.grad.clone()
        scaler.step(optimizer)
        scaler.update()
    assert np.array_equal(captured(tmp_path, 1)["0.weight"], (scaled / 1024).numpy())


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True, "foreach": True},
        {"nesterov": True, "fused": True},
        {"nesterov": False, "foreach": True},
        {"nesterov": True, "foreach": False},
    ],
    ids=str,
)
def test_they_are_what_sgd_was_given_whatever_it_leaves(options, closure, tmp_path):
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9, **options)
    given: list[Any] = []

    def backward() -> Any:
        optimizer.zero_grad()
        loss = loss_of(module, torch.randn(8, WIDTH))
        loss.backward()
        given.append(module[0].weight.grad.clone())
        return loss

    with attach(tmp_path, module, optimizer, capture_gradients=True):
        for _ in range(2):
            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
    is_spoiled = closure and options == {"nesterov": True, "foreach": True}
    found = captured(tmp_path, 2)["0.weight"]
    assert np.array_equal(found, given[1].numpy()) is not is_spoiled


def test_what_an_update_leaves_alone_has_zeros(tmp_path):
    module = net()
    optimizers = [torch.optim.SGD(module[k].parameters(), lr=1e-2) for k in (0, 2)]
    with attach(tmp_path, module, optimizers, capture_gradients=True):
        for step in range(2):
            loss_of(module, torch.randn(8, WIDTH)).backward()
            if step == 0:
                optimizers[0].step()
            optimizers[1].step()
    assert captured(tmp_path, 1)["0.weight"].any()
    assert not captured(tmp_path, 2)["0.weight"].any()
    assert captured(tmp_path, 2)["2.weight"].any()


def test_copies_are_those_of_living_parameters():
    gradients = Gradients()
    for _ in range(20):
        parameters = [nn.Parameter(torch.zeros(4)) for _ in range(10)]
        for parameter in parameters:
            assert not gradients.of(parameter).any()
            parameter.grad = torch.ones(4)
        gradients.take(parameters)
        assert all(gradients.of(parameter).all() for parameter in parameters)
        gradients.end_update()
        del parameter
        parameters.clear()
        assert len(gradients._copies) == 0
    module = nn.Linear(2, 2)
    module.weight.grad = torch.ones(2, 2)
    gradients.take([module.weight])
    module.double()
    module.weight.grad = torch.ones(2, 2, dtype=torch.float64)
    gradients.take([module.weight])
    assert gradients.of(module.weight).dtype == torch.float64


def test_sparse_ones_are_stored_whole(tmp_path):
    module = nn.Embedding(40, 6, sparse=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with attach(tmp_path, module, optimizer, capture_gradients=True):
        module(torch.tensor([3, 5, 3])).square().sum().backward()
        expected = module.weight.grad.to_dense()
        optimizer.step()
    assert np.array_equal(captured(tmp_path, 1)["weight"], expected.numpy())


@pytest.mark.parametrize("then", [False, True])
def test_they_are_not_restored(then, tmp_path):
    """Runs go on bit for bit, whether or not they capture gradients themselves."""

    def train(module: Any, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            loss_of(module, torch.randn(8, WIDTH)).backward()
            optimizer.step()
            optimizer.zero_grad()

    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    with attach(tmp_path, module, optimizer, capture_gradients=True) as checkpointer:
        train(module, optimizer, 2)
        checkpointer.wait()
        train(module, optimizer, 2)
    expected = copy.deepcopy([module.state_dict(), optimizer.state_dict()["state"]])
    module = net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    with attach(tmp_path, module, optimizer, capture_gradients=then) as checkpointer:
        assert checkpointer.restore(2) == 2
        assert all(parameter.grad is None for parameter in module.parameters())
        checkpointer.checkpointer.discard_after(2)
        train(module, optimizer, 2)
    assert differences([module.state_dict(), optimizer.state_dict()["state"]], expected) == []
    assert bool(captured(tmp_path, 4)) == then


def replayed_ratio(url: Any, step: int) -> float:
    """Stored to raw bytes of the matrices, their moments and gradients."""
    with closing(open_store(url)) as store:
        blocks = [b for b in load_index(store, step).blocks() if len(b.box.leaf.shape) == 2]
    assert all(block.codec.id == "replay" or block.block.count < 4096 for block in blocks)
    assert "gradients" in {block.box.leaf.kind for block in blocks}
    return sum(b.block.nbytes for b in blocks) / sum(b.nbytes for b in blocks)


# The largest part of weights, moments and gradients that a step may take.
MAKERS: dict[str, tuple[Any, Any, float]] = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-3), torch.float32, 0.11),
    "adam-l2": (lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=1e-2), torch.float32, 0.11),
    "sgd-nesterov": (
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        torch.float32,
        0.14,
    ),
    "adamw-maximize": (lambda p: torch.optim.AdamW(p, lr=1e-5, maximize=True), torch.float32, 0.4),
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-2), torch.float32, 0.2),
    "low-fused": (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), torch.bfloat16, 0.2),
    "low": (lambda p: torch.optim.AdamW(p, lr=1e-3), torch.bfloat16, 0.24),
}


@pytest.mark.parametrize("name", MAKERS)
def test_everything_follows_from_them(name, tmp_path):
    make, dtype, limit = MAKERS[name]
    module = net(dtype)
    optimizer = make(module.parameters())
    states: list[Any] = []
    with attach(tmp_path, module, optimizer, capture_gradients=True) as checkpointer:
        for _ in range(STEPS):
            x = torch.randn(8, WIDTH, dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                loss = loss_of(module, x)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
            states.append(copy.deepcopy([module.state_dict(), optimizer.state_dict()["state"]]))
        checkpointer.wait()
    for step in range(2, STEPS + 1):
        assert replayed_ratio(tmp_path, step) < limit
    for step, expected in enumerate(states, 1):
        module = net(dtype)
        optimizer = make(module.parameters())
        with attach(tmp_path, module, optimizer) as checkpointer:
            assert checkpointer.restore(step) == step
        assert differences([module.state_dict(), optimizer.state_dict()["state"]], expected) == []
