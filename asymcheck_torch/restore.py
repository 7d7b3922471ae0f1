"""From a checkpoint back into a training run: compared first, then read in place."""

from __future__ import annotations

import logging
from collections.abc import Callable

from asymcheck.reader import Checkpoint
from asymcheck_torch import rng
from asymcheck_torch.matching import Matching
from asymcheck_torch.modules import load_module_extra, named_buffers, stateful_names
from asymcheck_torch.parts import reshard
from asymcheck_torch.state import TrainingState
from asymcheck_torch.stored import Stored

_log = logging.getLogger("asymcheck")


def read_into(checkpoint: Checkpoint, training: TrainingState) -> Callable[[], None]:
    """Read the tensors of `training` from `checkpoint`; what makes the rest what it was then.

    Everything is compared before anything is changed. Without optimizers only the module and the
    extras given are restored, as for an evaluation; else all of the state must fit. No rank waits
    for another, here or in what is returned.

    Raises:
        StateMismatchError: listing every difference; nothing was changed.
        CorruptionError: stored bytes are wrong; the tensors' values are then undefined.
    """
    reshard(training.module)
    stored = Stored.open(checkpoint, training.world.rank)
    matching = Matching(checkpoint)
    apply = training.trained.match(matching, stored)
    _match_module(matching, stored, training)
    _match_extras(matching, stored, training)
    matching.raise_problems()
    matching.read()

    def apply_all() -> None:
        apply()
        load_module_extra(training.module, stored.module_extra)
        for extra in training.extras:
            extra.load(stored.own["extra"][extra.name])
        if training.trained.is_updated:
            _restore_generators(stored, checkpoint.step)

    return apply_all


def _restore_generators(stored: Stored, step: int) -> None:
    if "rng" in stored.own:
        rng.restore(stored.own["rng"])
    else:
        _log.warning("step %d holds no random generators: they stay as they are", step)


def _match_module(matching: Matching, stored: Stored, training: TrainingState) -> None:
    buffers = named_buffers(training.module)
    matching.tensors("buffer", buffers, stored.kinds.get("buffers", {}))
    names = stateful_names(training.module)
    matching.names("extra state of module", names, stored.module_extra)


def _match_extras(matching: Matching, stored: Stored, training: TrainingState) -> None:
    expected = [extra.name for extra in training.extras]
    found = list(stored.own["extra"])
    if not training.trained.is_updated:
        found = [name for name in found if name in expected]
    matching.names("extra state", expected, found)
