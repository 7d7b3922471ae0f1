"""Lossless coding of one snapshot, level 1: byte planes, the compressible ones entropy-coded.

The layout of a payload is given in `plane_payload`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from asymcheck.codecs import plane_payload
from asymcheck.codecs._columns import as_words, paired, word_width
from asymcheck.codecs.base import Column, JsonValue

_EXPONENTS_OF_8_BITS = [np.dtype(name) for name in ("float32", "complex64", ml_dtypes.bfloat16)]


@dataclass(frozen=True, slots=True)
class PlaneCodec:
    """Every column as the byte planes of its elements; complex ones as their float halves.

    Exact for every dtype and every bit pattern. The same bytes from the same version of the zstd
    library; any version decodes them.
    """

    id = "plane"
    needs_base = False
    lossy = False
    joint = False

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """None."""
        return {}

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """The coded planes of each column."""
        return [_encode(column) for column in columns]

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Fill every column from its planes.

        Raises:
            CodecError: if a payload does not follow the layout for the column's dtype and length.
        """
        for column, payload in paired(columns, payloads):
            plane_payload.decode(payload, as_words(column.new, word_width(column.dtype)))


def _encode(column: Column) -> memoryview:
    words = as_words(column.new, word_width(column.dtype))
    if column.dtype in _EXPONENTS_OF_8_BITS:
        return plane_payload.encode_floats(words)
    return plane_payload.encode(words)
