"""Every store beside the plain client of that store: 1 GiB in packs, and 100,000 small leaves.

    python benchmarks/stores.py --stores file s3 gs hdfs --rounds 3

Plain clients: `cp` and `sync` for files, TensorStore's KvStore for S3 and GCS, hdfs-native for
HDFS, fsspec for WebHDFS. They put and get objects of 32 MiB from `bytes` made beforehand, at each
of several numbers in flight, of which the one with the best median counts. AsymCheck saves and
restores a state of as many bytes, uncompressed, with all of its checks, until it is durable and
committed. Neither writes over an object. What was written before is synced first. Rounds take
turns; medians are shown. Small leaves: 100,000 of 4 KiB in one checkpoint, against one object a
leaf through the plain client, one after the other and many at a time (of which only so many are
put as fit into `--seconds`).

Servers run on this machine: SeaweedFS for S3, the tests' own stand-in for GCS (once more as if it
were 20 ms away), a real NameNode and two DataNodes for HDFS. They have one half of its cores, and
clients the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

import asymcheck
from asymcheck import AsymCheck
from asymcheck.policy import Never
from asymcheck.stores import open_store

sys.path.insert(0, str(Path(__file__).parent / "common"))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))
from machine import drop_caches

MIB = 1 << 20
OBJECT_NBYTES = 32 * MIB
LEAF_NBYTES = 16 * MIB
SMALL_NBYTES = 4096
IN_FLIGHT = (4, 8, 16)
FAR_S = 0.02
LEARNING = 2
TIMES = 3


# -- plain clients -----------------------------------------------------------------------------


class Client(Protocol):
    """Objects put and got without AsymCheck."""

    def put(self, key: str, data: bytes) -> None: ...

    def get(self, key: str) -> None: ...

    def delete(self, key: str) -> None: ...


class Cp:
    """Files that `cp` copies from memory to the disk and `sync` syncs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._memory = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self._sources: dict[int, Path] = {}

    def put(self, key: str, data: bytes) -> None:
        source = self._sources.get(id(data))
        if source is None:
            source = self._sources[id(data)] = self._memory / str(len(self._sources))
            source.write_bytes(data)
        subprocess.run(["cp", source, self._root / key], check=True)
        subprocess.run(["sync", self._root / key], check=True)

    def get(self, key: str) -> None:
        subprocess.run(["cp", self._root / key, self._memory / f"{key}.read"], check=True)
        (self._memory / f"{key}.read").unlink()

    def delete(self, key: str) -> None:
        (self._root / key).unlink()

    def close(self) -> None:
        shutil.rmtree(self._memory)


class KvStore:
    """TensorStore's KvStore."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        import tensorstore

        self._store = tensorstore.KvStore.open(dict(spec)).result()

    def put(self, key: str, data: bytes) -> None:
        self._store.write(key, data).result()

    def get(self, key: str) -> None:
        found = self._store.read(key).result()
        assert found.value  # copies it

    def delete(self, key: str) -> None:
        self._store.write(key, None).result()


class HdfsNative:
    """hdfs-native's own client."""

    def __init__(self, url: str) -> None:
        import hdfs_native

        self._native = hdfs_native
        self._client = hdfs_native.Client(url)
        self._client.mkdirs("/plain", 0o755, True)

    def put(self, key: str, data: bytes) -> None:
        options = self._native.WriteOptions(overwrite=True)
        with self._client.create(f"/plain/{key}", options) as file:
            file.write(data)

    def get(self, key: str) -> None:
        with self._client.read(f"/plain/{key}") as file:
            file.read()

    def delete(self, key: str) -> None:
        self._client.delete(f"/plain/{key}", recursive=False)


class WebHdfs:
    """fsspec's WebHDFS."""

    def __init__(self, url: str) -> None:
        import fsspec

        host, port = url.removeprefix("webhdfs://").split("/")[0].split(":")
        self._files = fsspec.filesystem("webhdfs", host=host, port=int(port), user="root")

    def put(self, key: str, data: bytes) -> None:
        with self._files.open(f"/plain/{key}", "wb", block_size=64 * MIB) as file:
            file.write(data)

    def get(self, key: str) -> None:
        self._files.cat_file(f"/plain/{key}")

    def delete(self, key: str) -> None:
        self._files.rm_file(f"/plain/{key}")


# -- stores ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A store to measure: where runs go, the plain client, and what comes before a cold read."""

    url: str
    client: Client
    before_read: Callable[[], None] = field(default=lambda: None)


@contextmanager
def file_place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as directory:
        plain = Path(directory) / "plain"
        plain.mkdir()
        client = Cp(plain)
        try:
            yield Place(f"{directory}/runs", client, drop_caches)
        finally:
            client.close()


@contextmanager
def s3_place() -> Iterator[Place]:
    from servers.seaweed import SeaweedServer

    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as directory,
        SeaweedServer(Path(directory)) as server,
    ):
        os.environ |= server.environment
        spec = {"driver": "s3", "bucket": server.bucket, "path": "plain/", "endpoint": server.url}
        query = f"endpoint={server.url}&region=us-east-1"
        client = KvStore(spec | {"aws_region": "us-east-1"})
        yield Place(f"s3://{server.bucket}/runs?{query}", client)


