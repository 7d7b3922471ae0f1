"""What the processes of the tests of restoring DeepSpeed engines run, started by `start`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed_runs import Setting, engine_of, snapshot, train, what_attach_says
from sharded_net import WIDTH, loss_of, parameters_of, random_tokens, seed_and_build
from torch import nn
from torch_runs import differences

import asymcheck_torch
from asymcheck.errors import AsymCheckError
from asymcheck_torch.deepspeed.engine import Engine
from asymcheck_torch.deepspeed.partitioned import Partitioned
from asymcheck_torch.testing import slow_collectives

STEPS = 2


def save(rank: int, url: str, setting: Setting) -> Any:
    """Train for some steps with checkpoints; the state then."""
    with engine_of(setting) as engine:
        torch.manual_seed(100 + rank)
        with asymcheck_torch.attach(engine, url=url, max_to_keep=None):
            train(engine, STEPS)
        return snapshot(engine)


def save_as_before(rank: int, url: str, setting: Setting) -> Any:
    """As `save`, in the form of checkpoints that were written before kinds were noted."""
    engine_state, records, note = (
        Engine.engine_state,
        Partitioned.records,
        Partitioned._note_numbers,
    )

    def with_micro_steps(self: Engine) -> dict[str, Any]:
        return engine_state(self) | {"micro_steps": self.engine.micro_steps}

    def without_kinds(self: Partitioned, copy: Any) -> list[dict[str, Any]]:
        unknown = ("class", "bare")
        return [
            {key: value for key, value in record.items() if key not in unknown}
            for record in records(self, copy)
        ]

    def in_float32(self: Partitioned, flat: int) -> None:
        note(self, flat)
        for key, number in self._scalars.items():
            self._scalars[key] = number.to(torch.float32)

    Engine.engine_state = with_micro_steps
    Partitioned.records, Partitioned._note_numbers = without_kinds, in_float32
    try:
        return save(rank, url, setting)
    finally:
        Engine.engine_state = engine_state
        Partitioned.records, Partitioned._note_numbers = records, note


def restore(rank: int, url: str, setting: Setting, step: int | None = None) -> Any:
    """The step that is restored and the state then, or the error."""
    with (
        engine_of(setting, seed=8) as engine,
        asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt,
    ):
        try:
            return ckpt.restore(step), snapshot(engine)
        except AsymCheckError as error:
            return type(error).__name__, str(error)


def fail_to_apply(rank: int, url: str, setting: Setting) -> tuple[str, str]:
    """The error of restoring when rank 1's schedule does not take its state."""

    def refuse(_state: Any) -> None:
        raise LookupError("what a schedule says")

    with (
        engine_of(setting, seed=8) as engine,
        asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt,
    ):
        if rank == 1:
            engine.lr_scheduler.load_state_dict = refuse
        try:
            ckpt.restore()
        except Exception as error:
            return type(error).__name__, str(error)
        raise AssertionError("restored")


def micro_batch(engine: Any, seed: int) -> None:
    """A backward pass, and an update if the engine has accumulated enough."""
    torch.manual_seed(seed)
    engine.backward(loss_of(engine, random_tokens()))
    engine.step()


def counts_of_updates(rank: int, url: str, setting: Setting) -> list[tuple[int, int]]:
    """(updates of DeepSpeed, steps) after each micro batch of two updates after restoring."""
    counts: list[tuple[int, int]] = []
    with (
        engine_of(setting, seed=8) as engine,
        asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt,
    ):
        ckpt.restore()
        for batch in range(2 * setting.accumulate):
            micro_batch(engine, batch)
            counts.append((engine.global_steps, ckpt.step))
    return counts


def forget_gradients(rank: int, url: str, setting: Setting) -> dict[str, list[str]]:
    """What of an update after restoring depends on what was done right before restoring."""

    def backward(engine: Any) -> None:
        engine.backward(loss_of(engine, random_tokens()) * 3)

    def nan(engine: Any) -> None:
        engine.backward(loss_of(engine, random_tokens()) * float("nan"))

    def amid(engine: Any) -> None:
        micro_batch(engine, 5)
        backward(engine)

    unfinished = {"backward": backward, "nan": nan}
    if setting.accumulate > 1:
        unfinished["amid"] = amid
    expected = _update_after(rank, url, setting, lambda _engine: None)
    return {
        name: differences(_update_after(rank, url, setting, leave), expected)
        for name, leave in unfinished.items()
    }


def _update_after(rank: int, url: str, setting: Setting, leave: Any) -> dict[str, Any]:
    with (
        engine_of(setting, seed=8) as engine,
        asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt,
    ):
        train(engine, 1)
        leave(engine)
        ckpt.restore()
        for batch in range(setting.accumulate):
            micro_batch(engine, 1000 * batch + rank)
        return snapshot(engine)


# -- numbers -------------------------------------------------------------------------------


