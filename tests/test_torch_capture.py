"""I3: a snapshot holds what was there right after the update, whatever training does since."""

from __future__ import annotations

import copy
import logging

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.func import functional_call, vmap  # noqa: E402
from torch_runs import Run, copied, differences, mlp, plain_step, seed_all, simple  # noqa: E402

import asymcheck_torch  # noqa: E402
from asymcheck.errors import (  # noqa: E402
    CheckpointNotFoundError,
    SaveFailedError,
    StepExistsError,
    StoreFullError,
    UnsupportedStateError,
)
from asymcheck.stores import open_store  # noqa: E402


def record_updates(run):
    """{step: state right after its update}, noted by a hook of the test's own."""
    seen = {}

    def note(_optimizer, _args, _kwargs):
        seen[len(seen) + 1] = live_state(run)

    run.optimizers[-1].register_step_post_hook(note)
    return seen


def live_state(run):
    names = {id(p): name for name, p in run.module.named_parameters()}
    buffers = set(dict(run.module.named_buffers())) & set(run.module.state_dict())
    state = {
        "params": {n: p.detach() for n, p in run.module.named_parameters()},
        "buffers": {n: b for n, b in run.module.named_buffers() if n in buffers},
    }
    for parameter, entry in run.optimizers[0].state.items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                state.setdefault(key, {})[names[id(parameter)]] = value
    return copied(state)


def assert_stored(url, seen):
    """Every step noted is stored, bit for bit."""
    for step, expected in seen.items():
        found = asymcheck_torch.load(url, step)
        assert differences({kind: found[kind] for kind in expected}, expected) == [], step


class Adversary(torch.optim.Optimizer):
    """Overwrites every parameter and moment the moment the barrier lets it."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        everything = [p for group in self.param_groups for p in group["params"]]
        everything += [t for entry in self.state.values() for t in entry.values()]
        for tensor in everything:
            tensor.fill_(float("nan"))
        for group in self.param_groups:
            for parameter in group["params"]:
                entry = self.state[parameter]
                for key in ("first", "second"):
                    if key not in entry:
                        entry[key] = torch.empty_like(parameter)
                    entry[key].copy_(torch.randn(parameter.shape))
                parameter.copy_(torch.randn(parameter.shape))


class Hostile(nn.Module):
    """A forward pass that changes its buffers before anything else happens in it."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, width)
        )
        self.register_buffer("noise", torch.zeros(width * width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.noise.normal_()
        self.calls += 1
        return self.inner(x)


@pytest.mark.parametrize("strategy", ["asymcheck", "asymcheck-naive", "synchronous"])
def test_adversarial_training(strategy):
    seed_all(3)
    module = Hostile(700)  # 2 MB a weight, so that copying takes a while
    optimizer = Adversary(module.parameters())

    def iterate(_i):
        loss = module(torch.randn(8, 700)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    run = Run(module, [optimizer], iterate)
    seen = record_updates(run)
    url = f"memory://adversary-{strategy}"
    with run.attach(url, strategy=strategy, max_to_keep=None):
        run.train(0, 6)
    assert len(seen) == 6
    assert_stored(url, seen)


def test_batch_norm_statistics_are_those_after_the_update():
    seed_all(3)
    module = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Dropout(0.5))
    optimizer = torch.optim.Adam(module.parameters())
    run = Run(module, [optimizer], lambda _i: plain_step(module, optimizer))
    seen = record_updates(run)
    with run.attach("memory://bn-statistics", max_to_keep=None) as ckpt:
        run.train(0, 4)
        module(torch.randn(5, 12))  # changes the statistics once more, before the barrier
        ckpt.wait()
        assert seen[4]["buffers"]["1.num_batches_tracked"] == 4
        assert module[1].num_batches_tracked == 5
        assert_stored("memory://bn-statistics", seen)


def test_a_submodule_called_by_itself_begins_the_capture():
    """The root's forward pass never runs; the statistics of the part that does are safe."""
    module = nn.ModuleDict({"a": nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12))})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def iterate(_i):
        return plain_step(module["a"], optimizer)

    run = Run(module, [optimizer], iterate)
    seen = record_updates(run)
    with run.attach("memory://part", max_to_keep=None):
        run.train(0, 3)
    assert_stored("memory://part", seen)