def _serve_gcs(connection: Any, latency_s: float) -> None:
    from servers.gcs import GcsServer

    with GcsServer(latency_s=latency_s) as server:
        connection.send((server.bucket, server.environment))
        connection.recv()


@contextmanager
def gs_place(latency_s: float = 0.0) -> Iterator[Place]:
    """The stand-in in a process of its own, so that it shares no interpreter with the client."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve_gcs, args=(there, latency_s)
    )
    process.start()
    try:
        bucket, environment = here.recv()
        os.environ |= environment
        client = KvStore({"driver": "gcs", "bucket": bucket, "path": "plain/"})
        yield Place(f"gs://{bucket}/runs", client)
    finally:
        here.send(None)
        process.join()


@contextmanager
def hdfs_place() -> Iterator[Place]:
    from servers.hdfs import HdfsCluster

    with tempfile.TemporaryDirectory() as directory, HdfsCluster(Path(directory)) as cluster:
        yield Place(f"{cluster.rpc_url}/runs", HdfsNative(cluster.rpc_url))


@contextmanager
def webhdfs_place() -> Iterator[Place]:
    from servers.hdfs import HdfsCluster

    with tempfile.TemporaryDirectory() as directory, HdfsCluster(Path(directory)) as cluster:
        yield Place(f"{cluster.webhdfs_url}/runs", WebHdfs(cluster.webhdfs_url))


PLACES = {
    "file": file_place,
    "s3": s3_place,
    "gs": gs_place,
    "gs-20ms": partial(gs_place, FAR_S),
    "hdfs": hdfs_place,
    "webhdfs": webhdfs_place,
}


# -- measuring ---------------------------------------------------------------------------------


def run_url(place: Place, name: str) -> str:
    """A run of its own below the place's URL, before its query."""
    path, question, query = place.url.partition("?")
    return f"{path}/{name}{question}{query}"


def timed(call: Callable[[str], object], names: Sequence[str], in_flight: int) -> float:
    with ThreadPoolExecutor(in_flight) as pool:
        begun_s = time.perf_counter()
        for done in [pool.submit(call, name) for name in names]:
            done.result()
        return time.perf_counter() - begun_s


def plain_round(place: Place, round: int, volume_nbytes: int) -> dict[str, list[float]]:
    """MB/s of the plain client, at each of `IN_FLIGHT`."""
    data = np.random.default_rng(0).bytes(OBJECT_NBYTES)
    count = volume_nbytes // OBJECT_NBYTES
    nbytes = count * OBJECT_NBYTES
    write: list[float] = []
    read: list[float] = []
    for in_flight in IN_FLIGHT:
        names = [f"{round}-{in_flight}-{n}" for n in range(count)]
        os.sync()
        write_s = timed(lambda name: place.client.put(name, data), names, in_flight)
        place.before_read()
        read_s = timed(place.client.get, names, in_flight)
        write.append(nbytes / write_s / 1e6)
        read.append(nbytes / read_s / 1e6)
        for name in names:  # so that servers in memory have room
            place.client.delete(name)
    return {"write": write, "read": read}


