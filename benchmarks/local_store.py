"""LocalStore beside TensorStore's file driver: which of them `file://` should mean.

    python benchmarks/local_store.py --directory /a/real/disk [--repeats 5] [--json out.json]

Everything runs in one process, the stores taking turns, and medians are shown. Writes return
when the data is synced. "driver" is TensorStore's KvStore called without our `Store` around it
and with the bytes objects that it wants made beforehand; "tensorstore" is that driver as a
`Store`. Memory is page-aligned, as the buffers of the flush queue are. Cold reads come after
the kernel was told to drop the file from its cache.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from asymcheck.stores import Store, open_store

MIB = 1 << 20
SIZES_NBYTES = [4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
IN_FLIGHT = [1, 4]
VOLUME_NBYTES = 512 * MIB
SCHEMES = {"local": "file", "tensorstore": "tensorstore+file"}


@dataclass(frozen=True)
class Measurement:
    """Median of the repeats of one setting."""

    what: str
    store: str
    object_nbytes: int
    in_flight: int
    mb_per_s: float
    cpu_s_per_gb: float


def random_memory(nbytes: int, seed: int) -> memoryview:
    array = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    array[:] = np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)
    return array.data


def timed(call: Callable[[int], object], count: int, in_flight: int) -> tuple[float, float]:
    """Wall and CPU seconds of `call(0), call(1), ...`."""
    with ThreadPoolExecutor(in_flight) as pool:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for done in [pool.submit(call, n) for n in range(count)]:
            done.result()
        return time.perf_counter() - wall_s, time.process_time() - cpu_s


@contextmanager
def directory_in(parent: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def writes(parent: Path, nbytes: int, in_flight: int, count: int) -> dict[str, tuple[float, float]]:
    """One round of synced writes by every store, each into a new directory."""
    sources = [random_memory(nbytes, seed) for seed in range(in_flight)]
    ready = [bytes(source) for source in sources]
    seconds: dict[str, tuple[float, float]] = {}
    for name, scheme in SCHEMES.items():
        with directory_in(parent) as directory:
            store = open_store(f"{scheme}://{directory}")

            def put(n: int, store: Store = store) -> None:
                store.put(f"objects/{n}", sources[n % in_flight])

            seconds[name] = timed(put, count, in_flight)
    with directory_in(parent) as directory:
        driver = ts.KvStore.open({"driver": "file", "path": f"{directory}/"}).result()
        seconds["driver"] = timed(
            lambda n: driver.write(f"objects/{n}", ready[n % in_flight]).result(), count, in_flight
        )
    return seconds


def reads(
    parent: Path, nbytes: int, in_flight: int, count: int, *, cold: bool
) -> dict[str, tuple[float, float]]:
    """One round of reads of whole objects into memory that was touched before."""
    out = [random_memory(nbytes, seed) for seed in range(in_flight)]
    free = list(range(in_flight))
    seconds: dict[str, tuple[float, float]] = {}
    with directory_in(parent) as directory:
        for n in range(count):
            open_store(directory).put(f"objects/{n}", out[0])
        for name, scheme in SCHEMES.items():
            prepare_cache(directory / "objects", cold=cold)
            store = open_store(f"{scheme}://{directory}")

            def get(n: int, store: Store = store) -> None:
                own = free.pop()
                store.get_range(f"objects/{n}", 0, out[own])
                free.append(own)

            seconds[name] = timed(get, count, in_flight)
    return seconds


def prepare_cache(directory: Path, *, cold: bool) -> None:
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        if cold:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            path.read_bytes()
        os.close(fd)


def longest_pause_ms(call: Callable[[], object]) -> float:
    """How long another Python thread stood still at most while `call` ran (it holds the GIL)."""
    done, gaps_s = threading.Event(), [0.0]

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            now = time.perf_counter()
            gaps_s.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    call()
    done.set()
    thread.join()
    return max(gaps_s) * 1000


def pauses(parent: Path, nbytes: int, repeats: int) -> dict[str, float]:
    data = random_memory(nbytes, 0)
    found: dict[str, list[float]] = {name: [] for name in SCHEMES}
    for _ in range(repeats):
        for name, scheme in SCHEMES.items():
            with directory_in(parent) as directory:
                store = open_store(f"{scheme}://{directory}")
                pause_ms = longest_pause_ms(lambda store=store: store.put("object", data))
                found[name].append(pause_ms)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(parent: Path, repeats: int) -> Iterator[Measurement]:
    rounds: dict[str, Callable[[int, int, int], dict[str, tuple[float, float]]]] = {
        "write": lambda size, flight, count: writes(parent, size, flight, count),
        "read, cold": lambda size, flight, count: reads(parent, size, flight, count, cold=True),
        "read, warm": lambda size, flight, count: reads(parent, size, flight, count, cold=False),
    }
    for what, one_round in rounds.items():
        for size in SIZES_NBYTES:
            for flight in IN_FLIGHT:
                count = max(VOLUME_NBYTES // size, flight)
                results = [one_round(size, flight, count) for _ in range(repeats)]
                for name in results[0]:
                    wall_s, cpu_s = (
                        statistics.median(result[name][which] for result in results)
                        for which in (0, 1)
                    )
                    gb = size * count / 1e9
                    yield Measurement(what, name, size, flight, 1e3 * gb / wall_s, cpu_s / gb)


def print_table(measurements: list[Measurement]) -> None:
    print(f"{'':10}  {'MiB':>4} {'in flight':>9}  {'store':12} {'MB/s':>6} {'CPU s/GB':>8}")
    for m in measurements:
        size_mib = m.object_nbytes // MIB
        print(
            f"{m.what:10}  {size_mib:4} {m.in_flight:9}  {m.store:12} {m.mb_per_s:6.0f}"
            f" {m.cpu_s_per_gb:8.3f}"
        )


def print_verdict(measurements: list[Measurement]) -> None:
    """The rule: at least 1.3 times as fast, or at most half the CPU, in writing."""
    by_setting = {(m.what, m.store, m.object_nbytes, m.in_flight): m for m in measurements}
    for what in ("write", "read, cold", "read, warm"):
        for rival in ("tensorstore", "driver"):
            pairs = [
                (by_setting[what, "local", *rest], by_setting[what, rival, *rest])
                for rest in ((size, flight) for size in SIZES_NBYTES for flight in IN_FLIGHT)
                if (what, rival, *rest) in by_setting
            ]
            if pairs:
                speed = statistics.median(a.mb_per_s / b.mb_per_s for a, b in pairs)
                cpu = statistics.median(a.cpu_s_per_gb / b.cpu_s_per_gb for a, b in pairs)
                print(f"{what}: local / {rival}: {speed:.2f} x the speed, {cpu:.2f} x the CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    measurements: list[Measurement] = []
    for measurement in measure(options.directory, options.repeats):
        measurements.append(measurement)
        print(f"\r{len(measurements)} settings measured", end="", flush=True)
    print()
    print_table(measurements)
    print_verdict(measurements)
    pause_ms = pauses(options.directory, 64 * MIB, options.repeats)
    for name, value in pause_ms.items():
        print(f"longest pause of another Python thread in a 64 MiB put, {name}: {value:.1f} ms")
    if options.json:
        figures = {
            "measurements": [asdict(measurement) for measurement in measurements],
            "longest_pause_ms": pause_ms,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
