"""Restoring: compared before anything changes, read in place, never a mixture."""

from __future__ import annotations

import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_runs import (  # noqa: E402
    Run,
    differences,
    everything,
    mlp,
    plain_step,
    raw,
    seed_all,
    simple,
)

import asymcheck  # noqa: E402
import asymcheck_torch  # noqa: E402
from asymcheck.errors import (  # noqa: E402
    CheckpointNotFoundError,
    CorruptionError,
    StateMismatchError,
    UnsupportedStateError,
)
from asymcheck.stores import open_store  # noqa: E402

ADAM = simple(lambda p: torch.optim.Adam(p, lr=1e-2))


def saved_run(url, steps=3, build=ADAM, **options):
    seed_all(1)
    run = build()
    with run.attach(url, **options):
        run.train(0, steps)
    return run


def damage(url, step):
    """Flip a bit in the middle of a pack of a step."""
    store = open_store(url)
    key = next(k for k in store.list("data/") if f"/{step:016d}-" in k and k.endswith(".pack"))
    data = bytearray(store.get(key, 1 << 30))
    data[len(data) // 2] ^= 1
    store.delete(key)
    store.put(key, memoryview(bytes(data)))


# -- mismatches ----------------------------------------------------------------------------


def test_every_difference_is_listed_and_nothing_changes():
    saved_run("memory://mismatch")
    module = nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 10).double(), nn.Linear(3, 3)
    )
    module.register_buffer("mean", torch.zeros(2))
    optimizer = torch.optim.Adam(module[0].parameters())
    run = Run(module, [optimizer], lambda _i: torch.zeros(()))
    before = everything(run)
    with run.attach("memory://mismatch") as ckpt, pytest.raises(StateMismatchError) as caught:
        ckpt.restore()
    message = str(caught.value)
    for part in [
        "parameter '3.weight' is missing in it",
        "'3.bias' is missing in it",
        "'2.weight' has shape [10, 24], in it [12, 24]",
        "'2.bias' has shape [10], in it [12]",
        "buffer 'mean' is missing in it",
        "optimizer 0, group 0: parameter '2.weight' is only in it",
    ]:
        assert part in message
    assert differences(everything(run), before) == []


def test_another_dtype_is_a_mismatch_never_a_cast():
    saved_run("memory://dtype-mismatch")
    module = mlp().double()
    with pytest.raises(StateMismatchError, match=r"'0.weight' is torch.float64, in it float32"):
        asymcheck_torch.attach(module, url="memory://dtype-mismatch").restore()


def test_numbers_of_optimizers_and_groups_must_agree():
    saved_run("memory://numbers-mismatch")
    module = mlp()
    two = [torch.optim.Adam(module[i].parameters()) for i in (0, 2)]
    with (
        asymcheck_torch.attach(module, two, url="memory://numbers-mismatch") as ckpt,
        pytest.raises(StateMismatchError, match="here are 2 optimizers, in it 1"),
    ):
        ckpt.restore()
    groups = torch.optim.Adam([{"params": module[i].parameters()} for i in (0, 2)])
    with (
        asymcheck_torch.attach(module, groups, url="memory://numbers-mismatch") as ckpt,
        pytest.raises(StateMismatchError, match="2 parameter groups, in it 1"),
    ):
        ckpt.restore()


def test_extra_state_must_agree():
    run = saved_run("memory://extra-mismatch")
    run.extras["generator"] = torch.Generator()
    with (
        run.attach("memory://extra-mismatch") as ckpt,
        pytest.raises(StateMismatchError, match="extra state 'generator' is missing in it"),
    ):
        ckpt.restore()