def our_round(place: Place, round: int, volume_nbytes: int) -> dict[str, float]:
    """MB/s of saving until committed and of restoring into given arrays, medians of `TIMES`.

    The first saves learn what the store costs, and take host memory; they are not timed. The
    arrays that are restored into have their memory, too, as those of a model have.
    """
    rng = np.random.default_rng(round)
    state = {
        f"leaf {n}": np.frombuffer(rng.bytes(LEAF_NBYTES), np.float32).copy()
        for n in range(volume_nbytes // LEAF_NBYTES)
    }
    target = {name: np.ones_like(array) for name, array in state.items()}
    nbytes = sum(array.nbytes for array in state.values())
    url = run_url(place, f"large-{round}")
    write_s, read_s = [], []
    with asymcheck.Checkpointer(url, strategy=AsymCheck(policy=Never())) as checkpointer:
        for step in range(LEARNING + TIMES):
            os.sync()
            begun_s = time.perf_counter()
            checkpointer.save(step, state).wait()
            write_s.append(time.perf_counter() - begun_s)
            remove(url, step - 1)
    for _ in range(TIMES):
        place.before_read()
        with asymcheck.Checkpointer(url) as checkpointer:
            begun_s = time.perf_counter()
            checkpointer.restore(target=target)
            read_s.append(time.perf_counter() - begun_s)
    assert all(np.array_equal(target[k].view("u4"), state[k].view("u4")) for k in state)
    remove(url, LEARNING + TIMES - 1)
    return {
        "write": nbytes / median(write_s[LEARNING:]) / 1e6,
        "read": nbytes / median(read_s) / 1e6,
    }


def remove(url: str, step: int) -> None:
    """A step that is not timed any more, by hand: servers in memory have room for a few."""
    with closing(open_store(url)) as store:
        store.delete(*(key for key in store.list("") if f"/{step:016d}" in key))


def small_leaves(place: Place, leaves: int, seconds: float) -> dict[str, float]:
    """Microseconds a leaf: in one checkpoint, the first and the next one, and one object each."""
    rng = np.random.default_rng(0)
    state = {f"leaf {n}": np.frombuffer(rng.bytes(SMALL_NBYTES), np.float32) for n in range(leaves)}
    our_s = []
    with asymcheck.Checkpointer(
        run_url(place, "small"), strategy=AsymCheck(policy=Never())
    ) as checkpointer:
        for step in range(1 + TIMES):
            begun_s = time.perf_counter()
            checkpointer.save(step, state).wait()
            our_s.append(time.perf_counter() - begun_s)
        begun_s = time.perf_counter()
        checkpointer.restore()
        our_read_s = time.perf_counter() - begun_s
    next_s = median(our_s[1:])
    alone_s = plain_leaf_s(place, rng.bytes(SMALL_NBYTES), leaves, 1, seconds)
    plain_s = plain_leaf_s(place, rng.bytes(SMALL_NBYTES), leaves, max(IN_FLIGHT), seconds)
    return {
        "ours_first_us": our_s[0] / leaves * 1e6,
        "ours_us": next_s / leaves * 1e6,
        "ours_read_us": our_read_s / leaves * 1e6,
        "plain_alone_us": alone_s * 1e6,
        "plain_us": plain_s * 1e6,
        "ratio_alone": alone_s / (next_s / leaves),
        "ratio": plain_s / (next_s / leaves),
    }


def plain_leaf_s(place: Place, data: bytes, leaves: int, in_flight: int, seconds: float) -> float:
    """Seconds for each object of one leaf, of as many as fit into `seconds`."""
    deadline = time.perf_counter() + seconds

    def put(n: int) -> bool:
        if time.perf_counter() > deadline:
            return False
        place.client.put(f"small-{in_flight}-{n}", data)
        return True

    begun_s = time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        done = sum(pool.map(put, range(leaves)))
    return (time.perf_counter() - begun_s) / done


@contextmanager
def cores(half: int) -> Iterator[None]:
    """This thread, and all threads and processes that it starts, on one half of the cores."""
    before = os.sched_getaffinity(0)
    ordered = sorted(before)
    middle = len(ordered) // 2
    os.sched_setaffinity(0, [ordered[:middle], ordered[middle:]][half] or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        if name == "file":
            place = stack.enter_context(PLACES[name]())
        else:
            with cores(0):
                place = stack.enter_context(PLACES[name]())
            stack.enter_context(cores(1))
        plain, ours = [], []
        if args.rounds:  # so that the machine has its memory
            plain_round(place, args.rounds, args.mib * MIB)
            our_round(place, args.rounds, args.mib * MIB)
        for round in range(args.rounds):
            plain.append(plain_round(place, round, args.mib * MIB))
            ours.append(our_round(place, round, args.mib * MIB))
            print(f"{name} round {round + 1}: plain {plain[-1]}, asymcheck {ours[-1]}", flush=True)
        small = small_leaves(place, args.leaves, args.seconds) if args.leaves else None
    return {"store": name, "plain": plain, "asymcheck": ours, "small": small}


def large_table(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| store | plain write / read, MB/s | AsymCheck write / read, MB/s | ratio |"
    yield "| --- | --- | --- | --- |"
    for result in results:
        rounds = result["plain"]
        plain = {
            what: max(median(each) for each in zip(*(r[what] for r in rounds), strict=True))
            for what in ("write", "read")
        }
        ours = {what: median(r[what] for r in result["asymcheck"]) for what in ("write", "read")}
        yield (
            f"| {result['store']} | {plain['write']:.0f} / {plain['read']:.0f} | "
            f"{ours['write']:.0f} / {ours['read']:.0f} | "
            f"{ours['write'] / plain['write']:.2f} / {ours['read'] / plain['read']:.2f} |"
        )


def small_table(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| store | object each: one / many at a time | packed: first / next | restored | times |"
    yield "| --- | --- | --- | --- | --- |"
    for result in results:
        small = result["small"]
        yield (
            f"| {result['store']} | {small['plain_alone_us']:.0f} / {small['plain_us']:.0f} | "
            f"{small['ours_first_us']:.0f} / {small['ours_us']:.0f} | "
            f"{small['ours_read_us']:.0f} | {small['ratio_alone']:.0f} / {small['ratio']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stores", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--rounds", type=int, default=3, help="of the state; 0: none")
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--leaves", type=int, default=100_000, help="small ones; 0: none")
    parser.add_argument("--seconds", type=float, default=10.0, help="for objects of one leaf each")
    parser.add_argument("--output", type=Path, default=Path("build/stores"))
    args = parser.parse_args()
    results = [measure(name, args) for name in args.stores]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [*large_table(results), ""] if args.rounds else []
    lines += small_table(results) if args.leaves else []
    text = "\n".join(lines)
    args.output.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
