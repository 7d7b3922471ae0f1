"""Which codec for which partition, and why."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from asymcheck.codecs import codec_by_name
from asymcheck.codecs.base import Codec
from asymcheck.cost import CostModel
from asymcheck.errors import CodecError

RAW, REPLAY = "raw", "replay"
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
    """A codec, by its id (then with default parameters) or itself, and why in a short sentence."""

    codec: str | Codec
    reason: str


class CompressionPolicy(Protocol):
    """Chooses a codec. Called once for every class of leaves of every partition."""

    def decide(self, request: PolicyRequest) -> Decision:
        """The codec for these bytes; one that needs a base only where there is one."""
        ...

    def decide_replay(self, requests: Sequence[PolicyRequest]) -> Decision | None:
        """Whether to code these classes together by replaying their update; None: each by itself.

        Called for parameters of which the update is known and the predecessor is at hand.
        """
        ...

    def wants_base(
        self,
        nbytes_by_class: Mapping[tuple[str, str], int],
        replayed_by_class: Mapping[tuple[str, str], int],
        cost: CostModel,
    ) -> bool:
        """Whether to hold the predecessor in host memory, so that requests can have a base.

        Args:
            nbytes_by_class: bytes of the whole snapshot by (kind, dtype), but for
            replayed_by_class: those of parameters of which the update is known.
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

    `replay` codes all leaves of a parameter jointly, where the update is known that made them. So
    it is compared with the best for all of them together.

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

    candidates: tuple[str, ...] = ("plane", "delta", "replay")
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
        usable = [c for c in self._by_class if request.has_base or not _needs_base(c)]
        key = request.kind, request.dtype
        return self._explore(key, request.nbytes, usable) or self._by_rule(request, usable)

    def decide_replay(self, requests: Sequence[PolicyRequest]) -> Decision | None:
        """By the rule, but for the decisions that explore."""
        if REPLAY not in self.candidates:
            return None
        kinds = " ".join(request.kind for request in requests)
        nbytes = sum(request.nbytes for request in requests)
        explored = self._explore((kinds, REPLAY), nbytes, [REPLAY])
        return explored or self._replay_by_rule(requests)

    def wants_base(
        self,
        nbytes_by_class: Mapping[tuple[str, str], int],
        replayed_by_class: Mapping[tuple[str, str], int],
        cost: CostModel,
    ) -> bool:
        """Whether, with a base, the rule would take a codec that needs one for some class."""
        requests = _requests(nbytes_by_class, cost)
        replayed = _requests(replayed_by_class, cost)
        if REPLAY in self.candidates and replayed and self._replay_by_rule(replayed) is not None:
            return True
        return any(
            _needs_base(self._by_rule(request, self._by_class).codec)
            for request in (*requests, *replayed)
        )

    @property
    def _by_class(self) -> list[str]:
        return [codec for codec in self.candidates if codec != REPLAY]

    def _by_rule(self, request: PolicyRequest, candidates: Sequence[str]) -> Decision:
        raw_s = _write_s(request, 1.0)
        raw = f"write raw {_ms(raw_s)}"
        if not candidates:
            return Decision(RAW, f"{raw}: no other candidate without a predecessor")
        best = self._best(request, candidates)
        if self._seconds(best) < raw_s:
            return Decision(best.codec, f"{self._sentence(best)} < {raw}")
        return Decision(RAW, f"{raw} <= {best.codec}: {self._sentence(best)}")

    def _best(self, request: PolicyRequest, candidates: Sequence[str]) -> _Estimate:
        return min((_estimate(codec, request) for codec in candidates), key=self._seconds)

    def _replay_by_rule(self, requests: Sequence[PolicyRequest]) -> Decision | None:
        """All classes by `replay`, if that is faster than the best for each by itself."""
        apart_s = sum(
            min([_write_s(r, 1.0), *(self._seconds(_estimate(c, r)) for c in self._by_class)])
            for r in requests
        )
        together = _sum([_estimate(REPLAY, request) for request in requests])
        if self._seconds(together) < apart_s:
            return Decision(REPLAY, f"{self._sentence(together)} < apart {_ms(apart_s)}")
        return None

    def _explore(
        self, key: tuple[str, str], nbytes: int, candidates: Sequence[str]
    ) -> Decision | None:
        if not (self.explore_every and candidates and nbytes >= _EXPLORE_MIN_NBYTES):
            return None
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
        codec: itself, or its id. "replay" is for parameters of which the update is known; other
            leaves get "delta" with it.
        fallback: where `codec` needs a base and there is none.

    Raises:
        CodecError: if there is no such codec, or the fallback needs a base itself.
    """

    codec: str | Codec = "delta"
    fallback: str = "plane"

    def __post_init__(self) -> None:
        if isinstance(self.codec, str):
            codec_by_name(self.codec)
        if _needs_base(self.fallback):
            raise CodecError("the fallback must work without a predecessor", found=self.fallback)

    def decide(self, request: PolicyRequest) -> Decision:
        """`codec`, or `fallback` if there is no predecessor for it."""
        codec = "delta" if self.codec == REPLAY else self.codec
        if request.has_base or not _needs_base(codec):
            return Decision(codec, f"always {_id(self.codec)}")
        return Decision(self.fallback, f"always {_id(self.codec)}, but there is no predecessor")

    def decide_replay(self, requests: Sequence[PolicyRequest]) -> Decision | None:
        """If that is the codec."""
        return Decision(REPLAY, f"always {REPLAY}") if self.codec == REPLAY else None

    def wants_base(
        self,
        nbytes_by_class: Mapping[tuple[str, str], int],
        replayed_by_class: Mapping[tuple[str, str], int],
        cost: CostModel,
    ) -> bool:
        """Whether `codec` needs one."""
        return _needs_base(self.codec)


@dataclass(frozen=True)
class Never:
    """Everything as it is."""

    def decide(self, request: PolicyRequest) -> Decision:
        """Raw."""
        return Decision(RAW, "never compress")

    def decide_replay(self, requests: Sequence[PolicyRequest]) -> Decision | None:
        """No."""
        return None

    def wants_base(
        self,
        nbytes_by_class: Mapping[tuple[str, str], int],
        replayed_by_class: Mapping[tuple[str, str], int],
        cost: CostModel,
    ) -> bool:
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


def _sum(estimates: Sequence[_Estimate]) -> _Estimate:
    return _Estimate(
        estimates[0].codec,
        sum(estimate.encode_s for estimate in estimates),
        sum(estimate.write_s for estimate in estimates),
    )


def _requests(
    nbytes_by_class: Mapping[tuple[str, str], int], cost: CostModel
) -> list[PolicyRequest]:
    return [
        PolicyRequest(nbytes, kind, dtype, True, cost)
        for (kind, dtype), nbytes in nbytes_by_class.items()
    ]


def _write_s(request: PolicyRequest, ratio: float) -> float:
    return request.cost.line("write").beta_s_per_byte * request.nbytes * ratio


def _needs_base(codec: str | Codec) -> bool:
    return (codec_by_name(codec) if isinstance(codec, str) else codec).needs_base


def _id(codec: str | Codec) -> str:
    return codec if isinstance(codec, str) else codec.id


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.1f} ms" if milliseconds >= 1 else f"{milliseconds:.2g} ms"
