"""Coders of one leaf's bytes, alone or as a difference to its predecessor: ours and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from asymcheck.codecs import Codec, Column

Bytes = NDArray[np.uint8]
Words = NDArray[Any]


@dataclass(frozen=True)
class Coder:
    """`encode` makes a payload of a column; `decode` the column's bytes of that, maybe in `out`."""

    name: str
    encode: Callable[[Column], Any]
    decode: Callable[[Any, Column, Bytes], Any]


def ours(codec: Codec) -> Coder:
    def encode(column: Column) -> Any:
        return codec.encode([column])[0]

    def decode(payload: Any, column: Column, out: Bytes) -> Bytes:
        target = Column(column.kind, column.dtype, out, column.old)
        codec.decode([target], [memoryview(payload)])
        return out

    return Coder(codec.id, encode, decode)


@dataclass(frozen=True)
class Library:
    """`compress` takes words, `decompress` gives their bytes back, maybe in `out` (words)."""

    name: str
    compress: Callable[[Words], Any]
    decompress: Callable[[Any, Words], Any]

    def alone(self) -> Coder:
        def encode(column: Column) -> Any:
            return self.compress(column.new.view(_words(column)))

        def decode(payload: Any, column: Column, out: Bytes) -> Any:
            return self.decompress(payload, out.view(_words(column)))

        return Coder(self.name, encode, decode)

    def of_xor(self) -> Coder:
        return self._of_difference("xor", np.bitwise_xor, np.bitwise_xor)

    def of_subtraction(self) -> Coder:
        return self._of_difference("sub", np.subtract, np.add)

    def _of_difference(self, suffix: str, take: Any, undo: Any) -> Coder:
        def encode(column: Column) -> Any:
            dtype = _words(column, "i")
            return self.compress(take(column.new.view(dtype), column.old.view(dtype)))

        def decode(payload: Any, column: Column, out: Bytes) -> Bytes:
            dtype = _words(column, "i")
            decoded = self.decompress(payload, out.view(dtype))
            undo(np.frombuffer(decoded, dtype), column.old.view(dtype), out=out.view(dtype))
            return out

        return Coder(f"{self.name} {suffix}", encode, decode)


def _words(column: Column, kind: str = "u") -> str:
    return f"<{kind}{column.dtype.itemsize}"


def zstd() -> Library:
    """Level 1."""
    coder, decoder = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    return Library(
        "zstd-1",
        lambda words: coder.compress(words),
        lambda payload, out: decoder.decompress(payload),
    )


def zipnn() -> Library:
    """Its own choice of method, for floats of the width of the words."""
    module: Any = import_module("zipnn")
    coders = {
        width: module.ZipNN(input_format="byte", bytearray_dtype=name, threads=1)
        for width, name in ((2, "bfloat16"), (4, "float32"))
    }
    return Library(
        "zipnn",
        lambda words: coders[words.itemsize].compress(words.tobytes()),  # works in its input
        lambda payload, out: coders[out.itemsize].decompress(payload),
    )


def blosc2() -> Library:
    """Byte shuffle and zstd at level 1."""
    module: Any = import_module("blosc2")
    module.set_nthreads(1)
    options = {"codec": module.Codec.ZSTD, "clevel": 1, "filters": [module.Filter.SHUFFLE]}

    def decompress(payload: Any, out: Words) -> Words:
        module.decompress2(payload, dst=out, nthreads=1)
        return out

    return Library(
        "blosc2",
        lambda words: module.compress2(words, typesize=words.itemsize, nthreads=1, **options),
        decompress,
    )


def pcodec() -> Library:
    """Level 8, as float32 where the words are whole ones of 4 bytes, else as integers."""
    module: Any = import_module("pcodec")
    config = module.ChunkConfig(compression_level=8)

    def compress(words: Words) -> Any:
        return module.standalone.simple_compress(_numbers(words), config)

    def decompress(payload: Any, out: Words) -> Words:
        module.standalone.simple_decompress_into(payload, _numbers(out))
        return out

    return Library("pcodec-8", compress, decompress)


def _numbers(words: Words) -> Words:
    """Unsigned words of 4 bytes are values in float32, signed ones differences."""
    return words.view("<f4") if words.dtype == np.dtype("<u4") else words


def others() -> tuple[list[Library], list[str]]:
    """The libraries that are installed, and the names of those that are not."""
    found, missing = [zstd()], []
    for make in (zipnn, blosc2, pcodec):
        try:
            found.append(make())
        except ImportError:
            missing.append(make.__name__)
    return found, missing