def test_without_any_forward_pass_the_barrier_captures_all():
    parameter = nn.Parameter(torch.randn(50, 50))
    module = nn.ParameterList([parameter])
    optimizer = torch.optim.Adam([parameter])

    def iterate(_i):
        parameter.grad = torch.randn(50, 50)
        optimizer.step()
        return parameter.sum()

    run = Run(module, [optimizer], iterate)
    seen = record_updates(run)
    with run.attach("memory://no-forward", max_to_keep=None):
        run.train(0, 4)
    assert_stored("memory://no-forward", seen)


def test_an_evaluation_with_swapped_weights_is_not_captured():
    seed_all(5)
    module = mlp()
    average = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.Adam(module.parameters())

    def iterate(_i):
        loss = plain_step(module, optimizer)
        trained = copy.deepcopy(module.state_dict())
        module.load_state_dict(average)
        module.eval()
        with torch.no_grad():
            module(torch.randn(3, 12))
        module.train()
        module.load_state_dict(trained)
        return loss

    run = Run(module, [optimizer], iterate)
    seen = record_updates(run)
    with run.attach("memory://swap", max_to_keep=None):
        run.train(0, 4)
    assert_stored("memory://swap", seen)


def lent_call(module, x):
    """A pass with weights and buffers that are not the module's own."""
    lent = {n: torch.full_like(t, 7.0) for n, t in [*params_of(module), *module.named_buffers()]}
    return functional_call(module, lent, (x,))


def lent_weights_call(module, x):
    return functional_call(module, {n: p.detach() * 2 for n, p in params_of(module)}, (x,))


def gradient_by_weights(module, x):
    weights = {n: p.detach() for n, p in params_of(module)}
    return torch.func.grad(lambda w: functional_call(module, w, (x,)).sum())(weights)


def gradient_by_input(module, x):
    """As of networks that solve differential equations."""
    return vmap(torch.func.grad(lambda row: module(row).sum()))(x)


def ensemble(module, x):
    stacked = {n: torch.stack([p.detach(), -p.detach()]) for n, p in params_of(module)}
    return vmap(lambda w: functional_call(module, w, (x,)))(stacked)


def params_of(module):
    return list(module.named_parameters())


@pytest.mark.parametrize(
    ("call", "make"),
    [
        (lent_call, lambda: Hostile(12)),
        (lent_weights_call, lambda: Hostile(12)),
        (gradient_by_weights, mlp),
        (gradient_by_input, mlp),
        (ensemble, mlp),
    ],
)
def test_functional_passes_neither_disturb_nor_are_disturbed(call, make):
    """Whatever stands in for the weights, those after the update are captured, and at once."""
    seed_all(5)
    module = make()
    optimizer = torch.optim.Adam(module.parameters())
    begun = []

    def iterate(_i):
        call(module, torch.randn(6, 12))
        begun.append(checkpointer._capture is not None)
        assert all(isinstance(p, nn.Parameter) for p in module.parameters())
        return plain_step(module, optimizer)

    run = Run(module, [optimizer], iterate)
    seen = record_updates(run)
    name = call.__name__
    with run.attach(f"memory://{name}", max_to_keep=None) as checkpointer:
        run.train(0, 4)
    assert_stored(f"memory://{name}", seen)
    assert begun == [False, True, True, True]  # before the first update there is nothing


def test_a_parameter_that_replaces_another_is_captured():
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with asymcheck_torch.attach(module, optimizer, url="memory://replaced") as checkpointer:
        plain_step(module, optimizer)
        module[0].weight = new = nn.Parameter(torch.full((24, 12), 3.0))
        module(torch.randn(3, 12))
        checkpointer.wait()
    assert torch.equal(asymcheck_torch.load("memory://replaced", 1)["params"]["0.weight"], new)


