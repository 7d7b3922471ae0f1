"""AsymCheck: checkpoints at every training step, lossless, committed atomically.

Importing this loads neither PyTorch nor JAX. Save and restore with `Checkpointer`; read a
checkpoint for analysis with `open_checkpoint`; PyTorch users attach `asymcheck_torch`.
"""

from asymcheck import errors
from asymcheck.attempt import PendingSave
from asymcheck.checkpointer import Checkpointer
from asymcheck.cost import CostModel
from asymcheck.errors import AsymCheckError
from asymcheck.policy import Always, CompressionPolicy, Never, Selective
from asymcheck.reader import Checkpoint, LazyArray, open_checkpoint
from asymcheck.state import LeafSpec, ShardSpec, StateView
from asymcheck.stores import Store, StoreOptions, open_store
from asymcheck.strategies import AsymCheck, AsymCheckNaive, AsymCheckS, Synchronous
from asymcheck.strategy import Strategy

__version__ = "0.1.0"

__all__ = [
    "Always",
    "AsymCheck",
    "AsymCheckError",
    "AsymCheckNaive",
    "AsymCheckS",
    "Checkpoint",
    "Checkpointer",
    "CompressionPolicy",
    "CostModel",
    "LazyArray",
    "LeafSpec",
    "Never",
    "PendingSave",
    "Selective",
    "ShardSpec",
    "StateView",
    "Store",
    "StoreOptions",
    "Strategy",
    "Synchronous",
    "errors",
    "open_checkpoint",
    "open_store",
]