def test_tied_here_but_not_there():
    class Two(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    def build(tied):
        module = Two(tied)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return Run(module, [optimizer], lambda _i: plain_step(module, optimizer))

    saved_run("memory://untied", build=lambda: build(False))
    with (
        build(True).attach("memory://untied") as ckpt,
        pytest.raises(StateMismatchError, match=r"'a\.weight' and 'b\.weight' are tied"),
    ):
        ckpt.restore()


def test_a_checkpoint_of_something_else_is_no_damage():
    with asymcheck.Checkpointer("memory://foreign") as ckpt:
        ckpt.save(1, {"w": np.ones(3)})
    with (
        ADAM().attach("memory://foreign") as ckpt,
        pytest.raises(StateMismatchError, match="not one of asymcheck_torch"),
    ):
        ckpt.restore()
    assert asymcheck.Checkpointer("memory://foreign").steps() == [1]


# -- which step ----------------------------------------------------------------------------


def test_a_missing_step_raises():
    saved_run("memory://missing-step")
    with ADAM().attach("memory://missing-step") as ckpt:
        with pytest.raises(CheckpointNotFoundError):
            ckpt.restore(7)
        assert ckpt.restore(2) == 2


def test_damage_falls_back_loudly_or_raises_when_asked_by_number(caplog):
    url = "memory://damaged"
    seed_all(1)
    run = ADAM()
    with run.attach(url, max_chain=0) as ckpt:
        run.train(0, 2)
        ckpt.wait()
        expected = everything(run)
        run.train(2, 3)
    damage(url, 3)
    seed_all(9)
    resumed = ADAM()
    with resumed.attach(url, max_chain=0) as ckpt:
        with pytest.raises(CorruptionError):
            ckpt.restore(3)
        with caplog.at_level(logging.ERROR, "asymcheck"):
            assert ckpt.restore() == 2
        assert "step 3 cannot be restored" in caplog.text
        assert differences(everything(resumed), expected) == []
        resumed.train(2, 4)
        ckpt.wait()
        assert ckpt.checkpointer.steps() == [1, 2, 3, 4]
    assert (
        differences(dict(resumed.module.state_dict()), dict(asymcheck_torch.load(url, 4)["params"]))
        == []
    )


def test_only_damaged_checkpoints_raise_instead_of_starting_afresh():
    saved_run("memory://all-damaged", steps=1)
    damage("memory://all-damaged", 1)
    with ADAM().attach("memory://all-damaged") as ckpt, pytest.raises(CheckpointNotFoundError):
        ckpt.restore()
    with pytest.raises(CheckpointNotFoundError):
        asymcheck_torch.load("memory://all-damaged")


# -- in place ------------------------------------------------------------------------------


def test_restores_into_the_tensors_that_exist():
    run = saved_run("memory://in-place")
    entry = run.optimizers[0].state[run.module[0].weight]
    addresses = {k: v.data_ptr() for k, v in entry.items()}
    weight = run.module[0].weight.data_ptr()
    expected = everything(run)
    with torch.no_grad():
        run.module[0].weight.zero_()
        entry["exp_avg"].zero_()
    with run.attach("memory://in-place") as ckpt:
        ckpt.restore()
    entry = run.optimizers[0].state[run.module[0].weight]
    assert run.module[0].weight.data_ptr() == weight
    assert {k: v.data_ptr() for k, v in entry.items()} == addresses
    assert differences(everything(run)["optimizers"], expected["optimizers"]) == []


def test_optimizer_state_is_created_where_torch_would_put_it():
    saved_run("memory://created")
    run = ADAM()
    with run.attach("memory://created") as ckpt:
        ckpt.restore()
    for parameter, entry in run.optimizers[0].state.items():
        assert entry["step"].device.type == "cpu"
        assert entry["step"].shape == ()
        assert entry["exp_avg"].shape == parameter.shape
        assert entry["exp_avg"].stride() == parameter.stride()


def test_options_keep_their_types():
    def build():
        module = mlp()
        optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.5), betas=(0.8, 0.9))
        return Run(module, [optimizer], lambda _i: plain_step(module, optimizer))

    saved_run("memory://options", build=build)
    module = mlp()
    optimizer = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.1))
    held = optimizer.param_groups[0]["lr"]
    with asymcheck_torch.attach(module, optimizer, url="memory://options") as ckpt:
        ckpt.restore()
    group = optimizer.param_groups[0]
    assert group["lr"] is held
    assert held == 0.5
    assert group["betas"] == (0.8, 0.9)
    assert type(group["betas"]) is tuple


def test_a_run_can_be_rolled_back_within_a_process():
    seed_all(1)
    run = ADAM()
    with run.attach("memory://rollback", max_to_keep=None) as ckpt:
        run.train(0, 2)
        ckpt.wait()
        at_two = everything(run)
        losses = run.train(2, 4)
        assert ckpt.restore(2) == 2
        assert differences(everything(run), at_two) == []
        ckpt.checkpointer.discard_after(2)
        assert run.train(2, 4) == losses


def test_state_that_the_checkpoint_does_not_have_is_gone():
    """The second layer has no momentum yet at step 1."""

    def build():
        module = mlp()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

        def iterate(i):
            module[2].requires_grad_(i > 0)
            return plain_step(module, optimizer)

        return Run(module, [optimizer], iterate)

    run = saved_run("memory://gone", build=build, max_to_keep=None)
    assert len(run.optimizers[0].state) == 4
    with run.attach("memory://gone") as ckpt:
        ckpt.restore(1)
    state = run.optimizers[0].state
    assert [run.module[0].weight in state, run.module[2].weight in state] == [True, False]


