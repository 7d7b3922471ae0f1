"""Zstandard over the bytes as they are: for leaves that are no numbers, or repeat themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asymcheck.codecs import _zstd
from asymcheck.codecs._columns import paired
from asymcheck.codecs.base import Column, JsonValue
from asymcheck.errors import CodecError


@dataclass(frozen=True, slots=True)
class ZstdCodec:
    """One zstd frame for each column, with its content size; nothing for a column of 0 bytes.

    The same bytes from the same version of the zstd library; any version decodes them.

    Args:
        level: 1 (fast) to 22 (small).

    Raises:
        CodecError: if `level` is not one.
    """

    level: int = 1

    id = "zstd"
    needs_base = False
    lossy = False
    joint = False

    def __post_init__(self) -> None:
        if type(self.level) is not int or not 1 <= self.level <= _zstd.MAX_LEVEL:
            raise CodecError(
                "no such zstd level", expected=f"1 to {_zstd.MAX_LEVEL}", found=repr(self.level)
            )

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """The level; decoding does not depend on it."""
        return {"level": self.level}

    def encode(self, columns: Sequence[Column]) -> list[bytes | memoryview]:
        """One frame for each column."""
        preset = _zstd.at_level(self.level)
        return [
            _zstd.compress(column.new.data, preset) if column.new.size else b""
            for column in columns
        ]

    def decode(self, columns: Sequence[Column], payloads: Sequence[memoryview]) -> None:
        """Decompress every payload into its column.

        Raises:
            CodecError: if a payload is not one frame of exactly the column's length.
        """
        for column, payload in paired(columns, payloads):
            if column.new.size:
                column.new[:] = _zstd.decompress(payload, column.new.size)
            elif payload.nbytes:
                raise CodecError("bytes for an empty column", expected=0, found=payload.nbytes)
