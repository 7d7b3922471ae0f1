"""That a local put is durable when it returns: by the system's calls, and by pulling the plug."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from simulated_filesystem import SimulatedCrash, SimulatedFilesystem

from asymcheck.errors import ObjectNotFoundError, StoreFullError
from asymcheck.stores import LocalStore
from asymcheck.stores.filesystem import CREATE_FLAGS, Filesystem

CALLS = (
    "openat,mkdir,mkdirat,pwrite64,write,fsync,fdatasync,ftruncate,"
    "rename,renameat,renameat2,link,linkat,unlink,unlinkat"
)
ROOT = Path("/runs/a")
SEEDS = range(60)


# By the system's calls


def traced_calls(tmp_path: Path, body: str) -> list[str]:
    """The system calls of `body` that concern files, in order, with descriptors as paths."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    script = f"""
        import os
        from asymcheck.stores import LocalStore
        store = LocalStore({str(tmp_path / "run")!r})
        os.write(1, b"begin")
        {body}
        os.write(1, b"end")
    """
    log = tmp_path / "strace"
    command = [strace, "-f", "-y", "-e", f"trace={CALLS}", "-o", str(log)]
    run = subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    if "ptrace" in run.stderr:
        pytest.skip(f"strace may not trace here: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    lines = [line.split(None, 1)[1] for line in log.read_text().splitlines()]
    (begin,) = (n for n, line in enumerate(lines) if '"begin"' in line)
    (end,) = (n for n, line in enumerate(lines) if '"end"' in line)
    return lines[begin + 1 : end]


def position(calls: list[str], pattern: str) -> int:
    found = [n for n, call in enumerate(calls) if re.search(pattern, call)]
    assert found, f"no call like {pattern} in\n" + "\n".join(calls)
    return found[-1]


def assert_in_order(calls: list[str], *patterns: str) -> None:
    positions = [position(calls, pattern) for pattern in patterns]
    assert positions == sorted(set(positions)), "\n".join(calls)


SYNC_DATA = r"^f(data)?sync\(\d+<.*/run/\.tmp/\.[^>]*>\)\s+= 0"
WRITE_DATA = r"^pwrite64\(\d+<.*/run/\.tmp/\."


@pytest.mark.parametrize("nbytes", [100, 200_001])
@pytest.mark.parametrize(
    ("method", "naming"),
    [("put", r"^rename(at2?)?\("), ("put_if_absent", r"^link(at)?\(")],
)
def test_data_then_name_then_directory(
    tmp_path: Path, nbytes: int, method: str, naming: str
) -> None:
    calls = traced_calls(tmp_path, f'store.{method}("steps/k", memoryview(bytes({nbytes})))')
    sync_directory = r"^fsync\(\d+<[^>]*/run/steps>\)\s+= 0"
    assert_in_order(calls, WRITE_DATA, SYNC_DATA, naming + r'.*/run/steps/k"', sync_directory)
    if nbytes > 65536:
        assert_in_order(calls, r"\.tmp/.*O_DIRECT", WRITE_DATA, r"^ftruncate", SYNC_DATA)


def test_directories_are_durable_before_anything_is_in_them(tmp_path: Path) -> None:
    calls = traced_calls(tmp_path, 'store.put("a/b/k", memoryview(b"x"))')
    for parent, child in (("", "/run"), ("/run", "/run/a"), ("/run/a", "/run/a/b")):
        made = rf'^mkdir(at)?\(.*{tmp_path}{child}"'
        synced = rf"^fsync\(\d+<{tmp_path}{parent}>\)\s+= 0"
        assert_in_order(calls, made, synced, r"^rename")
    assert_in_order(calls, rf"^fsync\(\d+<{tmp_path}/run>\)", r'^mkdir(at)?\(.*/run/a/b"')


def test_the_loser_syncs_what_the_winner_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "k").write_bytes(b"winner")
    calls = traced_calls(tmp_path, 'store.put_if_absent("k", memoryview(b"x"))')
    assert_in_order(calls, r"^link(at)?\(.*EEXIST", r"^fsync\(\d+<[^>]*/run>\)\s+= 0")


def test_a_deletion_is_durable(tmp_path: Path) -> None:
    LocalStore(tmp_path / "run").put("a/b/k", memoryview(b"x"))
    LocalStore(tmp_path / "run").put("a/j", memoryview(b"x"))
    calls = traced_calls(tmp_path, 'store.delete("a/b/k")')
    assert_in_order(calls, r"^unlink", r"^fsync\(\d+<[^>]*/run/a>\)\s+= 0")


# By pulling the plug

OLD = np.random.default_rng(0).bytes(5_000)
PACK = np.random.default_rng(1).bytes(70_001)
MANIFEST = np.random.default_rng(2).bytes(700)
COMMIT = b"commit"
CONTENT = {
    "steps/0/old": OLD,
    "steps/1/pack": PACK,
    "steps/1/manifest": MANIFEST,
    "commits/1": COMMIT,
}


def save_a_step(store: LocalStore, acknowledge: Callable[[str], None]) -> None:
    """Put what must be there before a commit record, commit, and delete the step before."""
    store.put("steps/0/old", memoryview(OLD))
    acknowledge("+steps/0/old")
    store.put("steps/1/pack", memoryview(PACK))
    acknowledge("+steps/1/pack")
    store.put("steps/1/manifest", memoryview(MANIFEST))
    acknowledge("+steps/1/manifest")
    assert store.put_if_absent("commits/1", memoryview(COMMIT))
    acknowledge("+commits/1")
    assert not store.put_if_absent("commits/1", memoryview(b"another"))
    store.delete("steps/0/old")
    acknowledge("-steps/0/old")


def broken_promises(filesystem: SimulatedFilesystem, acknowledged: list[str]) -> Iterator[str]:
    """What a store on this disk must not show after those acknowledgements."""
    store = LocalStore(ROOT, filesystem)
    keys = store.list("")
    for key in keys:
        if store.get(key, 1 << 20) != CONTENT[key]:
            yield f"{key} is torn"
    for change in acknowledged:
        key = change[1:]
        if change[0] == "+" and key not in keys and key != "steps/0/old":
            yield f"{key} is lost"
        if change[0] == "-" and key in keys:
            yield f"{key} is back"
    if "commits/1" in keys and not {"steps/1/pack", "steps/1/manifest"} <= set(keys):
        yield "a commit without its objects"
    if "commits/1" not in keys and "+steps/0/old" in acknowledged and "steps/0/old" not in keys:
        yield "the old step is lost before the new one stands"


def outcomes(
    new_filesystem: Callable[[], SimulatedFilesystem],
) -> Iterator[tuple[int, SimulatedFilesystem, list[str]]]:
    """For every call at which a save can die: the dead file system and what was acknowledged."""
    untouched = new_filesystem()
    save_a_step(LocalStore(ROOT, untouched), lambda change: None)
    for n in range(1, untouched.operations + 2):
        filesystem, acknowledged = new_filesystem(), list[str]()
        filesystem.die_at(n)
        try:
            save_a_step(LocalStore(ROOT, filesystem), acknowledged.append)
        except SimulatedCrash:
            assert n <= untouched.operations
        yield n, filesystem, acknowledged


def all_broken_promises(new_filesystem: Callable[[], SimulatedFilesystem]) -> set[str]:
    return {
        broken
        for _, dead, acknowledged in outcomes(new_filesystem)
        for seed in SEEDS
        for broken in broken_promises(dead.crash(seed), acknowledged)
    }


@pytest.mark.parametrize("direct", [True, False])
def test_no_power_cut_breaks_a_promise(direct: bool) -> None:
    assert all_broken_promises(lambda: SimulatedFilesystem(direct=direct)) == set()


def test_no_kill_breaks_a_promise() -> None:
    for n, dead, acknowledged in outcomes(SimulatedFilesystem):
        assert list(broken_promises(dead.restart(), acknowledged)) == [], n


def test_a_save_can_be_repeated_on_every_disk() -> None:
    for n, dead, _ in outcomes(SimulatedFilesystem):
        for seed in SEEDS[:10]:
            disk = dead.crash(seed)
            store = LocalStore(ROOT, disk)
            store.clear_stale_temporaries()
            assert disk_names(disk, ROOT / ".tmp") == [], (n, seed)
            acknowledged = list[str]()
            store.delete("commits/1")
            save_a_step(store, acknowledged.append)
            assert list(broken_promises(disk.crash(seed), acknowledged)) == [], (n, seed)


def test_an_object_that_was_seen_after_a_kill_is_made_durable_by_putting_it_again() -> None:
    """A process that died between name and sync leaves an object that a power cut may take."""
    lost_otherwise = 0
    for _, dead, _ in outcomes(SimulatedFilesystem):
        alive = dead.restart()
        store = LocalStore(ROOT, alive)
        if "commits/1" not in store.list(""):
            continue
        lost_otherwise += any(
            "commits/1" not in LocalStore(ROOT, alive.crash(seed)).list("") for seed in SEEDS
        )
        assert not store.put_if_absent("commits/1", memoryview(COMMIT))
        for seed in SEEDS:
            assert "commits/1" in LocalStore(ROOT, alive.crash(seed)).list("")
    assert lost_otherwise


def disk_names(filesystem: SimulatedFilesystem, path: Path) -> list[str]:
    try:
        return sorted(name for name, _ in filesystem.entries(path))
    except FileNotFoundError:
        return []


# That the simulation catches stores that skip a sync


class NoDataSync(SimulatedFilesystem):
    def sync(self, fd: int) -> None:
        pass


class NoDirectorySync(SimulatedFilesystem):
    def sync_directory(self, path: Path) -> None:
        pass


class NoSyncOfParents(SimulatedFilesystem):
    """Syncs a directory only once it holds an object, as a store that forgets ancestors does."""

    def sync_directory(self, path: Path) -> None:
        if path.name in ("0", "1", "commits"):
            super().sync_directory(path)


class NoSyncOfRemovals(SimulatedFilesystem):
    _removing = False

    def unlink(self, path: Path) -> None:
        self._removing = path.name == "old"
        super().unlink(path)

    def sync_directory(self, path: Path) -> None:
        if not self._removing:
            super().sync_directory(path)


class DirectorySyncTooEarly(SimulatedFilesystem):
    def rename(self, source: Path, target: Path) -> None:
        super().sync_directory(target.parent)
        super().rename(source, target)

    def sync_directory(self, path: Path) -> None:
        if path.name != "1":
            super().sync_directory(path)


class NameBeforeData(SimulatedFilesystem):
    """Makes the data durable only after the name, when the directory is synced."""

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self._late: list[int] = []

    def sync(self, fd: int) -> None:
        self._late.append(fd)

    def close(self, fd: int) -> None:
        if fd not in self._late:
            super().close(fd)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        while self._late:
            super().sync(self._late.pop())


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (NoDataSync, {"steps/1/pack is torn", "steps/1/manifest is torn", "commits/1 is torn"}),
        (NoDirectorySync, {"steps/1/pack is lost", "a commit without its objects"}),
        (NoSyncOfRemovals, {"steps/0/old is back"}),
        (NoSyncOfParents, {"steps/1/pack is lost", "commits/1 is lost"}),
        (DirectorySyncTooEarly, {"steps/1/manifest is lost", "a commit without its objects"}),
        (NameBeforeData, {"steps/1/manifest is torn"}),
    ],
)
def test_the_simulation_catches(broken: type[SimulatedFilesystem], found: set[str]) -> None:
    assert found <= all_broken_promises(broken)


# The simulated file system itself


def written(filesystem: Filesystem, path: Path, data: bytes, *, sync: bool) -> None:
    fd = filesystem.open(path, CREATE_FLAGS)
    filesystem.pwrite(fd, memoryview(data), 0)
    if sync:
        filesystem.sync(fd)
    filesystem.close(fd)


def content(filesystem: Filesystem, path: Path) -> bytes | None:
    try:
        out = bytearray(filesystem.status(path).nbytes)
    except FileNotFoundError:
        return None
    fd = filesystem.open(path, os.O_RDONLY)
    filesystem.pread(fd, memoryview(out), 0)
    filesystem.close(fd)
    return bytes(out)


class TestSimulatedFilesystem:
    K, J = Path("/k"), Path("/j")

    def crashes(self, filesystem: SimulatedFilesystem) -> list[SimulatedFilesystem]:
        return [filesystem.crash(seed) for seed in range(200)]

    def test_what_is_synced_stays(self) -> None:
        filesystem = SimulatedFilesystem()
        written(filesystem, self.K, PACK, sync=True)
        filesystem.sync_directory(Path("/"))
        assert {content(after, self.K) for after in self.crashes(filesystem)} == {PACK}

    def test_a_name_may_go_without_its_data_and_data_without_its_name(self) -> None:
        filesystem = SimulatedFilesystem()
        written(filesystem, self.K, PACK, sync=True)
        assert {content(after, self.K) for after in self.crashes(filesystem)} == {None, PACK}

    def test_unsynced_data_is_torn_in_every_way(self) -> None:
        filesystem = SimulatedFilesystem()
        written(filesystem, self.K, PACK, sync=False)
        filesystem.sync_directory(Path("/"))
        found = [content(after, self.K) or b"" for after in self.crashes(filesystem)]
        assert PACK in found
        assert b"" in found
        sectors = {image[n : n + 512] for image in found for n in range(0, len(image) - 511, 512)}
        assert bytes(512) in sectors
        assert PACK[:512] in sectors
        assert any(any(sector) and sector not in PACK for sector in sectors), "no garbage"
        assert {len(image) for image in found} - {0, len(PACK)}, "never short"

    def test_a_rename_shows_the_old_or_the_new(self) -> None:
        filesystem = SimulatedFilesystem()
        written(filesystem, self.K, b"old", sync=True)
        filesystem.sync_directory(Path("/"))
        written(filesystem, self.J, b"new", sync=True)
        filesystem.rename(self.J, self.K)
        found = {(content(a, self.J), content(a, self.K)) for a in self.crashes(filesystem)}
        assert found == {(None, b"old"), (b"new", b"old"), (None, b"new"), (b"new", b"new")}

    def test_names_go_independently_of_their_order(self) -> None:
        filesystem = SimulatedFilesystem()
        for path in (self.K, self.J):
            written(filesystem, path, b"x", sync=True)
        found = {(content(a, self.K), content(a, self.J)) for a in self.crashes(filesystem)}
        assert found == {(k, j) for k in (None, b"x") for j in (None, b"x")}

    def test_removals_may_be_undone(self) -> None:
        filesystem = SimulatedFilesystem()
        directory = Path("/d")
        filesystem.make_directory(directory)
        written(filesystem, directory / "k", b"x", sync=True)
        filesystem.sync_directory(directory)
        filesystem.sync_directory(Path("/"))
        filesystem.unlink(directory / "k")
        filesystem.remove_directory(directory)
        found = {content(after, directory / "k") for after in self.crashes(filesystem)}
        assert found == {None, b"x"}
        filesystem.sync_directory(Path("/"))
        assert {content(a, directory / "k") for a in self.crashes(filesystem)} == {None}

    def test_links_are_one_file_after_a_crash(self) -> None:
        filesystem = SimulatedFilesystem()
        written(filesystem, self.K, PACK, sync=False)
        filesystem.link(self.K, self.J)
        filesystem.sync_directory(Path("/"))
        for after in self.crashes(filesystem):
            assert content(after, self.K) == content(after, self.J)

    def test_one_seed_is_one_disk(self) -> None:
        filesystem = SimulatedFilesystem()
        written(filesystem, self.K, PACK, sync=False)
        assert content(filesystem.crash(7), self.K) == content(filesystem.crash(7), self.K)

    def test_the_dead_do_nothing(self) -> None:
        filesystem = SimulatedFilesystem()
        filesystem.die_at(2)
        fd = filesystem.open(self.K, CREATE_FLAGS)
        for _ in range(2):
            with pytest.raises(SimulatedCrash):
                filesystem.pwrite(fd, memoryview(b"x"), 0)
        with pytest.raises(SimulatedCrash):
            filesystem.status(self.K)
        assert content(filesystem.restart(), self.K) == b""

    def test_direct_writes_must_be_aligned(self) -> None:
        filesystem = SimulatedFilesystem()
        fd = filesystem.open(self.K, CREATE_FLAGS | os.O_DIRECT)
        with pytest.raises(OSError, match="Invalid"):
            filesystem.pwrite(fd, memoryview(bytes(100)), 0)

    def test_a_full_disk_is_reclaimed(self) -> None:
        filesystem = SimulatedFilesystem(capacity_nbytes=100_000)
        store = LocalStore(ROOT, filesystem)
        store.put("k", memoryview(PACK))
        for _ in range(2):
            with pytest.raises(StoreFullError):
                store.put("big", memoryview(PACK))
        store.put("small", memoryview(bytes(29_000)))
        with pytest.raises(ObjectNotFoundError):
            store.get("big", 1)
