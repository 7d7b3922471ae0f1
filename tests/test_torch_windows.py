"""Windows: which blocks, when they open, and that hooks change nothing and go away."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_runs import (  # noqa: E402
    Run,
    assert_resumes,
    differences,
    everything,
    seed_all,
    simple,
)

import asymcheck_torch  # noqa: E402
from asymcheck.inspection.timeline import window_nbytes  # noqa: E402
from asymcheck.partition import Phase  # noqa: E402
from asymcheck.trace import Trace  # noqa: E402
from asymcheck_torch import windows  # noqa: E402
from asymcheck_torch.collectives import Collective  # noqa: E402
from asymcheck_torch.windows import (  # noqa: E402
    MAX_BLOCKS,
    CudaClock,
    Cycle,
    HostClock,
    find_blocks,
    hook_windows,
)

F, B = Phase.FORWARD, Phase.BACKWARD


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return torch.relu(self.inner(x))


class Body(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Layer(8) for _ in range(layers))
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(self.dropout(x))


class Model(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.body = Body(layers)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_blocks_are_the_layers_of_the_heavy_part():
    model = Model(3)
    body = model.body
    assert find_blocks(model) == [body.embed, *body.layers, body.norm]


def test_blocks_of_nested_sequences_and_of_a_single_layer():
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))
    last = nn.Linear(4, 4)
    assert find_blocks(nn.Sequential(inner, last)) == [inner[0], inner[2][0], last]
    single = nn.Linear(3, 3)
    assert find_blocks(single) == [single]


def test_there_are_never_too_many_blocks():
    model = Model(150)
    blocks = find_blocks(model)
    assert MAX_BLOCKS / 2 < len(blocks) <= MAX_BLOCKS
    assert blocks == find_blocks(model)


def opened(model, loop):
    """The windows that open while `loop()` runs, by block index and phase."""
    events = []
    hooks = []
    for index, block in enumerate(find_blocks(model)):
        hooks += hook_windows(block, lambda phase, index=index: events.append((phase, index)))
    loop()
    for hook in hooks:
        hook.remove()
    return events


def test_forward_in_order_backward_in_reverse():
    model = Model(2)
    x = torch.randn(3, 4, requires_grad=True)
    events = opened(model, lambda: model(x).sum().backward())
    assert events == [(F, 0), (F, 1), (F, 2), (F, 3), (B, 3), (B, 2), (B, 1), (B, 0)]


def test_no_windows_without_gradients():
    model = Model(2)

    def evaluate():
        with torch.no_grad():
            model(torch.randn(3, 4))

    assert opened(model, evaluate) == []


def test_recomputed_layers_open_windows_again():
    class Recomputing(Body):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return self.norm(x)

    model = Recomputing(2)
    events = opened(model, lambda: model(torch.randn(3, 4)).sum().backward())
    assert events.count((F, 1)) == 2
    assert (B, 1) in events


@pytest.mark.parametrize("output", ["tuple", "dict", "nested"])
def test_outputs_of_any_kind_are_found(output):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            y = self.inner(x)
            return {"tuple": (None, y), "dict": {"y": y}, "nested": [x.detach(), {"z": (y, 3)}]}[
                output
            ]

    block = Block()
    events = []
    hook_windows(block, events.append)
    result = block(torch.randn(2, 4))
    tensor = {"tuple": lambda: result[1], "dict": lambda: result["y"]}.get(
        output, lambda: result[1]["z"][0]
    )()
    tensor.sum().backward()
    assert events == [F, B]


def test_in_place_operations_after_a_block_still_work():
    """A module's full backward hook would make its output a view that they may not change."""

    def build():
        module = nn.Sequential(nn.Linear(12, 12), nn.ReLU(inplace=True), nn.Linear(12, 12))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

        def iterate(_i):
            x = torch.randn(6, 12)
            y = module(x)
            y += 1
            y.mul_(2)
            loss = y.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate)

    assert_resumes(build, "memory://in-place-ops")


