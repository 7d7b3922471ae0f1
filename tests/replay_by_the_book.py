"""A decoder of `replay`, written from docs/format.md alone, in plain NumPy."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
        if mode == 3:
            plane = seven_bits(plane, n)
        words |= plane.astype(np.uint64) << np.uint64(8 * k)
    assert begin == len(payload)
    return words.astype(f"<u{width}")


def seven_bits(body: Words, n: int) -> Words:
    """9.3, mode 3."""
    m = n // 8
    spread = [sum((int(body[k * m + i]) >> 7) << k for k in range(7)) for i in range(m)]
    return np.concatenate([body[: 7 * m] & 127, np.array(spread, np.uint8), body[7 * m :]])


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


def or_else(x: Any, otherwise: Any) -> Any:
    """Where a formula gives NaN another word stands."""
    return np.where(np.isnan(x), otherwise.view("<u4"), x.view("<u4")).view("<f4")


Prediction = Callable[[], Any]
Others = Mapping[str, Callable[[Mapping[str, Any]], list[Prediction]]]
"""By role, in their order: the predictions, given the new values of roles."""


@dataclass
class Table:
    """A rule: its first role's predictions and inverses, with their constants, and the others."""

    first: str
    reference: Any
    predictions: list[Callable[[Any], Any]]
    inverses: list[Callable[[Any], Any]]
    constants: tuple[Any, Any]
    others: Callable[[Any], Others]  # given the gradient


def moment_inverse(k0: Any, k1: Any, old: Any) -> Callable[[Any], Any]:
    return lambda new: ((d(new) - d(k0) * d(old)) / d(k1)).astype(f)


def adam(x_: Mapping[str, Any], numbers: Mapping[str, float]) -> Table:
    first_, second_, weight_ = x_["first"], x_["second"], x_["weight"]
    beta1, beta2, lr, step = (numbers[k] for k in ("beta1", "beta2", "lr", "step"))
    b1, b2, o1, o2 = f(beta1), f(beta2), f(1 - beta1), f(1 - beta2)
    corrects = bool(numbers["corrects_bias"])
    c1, c2 = (1 - power(b, int(step)) if corrects else 1.0 for b in (beta1, beta2))
    k1, k2 = (1 - power(float(b), int(step)) if corrects else 1.0 for b in (b1, b2))
    i1, i2 = f(1) / f(k1), f(1) / f(k2)
    keep, p, r = f(1 - lr * numbers["decay"]), f(-lr / c1), f(np.sqrt(c2))
    eps, decay = f(numbers["eps"]), f(numbers["decay"])
    last = "largest" if "largest" in x_ else "second"

    def weights(x: Mapping[str, Any]) -> list[Prediction]:
        m, v = x["first"], x[last]
        return [
            lambda: keep * weight_ + (p * m) / (np.sqrt(v) / r + eps),
            lambda: fma(f(-lr), (m * i1) / (np.sqrt(v * i2) + eps) + decay * weight_, weight_),
            lambda: fma(p, m / (np.sqrt(v) / r + eps), keep * weight_),
        ]

    def largest(x: Mapping[str, Any]) -> list[Prediction]:
        v, largest_ = x["second"], x_["largest"]
        return [lambda: np.where(v > largest_, v, largest_)]

    def others(g: Any) -> Others:
        def seconds(_: Mapping[str, Any]) -> list[Prediction]:
            return [
                lambda: fma(o2 * g, g, b2 * second_),
                lambda: fma(b2, second_, o2 * (g * g)),
                lambda: fma(o2, g * g, b2 * second_),
            ]

        between = {"largest": largest} if last == "largest" else {}
        return {"second": seconds, **between, "weight": weights}

    predictions = [
        lambda g: fma(o1, g - first_, first_),
        lambda g: fma(b1, first_, o1 * g),
        lambda g: b1 * first_ + o1 * g,
    ]
    lerp = lambda m: ((d(m) - d(first_)) / d(o1) + d(first_)).astype(f)  # noqa: E731
    inverses = [lerp, *2 * [moment_inverse(b1, o1, first_)]]
    return Table("first", np.sqrt(second_), predictions, inverses, (b1, o1), others)


def sgd(x_: Mapping[str, Any], numbers: Mapping[str, float]) -> Table:
    first_, weight_ = x_["first"], x_["weight"]
    u, o, lr = f(numbers["momentum"]), f(1 - numbers["dampening"]), f(-numbers["lr"])

    def others(g: Any) -> Others:
        def weights(x: Mapping[str, Any]) -> list[Prediction]:
            b = x["first"]
            return [
                lambda: fma(lr, b, weight_),
                lambda: weight_ + lr * b,
                lambda: fma(lr, fma(u, b, g), weight_),
            ]

        return {"weight": weights}

    predictions = [lambda g: u * first_ + o * g, lambda g: fma(u, first_, o * g)]
    inverses = 2 * [moment_inverse(u, o, first_)]
    return Table("first", np.abs(first_), predictions, inverses, (u, o), others)


def descent(x_: Mapping[str, Any], numbers: Mapping[str, float]) -> Table:
    weight_, lr = x_["weight"], f(-numbers["lr"])
    predictions = [lambda g: fma(lr, g, weight_), lambda g: weight_ + lr * g]
    inverses = 2 * [moment_inverse(1, lr, weight_)]
    return Table("weight", f(0) * weight_, predictions, inverses, (None, None), lambda g: {})


