"""How large a pack should be: the batch size of optimal batched flushing, derived."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass


def derive_pack_nbytes(
    *,
    volume_nbytes: int,
    alpha_s: float,
    beta_s_per_byte: float,
    fill_s_per_byte: float,
    puts_in_flight: int,
    max_nbytes: int,
    min_nbytes: int,
    slack: float = 0.03,
) -> int:
    """The pack size b that makes a checkpoint durable soonest, with no more packs than that takes.

    Let V bytes arrive at gamma seconds per byte, packs of b bytes be put as they fill, w at a
    time, and one put take alpha + beta * b. In r whole rounds of w packs, b = V / (w * r), the
    last put ends at the larger of

        filling + r puts:   gamma * V / r + r * alpha + beta * V / w   (the store is the bottleneck)
        arrival + one put:  gamma * V + alpha + beta * V / (w * r)      (the source is)

    since every stream takes every w-th pack: its k-th arrives at k * w * b * gamma at the latest,
    after which it has r - k + 1 puts to do, and that sum is largest for the first or the last k.
    The second falls with r. The first is smallest where the cost of r puts equals that of waiting
    for the first round, r = sqrt(gamma * V / alpha). The two are equal at
    r = V * (gamma - beta / w) / alpha: with more rounds the puts alone take longer than the
    bytes need to arrive. So the best number of rounds is

        r* = max(1, sqrt(gamma * V / alpha), V * (gamma - beta / w) / alpha)

    or rather the better of the whole numbers beside it. If the bytes are there at once
    (gamma = 0), one round of V / w each is best; if puts cost nothing but bandwidth (alpha = 0),
    the smallest packs are.

    Around the best the time is flat, while every pack costs processor time, a file or request,
    and another one when it is deleted. So of all that take at most `slack` longer than the best
    the fewest rounds are taken.

    Args:
        volume_nbytes: V, bytes that this writer stores per checkpoint. Better too high than too
            low: one pack more than was planned may cost a whole round.
        alpha_s, beta_s_per_byte: cost of one put while `puts_in_flight` are under way.
        fill_s_per_byte: gamma, time per byte at which captured (and encoded) bytes arrive.
        puts_in_flight: w.
        max_nbytes: bound of a pack. w + 1 packs must fit into host memory, since one fills
            while w are under way; then filling never waits longer than it would anyway.
        min_nbytes: the smallest pack worth an object.
        slack: the part of the shortest time that may be spent for the sake of fewer packs.

    Raises:
        ValueError: for impossible arguments.
    """
    drain = _Drain(volume_nbytes, alpha_s, beta_s_per_byte, fill_s_per_byte, puts_in_flight)
    if not 1 <= min_nbytes <= max_nbytes:
        raise ValueError(f"no pack has {min_nbytes} to {max_nbytes} bytes")
    round_nbytes = volume_nbytes / puts_in_flight
    fewest = max(1, math.ceil(round_nbytes / max_nbytes))
    most = max(fewest, math.floor(round_nbytes / min_nbytes))
    ideal = min(max(drain.ideal_rounds, fewest), most)
    best = min(math.floor(ideal), math.ceil(ideal), key=drain.seconds)
    longest_s = (1 + slack) * drain.seconds(best)
    # More rounds take less time up to the best.
    rounds = fewest + bisect_left(
        range(fewest, best), True, key=lambda rounds: drain.seconds(rounds) <= longest_s
    )
    return min(max(math.ceil(round_nbytes / rounds), min_nbytes), max_nbytes)


@dataclass(frozen=True, slots=True)
class _Drain:
    volume_nbytes: int
    alpha_s: float
    beta_s_per_byte: float
    fill_s_per_byte: float
    puts_in_flight: int

    def __post_init__(self) -> None:
        costs = (self.alpha_s, self.beta_s_per_byte, self.fill_s_per_byte)
        if not all(math.isfinite(cost) and cost >= 0 for cost in costs):
            raise ValueError(f"a cost is negative or not finite: {self}")
        if self.volume_nbytes < 1 or self.puts_in_flight < 1:
            raise ValueError(f"nothing to put, or no puts: {self}")

    @property
    def ideal_rounds(self) -> float:
        """r*, not rounded; infinite if puts cost nothing but bandwidth."""
        if self.fill_s_per_byte == 0:
            return 1.0
        if self.alpha_s == 0:
            return math.inf
        shared_s_per_byte = self.beta_s_per_byte / self.puts_in_flight
        return max(
            1.0,
            math.sqrt(self.fill_s_per_byte * self.volume_nbytes / self.alpha_s),
            self.volume_nbytes * (self.fill_s_per_byte - shared_s_per_byte) / self.alpha_s,
        )

    def seconds(self, rounds: int) -> float:
        """From the first byte's arrival to the end of the last put."""
        fill_s = self.fill_s_per_byte * self.volume_nbytes
        put_s = self.alpha_s + self.beta_s_per_byte * self.volume_nbytes / (
            self.puts_in_flight * rounds
        )
        return max(fill_s / rounds + rounds * put_s, fill_s + put_s)
