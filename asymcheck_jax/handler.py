"""AsymCheck as a checkpoint handler of Orbax."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future as orbax_future

from asymcheck.checkpointer import Checkpointer
from asymcheck.cost import CostModel
from asymcheck.errors import SaveFailedError, StoreError
from asymcheck.reader import Checkpoint, open_step
from asymcheck.snapshot import Capture
from asymcheck.stores import open_store
from asymcheck.strategy import Strategy
from asymcheck_jax.capturing import WINDOWS, read_devices, spread
from asymcheck_jax.directories import ItemDirectories, ItemDirectory, read_item
from asymcheck_jax.held import HeldStep, unlink_unused
from asymcheck_jax.places import Place
from asymcheck_jax.restoring import restore_into, restore_tree, stored_shapes
from asymcheck_jax.sources import view_of

_log = logging.getLogger("asymcheck")
_LONGEST_PACE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Run:
    """What successive saves to one root share.

    `held`: none in an object store, where nothing can be linked, and every step is stored in full.
    """

    checkpointer: Checkpointer
    directories: ItemDirectories
    held: HeldStep | None

    def holds(self, step: int | None) -> bool:
        """Whether the next step may build on this one: process 0 decides, by what it holds."""
        return step is not None and self.held is not None and self.held.holds(step)

    def hold(self, item: ItemDirectory) -> None:
        """Protect the step before Orbax may delete it, if increments may build on it."""
        if self.held is None:
            return
        try:
            if self.checkpointer.may_build_increments:
                self.held.take(item)
            else:
                self.held.drop()
        except StoreError as error:
            _log.warning("the next step is stored in full: %s", error)

    def close(self) -> None:
        """Finish what is under way and end all threads."""
        self.checkpointer.close()
        self.directories.close()
        if self.held is not None:
            self.held.close()


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A save, from its beginning to its end.

    `on_held`: some process may build on the step that is held.
    """

    place: Place
    item: ItemDirectory
    capture: Capture
    on_held: bool
    done: threading.Event = field(default_factory=threading.Event)


