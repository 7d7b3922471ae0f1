"""When windows open: hooks on the blocks of a module, timed on the host or on the device.

A window is open from the begin of a block's pass to that of the next, except while collectives are
under way: those interrupt it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from asymcheck.checkpointer import Checkpointer
from asymcheck.idle import WindowTimer
from asymcheck.partition import Phase, Window, even_windows
from asymcheck.snapshot import Capture
from asymcheck_torch.collectives import Collective
from asymcheck_torch.modules import is_compiled
from asymcheck_torch.parts import numel

MAX_BLOCKS = 64
MAX_WINDOWS = 4096
MAX_MARKS = 65_536


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
    return sum(numel(parameter) for parameter in module.parameters())


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
    """Measures windows; each one ends where the next begins, and is idle between communications.

    Communications may overlap, and begin and end on any thread.
    """

    def open(self, phase: Phase, index: int) -> None:
        """A window begins."""
        ...

    def communication_begin(self) -> None:
        """The link is busy from here on."""
        ...

    def communication_end(self) -> None:
        """One communication has ended; the link is idle when all have."""
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

    def communication_begin(self) -> None:
        """The link is busy from here on."""
        self._timer.communication_begin()

    def communication_end(self) -> None:
        """One communication has ended."""
        self._timer.communication_end()

    def finish_cycle(self) -> list[list[Window]]:
        """This cycle."""
        return [self._timer.finish_cycle()]


_Mark = tuple[Callable[[WindowTimer], None], torch.cuda.Event]


class CudaClock:
    """Windows by events on the device's streams, looked at when the device has passed them.

    A communication begins where the current stream stands when it is issued, and ends where the
    stream stands that is current when its end is told: that of a callback of the collective's
    future waits for the collective.
    """

    def __init__(self) -> None:
        self._marks: deque[_Mark] = deque(maxlen=MAX_MARKS)
        self._pending: list[tuple[list[_Mark], torch.cuda.Event]] = []

    def open(self, phase: Phase, index: int) -> None:
        """A window begins, for the device, where the current stream stands."""
        self._marks.append((lambda timer: timer.open(phase, index), _event_now()))

    def communication_begin(self) -> None:
        """The link is busy from where the current stream stands."""
        self._marks.append((WindowTimer.communication_begin, _event_now()))

    def communication_end(self) -> None:
        """One communication has ended where the current stream stands."""
        self._marks.append((WindowTimer.communication_end, _event_now()))

    def finish_cycle(self) -> list[list[Window]]:
        """Earlier cycles that the device has finished; never waits for it."""
        if self._marks:
            self._pending.append((list(self._marks), _event_now()))
            self._marks.clear()
        done: list[list[Window]] = []
        while self._pending and _passed(*self._pending[0]):
            done.append(_resolve(*self._pending.pop(0)))
        return done


def _event_now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _passed(marks: Sequence[_Mark], end: torch.cuda.Event) -> bool:
    return end.query() and all(event.query() for _, event in marks)


def _resolve(marks: Sequence[_Mark], end: torch.cuda.Event) -> list[Window]:
    """The windows between events, by a timer that is shown the device's times in their order."""
    first = marks[0][1]
    end_s = first.elapsed_time(end) / 1000
    timed = sorted(
        ((first.elapsed_time(event) / 1000, tell) for tell, event in marks), key=lambda m: m[0]
    )
    timed = [(time_s, tell) for time_s, tell in timed if time_s <= end_s]
    times_s = iter([*(time_s for time_s, _ in timed), end_s])
    timer = WindowTimer(clock=times_s.__next__)
    for _, tell in timed:
        tell(timer)
    return timer.finish_cycle()


class Cycle:
    """The windows between an update and the barrier of the next, numbered as they open.

    Windows open on the training thread; collectives begin and end on any.

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
        self._lock = threading.Lock()  # guards what follows
        self._under_way = 0  # collectives
        self._capture: Capture | None = None
        self._step = 0
        self._window: str | None = None  # the label of the one that is open
        self._idle_since_s = 0.0

    def expect(self, blocks: int) -> None:
        """Expect a forward and a backward window of every block."""
        self.expected = even_windows(blocks, blocks)

    def begin(self) -> None:
        """An update is done."""
        self._listening = True

    def follow(self, capture: Capture | None) -> None:
        """Have a capture copy in windows, and pause while collectives are under way.

        None: it is finished.
        """
        with self._lock:
            self._capture = capture

    def open(self, phase: Phase, step: int) -> int | None:
        """A window opens, ending the one before; its position, or None if it does not count."""
        if not self._listening or len(self._opened) >= MAX_WINDOWS:
            return None
        window = Window(phase, self._count[phase], 0.0)
        self._clock.open(phase, window.index)
        self._count[phase] += 1
        with self._lock:
            self._pause()
            self._opened.append(window)
            self._step = step
            self._window = f"{phase} {window.index}"
            self._go_on()
            return len(self._opened) - 1

    def communication(self, collective: Collective) -> Callable[[], None]:
        """A collective begins; call the result when it has ended. For `observe_collectives`."""
        self._clock.communication_begin()
        with self._lock:
            self._pause()
            self._under_way += 1
            return partial(self._communication_end, collective, self._step, time.monotonic())

    def _communication_end(self, collective: Collective, step: int, begin_s: float) -> None:
        self._clock.communication_end()
        name, nbytes = collective
        self._checkpointer.trace.add("communication", name, step, begin_s, nbytes)
        with self._lock:
            self._under_way -= 1
            self._go_on()

    def _pause(self) -> None:
        """The link is not idle, or not for the window that is open, from here on."""
        if self._window is None or self._under_way:
            return
        self._checkpointer.trace.add("window", self._window, self._step, self._idle_since_s)
        if self._capture is not None:
            self._capture.leave_window()

    def _go_on(self) -> None:
        """The link is idle if nothing is under way."""
        if self._window is None or self._under_way:
            return
        self._idle_since_s = time.monotonic()
        if self._capture is not None:
            self._capture.enter_window(len(self._opened) - 1)

    def end(self) -> None:
        """An update is about to begin, or everything is captured: learn from the cycle."""
        if not self._listening:
            return
        self._listening = False
        with self._lock:
            self._pause()
            self._window, self._capture = None, None
            self.expected, self._opened = self._opened or self.expected, []
        self._count.clear()
        for windows in self._clock.finish_cycle():
            self._checkpointer.profile.observe(windows)
