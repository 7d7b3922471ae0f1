"""Coders of columns, alone or as differences to their predecessors: ours and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """`encode` makes payloads of columns; `decode` their bytes of those, in `outs` or elsewhere."""

    name: str
    encode: Callable[[Sequence[Column]], Sequence[Any]]
    decode: Callable[[Sequence[Any], Sequence[Column], Sequence[Bytes]], Sequence[Any]]


def ours(codec: Codec) -> Coder:
    def decode(payloads: Any, columns: Any, outs: Any) -> Any:
        targets = [replace(column, new=out) for column, out in zip(columns, outs, strict=True)]
        codec.decode(targets, [memoryview(payload) for payload in payloads])
        return outs

    return Coder(codec.id, codec.encode, decode)


def _each(name: str, encode: Callable[..., Any], decode: Callable[..., Any]) -> Coder:
    """Of functions for one column."""
    return Coder(
        name,
        lambda columns: [encode(column) for column in columns],
        lambda payloads, columns, outs: list(map(decode, payloads, columns, outs)),
    )


@dataclass(frozen=True)
class Library:
    """`compress` takes words, `decompress` gives their bytes back, in `out` (words) or elsewhere.

    `differences` are those that it is measured with: "xor" and "sub".
    """

    name: str
    compress: Callable[[Words], Any]
    decompress: Callable[[Any, Words], Any]
    differences: tuple[str, ...] = ("xor",)

    def alone(self) -> Coder:
        def encode(column: Column) -> Any:
            return self.compress(column.new.view(_words(column, "u")))

        def decode(payload: Any, column: Column, out: Bytes) -> Any:
            return self.decompress(payload, out.view(_words(column, "u")))

        return _each(self.name, encode, decode)

    def of_difference(self, difference: str) -> Coder:
        take, undo = _DIFFERENCES[difference]

        def encode(column: Column) -> Any:
            dtype = _words(column, "i")
            return self.compress(take(column.new.view(dtype), column.old.view(dtype)))

        def decode(payload: Any, column: Column, out: Bytes) -> Bytes:
            words = out.view(_words(column, "i"))
            decoded = np.frombuffer(self.decompress(payload, words), words.dtype)
            undo(decoded, column.old.view(words.dtype), out=words)
            return out

        return _each(f"{self.name} {difference}", encode, decode)


_DIFFERENCES: dict[str, tuple[Any, Any]] = {
    "xor": (np.bitwise_xor, np.bitwise_xor),
    "sub": (np.subtract, np.add),
}


def _words(column: Column, kind: str) -> str:
    return f"<{kind}{column.dtype.itemsize}"


def zstd() -> Library:
    """Level 1."""
    coder, decoder = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    return Library(
        "zstd-1",
        lambda words: coder.compress(words),
        lambda payload, out: decoder.decompress(payload),
        differences=("xor", "sub"),
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

    return Library("pcodec-8", compress, decompress, differences=("sub",))


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
