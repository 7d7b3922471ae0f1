"""The one place that calls the zstd libraries: bytes to one frame, one frame to bytes.

Frames are coded by `compression.zstd` (`backports.zstd` before Python 3.14), the binding that
reaches the literal compression mode. They are decoded by our own kernel if they are Huffman codes
alone, else by `zstandard`, the faster decoder of the two libraries. Contexts are kept per thread:
to set one up costs more than to code a small plane.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
import zstandard

from asymcheck.codecs.kernels import Bytes, kernels
from asymcheck.errors import CodecError

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, ZstdCompressor
else:
    from backports.zstd import CompressionParameter, ZstdCompressor

Preset = tuple[tuple[int, int], ...]
"""Compression parameters as (id, value) pairs."""

_LITERAL_COMPRESSION_MODE = 1002  # ZSTD_c_literalCompressionMode, not named by the bindings
_ALWAYS_HUFFMAN = 1
_MAX_BLOCK_BYTES = 1 << 17
_MIN_LITERALS_BYTES = 1 << 16  # below, nothing is gained that is worth compiling for
_MAX_LITERAL_BITS = 5  # a byte; beyond, zstd is as fast

MAX_LEVEL = CompressionParameter.compression_level.bounds()[1]


def at_level(level: int) -> Preset:
    """Ordinary zstd at `level`, 1 to `MAX_LEVEL`."""
    return ((CompressionParameter.compression_level, level),)


HUFFMAN: Preset = (
    *at_level(CompressionParameter.compression_level.bounds()[0]),
    (_LITERAL_COMPRESSION_MODE, _ALWAYS_HUFFMAN),
)
"""No search for matches, only Huffman codes: for bytes of which only the frequencies carry
something, such as exponents. The frames are ordinary zstd."""


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.compressors: dict[Preset, ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(data: memoryview, preset: Preset) -> bytes:
    """One frame of `data`, with its content size in the frame header and without checksum."""
    compressor = _contexts.compressors.get(preset)
    if compressor is None:
        compressor = ZstdCompressor(options=dict(preset))
        _contexts.compressors[preset] = compressor
    return compressor.compress(data, mode=ZstdCompressor.FLUSH_FRAME)


def decompress(frame: memoryview, nbytes: int) -> Bytes:
    """The content of `frame`, which must be a single frame of exactly `nbytes` > 0 bytes.

    Raises:
        CodecError: if it is anything else. The sizes that the frame declares are checked before
            memory is allocated.
    """
    try:
        declared = zstandard.get_frame_parameters(frame)
        _check_declared(declared, nbytes)
        content = _decode_literals(frame, declared)
        if content is None:
            whole = _contexts.decompressor.decompress(frame, nbytes, allow_extra_data=False)
            content = np.frombuffer(whole, np.uint8)
    except zstandard.ZstdError as error:
        raise CodecError(f"not a zstd frame: {error}") from error
    if content.size != nbytes:  # compiled kernels would read past its end
        raise CodecError("zstd frame of a wrong length", expected=nbytes, found=content.size)
    return content


def _decode_literals(frame: memoryview, declared: zstandard.FrameParameters) -> Bytes | None:
    """The content by our own decoder, where that is faster and knows the kinds of the blocks."""
    nbytes = declared.content_size
    if nbytes < _MIN_LITERALS_BYTES or 8 * frame.nbytes > _MAX_LITERAL_BITS * nbytes:
        return None
    if declared.has_checksum or declared.dict_id:
        return None
    begin = zstandard.frame_header_size(frame)
    max_block_bytes = min(declared.window_size, _MAX_BLOCK_BYTES)
    content = np.empty(nbytes, np.uint8)
    data = np.frombuffer(frame, np.uint8)
    return content if kernels().decode_literals(data, begin, max_block_bytes, content) else None


def _check_declared(declared: zstandard.FrameParameters, nbytes: int) -> None:
    if declared.content_size != nbytes:
        raise CodecError(
            "zstd frame declares another content size",
            expected=nbytes,
            found=declared.content_size,
        )
    if declared.window_size > nbytes:  # a coder that knows the size never asks for more
        raise CodecError(
            "zstd frame asks for too large a window", expected=nbytes, found=declared.window_size
        )