def test_partitions_move_in_windows_and_the_profile_learns():
    seed_all(1)
    module = nn.Sequential(*[nn.Linear(300, 300) for _ in range(4)])
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)

    def iterate(_i):
        loss = module(torch.randn(64, 300)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    run = Run(module, [optimizer], iterate)
    with run.attach("memory://profile") as ckpt:
        run.train(0, 15)
        profile = ckpt.checkpointer.profile
        assert profile.ready
        shape = [(w.phase, w.index) for w in profile.windows()]
        assert shape == [(F, i) for i in range(4)] + [(B, i) for i in range(4)]
        assert all(w.idle_s > 0 for w in profile.windows())
        tracks = {event.track for event in ckpt.checkpointer.trace.events()}
        assert {"window", "copy", "stall"} <= tracks


def test_accumulation_opens_more_windows_and_skipped_steps_do_too():
    run = simple(lambda p: torch.optim.SGD(p, lr=0.1))()
    with run.attach("memory://windows-count") as ckpt:
        for _ in range(3):
            run.module(torch.randn(2, 12)).sum().backward()
        run.train(0, 1)
        assert len(ckpt._cycle.expected) == 4 * 4
        run.train(1, 2)
        assert len(ckpt._cycle.expected) == 4


def test_evaluations_between_steps_do_not_count():
    run = simple(lambda p: torch.optim.SGD(p, lr=0.1))()
    with run.attach("memory://evaluations") as ckpt:
        for i in range(3):
            run.train(i, i + 1)
            run.module.eval()
            with torch.no_grad():
                run.module(torch.randn(2, 12))
            run.module.train()
        assert len(ckpt._cycle.expected) == 4


def hooks_of(run):
    of_modules = [(m._forward_pre_hooks, m._forward_hooks) for m in run.module.modules()]
    of_optimizers = [
        (o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks) for o in run.optimizers
    ]
    return sum(len(hooks) for pair in of_modules + of_optimizers for hooks in pair)


def test_close_removes_every_hook_even_if_it_raises():
    run = simple(lambda p: torch.optim.Adam(p))()
    before = hooks_of(run)
    with run.attach("memory://hooks") as ckpt:
        assert hooks_of(run) > before
        run.train(0, 2)
    assert hooks_of(run) == before
    run.train(2, 3)
    assert ckpt.step == 2
    ckpt.close()


def test_two_checkpointers_on_one_loop():
    run = simple(lambda p: torch.optim.Adam(p))()
    with (
        run.attach("memory://both-often", max_to_keep=None) as often,
        run.attach("memory://both-seldom", every_steps=2, max_to_keep=None) as seldom,
    ):
        run.train(0, 4)
        often.wait()
        seldom.wait()
        assert often.checkpointer.steps() == [1, 2, 3, 4]
        assert seldom.checkpointer.steps() == [2, 4]
    a, b = (asymcheck_torch.load(f"memory://both-{k}", 4) for k in ("often", "seldom"))
    assert differences(a, b) == []


def test_attach_detach_attach():
    build = simple(lambda p: torch.optim.Adam(p))
    seed_all(1)
    reference = build()
    losses = reference.train(0, 6)
    seed_all(1)
    run = build()
    found = []
    for i in range(3):
        with run.attach(f"memory://again-{i}"):
            found += run.train(2 * i, 2 * i + 2)
    assert found == losses
    assert differences(everything(run), everything(reference)) == []


def test_nothing_of_the_model_is_kept_alive():
    run = simple(lambda p: torch.optim.Adam(p))()
    ckpt = run.attach("memory://alive")
    run.train(0, 2)
    ckpt.close()
    model = weakref.ref(run.module)
    del run, ckpt
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile(model)", "model.compile()"])
def test_compiled_models(whole):
    def build():
        torch._dynamo.reset()
        bare = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12))
        if whole:
            module = torch.compile(bare, backend="eager")
        else:
            module = bare
            module.compile(backend="eager")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

        def iterate(_i):
            x = torch.randn(6, 12)
            loss = (module(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Run(module, [optimizer], iterate)

    assert_resumes(build, f"memory://compiled-{whole}", stop=3, total=5)
    saved = asymcheck_torch.load(f"memory://compiled-{whole}", 3)
    assert set(saved["buffers"]) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


# -- communication -------------------------------------------------------------------------

GATHER = Collective("all_gather_into_tensor", 64)


class FollowedCapture:
    """Notes when a capture may copy and when it must pause."""

    def __init__(self):
        self.calls = []

    def enter_window(self, ordinal):
        self.calls.append(ordinal)

    def leave_window(self):
        self.calls.append("pause")


@pytest.fixture
def cycle():
    observed = []
    checkpointer = SimpleNamespace(
        trace=Trace(), profile=SimpleNamespace(observe=observed.append), observed=observed
    )
    found = Cycle(HostClock(), checkpointer)
    found.checkpointer = checkpointer
    found.capture = FollowedCapture()
    found.follow(found.capture)
    return found


def tracks(cycle):
    return [(e.track, e.label) for e in cycle.checkpointer.trace.events()]


def test_collectives_interrupt_a_window(cycle):
    assert cycle.open(F, 7) == 0
    end = cycle.communication(GATHER)
    end()
    assert cycle.open(B, 7) == 1
    cycle.end()
    assert cycle.capture.calls == [0, "pause", 0, "pause", 1, "pause"]
    events = cycle.checkpointer.trace.events()
    assert [(e.track, e.label) for e in events] == [
        ("window", "forward 0"),
        ("communication", "all_gather_into_tensor"),
        ("window", "forward 0"),
        ("window", "backward 0"),
    ]
    for one, other in itertools.pairwise(events):
        assert one.end_s <= other.begin_s
    assert {e.step for e in events} == {7}
    assert events[1].nbytes == 64
    (shape,) = cycle.checkpointer.observed
    assert [(w.phase, w.index) for w in shape] == [(F, 0), (B, 0)]


def test_a_window_goes_on_when_the_last_of_several_collectives_has_ended(cycle):
    cycle.open(F, 1)
    ends = [cycle.communication(GATHER) for _ in range(3)]
    for end in ends[:2]:
        end()
    assert cycle.capture.calls == [0, "pause"]
    ends[2]()
    assert cycle.capture.calls == [0, "pause", 0]


def test_a_window_that_opens_during_a_collective_begins_after_it(cycle):
    end = cycle.communication(GATHER)
    cycle.open(F, 1)
    assert cycle.capture.calls == []
    end()
    assert cycle.capture.calls == [0]
    cycle.end()
    assert tracks(cycle) == [("communication", GATHER.name), ("window", "forward 0")]


def test_collectives_outside_of_windows_are_only_traced(cycle):
    cycle.open(F, 1)
    late = cycle.communication(GATHER)
    cycle.end()
    late()
    cycle.communication(GATHER)()
    assert cycle.open(B, 1) is None
    assert cycle.capture.calls == [0, "pause"]
    cycle.begin()
    cycle.open(F, 2)
    cycle.end()
    assert [[w.idle_s >= 0 for w in shape] for shape in cycle.checkpointer.observed] == [[True]] * 2
    assert [label for track, label in tracks(cycle) if track == "window"] == ["forward 0"] * 2


def test_collectives_of_many_threads_balance(cycle):
    cycle.open(F, 1)

    def communicate():
        for _ in range(200):
            cycle.communication(GATHER)()

    threads = [threading.Thread(target=communicate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = cycle.capture.calls
    assert calls[0] == calls[-1] == 0
    assert all(one != other for one, other in itertools.pairwise(calls))
    assert tracks(cycle).count(("communication", GATHER.name)) == 800
    cycle.end()
    events = cycle.checkpointer.trace.events()
    busy = [e._replace(track="copy", nbytes=8) for e in events if e.track == "communication"]
    assert window_nbytes([*events, *busy])[0] == 0


class Moment:
    """An event on a device that has passed everything."""

    def __init__(self, time_s):
        self.time_s = time_s

    def query(self):
        return True

    def elapsed_time(self, later):
        return (later.time_s - self.time_s) * 1000


def test_a_device_is_timed_in_its_own_order(monkeypatch):
    """The host issues everything at once; streams go on beside each other."""
    clock = CudaClock()

    def at(time_s, tell, *arguments):
        monkeypatch.setattr(windows, "_event_now", lambda: Moment(time_s))
        return tell(*arguments)

    at(10.0, clock.open, F, 0)
    at(11.0, clock.communication_begin)
    at(13.0, clock.communication_end)
    at(12.0, clock.open, F, 1)
    at(14.0, clock.communication_begin)
    at(99.0, clock.communication_end)
    ((first, second),) = at(15.0, clock.finish_cycle)
    assert (first.idle_s, second.idle_s) == pytest.approx((1.0, 1.0))
    assert clock.finish_cycle() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_communication_by_device_events():
    clock = CudaClock()
    x = torch.randn(2000, 2000, device="cuda")

    def work(times):
        for _ in range(times):
            x @ x

    def measured():
        done = clock.finish_cycle()
        torch.cuda.synchronize()
        ((window,),) = done + clock.finish_cycle()
        return window.idle_s

    work(5)
    clock.open(F, 0)
    work(5)
    clock.communication_begin()
    work(50)
    clock.communication_end()
    interrupted_s = measured()
    clock.open(F, 0)
    work(55)
    assert 0 < interrupted_s < measured() / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_windows_by_device_events():
    clock = CudaClock()
    x = torch.randn(2000, 2000, device="cuda")
    for cycle in range(2):
        for index in range(3):
            clock.open(F, index)
            for _ in range(5 * (index + 1)):
                x @ x
        done = clock.finish_cycle()
        assert cycle == 0 or len(done) <= 2
    torch.cuda.synchronize()
    (windows,) = clock.finish_cycle()[-1:]
    assert [w.index for w in windows] == [0, 1, 2]
    assert windows[2].idle_s > windows[0].idle_s > 0
