"""Reading a checkpoint as tensors, without a module to put them into."""

from __future__ import annotations

import os
from typing import Any

from asymcheck.reader import Checkpoint, read_step
from asymcheck_torch.stored import numpy_leaves_of, rebuild


def load(url: str | os.PathLike[str], step: int | None = None) -> Any:
    """The state of a step as it was saved, with torch tensors on the CPU.

    Reads checkpoints of any framework. Of one written by `attach` the result is the dictionary
    that `asymcheck_torch.state.TrainingState` describes; tied parameters share one tensor.

    Args:
        url: the run: a path or a URL.
        step: which step; None for the newest good one (damaged ones are passed over, loudly).

    Raises:
        CheckpointNotFoundError: there is no such step, or none that is whole.
        CorruptionError, FormatError: the step asked for by number is damaged.
        UnsupportedStateError: a leaf has a dtype that torch does not have.
        StoreError: the store failed.
    """
    return read_step(url, step, _read)


def _read(checkpoint: Checkpoint) -> Any:
    structure = checkpoint.structure
    state = rebuild(checkpoint, structure, numpy_leaves_of(structure))
    if isinstance(state, dict):
        state.pop("__numpy_leaves__", None)
    return state
