"""A resumed run is bit for bit the uninterrupted one: optimizers, schedules, loops of all kinds."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402
from torch_runs import (  # noqa: E402
    Run,
    assert_resumes,
    differences,
    everything,
    mlp,
    plain_step,
    seed_all,
    simple,
)

import asymcheck_torch  # noqa: E402
from asymcheck.commit import committed_steps  # noqa: E402
from asymcheck.stores import LocalStore  # noqa: E402

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-single": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    assert_resumes(simple(OPTIMIZERS[name]), f"memory://optimizer-{name}")


@pytest.mark.parametrize("strategy", ["asymcheck", "asymcheck-s", "asymcheck-naive", "synchronous"])
def test_strategies_on_disk(strategy, tmp_path):
    assert_resumes(simple(OPTIMIZERS["adam"]), tmp_path.as_uri(), strategy=strategy)


def test_without_optimizer_state_before_first_update_there_is_nothing_to_restore():
    run = simple(OPTIMIZERS["adam"])()
    with run.attach("memory://nothing-yet") as ckpt:
        assert ckpt.restore() == 0
        assert ckpt.step == 0


def test_lbfgs_with_closure():
    def build():
        module = mlp()
        optimizer = torch.optim.LBFGS(module.parameters(), lr=0.5, max_iter=4, history_size=3)

        def iterate(_i):
            x = torch.randn(6, 12)

            def closure():
                optimizer.zero_grad()
                loss = (module(x) - x).square().mean()
                loss.backward()
                return loss

            return optimizer.step(closure)

        return Run(module, [optimizer], iterate)

    assert_resumes(build, "memory://lbfgs")


def test_two_optimizers_one_stepped_more_often():
    def build():
        nets = nn.ModuleDict({"g": mlp(), "d": nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))})
        of_d = torch.optim.RMSprop(nets["d"].parameters(), lr=1e-3)
        of_g = torch.optim.Adam(nets["g"].parameters(), lr=1e-3, betas=(0.5, 0.99))

        def iterate(_i):
            for _ in range(2):
                of_d.zero_grad()
                with torch.no_grad():
                    fake = nets["g"](torch.randn(6, 12))
                loss_d = nets["d"](fake).mean() - nets["d"](torch.randn(6, 12)).square().mean()
                loss_d.backward()
                of_d.step()
                with torch.no_grad():
                    for parameter in nets["d"].parameters():
                        parameter.clamp_(-0.1, 0.1)
            of_g.zero_grad()
            loss_g = -nets["d"](nets["g"](torch.randn(6, 12))).square().mean()
            loss_g.backward()
            of_g.step()
            return loss_g

        return Run(nets, [of_d, of_g], iterate)

    assert_resumes(build, "memory://gan")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


def tied_run():
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)

    def iterate(_i):
        tokens = torch.randint(12, (20,))
        loss = nn.functional.cross_entropy(module(tokens), tokens.roll(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Run(module, [optimizer], iterate)


def test_tied_weights():
    assert_resumes(tied_run, "memory://tied")


def test_tied_weights_are_stored_once_and_load_as_one_tensor():
    run = tied_run()
    with run.attach("memory://tied-once") as ckpt:
        run.train(0, 2)
        ckpt.wait()
        checkpoint = asymcheck_torch.load("memory://tied-once")
    params = checkpoint["params"]
    assert params["head.weight"] is params["embedding.weight"]
    assert torch.equal(params["head.weight"], run.module.head.weight)
    assert set(checkpoint["exp_avg"]) == {"embedding.weight", "body.weight", "body.bias"}


def test_frozen_parameters_and_buffers():
    def build():
        module = mlp()
        module[0].requires_grad_(False)
        module.register_buffer("count", torch.zeros((), dtype=torch.int64))
        module.register_buffer("scratch", torch.zeros(3), persistent=False)
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad])
        return Run(module, [optimizer], lambda _i: plain_step(module, optimizer))

    assert_resumes(build, "memory://frozen")
    saved = asymcheck_torch.load("memory://frozen")
    assert set(saved["buffers"]) == {"count"}
    assert "0.weight" in saved["params"]
    assert "0.weight" not in saved["exp_avg"]


def test_parameter_groups_added_later():
    def build():
        module = mlp()
        optimizer = torch.optim.AdamW(module[0].parameters(), lr=1e-2)
        optimizer.add_param_group({"params": list(module[2].parameters()), "lr": 1e-3})
        return Run(module, [optimizer], lambda _i: plain_step(module, optimizer))

    def grow():
        module = mlp()
        optimizer = torch.optim.AdamW(module[0].parameters(), lr=1e-2)
        return Run(module, [optimizer], lambda _i: plain_step(module, optimizer))

    seed_all(1)
    run = grow()
    with run.attach("memory://grown") as ckpt:
        run.train(0, 2)
        group = {"params": list(run.module[2].parameters()), "lr": 1e-3}
        run.optimizers[0].add_param_group(group)
        run.train(2, 4)
        ckpt.wait()
        expected = everything(run)
        resumed = build()
        with resumed.attach("memory://grown") as other:
            assert other.restore() == 4
            assert [g["lr"] for g in resumed.optimizers[0].param_groups] == [1e-2, 1e-3]
            found = everything(resumed)
        assert differences(found, expected) == []


def test_parameters_that_only_the_optimizer_has():
    def build():
        module = mlp()
        temperature = nn.Parameter(torch.ones(()))
        optimizer = torch.optim.Adam([*module.parameters(), temperature], lr=1e-2)

        def iterate(_i):
            x = torch.randn(6, 12)
            loss = ((module(x) - x) * temperature).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate)

    assert_resumes(build, "memory://outside")
    assert "optim0/group0/4" in asymcheck_torch.load("memory://outside")["params"]


def test_gradient_accumulation():
    def build():
        module = mlp()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

        def iterate(_i):
            for _ in range(3):
                x = torch.randn(6, 12)
                loss = (module(x) - x).square().mean() / 3
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate)

    assert_resumes(build, "memory://accumulation")


SCHEDULERS = {
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 3, 6], gamma=0.5),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cosine-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    def build():
        module = mlp()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)

        def iterate(_i):
            loss = plain_step(module, optimizer)
            scheduler.step()
            return loss

        return Run(module, [optimizer], iterate, {"scheduler": scheduler})

    assert_resumes(build, f"memory://scheduler-{name}")


def test_plateau_scheduler():
    def build():
        module = mlp()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)

        def iterate(_i):
            loss = plain_step(module, optimizer)
            scheduler.step(loss.item())
            return loss

        return Run(module, [optimizer], iterate, {"scheduler": scheduler})

    assert_resumes(build, "memory://plateau")


def test_grad_scaler_that_skips_updates():
    """Iterations 1 and 4 overflow: they are no steps, make no checkpoint, and lower the scale."""

    def build():
        module = mlp()
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

        def iterate(i):
            x = torch.randn(6, 12)
            loss = (module(x) - x).square().mean()
            scaler.scale(loss * (float("inf") if i in (1, 4) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate, {"scaler": scaler})

    assert_resumes(build, "memory://scaler", stop=4, total=7, max_to_keep=None)
    seed_all(1)
    run = build()
    with run.attach("memory://scaler-count", max_to_keep=None) as ckpt:
        run.train(0, 6)
        ckpt.wait()
        assert ckpt.step == 4
        assert ckpt.checkpointer.steps() == [1, 2, 3, 4]


def batch_norm_run():
    module = nn.Sequential(
        nn.Linear(12, 16),
        nn.BatchNorm1d(16, momentum=0.3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(16, 12),
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    return Run(module, [optimizer], lambda _i: plain_step(module, optimizer))


def test_batch_norm_and_dropout():
    assert_resumes(batch_norm_run, "memory://batch-norm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes(dtype):
    def build():
        module = mlp().to(dtype)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

        def iterate(_i):
            x = torch.randn(6, 12).to(dtype)
            loss = (module(x) - x).abs().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate)

    assert_resumes(build, f"memory://dtype-{dtype}")


def test_mixed_dtypes_of_parameter_and_state_are_not_cast():
    """bf16 weights with fp32 moments: torch's own load_state_dict would round the moments."""

    class MasterSGD(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.01})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["master"] = p.float()
                        state["calls"] = 0
                    state["calls"] += 1
                    state["master"] -= group["lr"] * p.grad.float()
                    p.copy_(state["master"])

    def build():
        module = mlp().bfloat16()
        optimizer = MasterSGD(module.parameters())

        def iterate(_i):
            x = torch.randn(6, 12).bfloat16()
            loss = (module(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate)

    assert_resumes(build, "memory://master")


def test_tensors_that_are_replaced_at_every_step():
    class Replacing(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.01})

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                old = self.state[parameter].get("mean", torch.zeros_like(parameter))
                self.state[parameter]["mean"] = 0.9 * old + parameter.grad
                parameter.data = parameter - 0.01 * self.state[parameter]["mean"]

    assert_resumes(simple(Replacing), "memory://replaced")


