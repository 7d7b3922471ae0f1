"""Parameters with their optimizer state, one step apart, for the tests of `replay`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from asymcheck.codecs import Column, ReplayCodec
from asymcheck.codecs.rules import RULES

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)

NUMBERS: Mapping[str, dict[str, float]] = {
    "adam": {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "decay": 0.1,
        "l2": 0.0,
        "step": 7,
        "corrects_bias": 1.0,
    },
    "sgd": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "l2": 0.0},
    "descent": {"lr": 1e-2, "l2": 0.0},
    "lion": {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "decay": 0.1, "l2": 0.0},
}
NUMBERS = {**NUMBERS, "amsgrad": NUMBERS["adam"]}


def codec_for(rule: str, *more: str, **numbers: float) -> ReplayCodec:
    """The codec of a rule, with further roles after its own (`captured` is one)."""
    return ReplayCodec(rule, (*RULES[rule].roles, *more), NUMBERS[rule] | numbers)


@dataclass(frozen=True)
class Block:
    """Columns to be encoded, and how."""

    codec: ReplayCodec
    columns: list[Column]

    def encode(self) -> list[bytes]:
        return [bytes(payload) for payload in self.codec.encode(self.columns)]

    def decode(self, payloads: list[bytes], *, in_place: bool = False) -> list[NDArray[np.uint8]]:
        outs = [
            Column(c.kind, c.dtype, old if in_place else np.empty_like(c.new), old)
            for c, old in ((c, _copied(c.old)) for c in self.columns)
        ]
        self.codec.decode(outs, [memoryview(payload) for payload in payloads])
        return [out.new for out in outs]

    @property
    def nbytes(self) -> int:
        return sum(column.new.nbytes for column in self.columns)


def _copied(old: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    assert old is not None
    return old.copy()


def block_of(codec: ReplayCodec, olds: list[Any], news: list[Any]) -> Block:
    columns = [
        Column(role, new.dtype, new.view(np.uint8), old.view(np.uint8))
        for role, old, new in zip(codec.roles, olds, news, strict=True)
    ]
    return Block(codec, columns)


def gradients(n: int, seed: int, dtype: Any, scale: float) -> NDArray[np.float32]:
    """Of low precision, times a scale in float32."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(-7, 1.5, n))
    low = (rng.normal(0, 1, n) * sizes).astype(dtype)
    return low.astype(np.float32) * np.float32(scale)


def trained(
    rule: str,
    n: int,
    *,
    seed: int = 0,
    dtype: Any = BFLOAT16,
    scale: float = 0.37,
    kept: Any = FLOAT32,
    captured: bool = False,
    **numbers: Any,
) -> Block:
    """A step of an optimizer, in plain float32 arithmetic, with a bfloat16 copy of the weight.

    Args:
        dtype, scale: of the gradients.
        kept: the dtype of the optimizer's states, or one for each of these roles.
        captured: the gradient, and that of the step before, is a column, too: the last one.
    """
    k = {name: np.float32(value) for name, value in (NUMBERS[rule] | numbers).items()}
    rng = np.random.default_rng(seed + 100)
    one = np.float32(1)
    state = {
        "weight": rng.normal(0, 0.02, n).astype(np.float32),
        "first": gradients(n, seed + 1, np.float32, 1.0),
        "second": gradients(n, seed + 2, np.float32, 1.0) ** 2,
    }
    kept_as = {
        role: kept if not isinstance(kept, dict) else kept.get(role, FLOAT32) for role in state
    }
    kept_as["weight"] = FLOAT32
    for role in ("first", "second"):
        state[role] = state[role].astype(kept_as[role]).astype(np.float32)
    state["largest"] = state["second"] * np.float32(1.01)
    given = gradients(n, seed + 3, dtype, scale)
    g = given + k["l2"] * state["weight"]
    new = dict(state)
    if rule in ("adam", "amsgrad"):
        new["first"] = k["beta1"] * state["first"] + (one - k["beta1"]) * g
        new["second"] = k["beta2"] * state["second"] + (one - k["beta2"]) * g * g
        new["largest"] = np.maximum(state["largest"], new["second"])
        v = new["largest" if rule == "amsgrad" else "second"]
        c1, c2 = one - k["beta1"] ** k["step"], one - k["beta2"] ** k["step"]
        u = (new["first"] / c1) / (np.sqrt(v / c2) + k["eps"])
        new["weight"] = state["weight"] - k["lr"] * (u + k["decay"] * state["weight"])
    elif rule == "sgd":
        new["first"] = k["momentum"] * state["first"] + g
        new["weight"] = state["weight"] - k["lr"] * new["first"]
    elif rule == "descent":
        new["weight"] = state["weight"] - k["lr"] * g
    else:
        u = np.sign(k["beta1"] * state["first"] + (one - k["beta1"]) * g)
        new["weight"] = state["weight"] - k["lr"] * (u + k["decay"] * state["weight"])
        new["first"] = k["beta2"] * state["first"] + (one - k["beta2"]) * g
    roles = RULES[rule].roles
    kept_as["largest"] = kept_as["second"]
    olds, news = (
        [*(of[role].astype(kept_as[role]) for role in roles), of["weight"].astype(BFLOAT16)]
        for of in (state, new)
    )
    more = ["copy"]
    if captured:
        more.append("captured")
        olds.append(gradients(n, seed + 4, dtype, scale))
        news.append(given)
    return block_of(codec_for(rule, *more, **numbers), olds, news)
