"""Which codec for which partition, and why."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from asymcheck.codecs import codec_by_name
from asymcheck.cost import CostModel
from asymcheck.errors import CodecError

RAW = "raw"
_EXPLORE_MIN_NBYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """What is to be decided: the bytes of one partition in leaves of one kind and dtype.

    Attributes:
        nbytes: how many.
        kind, dtype: of the leaves.
        has_base: whether the predecessor's bytes are at hand, so that a difference can be taken.
        cost: what was learned so far.
    """

    nbytes: int
    kind: str
    dtype: str
    has_base: bool
    cost: CostModel


@dataclass(frozen=True, slots=True)
class Decision:
    """A codec id, and the figures behind it in a short sentence."""

    codec: str
    reason: str


class CompressionPolicy(Protocol):
    """Chooses a codec. Called once for every class of leaves of every partition."""

    def decide(self, request: PolicyRequest) -> Decision:
        """The codec for these bytes; one that needs a base only where there is one."""
        ...

    def wants_base(self, nbytes_by_class: Mapping[tuple[str, str], int], cost: CostModel) -> bool:
        """Whether to hold the predecessor in host memory, so that requests can have a base.

        Args:
            nbytes_by_class: bytes of the whole snapshot by (kind, dtype).
            cost: what was learned so far.
        """
        ...


@dataclass(frozen=True)
class Selective:
    """Compress a partition iff that takes less time than to write it raw.

    The rule of AsymCheck (DAC 2026): t_c(S) + t_w(rho * S) < t_w(S), with S raw bytes, t_c the
    cost `encode:<codec>`, t_w the cost `write` and rho the measured ratio of the codec for this
    class of leaves. Of several candidates the fastest wins, of equals the first; raw is always
    one, and wins every tie. alpha of t_w stands on both sides and is left out: a put carries the
    blocks of many partitions. So what decides is whether encoding costs less than writing the
    bytes that it saves, and alpha of t_c keeps small partitions raw.

    The figures of a codec that is not chosen grow old. So every `explore_every`-th decision of a
    class of leaves (from 64 KiB on) takes one of the candidates in turn, whatever the rule says,
    and its cost and ratio are measured again. This depends on the order of decisions only.

    May be used by several threads at once.

    Args:
        candidates: codec ids besides raw, lossless ones unless asked for by name.
        overlapped: encoding has processor cores of its own and goes on while others are written,
            so that only the slower of the two counts: max(t_c(S), t_w(rho * S)) < t_w(S).
        explore_every: 0 for never.

    Raises:
        CodecError: if there is no codec of that id.
    """

    candidates: tuple[str, ...] = ("plane", "delta")
    overlapped: bool = False
    explore_every: int = 256
    _decisions: dict[tuple[str, str], int] = field(
        default_factory=dict[tuple[str, str], int], init=False, repr=False, compare=False
    )
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for codec in self.candidates:
            codec_by_name(codec)

    def decide(self, request: PolicyRequest) -> Decision:
        """By the rule, but for the decisions that explore."""
        usable = [c for c in self.candidates if request.has_base or not _needs_base(c)]
        return self._explore(request, usable) or self._by_rule(request, usable)

    def wants_base(self, nbytes_by_class: Mapping[tuple[str, str], int], cost: CostModel) -> bool:
        """Whether, with a base, the rule would take a codec that needs one for some class."""
        requests = [
            PolicyRequest(nbytes, kind, dtype, True, cost)
            for (kind, dtype), nbytes in nbytes_by_class.items()
        ]
        return any(_needs_base(self._by_rule(r, self.candidates).codec) for r in requests)

    def _by_rule(self, request: PolicyRequest, candidates: Sequence[str]) -> Decision:
        raw_s = _write_s(request, 1.0)
        raw = f"write raw {_ms(raw_s)}"
        if not candidates:
            return Decision(RAW, f"{raw}: no other candidate without a predecessor")
        estimates = [_estimate(codec, request) for codec in candidates]
        best = min(estimates, key=self._seconds)
        if self._seconds(best) < raw_s:
            return Decision(best.codec, f"{self._sentence(best)} < {raw}")
        return Decision(RAW, f"{raw} <= {best.codec}: {self._sentence(best)}")

    def _explore(self, request: PolicyRequest, candidates: Sequence[str]) -> Decision | None:
        if not (self.explore_every and candidates and request.nbytes >= _EXPLORE_MIN_NBYTES):
            return None
        key = request.kind, request.dtype
        with self._lock:
            number = self._decisions[key] = self._decisions.get(key, 0) + 1
        turn, rest = divmod(number, self.explore_every)
        if rest:
            return None
        codec = candidates[(turn - 1) % len(candidates)]
        return Decision(codec, f"to measure it again: decision {number} of {' '.join(key)}")

    def _seconds(self, estimate: _Estimate) -> float:
        if self.overlapped:
            return max(estimate.encode_s, estimate.write_s)
        return estimate.encode_s + estimate.write_s

    def _sentence(self, estimate: _Estimate) -> str:
        encode, write = f"encode {_ms(estimate.encode_s)}", f"write {_ms(estimate.write_s)}"
        return f"max({encode}, {write})" if self.overlapped else f"{encode} + {write}"


@dataclass(frozen=True)
class Always:
    """One codec wherever it can be used, at any cost.

    Args:
        codec: its id.
        fallback: where `codec` needs a base and there is none.

    Raises:
        CodecError: if there is no such codec, or the fallback needs a base itself.
    """

    codec: str = "delta"
    fallback: str = "plane"

    def __post_init__(self) -> None:
        codec_by_name(self.codec)
        if _needs_base(self.fallback):
            raise CodecError("the fallback must work without a predecessor", found=self.fallback)

    def decide(self, request: PolicyRequest) -> Decision:
        """`codec`, or `fallback` if there is no predecessor for it."""
        if request.has_base or not _needs_base(self.codec):
            return Decision(self.codec, f"always {self.codec}")
        return Decision(self.fallback, f"always {self.codec}, but there is no predecessor")

    def wants_base(self, nbytes_by_class: Mapping[tuple[str, str], int], cost: CostModel) -> bool:
        """Whether `codec` needs one."""
        return _needs_base(self.codec)


@dataclass(frozen=True)
class Never:
    """Everything as it is."""

    def decide(self, request: PolicyRequest) -> Decision:
        """Raw."""
        return Decision(RAW, "never compress")

    def wants_base(self, nbytes_by_class: Mapping[tuple[str, str], int], cost: CostModel) -> bool:
        """No."""
        return False


@dataclass(frozen=True, slots=True)
class _Estimate:
    codec: str
    encode_s: float
    write_s: float


def _estimate(codec: str, request: PolicyRequest) -> _Estimate:
    ratio = request.cost.ratio(codec, request.kind, request.dtype)
    encode_s = request.cost.seconds(f"encode:{codec}", request.nbytes)
    return _Estimate(codec, encode_s, _write_s(request, ratio))


def _write_s(request: PolicyRequest, ratio: float) -> float:
    return request.cost.line("write").beta_s_per_byte * request.nbytes * ratio


def _needs_base(codec: str) -> bool:
    return codec_by_name(codec).needs_base


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.1f} ms" if milliseconds >= 1 else f"{milliseconds:.2g} ms"
