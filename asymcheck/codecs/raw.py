"""The column's own bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asymcheck.codecs._columns import paired
from asymcheck.codecs.base import Column, JsonValue
from asymcheck.errors import CodecError


@dataclass(frozen=True, slots=True)
class RawCodec:
    """No coding: the payload is a view of `new`, so it changes when the column's memory does."""

    id = "raw"
    needs_base = False
    lossy = False
    joint = False

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """None."""
        return {}

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """The bytes of each column, not copied."""
        return [column.new.data for column in columns]

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Copy every payload into its column.

        Raises:
            CodecError: if a payload has another length than its column.
        """
        for column, payload in paired(columns, payloads):
            if payload.nbytes != column.new.size:
                raise CodecError(
                    "raw payload of a wrong length",
                    expected=column.new.size,
                    found=payload.nbytes,
                )
            column.new[:] = np.frombuffer(payload, np.uint8)
