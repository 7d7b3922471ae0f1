"""AsymCheck as a checkpoint handler of Orbax."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future as orbax_future

from asymcheck.checkpointer import Checkpointer
from asymcheck.commit import committed_steps
from asymcheck.cost import CostModel
from asymcheck.errors import CheckpointNotFoundError
from asymcheck.partition import Phase, Window
from asymcheck.reader import Checkpoint, open_step
from asymcheck.snapshot import Capture
from asymcheck.stores import open_store
from asymcheck.strategy import Strategy
from asymcheck_jax.directories import (
    ItemDirectories,
    ItemDirectory,
    can_be_linked,
    link_objects,
    unlink_unused,
)
from asymcheck_jax.donation import note_capture
from asymcheck_jax.restoring import restore_into, restore_tree, stored_shapes
from asymcheck_jax.sources import DeviceShard, view_of

_log = logging.getLogger("asymcheck")
_WINDOWS = 8
_NUMBER = re.compile(r"[0-9]+")


class AsymCheckHandler(ocp.AsyncCheckpointHandler):
    """Saves and restores a pytree of (sharded) arrays, for Orbax's `CheckpointManager`.

    Every step's directory is whole by itself: `asymcheck.open_checkpoint` reads it, and deleting,
    moving or copying any step leaves the others as they are. An increment's predecessors are
    linked into its directory; where the file system has no hard links every step is a base.

    On the CPU nothing is copied before `save` returns: JAX keeps the memory of the arrays for as
    long as AsymCheck looks at it, whether they are donated or not. On a device all copies to the
    host are done when `save` returns, unless `donation_is_held` says that nobody donates arrays
    of a save under way (see `hold_donation`).

    Use one handler for one item of one manager. Its errors come where Orbax's users expect them:
    those of the state from `save`, those of writing from the next `save` or
    `wait_until_finished`.

    Args:
        strategy: see `asymcheck.Checkpointer`.
        max_host_bytes: bound on host memory of this process for buffers and the increments'
            reference.
        max_chain: an increment has at most so many steps below it; 0 stores every step in full.
        donation_is_held: captures on a device may go on after `save` has returned.
        commit_timeout_s: how long processes wait for each other, and for Orbax's directories.
    """

    def __init__(
        self,
        *,
        strategy: str | Strategy = "asymcheck",
        max_host_bytes: int = 4 << 30,
        max_chain: int = 10,
        donation_is_held: bool = False,
        commit_timeout_s: float = 300.0,
    ) -> None:
        self._strategy = strategy
        self._max_host_bytes = max_host_bytes
        self._max_chain = max_chain
        self._donation_is_held = donation_is_held
        self._timeout_s = commit_timeout_s
        self._checkpointer: Checkpointer | None = None
        self._directories = ItemDirectories(commit_timeout_s)
        self._previous: ItemDirectory | None = None
        self._last_save_s: float | None = None
        self._finishing = threading.Lock()

    # -- saving ----------------------------------------------------------------------------

    async def async_save(self, directory: epath.Path, args: Any) -> list[Any]:
        """Begin to save; the future is done when this process's part is durable and committed.

        Raises:
            UnsupportedStateError: the state cannot be represented; names the path.
        """
        view = view_of(args.item, jax.process_index())
        checkpointer, step = self._checkpointer_for(directory)
        place = self._directories.begin(step)
        previous = self._previous
        if previous is None or not can_be_linked(previous):
            checkpointer.start_chain()
        capture = checkpointer.begin(
            step, view, windows=self._windows(), metadata=args.metadata or {}
        )
        self._previous = place
        held_s = self._pace_s()
        on_device = [s for s in view.sources if isinstance(s, DeviceShard)]
        for source in on_device:
            source.start()
        if on_device:
            note_capture(capture)
        if on_device and not self._donation_is_held:
            self._finish(capture)
        base = previous if capture.base_step is not None else None
        commit = self._commit(capture, directory, place, base, held_s)
        return [orbax_future.CommitFutureAwaitingContractedSignals(commit, name="asymcheck")]

    def save(self, directory: epath.Path, args: Any) -> None:
        """Save and wait until it is durable."""

        async def run() -> None:
            for future in await self.async_save(directory, args):
                future.result()

        asyncio.run(run())

    async def _commit(
        self,
        capture: Capture,
        directory: epath.Path,
        place: ItemDirectory,
        base: ItemDirectory | None,
        pace_s: float,
    ) -> None:
        """On Orbax's commit thread, once the directory exists."""
        try:
            place.open(Path(os.fspath(directory)))
            if base is not None and jax.process_index() == 0:
                link_objects(base, place)
        except BaseException as error:
            place.give_up(error)
            capture.fail(error)
        self._spread(capture, pace_s)
        self._finish(capture)
        capture.pending.wait()
        if base is not None and jax.process_index() == 0:
            unlink_unused(place)

    def _spread(self, capture: Capture, pace_s: float) -> None:
        """Open the windows one after the other over the time until the next save."""
        for ordinal in range(_WINDOWS):
            capture.enter_window(ordinal)
            if capture.await_captured(pace_s / _WINDOWS):
                return

    def _finish(self, capture: Capture) -> None:
        with self._finishing:
            capture.finish()

    def _windows(self) -> list[Window]:
        return [Window(Phase.FORWARD, i, 1.0) for i in range(_WINDOWS)]

    def _pace_s(self) -> float:
        """Half the time between the last two saves: Orbax waits for one save before the next."""
        now_s = time.monotonic()
        last_s, self._last_save_s = self._last_save_s, now_s
        return 0.0 if last_s is None else (now_s - last_s) / 2

    def _checkpointer_for(self, directory: epath.Path) -> tuple[Checkpointer, int]:
        """The checkpointer, and the step's number as far as the directory's name tells it.

        Numbers grow within a chain; after going back to an older step a new one begins.
        """
        step = _step_of(directory)
        if self._previous is not None and step <= self._previous.step:
            self.close()
        if self._checkpointer is None:
            self._checkpointer = Checkpointer(
                self._directories,
                strategy=self._strategy,
                max_host_bytes=self._max_host_bytes,
                max_chain=self._max_chain,
                writer=jax.process_index(),
                writers=jax.process_count(),
                run_id="orbax",
                commit_timeout_s=self._timeout_s,
                on_error="warn",
                cost_model=CostModel(),  # no probes: there is no directory for them
            )
        return self._checkpointer, step

    def finalize(self, directory: epath.Path) -> None:
        """Nothing is left to do: the step was committed before Orbax names it."""

    def close(self) -> None:
        """Finish what is under way and end all threads."""
        checkpointer, self._checkpointer = self._checkpointer, None
        self._previous = None
        if checkpointer is not None:
            checkpointer.close()
        self._directories.close()

    # -- restoring -------------------------------------------------------------------------

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        """The pytree of a step; see `AsymCheckRestore`.

        Raises:
            StateMismatchError: the target differs; all differences are listed.
            CorruptionError, FormatError: the step is damaged.
        """
        with open_item(os.fspath(directory)) as checkpoint:
            if args is None or args.item is None:
                return restore_tree(checkpoint)
            return restore_into(checkpoint, args.item, cast_dtypes=args.cast)

    def metadata(self, directory: epath.Path) -> Any:
        """The saved pytree with a `jax.ShapeDtypeStruct` for every array, none of which is read."""
        with open_item(os.fspath(directory)) as checkpoint:
            return stored_shapes(checkpoint)

    @classmethod
    def typestr(cls) -> str:
        """The name under which Orbax notes this handler in a step's metadata."""
        return "asymcheck_jax.AsymCheckHandler"


def open_item(path: str) -> Checkpoint:
    """The step that an item's directory holds: the newest; those below it are its bases.

    Raises:
        CheckpointNotFoundError: the directory holds none.
        CorruptionError, FormatError: it is damaged.
    """
    store = open_store(path)
    try:
        steps = committed_steps(store)
        if not steps:
            raise CheckpointNotFoundError("the directory holds no AsymCheck step", object=path)
        return open_step(store, steps[-1])
    except BaseException:
        store.close()
        raise


def _step_of(directory: epath.Path) -> int:
    """The number in the name of the step's directory, 0 without one."""
    match = _NUMBER.search(directory.parent.name)
    return int(match[0]) if match is not None else 0
