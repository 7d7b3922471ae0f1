"""How many puts at a time, and how large their packs: optimal batched flushing, derived."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batching:
    """So many puts in flight at most, of packs of at most so many bytes."""

    puts_in_flight: int
    pack_nbytes: int


def derive_batching(
    *,
    volume_nbytes: int,
    alpha_s: float,
    beta_s_per_byte: float,
    streams: float,
    fill_s_per_byte: float,
    min_puts: int,
    max_puts: int,
    max_pack_nbytes: int,
    memory_nbytes: int,
    min_round_nbytes: int,
    slack: float = 0.03,
) -> Batching:
    """The batching that makes a checkpoint durable soonest, with no more than that takes.

    Let V bytes arrive at gamma seconds per byte, packs of b bytes be put as they fill, w at a
    time, and one put take alpha + beta_w * b with beta_w = beta * max(1, w / streams). In r whole
    rounds of w packs, b = V / (w * r), the last put ends at the larger of

        filling + r puts:   gamma * V / r + r * alpha + beta_w * V / w (the store is the bottleneck)
        arrival + one put:  gamma * V + alpha + beta_w * V / (w * r)   (the source is)

    since every stream takes every w-th pack: its k-th arrives at k * w * b * gamma at the latest,
    after which it has r - k + 1 puts to do, and that sum is largest for the first or the last k.
    The second falls with r. The first is smallest where the cost of r puts equals that of waiting
    for the first round, r = sqrt(gamma * V / alpha). The two are equal at
    r = V * (gamma - beta_w / w) / alpha: with more rounds the puts alone take longer than the
    bytes need to arrive. So the best number of rounds is

        r* = max(1, sqrt(gamma * V / alpha), V * (gamma - beta_w / w) / alpha)

    or rather the better of the whole numbers beside it. If the bytes are there at once
    (gamma = 0), one round of V / w each is best; if puts cost nothing but bandwidth (alpha = 0),
    the smallest packs are.

    Up to `streams` more puts in flight make both terms smaller: fewer rounds carry the same
    bytes, and each is carried at w times the rate of a stream. Beyond, beta_w / w no longer falls
    and only alpha is paid less often, until w packs of the size that this takes do not fit into
    host memory. So every w has its best r, and the best pair of all is found by trying each w.

    Around the best the time is flat, while every put in flight costs a thread, and every pack
    processor time, a file or request, and another one when it is deleted. So of all pairs that
    take at most `slack` longer than the best that with the fewest puts in flight is taken, then
    with the fewest rounds.

    Args:
        volume_nbytes: V, bytes that this writer stores per checkpoint. Better too high than too
            low: one pack more than was planned may cost a whole round.
        alpha_s, beta_s_per_byte, streams: cost of one put; see `PutCost`.
        fill_s_per_byte: gamma, time per byte at which captured (and encoded) bytes arrive.
        min_puts, max_puts: bounds of w.
        max_pack_nbytes: bound of b.
        memory_nbytes: host memory for packs: w + 1 must fit, since one fills while w are under
            way; then filling never waits longer than it would anyway.
        min_round_nbytes: the smallest round worth w objects; less is put as if it were that much.
        slack: the part of the shortest time that may be spent for the sake of fewer packs.

    Raises:
        ValueError: for impossible arguments.
    """
    if not 1 <= min_puts <= max_puts < memory_nbytes or min(max_pack_nbytes, min_round_nbytes) < 1:
        raise ValueError(f"no pack fits: {min_puts} to {max_puts} puts in {memory_nbytes} bytes")
    volume_nbytes = max(volume_nbytes, min_round_nbytes)
    drains = [
        _Drain(
            volume_nbytes,
            alpha_s,
            beta_s_per_byte * max(1.0, puts / streams),
            fill_s_per_byte,
            puts,
            min(max_pack_nbytes, memory_nbytes // (puts + 1)),
            volume_nbytes // min_round_nbytes,
        )
        for puts in range(min_puts, max_puts + 1)
    ]
    longest_s = (1 + slack) * min(drain.seconds(drain.best_rounds) for drain in drains)
    drain = next(drain for drain in drains if drain.seconds(drain.best_rounds) <= longest_s)
    pack_nbytes = math.ceil(drain.round_nbytes / drain.fewest_rounds_within(longest_s))
    return Batching(drain.puts_in_flight, pack_nbytes)


@dataclass(frozen=True, slots=True)
class _Drain:
    """A checkpoint on its way, w puts at a time."""

    volume_nbytes: int
    alpha_s: float
    beta_s_per_byte: float
    fill_s_per_byte: float
    puts_in_flight: int
    max_pack_nbytes: int
    max_rounds: int

    def __post_init__(self) -> None:
        costs = (self.alpha_s, self.beta_s_per_byte, self.fill_s_per_byte)
        if not all(math.isfinite(cost) and cost >= 0 for cost in costs):
            raise ValueError(f"a cost is negative or not finite: {self}")

    @property
    def round_nbytes(self) -> float:
        """Bytes of a stream, in all rounds."""
        return self.volume_nbytes / self.puts_in_flight

    @property
    def fewest_rounds(self) -> int:
        """Of the largest packs."""
        return max(1, math.ceil(self.round_nbytes / self.max_pack_nbytes))

    @property
    def best_rounds(self) -> int:
        """r*, within its bounds."""
        fewest = self.fewest_rounds
        ideal = min(max(self._ideal_rounds, fewest), max(self.max_rounds, fewest))
        return min(math.floor(ideal), math.ceil(ideal), key=self.seconds)

    def fewest_rounds_within(self, longest_s: float) -> int:
        """More rounds take less time up to the best."""
        fewest, best = self.fewest_rounds, self.best_rounds
        return fewest + bisect_left(
            range(fewest, best), True, key=lambda rounds: self.seconds(rounds) <= longest_s
        )

    @property
    def _ideal_rounds(self) -> float:
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
        put_s = self.alpha_s + self.beta_s_per_byte * self.round_nbytes / rounds
        return max(fill_s / rounds + rounds * put_s, fill_s + put_s)
