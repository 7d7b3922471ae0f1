"""Where the training loop of another library stands, so that it goes on with the next batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from asymcheck.errors import UnsupportedStateError
from asymcheck_torch import rng
from asymcheck_torch.tensors import cuda_devices
from asymcheck_torch.training import TrainingCheckpointer

_log = logging.getLogger("asymcheck")


class PositionUnknownError(UnsupportedStateError):
    """The update is over and the next batch has not begun: nobody knows what else is done."""


class Position:
    """What a loop that draws its own batches needs to go on; an extra state of `attach`.

    Two states of the random number generators belong to it: as the iterator over the epoch's
    batches was made, and as the first batch after the update began to train. A resumed loop makes
    the same iterator, passes over the batches that were used, and begins its batch, all under the
    generators of the interrupted one.

    Args:
        module: its CUDA devices have generators too.
        loop_state: gives what the loop itself knows: plain values and arrays.

    Attributes:
        loop: what `loop_state` gave last, or was restored.
    """

    def __init__(self, module: torch.nn.Module, loop_state: Callable[[], Any]) -> None:
        self.loop: Any = None
        self._module = module
        self._loop_state = loop_state
        self._checkpointer: TrainingCheckpointer | None = None
        self._noted_step: int | None = None
        self._epoch_rng: dict[str, Any] | None = None
        self._batch_rng: dict[str, Any] | None = None
        self._restored: dict[str, Any] = {}  # generators that are still to be set

    def follow(self, checkpointer: TrainingCheckpointer) -> None:
        """Note the position once after each of its steps."""
        self._checkpointer = checkpointer

    @property
    def is_restored(self) -> bool:
        """Whether the loop goes on from a checkpoint and has not begun its first batch."""
        return bool(self._restored)

    # -- called by the loop ----------------------------------------------------------------

    def begin_epoch(self) -> None:
        """The iterator over the batches of an epoch is about to be made."""
        self._epoch_rng = self._generators("epoch_rng")

    def begin_batch(self) -> None:
        """A batch is drawn, and training it is about to begin."""
        if self._noted_step != self._step:
            self._note(self._generators("batch_rng"))
        self._restored.clear()

    def end_training(self) -> None:
        """The loop is over; training that is resumed from here begins a new epoch."""
        self._epoch_rng = self._generators("epoch_rng")
        self._note(None)

    def close(self) -> None:
        """Close the checkpointer. A step whose position is not known does not get a checkpoint."""
        if self._checkpointer is None:
            return
        try:
            self._checkpointer.close()
        except PositionUnknownError as error:
            _log.warning("the last step is not checkpointed: %s", error)
        finally:
            self._checkpointer = None

    def _generators(self, name: str) -> dict[str, Any]:
        """The generators as they are from here on: as restored, if they were."""
        restored = self._restored.pop(name, None)
        if restored is not None:
            rng.restore(restored)
        on_cuda = torch.cuda.is_initialized()
        return rng.capture(cuda_devices(self._module.parameters()) if on_cuda else [])

    def _note(self, batch_rng: dict[str, Any] | None) -> None:
        self._noted_step = self._step
        self._batch_rng = batch_rng
        self.loop = self._loop_state()

    @property
    def _step(self) -> int | None:
        return None if self._checkpointer is None else self._checkpointer.step

    # -- called by the checkpointer --------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position that was noted after the last update.

        Raises:
            PositionUnknownError: none was.
        """
        if self._noted_step is None or self._noted_step != self._step:
            raise PositionUnknownError(
                "no batch has begun since the update, so a resumed loop could not go on from here",
                step=self._step,
                hint="Either training was stopped, or a forward pass with gradients or in "
                'training mode ran in between (on_error="warn" passes over such steps)',
            )
        return {"epoch_rng": self._epoch_rng, "batch_rng": self._batch_rng, "loop": self.loop}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the generators are set when the loop comes to epoch and batch."""
        self.loop = state["loop"]
        self._epoch_rng, self._batch_rng = state["epoch_rng"], state["batch_rng"]
        self._restored = {"epoch_rng": self._epoch_rng, "batch_rng": self._batch_rng}