def test_an_optimizer_that_keeps_other_state_does_not_fit():
    saved_run("memory://adam")
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in module.parameters()]
    with (
        asymcheck_torch.attach(module, optimizer, url="memory://adam") as ckpt,
        pytest.raises(StateMismatchError, match="the optimizer is SGD, in it Adam,"),
    ):
        ckpt.restore()
    assert all(map(torch.equal, before, module.parameters()))


def test_restoring_drops_gradients():
    """The state of a step is that right after its update; gradients are no part of it."""
    run = saved_run("memory://gradients")
    run.module(torch.ones(2, 12)).sum().backward()
    with run.attach("memory://gradients") as ckpt:
        ckpt.restore()
    assert [parameter.grad for parameter in run.module.parameters()] == [None] * 4


# -- without an optimizer ------------------------------------------------------------------


def test_weights_alone_for_an_evaluation():
    run = saved_run("memory://evaluation")
    module = mlp()
    generators = torch.get_rng_state()
    with asymcheck_torch.attach(module, url="memory://evaluation") as ckpt:
        assert ckpt.restore() == 3
    assert differences(dict(module.state_dict()), dict(run.module.state_dict())) == []
    assert torch.equal(torch.get_rng_state(), generators)


def test_a_wrapped_module_restores_from_a_bare_one():
    run = saved_run("memory://wrapped")
    module = mlp()
    compiled = torch.compile(module, backend="eager")
    with asymcheck_torch.attach(compiled, url="memory://wrapped") as ckpt:
        ckpt.restore()
    assert differences(dict(module.state_dict()), dict(run.module.state_dict())) == []


# -- load ----------------------------------------------------------------------------------


def test_load_gives_tensors_of_every_dtype_that_torch_has():
    dtypes = [d for n, d in asymcheck.state.DTYPES.items() if hasattr(torch, n)]
    state = {
        "arrays": [np.arange(6).astype(d).reshape(2, 3) for d in dtypes],
        "plain": (1, 2.5, None, "x", b"bytes", {"n": np.float32(3)}),
        "empty": np.zeros((0, 2), np.float32),
        "scalar": np.asarray(7, np.int16),
    }
    with asymcheck.Checkpointer("memory://load") as ckpt:
        ckpt.save(5, state)
    loaded = asymcheck_torch.load("memory://load")
    for array, tensor in zip(state["arrays"], loaded["arrays"], strict=True):
        assert str(tensor.dtype).removeprefix("torch.") == array.dtype.name
        assert tuple(tensor.shape) == array.shape
        assert raw(tensor) == array.tobytes()
    assert loaded["plain"] == state["plain"]
    assert type(loaded["plain"][5]["n"]) is np.float32
    assert loaded["empty"].shape == (0, 2)
    assert loaded["scalar"].shape == ()


def test_load_names_the_dtype_that_torch_lacks():
    with asymcheck.Checkpointer("memory://lacking") as ckpt:
        ckpt.save(1, {"x": np.zeros(3, asymcheck.state.DTYPES["float8_e3m4"])})
    with pytest.raises(UnsupportedStateError, match="float8_e3m4"):
        asymcheck_torch.load("memory://lacking")


def test_load_of_a_training_state():
    run = saved_run("memory://state")
    state = asymcheck_torch.load("memory://state", 3)
    assert set(state) == {
        "params", "buffers", "exp_avg", "exp_avg_sq", "step", "optimizers", "module_extra",
        "ranks", "world_size",
    }  # fmt: skip
    assert differences(state["params"], dict(run.module.state_dict())) == []
    assert state["world_size"] == 1
    assert state["optimizers"][0]["param_groups"][0]["params"] == [
        "0.weight", "0.bias", "2.weight", "2.bias",
    ]  # fmt: skip
    assert type(state["ranks"]["0"]["rng"]["python"]["words"]) is np.ndarray
    assert isinstance(state["ranks"]["0"]["rng"]["torch"], torch.Tensor)


def test_a_checkpoint_opens_without_torch_objects():
    run = saved_run("memory://framework-free")
    with asymcheck.open_checkpoint("memory://framework-free") as checkpoint:
        weight = checkpoint["params/0.weight"][...]
        checkpoint.verify()
    assert weight.tobytes() == raw(run.module[0].weight)