def test_weights_clipped_after_the_update_are_what_is_captured():
    """Between step() and the next forward pass the loop may still change the weights."""
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    run = Run(module, [optimizer], lambda _i: plain_step(module, optimizer))
    with run.attach("memory://clipped") as ckpt:
        run.train(0, 1)
        with torch.no_grad():
            module[0].weight.fill_(0.25)
        run.train(1, 2)
        ckpt.wait()
    saved = asymcheck_torch.load("memory://clipped", 1)
    assert torch.all(saved["params"]["0.weight"] == 0.25)


def test_generators_are_those_right_after_the_update():
    """The loop draws its next batch before the next forward pass."""
    run = simple(lambda p: torch.optim.SGD(p, lr=0.1))()
    states = []
    run.optimizers[0].register_step_post_hook(lambda *_: states.append(torch.get_rng_state()))
    with run.attach("memory://after-update", max_to_keep=None):
        run.train(0, 3)
    for step, expected in enumerate(states, 1):
        rng = asymcheck_torch.load("memory://after-update", step)["ranks"]["0"]["rng"]
        assert torch.equal(rng["torch"], expected)


def test_forward_passes_inside_a_closure_begin_nothing():
    """LBFGS evaluates the model while it changes the weights."""
    module = mlp()
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    def iterate(_i):
        def closure():
            optimizer.zero_grad()
            loss = module(torch.ones(2, 12)).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure)

    run = Run(module, [optimizer], iterate)
    weights = {}
    optimizer.register_step_post_hook(
        lambda *_: weights.setdefault(len(weights) + 1, copied(dict(module.named_parameters())))
    )
    with run.attach("memory://closure", max_to_keep=None):
        run.train(0, 4)
    for step, expected in weights.items():
        found = asymcheck_torch.load("memory://closure", step)["params"]
        assert differences(found, {n: p.data for n, p in expected.items()}) == []


def test_a_capture_is_finished_before_another_optimizer_changes_the_weights():
    module = nn.ModuleDict({"a": mlp(), "b": mlp()})
    first = torch.optim.SGD(module["a"].parameters(), lr=0.1)
    last = torch.optim.SGD(module["b"].parameters(), lr=0.1)
    seen = {}
    last.register_step_post_hook(
        lambda *_: seen.setdefault(len(seen) + 1, copied(dict(module.state_dict())))
    )
    url = "memory://two"
    with asymcheck_torch.attach(module, [first, last], url=url, max_to_keep=None) as ckpt:
        for _ in range(3):
            loss = (module["b"](module["a"](torch.randn(4, 12)))).square().mean()
            loss.backward()
            first.step()
            last.step()
        assert ckpt.step == 3
    for step, expected in seen.items():
        assert differences(asymcheck_torch.load(url, step)["params"], expected) == []


def test_wait_captures_in_the_middle_of_a_step():
    run = simple(lambda p: torch.optim.Adam(p))()
    seen = record_updates(run)
    with run.attach("memory://middle") as ckpt:
        run.train(0, 2)
        run.module(torch.randn(2, 12)).sum().backward()
        ckpt.wait()
        assert ckpt.checkpointer.steps() == [1, 2]
    assert_stored("memory://middle", seen)


def test_save_now():
    run = simple(lambda p: torch.optim.Adam(p))()
    seen = record_updates(run)
    with run.attach("memory://now", every_steps=10) as ckpt:
        run.train(0, 3)
        ckpt.save_now()
        ckpt.save_now()
        ckpt.wait()
        assert ckpt.checkpointer.steps() == [3]
        run.train(3, 4)
        run.module(torch.randn(2, 12))
        with pytest.raises(SaveFailedError, match="forward pass has begun"):
            ckpt.save_now()
        ckpt.restore(3)
        ckpt.save_now()  # there already
        assert ckpt.checkpointer.steps() == [3]
    assert_stored("memory://now", {3: seen[3]})


