"""Pytrees in any store, without Orbax."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax

import asymcheck
from asymcheck.agreement import restore_together
from asymcheck.attempt import PendingSave
from asymcheck.reader import Checkpoint
from asymcheck.snapshot import Capture
from asymcheck.stores.base import Store
from asymcheck_jax.capturing import WINDOWS, read_devices, spread
from asymcheck_jax.restoring import restore_into, restore_tree
from asymcheck_jax.sources import view_of
from asymcheck_jax.updates import OptimizerUpdate
from asymcheck_jax.world import World


class Checkpointer:
    """Saves and restores pytrees of (sharded) arrays, in any store, all steps in one run.

    For where Orbax cannot write, or is not used. With several processes (`jax.distributed`) each
    makes one and calls its methods as the others do; each stores what its devices hold. Donation
    is as for `AsymCheckHandler`. Use from one thread; close it, or use it as a context manager.

    Args:
        url: the run: a path or a URL that all processes reach, or a `Store`.
        donation_is_held: captures on a device may go on after `save` has returned (see
            `hold_donation`).
        options: those of `asymcheck.Checkpointer`, but for `writer`, `writers` and `run_id`.

    Raises:
        ValueError, StoreError: as `asymcheck.Checkpointer` does.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Store,
        *,
        donation_is_held: bool = False,
        **options: Any,
    ) -> None:
        self._world = World()
        self._donation_is_held = donation_is_held
        self._finishing: threading.Thread | None = None
        self.checkpointer = asymcheck.Checkpointer(
            url,
            writer=jax.process_index(),
            writers=jax.process_count(),
            run_id=self._world.fresh_name(),
            **options,
        )

    def save(
        self,
        step: int,
        item: Any,
        *,
        metadata: dict[str, Any] | None = None,
        update: OptimizerUpdate | None = None,
    ) -> PendingSave:
        """Begin to save a pytree; the arrays may be donated when this returns.

        Args:
            step: its number; a committed step is never overwritten.
            item, metadata, update: as in `AsymCheckSave`.

        Raises:
            UnsupportedStateError, StepExistsError, SaveFailedError, StoreError: as
                `asymcheck.Checkpointer.save` does.
        """
        self._await_captured()
        with self.checkpointer.viewing(step):
            view = view_of(item, jax.process_index(), update)
        capture = self.checkpointer.begin(step, view, windows=WINDOWS, metadata=metadata)
        read_devices(capture, view, donation_is_held=self._donation_is_held)
        self._finishing = threading.Thread(target=_finish, args=(capture,), name="asymcheck-finish")
        self._finishing.start()
        if self.checkpointer.strategy.blocking:
            self.wait()
        return capture.pending

    def restore(self, item: Any = None, step: int | None = None, *, cast: bool = False) -> Any:
        """The pytree of a step, the same one on all processes.

        Args:
            item, cast: the target, as in `AsymCheckRestore`.
            step: which; None for the newest that is good on all processes (damaged ones are
                passed over, loudly, and give way when training saves again).

        Raises:
            CheckpointNotFoundError: there is no such step, or none that is whole.
            StateMismatchError: the target differs; all differences are listed.
            CorruptionError, FormatError: the step asked for by number is damaged.
            AsymCheckError: another process could not restore.
            StoreError: the store failed.
        """
        restored: list[Any] = []

        def read(checkpoint: Checkpoint) -> Callable[[], None]:
            if item is None:
                state = restore_tree(checkpoint)
            else:
                state = restore_into(checkpoint, item, cast_dtypes=cast)
            return lambda: restored.append(state)

        restore_together(self.checkpointer, read, step, self._world)
        return restored[0]

    def latest_step(self) -> int | None:
        """The newest committed step; whether it is whole shows when it is restored."""
        return self.checkpointer.latest_step()

    def wait(self) -> None:
        """Return when everything saved so far is committed.

        Raises:
            SaveFailedError: a save failed (with on_error="raise").
        """
        self._await_captured()
        self.checkpointer.wait()

    def close(self) -> None:
        """Finish what is under way and end all threads, then raise what `wait` would."""
        self._await_captured()
        self.checkpointer.close()

    def _await_captured(self) -> None:
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _finish(capture: Capture) -> None:
    spread(capture, 0.0)
    capture.finish()
