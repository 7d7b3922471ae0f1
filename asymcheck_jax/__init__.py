"""AsymCheck for JAX: a checkpoint handler for Orbax, and reading checkpoints as JAX arrays.

manager = ocp.CheckpointManager(directory, item_handlers=asymcheck_jax.AsymCheckHandler())
manager.save(step, args=asymcheck_jax.AsymCheckSave(state))
state = manager.restore(step, args=asymcheck_jax.AsymCheckRestore(state))

Or without Orbax, in any store: asymcheck_jax.Checkpointer(url).
"""

from asymcheck_jax.arguments import AsymCheckRestore, AsymCheckSave
from asymcheck_jax.checkpointer import Checkpointer
from asymcheck_jax.donation import HeldDonation, hold_donation
from asymcheck_jax.handler import AsymCheckHandler
from asymcheck_jax.loading import load
from asymcheck_jax.recording import RecordedUpdates, record_updates
from asymcheck_jax.updates import AdamUpdate, LionUpdate, SGDUpdate

__all__ = [
    "AdamUpdate",
    "AsymCheckHandler",
    "AsymCheckRestore",
    "AsymCheckSave",
    "Checkpointer",
    "HeldDonation",
    "LionUpdate",
    "RecordedUpdates",
    "SGDUpdate",
    "hold_donation",
    "load",
    "record_updates",
]