class AsymCheckHandler(ocp.AsyncCheckpointHandler):
    """Saves and restores a pytree of (sharded) arrays, for Orbax's `CheckpointManager`.

    Every step's directory is whole by itself: `asymcheck.open_checkpoint` reads it, and deleting,
    moving or copying any step leaves the others as they are. An increment's predecessors are
    linked into its directory; where there are no hard links (on some file systems, and in object
    stores, `gs://BUCKET/...`) every step is a base.

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
        self._run: _Run | None = None
        self._committed_step: int | None = None  # the last save, unless it failed
        self._under_way: _UnderWay | None = None  # the last save, done or not
        self._last_save_s: float | None = None

    # -- saving ----------------------------------------------------------------------------

    async def async_save(self, directory: epath.Path, args: Any) -> list[Any]:
        """Begin to save; the future is done when this process's part is durable and committed.

        Raises:
            UnsupportedStateError: the state cannot be represented; names the path.
            StoreError: the directory is in no kind of store that AsymCheck knows.
        """
        return self._begin(directory, args)

    def save(self, directory: epath.Path, args: Any) -> None:
        """Save and wait until it is durable."""
        for future in self._begin(directory, args):
            future.result()

    def _begin(self, directory: epath.Path, args: Any) -> list[Any]:
        place = Place.of(directory)
        self._abandon_last(place)
        run, step = self._run_at(place)
        checkpointer, on_held = run.checkpointer, run.holds(self._committed_step)
        if not on_held:
            checkpointer.start_chain()
        item = run.directories.begin(step)
        try:
            with checkpointer.viewing(step):
                view = view_of(args.item, jax.process_index(), args.update)
            capture = checkpointer.begin(step, view, windows=WINDOWS, metadata=args.metadata or {})
        except BaseException as error:
            item.give_up(error)  # Orbax will not go on here
            raise
        self._committed_step = None  # until this one is
        self._under_way = _UnderWay(place, item, capture, on_held)
        on_device = read_devices(capture, view, donation_is_held=self._donation_is_held)
        pace_s = self._pace_s() if on_device and self._donation_is_held else 0.0
        commit = self._commit(run, self._under_way, pace_s)
        future = orbax_future.CommitFutureAwaitingContractedSignals(commit, name="asymcheck")
        return [future]

    async def _commit(self, run: _Run, save: _UnderWay, pace_s: float) -> None:
        """On Orbax's commit thread, once the directory exists."""
        primary, capture, item = jax.process_index() == 0, save.capture, save.item
        try:
            try:
                item.open(save.place.url)
                if primary:
                    item.mark()
                if primary and save.on_held and run.held is not None:
                    run.held.give(item)
            except BaseException as error:
                item.give_up(error)
                capture.fail(error)
            spread(capture, pace_s)
            capture.finish()
            capture.pending.wait()
            if primary:
                if item.has_bases:
                    unlink_unused(item)
                run.hold(item)
            self._committed_step = item.step
        finally:
            save.done.set()

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
        if place.is_certain and last.place.root == place.root and last.place.item != place.item:
            raise ValueError(
                f"one AsymCheckHandler for two items, {last.place.item!r} and {place.item!r}: "
                "give each its own"
            )
        if not last.done.is_set():
            error = SaveFailedError("Orbax gave this save up", step=last.item.step)
            last.capture.fail(error)
            last.item.give_up(error)
            last.done.wait(self._timeout_s)

    def _run_at(self, place: Place) -> tuple[_Run, int]:
        """Where to save, and the step's number as far as the directory's name tells it.

        Numbers grow within a chain; after going back to an older step a new one begins.
        """
        last = self._under_way
        step = place.number if place.number is not None else last.item.step + 1 if last else 0
        if last is not None and (step <= last.item.step or last.place.root != place.root):
            self.close()
        if self._run is None:
            self._run = self._begin_run(place)
        return self._run, step

    def _begin_run(self, place: Place) -> _Run:
        directories = ItemDirectories(place.root, self._timeout_s)
        checkpointer = Checkpointer(
            directories,
            strategy=self._strategy,
            max_host_bytes=self._max_host_bytes,
            max_chain=self._max_chain if place.is_local else 0,
            writer=jax.process_index(),
            writers=jax.process_count(),
            run_id="orbax",
            commit_timeout_s=self._timeout_s,
            on_error="warn",
            cost_model=CostModel(),  # no probes: there is no directory for them
        )
        held: HeldStep | None = None
        if place.is_local:
            path = Path(place.root) / ".asymcheck-held" / (place.item or "item")
            held = HeldStep(path, primary=jax.process_index() == 0)
        return _Run(checkpointer, directories, held)

    def finalize(self, directory: epath.Path) -> None:
        """Nothing is left to do: the step was committed before Orbax names it."""

    def close(self) -> None:
        """Finish what is under way and end all threads; a later save begins anew."""
        last, self._under_way, self._committed_step = self._under_way, None, None
        if last is not None:
            last.done.wait(self._timeout_s)
        run, self._run = self._run, None
        if run is not None:
            run.close()

    # -- restoring -------------------------------------------------------------------------

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        """The pytree of a step; see `AsymCheckRestore`.

        Raises:
            StateMismatchError: the target differs; all differences are listed.
            CorruptionError, FormatError: the step is damaged.
        """
        with open_item(Place.of(directory).url) as checkpoint:
            if args is None or args.item is None:
                return restore_tree(checkpoint)
            return restore_into(checkpoint, args.item, cast_dtypes=args.cast)

    def metadata(self, directory: epath.Path) -> Any:
        """The saved pytree with a `jax.ShapeDtypeStruct` for every array, none of which is read."""
        with open_item(Place.of(directory).url) as checkpoint:
            return stored_shapes(checkpoint)

    @classmethod
    def typestr(cls) -> str:
        """The name under which Orbax notes this handler in a step's metadata."""
        return "asymcheck_jax.AsymCheckHandler"


def open_item(url: str) -> Checkpoint:
    """The step that an item's directory is for.

    Raises:
        CheckpointNotFoundError: it is not in the directory.
        CorruptionError, FormatError: it is damaged.
    """
    store = open_store(url)
    try:
        return open_step(store, read_item(store))
    except BaseException:
        store.close()
        raise
