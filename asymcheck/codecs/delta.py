"""Lossless coding of a change, level 2: differences of bit patterns, then byte planes.

Between two steps most elements change by few units in the last place, so that their bit patterns,
read as unsigned integers, are close. The difference of those is taken modulo 2^(8w), w the width
of an element in bytes: exact and invertible for every pattern, NaN and infinity among them, which
a difference of floats is not. zigzag then folds its sign into the lowest bit, and the planes are
coded as `plane_payload` describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asymcheck.codecs import plane_payload
from asymcheck.codecs._columns import as_words, base_of, paired, word_width
from asymcheck.codecs.base import Column, JsonValue


@dataclass(frozen=True, slots=True)
class DeltaCodec:
    """Every column as the planes of its bit differences to the predecessor.

    Exact for every dtype and every bit pattern. The same bytes from the same version of the zstd
    library; any version decodes them.
    """

    id = "delta"
    needs_base = True
    lossy = False
    joint = False

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """None."""
        return {}

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """The coded difference of each column.

        Raises:
            CodecError: if a column has no predecessor.
        """
        return [_encode(column) for column in columns]

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Fill every column from its predecessor, which may be the same memory.

        Raises:
            CodecError: if a column has no predecessor, or a payload does not follow the layout
                for the column's dtype and length.
        """
        for column, payload in paired(columns, payloads):
            np.copyto(column.new, base_of(column))  # nothing to do where they are the same
            plane_payload.decode_difference(payload, as_words(column.new, word_width(column.dtype)))


def _encode(column: Column) -> memoryview:
    width = word_width(column.dtype)
    return plane_payload.encode_difference(
        as_words(column.new, width), as_words(base_of(column), width)
    )