def test_save_now_late_takes_the_generator_as_it_is_now():
    run = simple(lambda p: torch.optim.Adam(p))()
    seen = record_updates(run)
    with run.attach("memory://late", every_steps=10) as ckpt:
        run.train(0, 2)
        run.module(torch.randn(2, 12))
        generator = torch.get_rng_state()
        ckpt.save_now(late=True)
        torch.manual_seed(5)
        ckpt.restore()
        assert torch.equal(torch.get_rng_state(), generator)
    assert_stored("memory://late", {2: seen[2]})


def test_every_steps_is_at_least_one():
    run = simple(lambda p: torch.optim.Adam(p))()
    with pytest.raises(ValueError, match="every_steps is 0"):
        run.attach("memory://never", every_steps=0)


# -- failures ------------------------------------------------------------------------------


class FullStore:
    """A store that has no room for the packs of some steps."""

    def __init__(self, url, full_steps):
        self._store = open_store(url)
        self._full = [f"/{step:016d}" for step in full_steps]

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put(self, key, data):
        if any(step in f"/{key}" for step in self._full):
            raise StoreFullError("the test's disk is full", object=key)
        self._store.put(key, data)


def test_a_failed_save_surfaces_in_the_loop_and_changes_nothing():
    run = simple(lambda p: torch.optim.Adam(p))()
    seen = record_updates(run)
    store = FullStore("memory://full-raise", [2])
    ckpt = asymcheck_torch.attach(run.module, run.optimizers, url=store, max_to_keep=None)
    run.train(0, 2)
    with pytest.raises(SaveFailedError, match="disk is full"):
        ckpt.wait()
    assert differences(live_state(run), seen[2]) == []
    run.train(2, 4)
    ckpt.close()
    assert ckpt.step == 4
    del seen[2]
    assert_stored("memory://full-raise", seen)


def test_a_failed_save_raises_inside_the_loop_before_the_update():
    run = simple(lambda p: torch.optim.Adam(p))()
    seen = record_updates(run)
    store = FullStore("memory://full-loop", [2])
    ckpt = asymcheck_torch.attach(run.module, run.optimizers, url=store)
    run.train(0, 2)
    ckpt.save_now()
    while not ckpt.checkpointer._last.finished.wait(10):
        pass
    with pytest.raises(SaveFailedError, match="disk is full"):
        run.train(2, 3)
    assert differences(live_state(run), seen[2]) == []
    ckpt.close()


def test_warnings_instead_of_errors(caplog):
    run = simple(lambda p: torch.optim.Adam(p))()
    seen = record_updates(run)
    store = FullStore("memory://full-warn", [2])
    with (
        caplog.at_level(logging.ERROR, "asymcheck"),
        run.attach(store, on_error="warn", max_to_keep=None) as ckpt,
    ):
        run.train(0, 4)
        ckpt.wait()
    assert "disk is full" in caplog.text
    del seen[2]
    assert_stored("memory://full-warn", seen)


def test_a_committed_step_is_never_overwritten():
    build = simple(lambda p: torch.optim.Adam(p))
    run = build()
    with run.attach("memory://again"):
        run.train(0, 2)
    other = build()
    ckpt = other.attach("memory://again")
    with pytest.raises(StepExistsError):
        other.train(0, 2)
    ckpt.close()


class Odd:
    def __init__(self):
        self.held = object()

    def state_dict(self):
        return {"inner": [1, self.held]}

    def load_state_dict(self, state):
        raise AssertionError("never saved")


def test_what_cannot_be_stored_is_named_and_nothing_is_saved():
    run = simple(lambda p: torch.optim.Adam(p))()
    run.extras["odd"] = Odd()
    ckpt = run.attach("memory://odd")
    with pytest.raises(UnsupportedStateError) as caught:
        run.train(0, 2)
    assert caught.value.leaf == "ranks/0/extra/odd/inner/1"
    assert ckpt.step == 1
    ckpt.close()
    with pytest.raises(CheckpointNotFoundError):
        asymcheck_torch.load("memory://odd")


