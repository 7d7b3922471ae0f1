"""A decoder of `replay` with rule `adam`, written from docs/format.md alone, in plain NumPy."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import zstandard

f, d = np.float32, np.float64
Words = Any


def planes(payload: bytes, width: int, n: int) -> Words:
    """9.3: n words of w bytes."""
    assert payload[0] == width
    words, begin = np.zeros(n, np.uint64), 1 + 9 * width
    for k in range(width):
        mode, nbytes = struct.unpack_from("<BQ", payload, 1 + 9 * k)
        body = payload[begin : begin + nbytes]
        begin += nbytes
        if mode == 1:
            body = zstandard.ZstdDecompressor().decompress(body, n)
        plane = np.full(n, body[0], np.uint8) if mode == 2 else np.frombuffer(body, np.uint8)
        words |= plane.astype(np.uint64) << np.uint64(8 * k)
    assert begin == len(payload)
    return words.astype(f"<u{width}")


def difference(payload: bytes, old: Words) -> Words:
    """9.4."""
    one = old.dtype.type(1)
    z = planes(payload, old.itemsize, old.size)
    return old + ((z >> one) ^ (old.dtype.type(0) - (z & one)))


def fma(a: Any, b: Any, c: Any) -> Any:
    return (d(a) * d(b) + d(c)).astype(f)


def power(base: float, n: int) -> float:
    result = 1.0
    while n:
        if n & 1:
            result *= base
        base *= base
        n >>= 1
    return result


def words(x: Any) -> Words:
    return x.view("<u4")


def decode(
    payloads: Mapping[str, bytes], old: Mapping[str, Any], numbers: Mapping[str, float]
) -> dict[str, Any]:
    """9.11: first, second, weight and copy (bfloat16) from their payloads and old values."""
    first_, second_, weight_ = old["first"], old["second"], old["weight"]
    beta1, beta2, lr, step = (numbers[k] for k in ("beta1", "beta2", "lr", "step"))
    b1, b2, o1, o2 = f(beta1), f(beta2), f(1 - beta1), f(1 - beta2)

    payload = payloads["first"]
    mode, form = payload[:2]
    if mode == 2:
        bits, scale, nbytes = struct.unpack_from("<BfQ", payload, 2)
        reference = words(np.sqrt(second_))
        shift = 24 - bits
        folded = ((reference & 0x7FFFFFFF) >> shift) << 1 | reference >> 31
        y = difference(payload[15 : 15 + nbytes], folded)
        g = f(scale) * ((y >> 1) << shift | y << 31).view("<f4")
        if numbers["l2"]:
            g = fma(f(numbers["l2"]), weight_, g)
        predictions = (
            lambda: fma(o1, g - first_, first_),
            lambda: fma(b1, first_, o1 * g),
            lambda: b1 * first_ + o1 * g,
        )
        first = difference(payload[15 + nbytes :], words(predictions[form]())).view("<f4")
    else:
        first = difference(payload[2:], words(first_)).view("<f4")
        if form == 0:
            g = ((d(first) - d(first_)) / d(o1) + d(first_)).astype(f)
        else:
            g = ((d(first) - d(b1) * d(first_)) / d(o1)).astype(f)

    mode, form = payloads["second"][:2]
    predictions = (
        lambda: fma(o2 * g, g, b2 * second_),
        lambda: fma(b2, second_, o2 * (g * g)),
        lambda: fma(o2, g * g, b2 * second_),
    )
    base = predictions[form]() if mode else second_
    second = difference(payloads["second"][2:], words(base)).view("<f4")

    corrects = bool(numbers["corrects_bias"])
    c1, c2 = (1 - power(b, int(step)) if corrects else 1.0 for b in (beta1, beta2))
    k1, k2 = (1 - power(float(b), int(step)) if corrects else 1.0 for b in (b1, b2))
    i1, i2 = f(1) / f(k1), f(1) / f(k2)
    keep, p, r = f(1 - lr * numbers["decay"]), f(-lr / c1), f(np.sqrt(c2))
    eps, decay = f(numbers["eps"]), f(numbers["decay"])
    mode, form = payloads["weight"][:2]
    predictions = (
        lambda: keep * weight_ + (p * first) / (np.sqrt(second) / r + eps),
        lambda: fma(f(-lr), (first * i1) / (np.sqrt(second * i2) + eps) + decay * weight_, weight_),
        lambda: fma(p, first / (np.sqrt(second) / r + eps), keep * weight_),
    )
    base = predictions[form]() if mode else weight_
    weight = difference(payloads["weight"][2:], words(base)).view("<f4")

    base = weight.astype(ml_dtypes.bfloat16) if payloads["copy"][0] else old["copy"]
    copy = difference(payloads["copy"][2:], base.view("<u2")).view(ml_dtypes.bfloat16)
    return {"first": first, "second": second, "weight": weight, "copy": copy}
