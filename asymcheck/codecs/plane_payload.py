"""The payload of plane coding: n words of w bytes as w byte planes, each coded by itself.

Byte k of word i is byte i of plane k. In a float the high planes (sign, exponent) compress and
the low ones (mantissa) do not; those are stored as they are and cost a copy. Where the exponent
has 8 bits the sign is moved to below it, so that the top plane is the exponent.

Layout, integers little-endian:

| offset | bytes | field |
| --- | --- | --- |
| 0 | 1 | w, the width of a word: 1, 2, 4 or 8; 128 more (w is 2 or 4) if signs were moved |
| 1 + 9k | 1 | mode of plane k, for k = 0 … w−1 (0: least significant) |
| 2 + 9k | 8 | length of the body of plane k, unsigned |
| 1 + 9w | | the bodies, in the order of the planes, nothing between or after them |

| mode | body | length |
| --- | --- | --- |
| 0 raw | the plane | n |
| 1 zstd | a zstd frame that declares n bytes of content and a window of at most n | 1 to n−1 |
| 2 constant | the byte that the whole plane consists of; n > 0 | 1 |
| 3 seven bits | bytes below 128, an eighth of them in the top bits of the others; n > 7 | n − m |

Mode 3, with m = ⌊n/8⌋: bytes 0 to 7m−1 of the plane, bit k of byte 7m + i in the top bit of byte
km + i for k = 0 … 6 and i = 0 … m−1; then bytes 8m to n−1 of the plane. So the sign of what is
never negative, such as second moments, costs nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs import _zstd
from asymcheck.codecs.kernels import Bytes, Words, kernels
from asymcheck.errors import CodecError

_RAW, _ZSTD, _CONSTANT, _SEVEN_BITS = range(4)
_TOP_BIT = 128
_FLOATS = 128
_PLANE = struct.Struct("<BQ")

_SAMPLE_STRETCHES = 64
_SAMPLE_STRETCH_BYTES = 128
_SAMPLE_BYTES = _SAMPLE_STRETCHES * _SAMPLE_STRETCH_BYTES
_MATCHING: _zstd.Preset = _zstd.at_level(1)


def encode(words: Words) -> memoryview:
    """The payload of `words`."""
    return _encode(words, lambda planes: kernels().split(words, planes), b"")


def encode_floats(words: Words) -> memoryview:
    """The payload of `words` of 2 or 4 bytes that are floats with exponents of 8 bits."""
    payload = _encode(words, lambda planes: kernels().split_floats(words, planes), b"")
    payload[0] |= _FLOATS
    return payload


def encode_difference(new: Words, old: Words, prefix: bytes = b"") -> memoryview:
    """The payload of the differences of the bit patterns, zigzag(new − old); after `prefix`."""
    if _are_equal(new, old):
        return memoryview(prefix + _all_constant(new.itemsize))
    return _encode(new, lambda planes: kernels().split_difference(new, old, planes), prefix)


def decode(payload: memoryview, words: Words) -> None:
    """Inverse of `encode` and `encode_floats`: fill `words`.

    Raises:
        CodecError: if `payload` does not follow the layout for that many words of that width;
            `words` is then unchanged.
    """
    if payload.nbytes and payload[0] & _FLOATS and words.itemsize in (2, 4):
        planes = _decode_planes(payload, words.itemsize | _FLOATS, words.size)
        kernels().merge_floats(planes, words)
    else:
        kernels().merge(_decode_planes(payload, words.itemsize, words.size), words)


def decode_difference(payload: memoryview, words: Words) -> None:
    """Inverse of `encode_difference`, in place: `words` holds old before and new after.

    Raises:
        CodecError: as `decode` does.
    """
    equal = _all_constant(words.itemsize)
    if words.size and payload.nbytes == len(equal) and bytes(payload) == equal:
        return
    kernels().merge_difference(_decode_planes(payload, words.itemsize, words.size), words)


def _header_bytes(width: int) -> int:
    return 1 + width * _PLANE.size


def _are_equal(new: Words, old: Words) -> bool:
    """Whether there are words, and no differences; mostly decided by the first ones."""
    first = slice(0, _SAMPLE_BYTES)
    same = new.size > 0 and np.array_equal(new[first], old[first])
    return same and np.array_equal(new, old)


def _all_constant(width: int) -> bytes:
    """The payload of zeros."""
    return bytes([width]) + width * _PLANE.pack(_CONSTANT, 1) + bytes(width)


def _encode(words: Words, split: Callable[[Bytes], None], prefix: bytes) -> memoryview:
    """The planes are split to where they stay if they are raw, and only coded ones moved."""
    begin = len(prefix)
    header = begin + _header_bytes(words.itemsize)
    out = np.empty(header + words.nbytes, np.uint8)
    out[:begin] = np.frombuffer(prefix, np.uint8)
    split(out[header:])
    end = begin + _code_planes(out[begin:], words.itemsize, words.size)
    out.resize(end, refcheck=False)  # no view of `out` is left; gives the unused end back
    return out.data


def _code_planes(out: Bytes, width: int, n: int) -> int:
    """Write the header of `out` and replace its planes by their bodies; the end of the last."""
    header = _header_bytes(width)
    out[0] = width
    planes = out[header:].reshape(width, n)
    choices = list(map(_choose, planes, _samples(planes)))
    end = header
    for k, (plane, choice) in enumerate(zip(planes, choices, strict=True)):
        mode, body = _body(plane, *choice)
        out[end : end + body.size] = body  # never past the plane's own place
        _PLANE.pack_into(out.data, 1 + k * _PLANE.size, mode, body.size)
        end += body.size
    return end


def _body(plane: Bytes, mode: int, preset: _zstd.Preset) -> tuple[int, Bytes]:
    """The mode that it is in the end, and the body; `plane` may be overwritten."""
    if mode == _SEVEN_BITS:
        return mode, _pack(plane)
    if mode != _ZSTD:
        return mode, plane[:1] if mode == _CONSTANT else plane
    frame = np.frombuffer(_zstd.compress(plane.data, preset), np.uint8)
    return (_ZSTD, frame) if frame.size < plane.size else (_RAW, plane)


def _pack(plane: Bytes) -> Bytes:
    """In place: the last eighth of the bytes, bit by bit, into the top bits of the others."""
    eighth = plane.size >> 3
    shifted = plane[7 * eighth : 8 * eighth].copy()
    for row in reversed(plane[: 7 * eighth].reshape(7, eighth)):
        shifted += shifted  # bit 6 is the first to arrive at the top
        row |= shifted & _TOP_BIT
    plane[7 * eighth : -eighth] = plane[8 * eighth :]
    return plane[:-eighth]


def _unpack(body: Bytes, n: int) -> Bytes:
    """Inverse of `_pack`, elsewhere."""
    eighth = n >> 3
    rows = body[: 7 * eighth].reshape(7, eighth)
    plane = np.empty(n, np.uint8)
    np.bitwise_and(body[: 7 * eighth], _TOP_BIT - 1, out=plane[: 7 * eighth])
    spread = plane[7 * eighth : 8 * eighth]
    spread[:] = 0
    for k, row in enumerate(rows):
        spread |= (row & _TOP_BIT) >> (7 - k)
    plane[8 * eighth :] = body[7 * eighth :]
    return plane


def _samples(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Stretches of each row at the same distance: short ones show the frequencies of bytes and
    whether they repeat."""
    width, n = planes.shape
    if n <= _SAMPLE_BYTES:
        return planes
    distance = n // _SAMPLE_STRETCHES
    stretches = planes[:, : distance * _SAMPLE_STRETCHES].reshape(width, -1, distance)
    return stretches[:, :, :_SAMPLE_STRETCH_BYTES].reshape(width, -1)


