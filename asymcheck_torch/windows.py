"""When windows open: hooks on the blocks of a module, timed on the host or on the device."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from asymcheck.checkpointer import Checkpointer
from asymcheck.idle import WindowTimer
from asymcheck.partition import Phase, Window, even_windows
from asymcheck_torch.modules import is_compiled

MAX_BLOCKS = 64
MAX_WINDOWS = 4096


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The parts of a module whose passes make good windows: its layers, in order.

    From the root down while one child holds more than half of the parameters; there the
    children, containers flattened. A compiled module is one block. Of more than `MAX_BLOCKS`
    only every second, third, ... one.
    """
    node = module
    while (heavy := _heaviest(node)) is not None:
        node = heavy
    blocks = [] if is_compiled(node) else list(dict.fromkeys(_flattened(node)))
    blocks = blocks or [node]
    return blocks[:: -(-len(blocks) // MAX_BLOCKS)]


def _weight(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _heaviest(module: nn.Module) -> nn.Module | None:
    """The child to go down to: it has more than half of the parameters, and parts itself."""
    if is_compiled(module):
        return None
    half = _weight(module) / 2
    heavy = [child for child in module.children() if _weight(child) > half]
    parts = [child for child in heavy if any(child.children()) and not _is_container(child)]
    return parts[0] if parts else None


def _is_container(module: nn.Module) -> bool:
    kinds = nn.ModuleList | nn.Sequential | nn.ModuleDict
    return isinstance(module, kinds) and not is_compiled(module)


def _flattened(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_container(child):
            yield from _flattened(child)
        elif any(True for _ in child.parameters()):
            yield child


def hook_windows(
    block: nn.Module,
    on_window: Callable[[Phase], None],
    eager: Callable[[Any], Any] = lambda hook: hook,
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `on_window` as the forward and as the backward pass of a block begins.

    Backward begins when the gradient of the block's output is there. The hook for it sits on the
    output tensor: a module's full backward hook would forbid in-place operations on the output.
    Passes without gradients open no windows. `eager` wraps the hooks to keep a compiler out.
    """

    def before_forward(_block: nn.Module, _args: Any) -> None:
        if torch.is_grad_enabled():
            on_window(Phase.FORWARD)

    def before_backward(_gradient: torch.Tensor) -> None:
        on_window(Phase.BACKWARD)

    def after_forward(_block: nn.Module, _args: Any, output: Any) -> None:
        if (tensor := _first_with_gradient(output)) is not None:
            tensor.register_hook(before_backward)

    return [
        block.register_forward_pre_hook(eager(before_forward)),
        block.register_forward_hook(eager(after_forward)),
    ]


def _first_with_gradient(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output if output.requires_grad else None
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, Sequence) or isinstance(output, str):
        return None
    found = (_first_with_gradient(item) for item in output)
    return next((tensor for tensor in found if tensor is not None), None)


class WindowClock(Protocol):
    """Measures windows; each one ends where the next begins."""

    def open(self, phase: Phase, index: int) -> None:
        """A window begins."""
        ...

    def finish_cycle(self) -> list[list[Window]]:
        """The update comes: the cycles that are measured by now, oldest first."""
        ...


class HostClock:
    """Windows by the host's monotonic clock."""

    def __init__(self) -> None:
        self._timer = WindowTimer()

    def open(self, phase: Phase, index: int) -> None:
        """A window begins."""
        self._timer.open(phase, index)

    def finish_cycle(self) -> list[list[Window]]:
        """This cycle."""
        return [self._timer.finish_cycle()]


_Mark = tuple[Phase, int, torch.cuda.Event]


class CudaClock:
    """Windows by events on the device's stream, looked at when the device has passed them."""

    def __init__(self) -> None:
        self._marks: list[_Mark] = []
        self._pending: list[tuple[list[_Mark], torch.cuda.Event]] = []

    def open(self, phase: Phase, index: int) -> None:
        """A window begins, for the device, where the current stream stands."""
        self._marks.append((phase, index, _event_now()))

    def finish_cycle(self) -> list[list[Window]]:
        """Earlier cycles that the device has finished; never waits for it."""
        if self._marks:
            self._pending.append((self._marks, _event_now()))
            self._marks = []
        done: list[list[Window]] = []
        while self._pending and self._pending[0][1].query():
            done.append(_resolve(*self._pending.pop(0)))
        return done


def _event_now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _resolve(marks: list[_Mark], end: torch.cuda.Event) -> list[Window]:
    """The windows between events, by a timer that is shown the device's times."""
    first = marks[0][2]
    times_s = (first.elapsed_time(event) / 1000 for event in [*(m[2] for m in marks), end])
    timer = WindowTimer(clock=times_s.__next__)
    for phase, index, _ in marks:
        timer.open(phase, index)
    return timer.finish_cycle()


class Cycle:
    """The windows between an update and the barrier of the next, numbered as they open.

    Attributes:
        expected: the windows to plan with while the profile warms up: those of the last cycle,
            their times unknown.
    """

    def __init__(self, clock: WindowClock, checkpointer: Checkpointer) -> None:
        self.expected: list[Window] = []
        self._clock = clock
        self._checkpointer = checkpointer
        self._opened: list[Window] = []
        self._count = Counter[Phase]()
        self._listening = True
        self._since: tuple[str, int, float] | None = None

    def expect(self, blocks: int) -> None:
        """Expect a forward and a backward window of every block."""
        self.expected = even_windows(blocks, blocks)

    def begin(self) -> None:
        """An update is done."""
        self._listening = True

    def open(self, phase: Phase, step: int) -> int | None:
        """A window opens, ending the one before; its position, or None if it does not count."""
        if not self._listening or len(self._opened) >= MAX_WINDOWS:
            return None
        window = Window(phase, self._count[phase], 0.0)
        self._clock.open(phase, window.index)
        self._trace(f"{phase} {window.index}", step)
        self._count[phase] += 1
        self._opened.append(window)
        return len(self._opened) - 1

    def end(self) -> None:
        """An update is about to begin, or everything is captured: learn from the cycle."""
        if not self._listening:
            return
        self._listening = False
        self._trace(None, 0)
        self.expected, self._opened = self._opened or self.expected, []
        self._count.clear()
        for windows in self._clock.finish_cycle():
            self._checkpointer.profile.observe(windows)

    def _trace(self, label: str | None, step: int) -> None:
        if self._since is not None:
            self._checkpointer.trace.add("window", *self._since)
        self._since = None if label is None else (label, step, time.monotonic())