def test_what_cannot_be_stored_only_warns_if_asked_to(caplog):
    run = simple(lambda p: torch.optim.Adam(p))()
    run.extras["odd"] = Odd()
    with (
        caplog.at_level(logging.ERROR, "asymcheck"),
        run.attach("memory://odd-warn", on_error="warn") as ckpt,
    ):
        run.train(0, 3)
        assert ckpt.step == 3
        assert ckpt.checkpointer.steps() == []
    assert "ranks/0/extra/odd" in caplog.text


def test_optimizers_with_a_state_of_their_own_are_refused():
    class Sharded(torch.optim.SGD):
        def state_dict(self):
            return {"mine": 1}

    module = mlp()
    with pytest.raises(UnsupportedStateError, match="overrides state_dict"):
        asymcheck_torch.attach(module, Sharded(module.parameters(), lr=0.1), url="memory://refused")


def test_sparse_parameters_are_refused_by_name():
    module = mlp()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    ckpt = asymcheck_torch.attach(module, optimizer, url="memory://sparse")
    with pytest.raises(UnsupportedStateError) as caught:
        for _ in range(2):
            plain_step(module, optimizer)
    assert caught.value.leaf == "buffers/sparse"
    ckpt.close()


# -- writes that nobody announced --------------------------------------------------------------


@pytest.mark.parametrize(("captured", "announced"), [(False, False), (True, False), (False, True)])
def test_weights_changed_in_the_middle_of_a_step_are_never_saved_as_a_mixture(captured, announced):
    """As sharpness-aware minimisation does: perturb, second pass, and back, without `step()`.

    Torch counts a write when it is over: a copy made meanwhile looks good until the barrier.
    """
    module = mlp(200)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def iterate(_i):
        module(torch.randn(6, 200)).square().mean().backward()
        if announced:
            ckpt.barrier()
        elif captured and ckpt.step:
            assert ckpt._capture.await_captured(30)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        optimizer.step()
        return module[0].bias.sum()

    run = Run(module, [optimizer], iterate)
    seen = record_updates(run)
    url = f"memory://perturbed-{captured}-{announced}"
    with run.attach(url, on_error="warn", max_to_keep=None) as ckpt:
        run.train(0, 6)
        ckpt.wait()
        saved = ckpt.checkpointer.steps()
    assert saved == ([1, 2, 3, 4, 5, 6] if announced else [6])  # nothing changed after the last
    assert_stored(url, {step: seen[step] for step in saved})


def test_a_write_before_the_first_window_is_always_seen():
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    ckpt = asymcheck_torch.attach(module, optimizer, url="memory://early-write")

    def disturb(_module, _args):
        with torch.no_grad():
            module[0].weight.mul_(2)

    module.register_forward_pre_hook(disturb)
    plain_step(module, optimizer)
    module(torch.randn(6, 12)).sum().backward()
    with pytest.raises(SaveFailedError, match="changed while it was being captured") as caught:
        ckpt.wait()
    assert caught.value.__cause__.leaf == "params/0.weight"
    assert ckpt.checkpointer.steps() == []
    ckpt.close()


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_renormed_in_the_forward_pass(tied):
    class Renormed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(12, 8, max_norm=0.5)
            self.head = nn.Linear(8, 12)
            if tied:
                self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x).tanh())

    module = Renormed()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)

    def iterate(_i):
        tokens = torch.randint(12, (30,))
        loss = nn.functional.cross_entropy(module(tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    run = Run(module, [optimizer], iterate)
    seen = record_updates(run)
    with run.attach(f"memory://renormed-{tied}", max_to_keep=None):
        run.train(0, 4)
    for state in seen.values() if tied else ():
        state["params"]["head.weight"] = state["params"]["embedding.weight"]
    assert_stored(f"memory://renormed-{tied}", seen)
