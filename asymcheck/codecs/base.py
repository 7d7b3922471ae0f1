"""What a codec is: bytes of co-located extents in, one payload for each extent out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


@dataclass(frozen=True, slots=True)
class Column:
    """One leaf's extent, as a codec sees it.

    Attributes:
        kind: the leaf's kind, the first component of its path (`params`, `exp_avg`, ...).
        dtype: element type of the leaf.
        new: the extent's bytes, a contiguous 1-d uint8 array of whole elements. Input of
            `encode`; output of `decode`, which fills all of it.
        old: the predecessor's bytes of the same extent, same length, or None if there is no
            predecessor. In `decode` it may be the same memory as `new`.
    """

    kind: str
    dtype: np.dtype[np.generic]
    new: NDArray[np.uint8]
    old: NDArray[np.uint8] | None = None


class Codec(Protocol):
    """A reversible (unless `lossy`) coding of co-located extents.

    `columns` are extents of the leaves of one parameter group over the same element range
    (weight, moments), so that a codec may predict one leaf from another. A codec is a pure
    function of its inputs: the same columns give the same payloads on every machine, with or
    without numba, whatever the number of threads.
    """

    @property
    def id(self) -> str:
        """Name in the registry and in manifests."""
        ...

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """What a decoder needs besides the payload; stored in the manifest."""
        ...

    @property
    def needs_base(self) -> bool:
        """Whether `old` must be given: such a block makes its step an increment."""
        ...

    @property
    def lossy(self) -> bool:
        """Whether decoding may give other bytes than were encoded; never so by default."""
        ...

    @property
    def joint(self) -> bool:
        """Whether the columns of a group only decode together, in the order of encoding."""
        ...

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """One payload for each column. Does not change `columns`."""
        ...

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Fill `new` of every column from its payload.

        Raises:
            CodecError: if a payload is not one that `encode` can have written for columns of
                this dtype and length. Lengths are checked before anything is allocated; memory
                is bounded by a small multiple of the columns' own size.
        """
        ...


def max_payload_nbytes(decoded_nbytes: int) -> int:
    """The longest payload that a column of so many bytes may have; readers refuse longer ones."""
    return 2 * decoded_nbytes + 4096


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What a payload states about how far its decoded values may be from the true ones.

    Attributes:
        exact: whether every bit comes back; the bounds are 0 then.
        absolute: bound on |decoded - true|, in float64.
        relative: bound on |decoded - true| / |true|, 0/0 taken as 0; infinite where none is stated.
    """

    exact: bool
    absolute: float
    relative: float


class LossyCodec(Codec, Protocol):
    """A codec whose payloads state their bounds.

    `encode` raises CodecError rather than give a payload that does not hold them.
    """

    def fidelity(self, payload: bytes | memoryview) -> Fidelity:
        """What a payload states; its first `MAX_FIDELITY_NBYTES` bytes suffice.

        Raises:
            CodecError: if the payload's header does not follow the layout.
        """
        ...


MAX_FIDELITY_NBYTES = 64
"""Bounds are stated within that many bytes of every payload of a lossy codec."""
