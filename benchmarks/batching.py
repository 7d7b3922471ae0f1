"""Puts in flight and sizes of packs: what is derived, beside a sweep over both.

    python benchmarks/batching.py --volumes-mb 4 64 --stores streams link --output build/batching

A checkpoint of each volume is saved, uncompressed, into a store in memory that sleeps as long as a
network would take, again and again: with what the checkpointer derives from the costs that it has
measured in the checkpoints before, and with every pair of a sweep, in turn. What counts is the time
from the first copy to the end of the last put of a pack. Medians of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from asymcheck import AsymCheck, Checkpointer
from asymcheck.batching import Batching
from asymcheck.policy import Never

sys.path.insert(0, str(Path(__file__).parent / "common"))
from latency import LatencyStore, Network

MIB = 1 << 20
NETWORKS = {
    "streams": Network(50e-3, stream_bytes_per_s=80e6),
    "both": Network(50e-3, stream_bytes_per_s=80e6, link_bytes_per_s=400e6),
    "link": Network(50e-3, link_bytes_per_s=100e6),
    "near": Network(0.0, link_bytes_per_s=1e9),
}
PUTS = (4, 8, 16, 32)
ROUNDS = (1, 2, 4)
WARM_UP = 4


@dataclass(frozen=True)
class Measurement:
    """Medians of one store, volume and batching."""

    store: str
    volume_mb: int
    derived: bool
    puts_in_flight: int
    pack_nbytes: int
    seconds: float


def state_of(nbytes: int) -> dict[str, np.ndarray]:
    """Leaves of the sizes of a transformer's: some large, many small."""
    shares = [8, 4, 4, 3, 1, 1, 1, 1] * 4 + [1 / 64] * 32
    rng = np.random.default_rng(0)
    return {
        f"w{i}": rng.integers(0, 256, int(nbytes * share / sum(shares)), np.uint8)
        for i, share in enumerate(shares)
    }


def seconds_until_put(checkpointer: Checkpointer, step: int, state: object) -> float:
    checkpointer.save(step, state).wait()
    events = [event for event in checkpointer.trace.events() if event.step == step]
    begun_s = min(event.begin_s for event in events if event.track == "copy")
    return max(event.end_s for event in events if event.track == "flush") - begun_s


def all_batchings(volume_nbytes: int, derived: Batching, max_pack_nbytes: int) -> list[Batching]:
    """Whole rounds of every number of puts, and the neighbours of what is derived."""
    found = {
        Batching(puts, min(math.ceil(volume_nbytes / (puts * rounds)), max_pack_nbytes))
        for puts in PUTS
        for rounds in ROUNDS
    }
    near = [derived.pack_nbytes // 2, derived.pack_nbytes * 3 // 4, derived.pack_nbytes * 3 // 2]
    found |= {Batching(derived.puts_in_flight, min(n, max_pack_nbytes)) for n in near}
    least = max(64 << 10, volume_nbytes >> 8)
    return sorted((b for b in found if b.pack_nbytes >= least), key=repr)


def measure(store: str, volume_mb: int, repeats: int) -> Iterator[Measurement]:
    state = state_of(volume_mb * 1_000_000)
    strategy = AsymCheck(policy=Never())
    with Checkpointer(LatencyStore(NETWORKS[store]), strategy=strategy, max_to_keep=1) as saver:
        for step in range(WARM_UP):
            saver.save(step, state).wait()
        pipeline, plan = saver._pipeline, saver._plan
        assert pipeline is not None and plan is not None
        derive = pipeline.batching
        derived = derive(plan, has_base=False)
        given = [None, *all_batchings(plan.nbytes, derived, pipeline.buffer_nbytes)]
        taken_s: dict[Batching | None, list[float]] = {batching: [] for batching in given}
        for batching in given * repeats:
            chosen = derive if batching is None else lambda *_, b=batching, **__: b
            pipeline.batching = chosen  # type: ignore[method-assign]
            step += 1
            taken_s[batching].append(seconds_until_put(saver, step, state))
    for batching, seconds in taken_s.items():
        shown = batching or derived
        yield Measurement(
            store, volume_mb, batching is None, *asdict(shown).values(), median(seconds)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volumes-mb", type=int, nargs="+", default=[4, 64, 512])
    parser.add_argument("--stores", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a folder for batching.json")
    options = parser.parse_args()
    found: list[Measurement] = []
    for store in options.stores:
        for volume_mb in options.volumes_mb:
            measured = list(measure(store, volume_mb, options.repeats))
            found += measured
            derived = next(m for m in measured if m.derived)
            best = min((m for m in measured if not m.derived), key=lambda m: m.seconds)
            print(
                f"{store}, {volume_mb} MB: derived {_text(derived)}, best of the sweep "
                f"{_text(best)}, ratio {derived.seconds / best.seconds:.2f}"
            )
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        rows = [asdict(measurement) for measurement in found]
        (options.output / "batching.json").write_text(json.dumps(rows, indent=1) + "\n")


def _text(m: Measurement) -> str:
    return f"{m.puts_in_flight} x {m.pack_nbytes / MIB:.2f} MiB {m.seconds * 1000:.0f} ms"


if __name__ == "__main__":
    main()