def _choose(plane: Bytes, sample: Bytes) -> tuple[int, _zstd.Preset]:
    """A mode, and a preset for zstd. No entropy coder unless it gains 5 % on the sample; Huffman
    codes unless matches gain another 10 %.

    Huffman codes alone are two to four times faster both ways, so matches are only for planes
    that are nearly constant or have long runs.
    """
    if sample.size and (sample == plane[0]).all() and (plane == plane[0]).all():
        return _CONSTANT, ()
    huffman = len(_zstd.compress(sample.data, _zstd.HUFFMAN))
    matching = len(_zstd.compress(sample.data, _MATCHING))
    seven_bits = _has_seven_bits(sample) and _has_seven_bits(plane)
    without = sample.size - (sample.size >> 3 if seven_bits else 0)
    if 20 * min(huffman, matching) > 19 * without:
        return (_SEVEN_BITS if seven_bits else _RAW), ()
    return _ZSTD, (_MATCHING if 10 * matching < 9 * huffman else _zstd.HUFFMAN)


def _has_seven_bits(plane: Bytes) -> bool:
    return plane.size > 7 and bool(plane.max() < _TOP_BIT)


def _decode_planes(payload: memoryview, first: int, n: int) -> list[Bytes]:
    """The planes, arrays of `n` bytes, of a payload that begins with `first`; raw ones are views
    of `payload`."""
    width = first & ~_FLOATS
    entries = _read_header(payload, first, width)
    _check_entries(entries, n)
    start = _header_bytes(width)
    end = start + sum(length for _, length in entries)
    if end != payload.nbytes:
        raise CodecError("coded planes of a wrong length", expected=end, found=payload.nbytes)
    planes: list[Bytes] = []
    for mode, length in entries:
        planes.append(_decode_body(mode, payload[start : start + length], n))
        start += length
    return planes


def _read_header(payload: memoryview, first: int, width: int) -> list[tuple[int, int]]:
    header = _header_bytes(width)
    if payload.nbytes < header:
        raise CodecError(
            "coded planes end within their header", expected=header, found=payload.nbytes
        )
    if payload[0] != first:
        raise CodecError("planes of words of another width", expected=first, found=payload[0])
    return [(mode, length) for mode, length in _PLANE.iter_unpack(payload[1:header])]


def _check_entries(entries: Sequence[tuple[int, int]], n: int) -> None:
    packed = n - (n >> 3)
    allowed = {
        _RAW: range(n, n + 1),
        _ZSTD: range(1, n),
        _CONSTANT: range(1, 1 + min(n, 1)),
        _SEVEN_BITS: range(packed, packed + min(n >> 3, 1)),
    }
    for mode, length in entries:
        if mode not in allowed:
            raise CodecError("unknown mode of a plane", expected="0 to 3", found=mode)
        if length not in allowed[mode]:
            raise CodecError(
                f"wrong length of a plane in mode {mode}", expected=allowed[mode], found=length
            )


def _decode_body(mode: int, body: memoryview, n: int) -> Bytes:
    if mode == _CONSTANT:
        return np.full(n, body[0], np.uint8)
    if mode == _ZSTD:
        return _zstd.decompress(body, n)
    if mode == _SEVEN_BITS:
        return _unpack(np.frombuffer(body, np.uint8), n)
    return np.frombuffer(body, np.uint8)