def lion(x_: Mapping[str, Any], numbers: Mapping[str, float]) -> Table:
    first_, weight_ = x_["first"], x_["weight"]
    beta1, beta2, lr, decay = (numbers[k] for k in ("beta1", "beta2", "lr", "decay"))
    b1, b2, o1, o2 = f(beta1), f(beta2), f(1 - beta1), f(1 - beta2)
    keep = f(1 - lr * decay)

    def others(g: Any) -> Others:
        def weights(_: Mapping[str, Any]) -> list[Prediction]:
            c = b1 * first_ + o1 * g
            return [
                lambda: fma(f(-lr), np.sign(c) + f(decay) * weight_, weight_),
                lambda: keep * weight_ + f(-lr) * np.sign(c),
            ]

        return {"weight": weights}

    predictions = [lambda g: fma(b2, first_, o2 * g), lambda g: b2 * first_ + o2 * g]
    inverses = 2 * [moment_inverse(b2, o2, first_)]
    return Table("first", np.abs(first_), predictions, inverses, (b2, o2), others)


TABLES = {"adam": adam, "amsgrad": adam, "sgd": sgd, "descent": descent, "lion": lion}


class Group:
    """The roles of a group while they are decoded: words as they are stored, values as float32."""

    def __init__(self, payloads: Mapping[str, bytes], old: Mapping[str, Any]) -> None:
        self.payloads, self.old = payloads, old
        self.old_values = {role: each.astype(f) for role, each in old.items() if role != "copy"}
        self.new: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.unrounded: dict[str, Any] = {}

    def words(self, role: str) -> Words:
        return self.old[role].view(f"<u{self.old[role].itemsize}")

    def rounded(self, x: Any, role: str) -> Words:
        if self.old[role].itemsize == 4:
            return x.view("<u4")
        low = x.astype(self.old[role].dtype).view("<u2")
        return np.where(np.isnan(x), self.words(role), low)

    def finish(self, role: str, payload: bytes, base: Words, predicted: Any = None) -> None:
        self.new[role] = difference(payload, base).view(self.old[role].dtype)
        self.values[role] = self.new[role].astype(f)
        is_low = predicted is not None and self.old[role].itemsize == 2
        self.unrounded[role] = predicted if is_low else self.values[role]

    def decode(self, role: str, predictions: Sequence[Prediction]) -> None:
        mode, form = self.payloads[role][:2]
        assert mode in (0, 1)
        if mode == 0:
            self.finish(role, self.payloads[role][2:], self.words(role))
        else:
            predicted = or_else(predictions[form](), self.old_values[role])
            self.finish(role, self.payloads[role][2:], self.rounded(predicted, role), predicted)

    def decode_with_gradient(self, table: Table, l2: float) -> Any:
        """The first role; the gradient."""
        role, payload = table.first, self.payloads[table.first]
        mode, form = payload[:2]
        old = self.old_values[role]
        if mode == 0:
            self.finish(role, payload[2:], self.words(role))
            return or_else(table.inverses[form](self.values[role]), old)
        assert mode == 2
        bits, scale, nbytes = struct.unpack_from("<BfQ", payload, 2)
        reference = or_else(table.reference, old).view("<u4")
        shift = 24 - bits
        folded = ((reference & 0x7FFFFFFF) >> shift) << 1 | reference >> 31
        y = difference(payload[15 : 15 + nbytes], folded)
        q = ((y >> 1) << shift | y << 31).view("<f4")
        g = f(scale) * q
        g = or_else(fma(f(l2), self.old_values["weight"], g) if l2 else g, q)
        predicted = or_else(table.predictions[form](g), old)
        self.finish(role, payload[15 + nbytes :], self.rounded(predicted, role))
        return g


def decode(
    rule: str, payloads: Mapping[str, bytes], old: Mapping[str, Any], numbers: Mapping[str, float]
) -> dict[str, Any]:
    """9.11: the roles of a rule, `copy` and perhaps `captured`, from their old values."""
    with np.errstate(all="ignore"):
        return _decode(rule, payloads, old, numbers)


def _decode(
    rule: str, payloads: Mapping[str, bytes], old: Mapping[str, Any], numbers: Mapping[str, float]
) -> dict[str, Any]:
    group = Group(payloads, old)
    table, l2 = TABLES[rule](group.old_values, numbers), numbers["l2"]
    is_captured = "captured" in payloads
    if is_captured:
        given = Table(
            "captured",
            table.reference,
            [lambda g: g],
            [lambda new: new],
            (None, None),
            table.others,
        )
        group.decode_with_gradient(given, 0.0)
        g = captured = group.values["captured"]
        if l2:
            g = or_else(fma(f(l2), group.old_values["weight"], captured), captured)
        predictions = [lambda form=form: form(g) for form in table.predictions]
        if table.first == "first":
            k0, k1 = table.constants
            low = f(k0.astype(ml_dtypes.bfloat16))
            predictions.append(lambda: fma(k1, g, low * group.old_values["first"]))
        group.decode(table.first, predictions)
    else:
        g = group.decode_with_gradient(table, l2)
    for role, forms in table.others(g).items():
        predictions = forms(group.values)
        takes_new = role == "largest" or (role == "weight" and rule != "lion")
        if is_captured and takes_new:
            predictions += forms(group.unrounded)
        group.decode(role, predictions)
    copied = group.rounded(group.values["weight"], "copy")
    base = copied if payloads["copy"][0] else group.words("copy")
    group.finish("copy", payloads["copy"][2:], base)
    return group.new
