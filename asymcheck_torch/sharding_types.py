"""Whether something is of a type of torch's sharding libraries, without importing these.

They take most of a second to import, and nothing can be of such a type before somebody has.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether it is a tensor of which this rank holds a part."""
    return _is("torch.distributed.tensor", "DTensor", value)


def is_fsdp2(module: object) -> TypeIs[FSDPModule]:
    """Whether FSDP2 shards that module."""
    return _is("torch.distributed.fsdp", "FSDPModule", module)


def is_fsdp1(module: object) -> TypeIs[FullyShardedDataParallel]:
    """Whether it is a wrapper of the FSDP before."""
    return _is("torch.distributed.fsdp", "FullyShardedDataParallel", module)


def _is(library: str, name: str, value: Any) -> bool:
    loaded = sys.modules.get(library)
    # Another thread may be importing it right now: then it lacks what nothing can be of yet.
    return isinstance(value, getattr(loaded, name, ()))
