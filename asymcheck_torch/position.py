"""Where the training loop of another library stands, so that it goes on with the next batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from asymcheck_torch import rng
from asymcheck_torch.tensors import cuda_devices


class LoopStep(Optimizer):
    """Has no parameters; its `step()` says that a loop is done with one of its steps.

    Attached after the real optimizers, it moves the end of the step from their update to where
    the loop has updated schedules and counters, too, and evaluated.
    """

    def __init__(self) -> None:
        super().__init__([torch.empty(0)], {})
        self.param_groups.clear()

    def step(self, closure: Any = None) -> Any:
        """The next batch is drawn, or training is over."""


class Position:
    """What a loop that draws its own batches needs to go on; an extra state of `attach`.

    Two states of the random number generators belong to it: as the iterator over the epoch's
    batches was made, and as the first batch after the update began to train. A resumed loop makes
    the same iterator, passes over the batches that were used, and begins its batch, all under the
    generators of the interrupted one.

    Args:
        module: its CUDA devices have generators too.
        updates: how many updates the loop has made.
        loop_state: what the loop itself knows: plain values and arrays.

    Attributes:
        loop: what `loop_state` gave last, or was restored.
        loop_step: to be attached as the last optimizer.
    """

    def __init__(
        self, module: nn.Module, updates: Callable[[], int], loop_state: Callable[[], Any]
    ) -> None:
        self.loop: Any = None
        self.loop_step = LoopStep()
        self._module = module
        self._updates = updates
        self._loop_state = loop_state
        self._done: int | None = None  # updates that were made when the last batch began
        self._epoch_rng: dict[str, Any] | None = None
        self._batch_rng: dict[str, Any] | None = None
        self._restored: dict[str, Any] = {}  # generators that are still to be set

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
        done, self._done = self._done, self._updates()
        if done is None:
            self._generators("batch_rng")
            self._restored.clear()
        elif done != self._done:
            self._end_step(self._generators("batch_rng"))

    def end_training(self) -> None:
        """The loop is over; if it is resumed later, it begins a new epoch."""
        done, self._done = self._done, self._updates()
        if done is not None and done != self._done:
            self.begin_epoch()
            self._end_step(None)

    def _generators(self, name: str) -> dict[str, Any]:
        """The generators as they are from here on: as restored, if they were."""
        restored = self._restored.pop(name, None)
        if restored is not None:
            rng.restore(restored)
        on_cuda = torch.cuda.is_initialized()
        return rng.capture(cuda_devices(self._module.parameters()) if on_cuda else [])

    def _end_step(self, batch_rng: dict[str, Any] | None) -> None:
        self._batch_rng = batch_rng
        self.loop = self._loop_state()
        self.loop_step.step()

    # -- called by the checkpointer --------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position at the end of the last step."""
        return {"epoch_rng": self._epoch_rng, "batch_rng": self._batch_rng, "loop": self.loop}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the generators are set when the loop comes to epoch and batch."""
        self.loop = state["loop"]
        self._epoch_rng, self._batch_rng = state["epoch_rng"], state["batch_rng"]
        self._restored = {"epoch_rng": self._epoch_rng, "batch_rng": self._batch_rng}
