"""AsymCheck as a checkpoint handler of Orbax."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future as orbax_future

from asymcheck.checkpointer import Checkpointer
from asymcheck.cost import CostModel
from asymcheck.errors import SaveFailedError, StoreError
from asymcheck.partition import even_windows
from asymcheck.reader import Checkpoint, open_step
from asymcheck.snapshot import Capture
from asymcheck.stores import open_store
from asymcheck.strategy import Strategy
from asymcheck_jax.directories import (
    HeldStep,
    ItemDirectories,
    ItemDirectory,
    Place,
    read_item,
    unlink_unused,
)
from asymcheck_jax.donation import note_capture
from asymcheck_jax.restoring import restore_into, restore_tree, stored_shapes
from asymcheck_jax.sources import DeviceShard, view_of

_log = logging.getLogger("asymcheck")
_WINDOWS = 8
_LONGEST_PACE_S = 1.0


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A save, from its beginning to its end."""

    place: Place
    item: ItemDirectory
    capture: Capture
    done: threading.Event = field(default_factory=threading.Event)


class AsymCheckHandler(ocp.AsyncCheckpointHandler):
    """Saves and restores a pytree of (sharded) arrays, for Orbax's `CheckpointManager`.

    Every step's directory is whole by itself: `asymcheck.open_checkpoint` reads it, and deleting,
    moving or copying any step leaves the others as they are. An increment's predecessors are
    linked into its directory; where the file system has no hard links every step is a base.

    On the CPU nothing is copied before `save` returns: JAX keeps the memory of the arrays for as
    long as AsymCheck looks at it, whether they are donated or not. On a device all copies to the
    host are done when `save` returns (in memory of JAX's, beside `max_host_bytes`), unless
    `donation_is_held` says that nobody donates arrays of a save under way (see `hold_donation`).

    Use one handler for one item of one manager. Its errors come where Orbax's users expect them:
    those of the state from `save`, those of writing from the next `save` or
    `wait_until_finished`.

    Args:
        strategy: see `asymcheck.Checkpointer`.
        max_host_bytes: bound on host memory of this process for buffers and the increments'
            reference.
        max_chain: an increment has at most so many steps below it; 0 stores every step in full,
            None chooses by cost.
        donation_is_held: captures on a device may go on after `save` has returned.
        commit_timeout_s: how long processes wait for each other, and for Orbax's directories.
    """

    def __init__(
        self,
        *,
        strategy: str | Strategy = "asymcheck",
        max_host_bytes: int = 4 << 30,
        max_chain: int | None = None,
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
        self._held: HeldStep | None = None  # on process 0
        self._base_step: int | None = None  # what the next step may build on
        self._under_way: _UnderWay | None = None  # the last save, done or not
        self._last_save_s: float | None = None

    # -- saving ----------------------------------------------------------------------------

    async def async_save(self, directory: epath.Path, args: Any) -> list[Any]:
        """Begin to save; the future is done when this process's part is durable and committed.

        Raises:
            UnsupportedStateError: the state cannot be represented; names the path.
            StoreError: the directory is not local.
        """
        return self._begin(directory, args)

    def save(self, directory: epath.Path, args: Any) -> None:
        """Save and wait until it is durable."""
        for future in self._begin(directory, args):
            future.result()

    def _begin(self, directory: epath.Path, args: Any) -> list[Any]:
        place = Place.of(directory)
        self._abandon_last(place)
        view = view_of(args.item, jax.process_index(), args.update)
        checkpointer, step = self._checkpointer_for(place)
        if self._base_step is None:
            checkpointer.start_chain()
        item = self._directories.begin(step)
        capture = checkpointer.begin(
            step, view, windows=even_windows(_WINDOWS, 0), metadata=args.metadata or {}
        )
        self._base_step = None  # until this one is committed
        self._under_way = _UnderWay(place, item, capture)
        on_device = [s for s in view.sources if isinstance(s, DeviceShard)]
        self._read_devices(capture, on_device)
        pace_s = self._pace_s() if on_device and self._donation_is_held else 0.0
        commit = self._commit(checkpointer, self._under_way, pace_s)
        future = orbax_future.CommitFutureAwaitingContractedSignals(commit, name="asymcheck")
        return [future]

    def _read_devices(self, capture: Capture, shards: list[DeviceShard]) -> None:
        for shard in shards:
            shard.start()
        if not self._donation_is_held:
            for shard in shards:
                shard.fetch()
        elif shards:
            note_capture(capture)

    async def _commit(self, checkpointer: Checkpointer, save: _UnderWay, pace_s: float) -> None:
        """On Orbax's commit thread, once the directory exists."""
        primary, capture, item = jax.process_index() == 0, save.capture, save.item
        try:
            try:
                item.open(save.place.path)
                if primary:
                    item.mark()
                if primary and capture.base_step is not None and self._held is not None:
                    self._held.give(item)
            except BaseException as error:
                item.give_up(error)
                capture.fail(error)
            self._spread(capture, pace_s)
            capture.finish()
            capture.pending.wait()
            if primary:
                if item.has_bases:
                    unlink_unused(item)
                self._hold(checkpointer, item)
            self._base_step = item.step if not primary or self._holds(item.step) else None
        finally:
            save.done.set()

    def _hold(self, checkpointer: Checkpointer, item: ItemDirectory) -> None:
        """Protect the step before Orbax may delete it, if increments may build on it."""
        if self._held is None:
            return
        try:
            if checkpointer.may_build_increments:
                self._held.take(item)
            else:
                self._held.drop()
        except StoreError as error:
            _log.warning("the next step is stored in full: %s", error)

    def _holds(self, step: int) -> bool:
        return self._held is not None and self._held.step == step

    def _spread(self, capture: Capture, pace_s: float) -> None:
        """Open the windows one after the other."""
        for ordinal in range(_WINDOWS):
            capture.enter_window(ordinal)
            if capture.await_captured(pace_s / _WINDOWS):
                return

    def _pace_s(self) -> float:
        """Over how long to spread the copies from the device.

        Half the time between the last two saves, since Orbax waits for one save before the
        next, and never so long that it matters when somebody waits for the save.
        """
        now_s = time.monotonic()
        last_s, self._last_save_s = self._last_save_s, now_s
        return 0.0 if last_s is None else min((now_s - last_s) / 2, _LONGEST_PACE_S)

    def _abandon_last(self, place: Place) -> None:
        """Orbax lets a save finish before the next, unless it gave it up (another item failed)."""
        last = self._under_way
        if last is None:
            return
        if last.place.root == place.root and last.place.item != place.item:
            raise ValueError(
                f"one AsymCheckHandler for two items, {last.place.item!r} and {place.item!r}: "
                "give each its own"
            )
        if not last.done.is_set():
            error = SaveFailedError("Orbax gave this save up", step=last.item.step)
            last.capture.fail(error)
            last.item.give_up(error)
            last.done.wait(self._timeout_s)

    def _checkpointer_for(self, place: Place) -> tuple[Checkpointer, int]:
        """The checkpointer, and the step's number as far as the directory's name tells it.

        Numbers grow within a chain; after going back to an older step a new one begins.
        """
        last = self._under_way
        step = place.number if place.number is not None else last.item.step + 1 if last else 0
        if last is not None and (step <= last.item.step or last.place.root != place.root):
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
            if jax.process_index() == 0:
                self._held = HeldStep(place.root / ".asymcheck-held" / (place.item or "item"))
        return self._checkpointer, step

    def finalize(self, directory: epath.Path) -> None:
        """Nothing is left to do: the step was committed before Orbax names it."""

    def close(self) -> None:
        """Finish what is under way and end all threads; a later save begins anew."""
        last, self._under_way, self._base_step = self._under_way, None, None
        if last is not None:
            last.done.wait(self._timeout_s)
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            checkpointer.close()
        self._directories.close()
        held, self._held = self._held, None
        if held is not None:
            held.close()

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
    """The step that an item's directory is for.

    Raises:
        CheckpointNotFoundError: it is not in the directory.
        CorruptionError, FormatError: it is damaged.
    """
    store = open_store(path)
    try:
        return open_step(store, read_item(store))
    except BaseException:
        store.close()
        raise