class Counting(torch.optim.Optimizer):
    """Keeps numbers of every kind for a parameter; not one of torch's optimizers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"])

    def _update(self, parameter: torch.Tensor, lr: float) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"scale": 0.1, "seen": (1 << 40) + 1, "warm": False, "step": 0}
            state |= {"t": torch.tensor(0.3), "d": torch.tensor(0.7, dtype=torch.float64)}
            state["mean"] = torch.zeros_like(parameter)
        state["scale"] *= 1.1
        state["seen"] += 1
        state["step"] += 1
        state["warm"] = True
        state["t"] = state["t"] * 1.1
        state["d"] = state["d"] * 1.1
        state["mean"].mul_(0.9).add_(parameter.grad)
        parameter.add_(state["mean"], alpha=-lr * state["scale"])


def numbers_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """All that it keeps but for the means, once each."""
    found: list[dict[str, Any]] = []
    for state in optimizer.state.values():
        numbers = {key: value for key, value in state.items() if key != "mean"}
        if all(differences(numbers, other) for other in found):
            found.append(numbers)
    return found


def counting_engine(stage: int, seed: int) -> Any:
    model = seed_and_build(WIDTH, seed)
    optimizer = Counting(parameters_of(model, False))
    config = Setting(stage).config()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def inner(engine: Any) -> torch.optim.Optimizer:
    zero = engine.optimizer
    return zero if isinstance(zero, torch.optim.Optimizer) else zero.optimizer


def save_numbers(rank: int, url: str, stage: int) -> list[dict[str, Any]]:
    """Train with an optimizer that keeps numbers; these."""
    engine = counting_engine(stage, 7)
    with asymcheck_torch.attach(engine, url=url):
        train(engine, STEPS)
    return numbers_of(inner(engine))


def restore_numbers(rank: int, url: str, stage: int, warm: int) -> list[dict[str, Any]]:
    """Restore, after some updates; the numbers then."""
    engine = counting_engine(stage, 8)
    train(engine, warm)
    with asymcheck_torch.attach(engine, url=url, every_steps=1000) as ckpt:
        assert ckpt.restore() == STEPS
    return numbers_of(inner(engine))


# -- modules and optimizers ----------------------------------------------------------------


def train_compiled(rank: int, url: str, stage: int) -> Any:
    """Train what was compiled before DeepSpeed had it; the parameters by their own names."""
    model = seed_and_build(WIDTH, 7)
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(parameters_of(model, False), lr=1e-2)
    config = Setting(stage).config()
    engine, *_ = deepspeed.initialize(model=compiled, optimizer=optimizer, config=config)
    torch.manual_seed(100 + rank)
    with asymcheck_torch.attach(engine, url=url):
        train(engine, STEPS)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def attach_with_a_stranger(rank: int, url: str, stage: int) -> str:
    """What attaching says when the optimizer trains what the module has no more."""
    with engine_of(Setting(stage)) as engine:
        del engine.module.few
        return what_attach_says(engine, url)


# -- windows -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """What was seen of the copies of a rank.

    Attributes:
        copied: {phase: bytes copied in windows of that phase by the middle of the pass}.
        planned: {(phase, number of the window): (bytes of its partition, idle seconds)}.
        tracks: {track: events on it}.
    """

    copied: Mapping[str, int]
    planned: Mapping[tuple[str, int], tuple[int, float]]
    tracks: Mapping[str, int]


class Gate:
    """Holds up the passes of a layer until something was copied in a window of the pass.

    Meanwhile no collective begins, so whatever is under way ends and the link becomes idle.
    """

    def __init__(self, module: nn.Module, layer: nn.Module, trace: Any) -> None:
        self.copied = {"forward": 0, "backward": 0}
        self._trace = trace
        self._begin_s = 0.0  # of the pass
        self.hooks = [
            module.register_forward_pre_hook(lambda *_: self._begin()),
            module.register_forward_hook(
                lambda _m, _args, out: self._at_gradient(out, self._begin)
            ),
            layer.register_forward_hook(self._after_layer),
        ]

    def _begin(self) -> None:
        self._begin_s = time.monotonic()

    def _after_layer(self, _layer: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            self._hold("forward")
            self._at_gradient(output, lambda: self._hold("backward"))

    def _at_gradient(self, output: torch.Tensor, call: Callable[[], None]) -> None:
        if output.requires_grad:
            output.register_hook(lambda _gradient: call())

    def _hold(self, phase: str) -> None:
        copied, since_s = 0, time.monotonic()
        while not copied:
            assert time.monotonic() < since_s + 60, f"nothing is copied in the {phase} pass"
            time.sleep(1e-3)
            copied = sum(
                event.nbytes
                for event in self._trace.events()
                if event.track == "copy"
                and "barrier" not in event.label
                and event.begin_s >= self._begin_s
            )
        self.copied[phase] += copied


@contextmanager
def gated(module: nn.Module, layer: nn.Module, trace: Any) -> Iterator[Gate]:
    gate = Gate(module, layer, trace)
    try:
        yield gate
    finally:
        for hook in gate.hooks:
            hook.remove()


def move_in_windows(rank: int, url: str) -> Moved:
    """Train over a slow link until partitions are sized by the windows that were measured."""
    with engine_of(Setting(3)) as engine, slow_collectives(1e-3):
        torch.manual_seed(100 + rank)
        with asymcheck_torch.attach(engine, url=url, commit_timeout_s=20.0) as ckpt:
            core = ckpt.checkpointer
            train(engine, 1)  # the first gradients make the optimizer's state
            with gated(engine.module, engine.module.layers[1], core.trace) as gate:
                train(engine, 2)
            while not core.profile.ready:
                train(engine, 1)
            train(engine, 2)
            plan, windows = core._plan, core._planned_windows
            assert plan is not None
            sizes = {(p.phase, p.window): p.nbytes for p in plan.partitions}
            tracks = [event.track for event in core.trace.events()]
        return Moved(
            gate.copied,
            {
                (str(w.phase), w.index): (sizes.get((w.phase, w.index), 0), w.idle_s)
                for w in windows
            },
            {track: tracks.count(track) for track in set(tracks)},
        )