def test_channels_last_parameters():
    def build():
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3))
        module = module.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

        def iterate(_i):
            loss = module(torch.randn(2, 3, 8, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate)

    assert_resumes(build, "memory://channels-last")


def test_python_and_numpy_generators():
    def build():
        module = mlp()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

        def iterate(_i):
            scale = random.random() + np.random.rand() + random.gauss(0, 1) + np.random.randn()
            x = scale * torch.randn(6, 12)
            loss = (module(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate)

    assert_resumes(build, "memory://generators", stop=3)


def test_every_few_steps():
    run = simple(OPTIMIZERS["adam"])()
    with run.attach("memory://every", every_steps=3, max_to_keep=None) as ckpt:
        run.train(0, 8)
        ckpt.wait()
        assert ckpt.checkpointer.steps() == [3, 6]
        assert set(ckpt.stall_s) == {3, 6}


def test_train_on_after_restore_numbers_steps_on():
    build = simple(OPTIMIZERS["adam"])
    for first, last in [(0, 3), (3, 5), (5, 6)]:
        run = build()
        with run.attach("memory://numbers", max_to_keep=None) as ckpt:
            assert ckpt.restore() == first
            run.train(first, last)
    with build().attach("memory://numbers") as ckpt:
        assert ckpt.checkpointer.steps() == [1, 2, 3, 4, 5, 6]


def test_restore_an_older_step_and_train_on_from_it():
    build = simple(OPTIMIZERS["adam"])
    seed_all(1)
    run = build()
    with run.attach("memory://older", max_to_keep=None) as ckpt:
        run.train(0, 3)
        ckpt.wait()
        expected = everything(run)
        run.train(3, 5)
        assert ckpt.restore(3) == 3
        ckpt.checkpointer.discard_after(3)
        assert differences(everything(run), expected) == []
        run.train(3, 5)
        ckpt.wait()
        assert ckpt.checkpointer.steps() == [1, 2, 3, 4, 5]


def test_a_lost_disk_costs_nothing_that_the_mirror_has(tmp_path):
    build = simple(OPTIMIZERS["adam"])
    seed_all(1)
    reference = build()
    losses = reference.train(0, 7)
    expected = everything(reference)
    options = {"mirror": tmp_path / "mirror", "mirror_every": 2, "mirror_max_to_keep": 1}
    seed_all(1)
    run = build()
    with run.attach(tmp_path / "run", **options) as ckpt:
        run.train(0, 5)
        assert ckpt.step == 5
    assert 4 in committed_steps(LocalStore(tmp_path / "mirror"))
    shutil.rmtree(tmp_path / "run")
    seed_all(9)
    run = build()
    with run.attach(tmp_path / "run", **options) as ckpt:
        assert ckpt.restore() == 4
        assert run.train(4, 7) == losses[4:]
        assert differences(everything(run), expected) == []
    assert committed_steps(LocalStore(tmp_path / "run")) == [5, 6, 7]
