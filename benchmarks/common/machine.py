"""What the benchmarks ask of the machine: memory in use, and a cold page cache."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path


class MemoryPeak:
    """The largest memory of this process and its children while it watches, sampled.

    Anonymous memory of all, and shared memory once (the largest mapping of any of them).
    """

    def __init__(self, interval_s: float = 0.1) -> None:
        self._interval_s = interval_s
        self.baseline = self._now()
        self.peak = self.baseline
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak = max(self.peak, self._now())

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(0, self.peak - self.baseline)

    @staticmethod
    def _now() -> int:
        children = subprocess_tree(os.getpid())
        fields = [memory_fields(pid) for pid in [os.getpid(), *children]]
        anonymous = sum(f.get("RssAnon", 0) for f in fields)
        return anonymous + max((f.get("RssShmem", 0) for f in fields), default=0)


def subprocess_tree(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *subprocess_tree(child)]
    return found


def memory_fields(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith("Rss"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def drop_caches() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("page cache not dropped: not allowed here", file=sys.stderr)
