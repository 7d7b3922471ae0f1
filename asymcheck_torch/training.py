"""The training checkpointer: listens to a training loop and checkpoints its steps."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from asymcheck.agreement import restore_together
from asymcheck.buffers import page_aligned
from asymcheck.checkpointer import Checkpointer
from asymcheck.errors import AsymCheckError, SaveFailedError
from asymcheck.partition import Phase
from asymcheck.reader import Checkpoint
from asymcheck.snapshot import Capture
from asymcheck.strategy import Strategy
from asymcheck_torch.collectives import observe_collectives
from asymcheck_torch.extras import named_extras
from asymcheck_torch.gradients import Gradients
from asymcheck_torch.modules import (
    Places,
    as_updated,
    changes_in_forward,
    is_compiled,
    places,
    unwrap,
    visible,
)
from asymcheck_torch.optimizers import check_optimizer
from asymcheck_torch.parts import sharded_among
from asymcheck_torch.restore import read_into
from asymcheck_torch.state import TrainingState
from asymcheck_torch.tensors import cuda_devices, pinned
from asymcheck_torch.trained import ModuleAndOptimizers, Trained
from asymcheck_torch.windows import (
    CudaClock,
    Cycle,
    HostClock,
    WindowClock,
    find_blocks,
    hook_windows,
)
from asymcheck_torch.world import World

_log = logging.getLogger("asymcheck")
_STALLS_REMEMBERED = 100_000


def attach(
    module: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    url: str | os.PathLike[str],
    every_steps: int = 1,
    capture_gradients: bool = False,
    strategy: str | Strategy = "asymcheck",
    extra_state: Any = None,
    max_to_keep: int | None = 5,
    keep_every: int | None = None,
    max_host_bytes: int = 4 << 30,
    max_chain: int | None = None,
    on_error: Literal["raise", "warn"] = "raise",
    process_group: torch.distributed.ProcessGroup | None = None,
    stall_timeout_s: float = 300.0,
    commit_timeout_s: float = 300.0,
    mirror: str | os.PathLike[str] | None = None,
    mirror_every: int = 1,
    mirror_max_to_keep: int | None = 5,
    mirror_keep_every: int | None = None,
    keep_trace: bool = False,
) -> TrainingCheckpointer:
    """Checkpoint a training loop, which stays as it is.

    A *step* is a completed update: a `step()` of the last optimizer given. What a checkpoint of
    step k holds is the state right after update k: parameters (frozen ones too), persistent
    buffers, optimizer state, options of the parameter groups, extra state, and the random number
    generators of Python, NumPy, torch and CUDA. An update that is skipped, as a `GradScaler`
    does after an overflow, is no step (a fused optimizer, which skips inside, counts it).

    Parameters and optimizer state are copied in the background between the first forward pass
    after the update and the next `step()`, which waits for what is left. So they may be changed
    by hand between `step()` and the next forward pass (clipped, swapped with averages for an
    evaluation and back), but from there only by an attached optimizer, or after `barrier()`: a
    step of which torch counts other writes is not saved (`SaveFailedError`). Forward passes with
    gradients switched off in eval mode are an evaluation: they begin nothing. Passes by way of
    `torch.func`, with other weights perhaps, may come first: the module's own are stored.

    Extra state is anything with `state_dict()` and `load_state_dict()`, or a `torch.Generator`:

    - What can be iterated (samplers, data loaders) and generators are *data positions*: taken
      right after the update, before the loop draws the next batch.
    - Everything else (schedulers, `GradScaler`, averages) the loop moves after `optimizer.step()`:
      taken right before the next forward pass.
    - `at_update(obj)` and `at_forward(obj)` say it explicitly.

    With `DistributedDataParallel` all ranks attach together. Each stores its part of what all
    share, and its own generators and extra state; a checkpoint written at one world size restores
    at any other (rank r takes those of rank r modulo the saved size). So do the ranks of FSDP2 and
    of DeepSpeed, each of which stores what it holds. Nothing is copied in windows while
    collectives are under way.

    Compile before attaching; a compiled module is left whole and makes one window.

    Args:
        module: the module that trains, bare or wrapped by DDP or `torch.compile`, sharded by
            FSDP2 (`fully_shard`), or a DeepSpeed engine.
        optimizer: the optimizers, in the order in which the loop steps them. None to restore
            only: the module and the extra state given, nothing else.
        url: where to keep the checkpoints: a path or a URL.
        every_steps: checkpoint steps that are multiples of this.
        capture_gradients: keep the gradients of every update in its checkpoint, too, reduced,
            unscaled and clipped, under `gradients`. Takes a copy of them beside the parameters,
            and one more tensor of each parameter in host memory and in full steps. Increments
            take about as much as without, since everything else follows from the gradient; less
            where moments are kept in low precision; more where weights are all that is kept.
            Parameters that an update leaves alone have zeros. They are not restored. (Of torch's
            SGD with Nesterov momentum whose `step` is given a closure they are what it leaves.)
        strategy: "asymcheck", "asymcheck-s", "asymcheck-naive", "synchronous" or a `Strategy`.
        extra_state: a mapping of names to such objects, or one such object.
        max_to_keep, keep_every, max_host_bytes, max_chain: as for `asymcheck.Checkpointer`.
        on_error: a failed checkpoint raises at the next call inside the loop or of this object
            ("raise"), before anything of the model changes; or it is logged ("warn").
        process_group: ranks that hold the same parameters, if `module` is no DDP.
        stall_timeout_s, commit_timeout_s, keep_trace: as for `asymcheck.Checkpointer`.
        mirror, mirror_every, mirror_max_to_keep, mirror_keep_every: as for
            `asymcheck.Checkpointer`; of several ranks, which must share `url`, rank 0 copies.

    Raises:
        UnsupportedStateError: an optimizer with a state of its own kind.
        TypeError: an extra state that is none.
        ValueError: a number out of range.
        StoreError: the URL names no store.
    """
    if isinstance(optimizer, Optimizer):
        optimizer = [optimizer]
    if every_steps < 1:
        raise ValueError(f"every_steps is {every_steps}; the least is 1")
    optimizers = list(optimizer or [])
    for each in optimizers:
        check_optimizer(each)
    gradients = Gradients() if capture_gradients else None
    if is_engine(module):
        if optimizers or process_group is not None:
            raise ValueError("an engine has its own optimizer and process group: give neither")
        trained, world = _engine(module, gradients)
    else:
        world = World.of(module, process_group)
        trained = ModuleAndOptimizers(unwrap(module), optimizers, gradients)
    on_cuda = bool(cuda_devices(module.parameters()))
    checkpointer = Checkpointer(
        url,
        strategy=strategy,
        max_host_bytes=max_host_bytes,
        max_to_keep=max_to_keep,
        keep_every=keep_every,
        max_chain=max_chain,
        on_error=on_error,
        writer=world.rank,
        writers=world.size,
        run_id=world.fresh_name(),
        stall_timeout_s=stall_timeout_s,
        commit_timeout_s=commit_timeout_s,
        mirror=mirror,
        mirror_every=mirror_every,
        mirror_max_to_keep=mirror_max_to_keep,
        mirror_keep_every=mirror_keep_every,
        keep_trace=keep_trace,
        allocate=pinned if on_cuda else page_aligned,
    )
    state = TrainingState(trained, named_extras(extra_state), world)
    clock = CudaClock() if on_cuda else HostClock()
    hooked: Any = module.module if is_engine(module) else module
    return TrainingCheckpointer(
        checkpointer, state, hooked, clock, every_steps, on_error, gradients
    )


def is_engine(module: nn.Module) -> bool:
    """Whether a module is a DeepSpeed engine; does not import DeepSpeed."""
    deepspeed: Any = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)


def _engine(engine: Any, gradients: Gradients | None) -> tuple[Trained, World]:
    from asymcheck_torch.deepspeed.engine import Engine

    world = World.of(engine.module, engine.seq_data_parallel_group)
    return Engine.of(engine, world.rank, world.size, gradients), world


class TrainingCheckpointer:
    """Checkpoints the steps of a training loop by way of hooks; made by `attach`.

    Use from the training thread. Close it, or use it as a context manager.

    Attributes:
        step: completed updates, counted from the start of training.
        stall_s: {step: seconds that training waited for its checkpoint}, of the last 100,000.
        checkpointer: the `asymcheck.Checkpointer` beneath: its steps, costs and trace.
        state: what is saved and restored.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        state: TrainingState,
        module: nn.Module,
        clock: WindowClock,
        every_steps: int,
        on_error: str,
        gradients: Gradients | None,
    ) -> None:
        self.step = 0
        self.stall_s: dict[int, float] = {}
        self.checkpointer = checkpointer
        self.state = state
        self._module = module  # as the loop calls it, with its wrappers
        self._every_steps = every_steps
        self._raises = on_error == "raise"
        self._gradients = gradients
        self._cycle = Cycle(clock, checkpointer)
        self._due = False  # the step is to be captured, which has not begun
        self._updated: Places = []  # by the step that is due
        self._seen_forward = False  # buffers may have changed since the update
        self._captured = -1  # the last step that was captured, restored or tried by all
        self._capture: Capture | None = None
        self._held_s = 0.0
        self._hooks = list(self._hook()) if state.trained.is_updated else []

    def __enter__(self) -> TrainingCheckpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- by hand ---------------------------------------------------------------------------

    def restore(self, step: int | None = None) -> int:
        """Make module, optimizers, extra state and generators what they were; the step.

        Reads straight into the tensors that exist. Optimizer state that does not exist yet is
        created; options of parameter groups come back too. All ranks call this together, and
        restore the same step.

        Args:
            step: which; None for the newest good one (damaged ones are passed over, loudly).
                To train on from an older one, call `checkpointer.discard_after(step)` as well.

        Returns:
            The step restored; 0 if there is no checkpoint yet.

        Raises:
            CheckpointNotFoundError: there is no such step, or none that is whole.
            StateMismatchError: listing every difference; nothing was changed.
            SaveFailedError: an earlier save failed, here or on another rank; nothing was changed.
            CorruptionError, FormatError: the step asked for by number is damaged; parameters and
                optimizer state are then undefined.
            StoreError: the store failed.
        """
        if self._settle() == 0 and step is None:
            return 0

        self._restore(step, self.state)
        return self.step

    def restore_weights(self, step: int | None = None) -> int:
        """As `restore`, but only parameters, buffers and extra state of modules; the step.

        Optimizers, extra state, generators and the count of steps stay as they are: to train
        anew from the weights of another run.
        """
        self._settle()
        weights = TrainingState(self.state.trained.weights(), (), self.state.world)
        return self._restore(step, weights)

    def _settle(self) -> int:
        """Have the saves of all ranks end; how many steps there are. If a rank fails, all raise."""
        error: Exception | None = None
        count = -1
        try:
            self.wait()
            count = len(self.checkpointer.steps())
        except Exception as caught:
            error = caught
        lowest, highest = self.state.world.extremes(count)
        if error is not None:
            raise error
        if lowest < 0:
            raise SaveFailedError(
                "another rank could not finish its saves, or list the steps",
                hint="Its own error says why; nothing was restored",
            )
        return highest

    def _restore(self, step: int | None, state: TrainingState) -> int:
        def read(checkpoint: Checkpoint) -> Callable[[], None]:
            return read_into(checkpoint, state)

        found = restore_together(self.checkpointer, read, step, state.world)
        state.trained.refresh()
        if state is self.state:
            self.step = self._captured = found
        self._due = self._seen_forward = False
        self._cycle.begin()
        return found

    def save_now(self, *, late: bool = False) -> None:
        """Checkpoint the current step whatever `every_steps` says, if it is not already.

        Call it between an update and the next forward pass. Durable after `wait()`.

        Args:
            late: after a forward pass, too (an update that was skipped, accumulation that is not
                at its end). Parameters and optimizer state are those of the update then (if
                nobody has changed them by hand), but buffers, generators and extra state what they
                are now, unless the step was to be checkpointed anyway. Gradients that have not been
                used are in no checkpoint.

        Raises:
            SaveFailedError: a forward pass has begun since the update, and may have changed
                buffers; the step was not to be checkpointed and cannot be any more.
        """
        if not self._due and self._capture is None and self.step != self._captured:
            if self._seen_forward and not late:
                raise SaveFailedError(
                    "the step cannot be checkpointed: a forward pass has begun since its update",
                    step=self.step,
                    hint="Call save_now() between optimizer.step() and the next forward pass, or "
                    "save_now(late=True) to take buffers and generators as they are now",
                )
            self._note_update()
        self._barrier()

    def barrier(self) -> None:
        """Return when the step that is being captured is: then it may be changed by anybody.

        To be called before parameters or optimizer state are changed between a forward pass and
        `step()` by anything but an attached optimizer: sharpness-aware minimisation, weight decay
        by hand, a teacher that follows. `step()` waits for the same.
        """
        self._finish()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when every step up to now that is to be checkpointed is durable.

        Raises:
            SaveFailedError: one failed (with on_error="raise").
            TimeoutError: it takes longer.
        """
        self._barrier()
        self.checkpointer.wait(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Remove all hooks, finish what is under way, then raise what `wait` would."""
        try:
            self._barrier()
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self.checkpointer.close(timeout_s)

    # -- hooks -----------------------------------------------------------------------------

    def _hook(self) -> Iterator[Any]:
        module = self._module
        compiled = any(is_compiled(part) for part in visible(module))
        # Imported by whoever compiles; for everybody else the import would take seconds.
        eager: Any = torch.compiler.disable if compiled else lambda hook: hook
        before_forward = eager(self._before_forward)
        blocks = find_blocks(module)
        # Those that FSDP2 shards, too: a hook inside of one would see its parameters gathered.
        shown = [module, *changes_in_forward(module), *blocks, *sharded_among(visible(module))]
        for part in dict.fromkeys(shown):
            yield part.register_forward_pre_hook(before_forward, prepend=True)
        self._cycle.expect(len(blocks))
        for block in blocks:
            yield from hook_windows(block, self._on_window, eager)
        yield from self.state.trained.hook_updates(self._before_update, self._after_update)
        if self.state.world.size > 1:
            yield observe_collectives(self._cycle.communication)

    def _before_forward(self, module: nn.Module, _args: Any) -> None:
        if module.training or torch.is_grad_enabled():
            self._seen_forward = True
            if self._due:
                with as_updated(self._updated):
                    self._begin()

    def _on_window(self, phase: Phase) -> None:
        self._cycle.open(phase, self.step)

    def _before_update(self) -> None:
        # From here to the end of the update nothing is due and no window counts, so forward
        # passes in a closure begin nothing.
        self._barrier()
        self.checkpointer.raise_errors()

    def _after_update(self) -> None:
        self.step += 1
        self._seen_forward = False
        self._cycle.begin()
        copying_s = 0.0 if self._gradients is None else self._gradients.end_update()
        if self.step % self._every_steps == 0:
            self._note_update()
            self._held_s += copying_s

    # -- one snapshot ----------------------------------------------------------------------

    def _note_update(self) -> None:
        """The step is to be captured; take what will not wait for the next forward pass."""
        if self.state.world.size > 1:
            self._captured = self.step  # tried once: if it fails here, others do not try again
        with self._failures(), self._held():
            with self.checkpointer.viewing(self.step):
                self.state.note_update(self.step)
            self._updated = places(self._module)
            self._due = True

    def _begin(self) -> None:
        """From here on the state is final, and may be copied in the background."""
        self._due = False
        with self._failures(), self._held():
            begun_s = time.monotonic()
            with self.checkpointer.viewing(self.step):
                view = self.state.view()
            view_s = time.monotonic() - begun_s
            windows = self._cycle.expected
            self._capture = self.checkpointer.begin(self.step, view, windows=windows)
            self._capture.add_stall(self._held_s + view_s)
            self._cycle.follow(self._capture)
        if not self.checkpointer.strategy.windows:
            self._finish()

    def _finish(self) -> None:
        """Have everything captured: after this the state may change."""
        capture = self._capture
        if capture is not None:
            with self._held():
                self._cycle.follow(None)
                capture.finish()
                self._capture = None
                self._block_on(capture)
            self._remember(capture.step)
        self._held_s = 0.0

    def _block_on(self, capture: Capture) -> None:
        if self.checkpointer.strategy.blocking:
            with self._failures():
                capture.pending.wait()

    def _remember(self, step: int) -> None:
        self._captured = step
        self.stall_s[step] = self._held_s
        if len(self.stall_s) > _STALLS_REMEMBERED:
            del self.stall_s[next(iter(self.stall_s))]

    def _barrier(self) -> None:
        """Everything of a step that is to be captured is, when this returns."""
        if self._due:
            self._begin()
        self._finish()
        with self._failures():
            self._cycle.end()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Count the time inside as time for which training waits."""
        begun_s = time.monotonic()
        try:
            yield
        finally:
            self._held_s += time.monotonic() - begun_s

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """With on_error="warn" a checkpoint that fails is logged and training goes on."""
        try:
            yield
        except AsymCheckError as error:
            if self._raises:
                raise
            _log.error("step %d is not checkpointed: %s", self.step, error)
