"""What a user passes to Orbax to save and restore with AsymCheck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orbax.checkpoint as ocp

from asymcheck_jax.handler import AsymCheckHandler
from asymcheck_jax.updates import OptimizerUpdate


@ocp.args.register_with_handler(AsymCheckHandler, for_save=True)
@dataclass
class AsymCheckSave(ocp.args.CheckpointArgs):
    """Save a pytree, as `ocp.args.StandardSave` does.

    Attributes:
        item: a pytree of `jax.Array` (typed random keys included), NumPy arrays and scalars,
            bool, int, float, complex, str, bytes and None.
        metadata: a JSON object, kept with the step.
        update: the optimizer's update that made `item` of what was saved last, if it was one
            (`AdamUpdate`, `LionUpdate`, `SGDUpdate`): then an increment can be a tenth as large.
    """

    item: Any
    metadata: dict[str, Any] | None = None
    update: OptimizerUpdate | None = None


@ocp.args.register_with_handler(AsymCheckHandler, for_restore=True)
@dataclass
class AsymCheckRestore(ocp.args.CheckpointArgs):
    """Restore a pytree, as `ocp.args.StandardRestore` does.

    Attributes:
        item: a pytree of the structure, types, dtypes and shardings wanted: arrays,
            `jax.ShapeDtypeStruct` or Python values; None for nested dictionaries, with arrays
            on the default device.
        cast: convert to the target's dtypes where they differ from what is stored.
    """

    item: Any = None
    cast: bool = False
