"""Codecs by id: how manifests and users name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from asymcheck.codecs.base import Codec, Column, JsonValue
from asymcheck.codecs.bf16 import Bf16Codec
from asymcheck.codecs.delta import DeltaCodec
from asymcheck.codecs.excp import ExcpCodec
from asymcheck.codecs.int8 import Int8Codec
from asymcheck.codecs.plane import PlaneCodec
from asymcheck.codecs.raw import RawCodec
from asymcheck.codecs.replay import ReplayCodec
from asymcheck.codecs.rounded import RoundedCodec
from asymcheck.codecs.topk import TopKCodec
from asymcheck.codecs.zstd import ZstdCodec
from asymcheck.errors import CodecError, FormatError, UnsupportedVersionError

__all__ = [
    "Bf16Codec",
    "Codec",
    "Column",
    "DeltaCodec",
    "ExcpCodec",
    "Int8Codec",
    "JsonValue",
    "PlaneCodec",
    "RawCodec",
    "ReplayCodec",
    "RoundedCodec",
    "TopKCodec",
    "ZstdCodec",
    "codec_by_name",
    "codec_from_manifest",
    "warm_up",
]

_LOSSLESS: tuple[Callable[..., Codec], ...] = (RawCodec, ZstdCodec, PlaneCodec, DeltaCodec)
_LOSSY = (TopKCodec, Bf16Codec, Int8Codec, RoundedCodec, ExcpCodec)
_CODECS: dict[str, Callable[..., Codec]] = {
    codec.id: codec for codec in (*_LOSSLESS, ReplayCodec, *_LOSSY)
}


def codec_by_name(name: str) -> Codec:
    """The codec of that id with its default parameters.

    Raises:
        CodecError: if there is none.
    """
    if name not in _CODECS:
        raise CodecError("no codec of that name", expected=", ".join(_CODECS), found=name)
    return _CODECS[name]()


def codec_from_manifest(id: str, params: Mapping[str, JsonValue]) -> Codec:
    """The codec that a manifest records by its `id` and `params`.

    Raises:
        UnsupportedVersionError: if this version has no codec of that id.
        FormatError: if the parameters are not exactly that codec's.
        CodecError: if a parameter has a wrong type or is out of range.
    """
    if id not in _CODECS:
        raise UnsupportedVersionError(
            f"unknown codec {id!r}",
            expected=", ".join(_CODECS),
            hint="Read the checkpoint with a newer version of this library.",
        )
    expected = sorted(codec_by_name(id).params)
    if sorted(params) != expected:
        raise FormatError(
            f"wrong parameters of codec {id!r}", expected=expected, found=sorted(params)
        )
    return _CODECS[id](**params)


def warm_up() -> None:
    """Load what the codecs for the common dtypes take, and compile it where that is still to do.

    It takes tenths of a second, part of it with the GIL held: better at the start of training than
    in the middle of a step.
    """
    for dtype in (np.dtype(np.uint16), np.dtype(np.uint32)):
        zeros = np.zeros(16 * dtype.itemsize, np.uint8)
        for codec in (PlaneCodec(), DeltaCodec()):
            codec.encode([Column("", dtype, zeros, zeros)])
