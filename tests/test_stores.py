import errno
import mmap
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from simulated_filesystem import SimulatedFilesystem

from asymcheck.errors import (
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    StorePermissionError,
)
from asymcheck.stores import LocalStore, Store, open_store, process_identity
from asymcheck.stores.direct_io import ALIGNMENT
from asymcheck.stores.filesystem import Filesystem
from asymcheck.testing import StoreContract


def aligned(nbytes: int, shift: int = 0, seed: int = 0) -> memoryview:
    """Random bytes that start `shift` bytes after a page boundary."""
    page_aligned = np.frombuffer(mmap.mmap(-1, nbytes + ALIGNMENT), np.uint8)
    array = page_aligned[shift : shift + nbytes]
    array[:] = np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)
    return array.data


def temporaries(root: Path) -> list[Path]:
    return list((root / ".tmp").iterdir()) if (root / ".tmp").exists() else []


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class RecordingFilesystem(Filesystem):
    """Records the flags of opens; refuses or shortens what it is told to."""

    def __init__(self, *, refuse_direct: str = "", max_call_nbytes: int = 1 << 40) -> None:
        self.flags: list[int] = []
        self._refuse_direct = refuse_direct
        self._max_call_nbytes = max_call_nbytes
        self._direct_fds: set[int] = set()

    def open(self, path: Path, flags: int) -> int:
        self.flags.append(flags)
        fd = super().open(path, flags & ~os.O_DIRECT if self._refuse_direct else flags)
        if flags & os.O_DIRECT and self._refuse_direct == "open":
            os.close(fd)  # the file exists nevertheless, as on Linux
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        if flags & os.O_DIRECT:
            self._direct_fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self._direct_fds.discard(fd)
        super().close(fd)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if fd in self._direct_fds and self._refuse_direct == "write":
            raise OSError(errno.EINVAL, "another alignment, please")
        return super().pwrite(fd, data[: self._max_call_nbytes], offset)

    def pread(self, fd: int, out: memoryview, offset: int) -> int:
        return super().pread(fd, out[: self._max_call_nbytes], offset)

    @property
    def used_direct(self) -> bool:
        return any(flags & os.O_DIRECT for flags in self.flags)


class FaultyFilesystem(Filesystem):
    """Raises an error in one kind of call, as often as told."""

    def __init__(self, call: str, code: int, times: int = 1 << 30) -> None:
        self.code = code
        self.times = times
        method = getattr(self, call)

        def faulty(*args: object) -> object:
            if self.times > 0:
                self.times -= 1
                raise OSError(self.code, os.strerror(self.code))
            return method(*args)

        setattr(self, call, faulty)


class LocalStoreContract(StoreContract):
    def filesystem(self) -> Filesystem:
        return Filesystem()

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: LocalStore(tmp_path / "runs" / "a", self.filesystem())

    @pytest.fixture(autouse=True)
    def leaves_nothing_behind(self, tmp_path: Path) -> Iterator[None]:
        descriptors = open_descriptors()
        yield
        assert temporaries(tmp_path / "runs" / "a") == []
        assert open_descriptors() == descriptors


class TestLocalStoreWithAlignedData(LocalStoreContract):
    def payload(self, nbytes: int, seed: int = 0) -> memoryview:
        return aligned(nbytes, 0, seed)


class TestLocalStoreWithUnalignedData(LocalStoreContract):
    def payload(self, nbytes: int, seed: int = 0) -> memoryview:
        return aligned(nbytes, 1, seed)


class TestLocalStoreWithoutDirectOpen(LocalStoreContract):
    def filesystem(self) -> Filesystem:
        return RecordingFilesystem(refuse_direct="open")


class TestLocalStoreWithoutDirectWrite(LocalStoreContract):
    def filesystem(self) -> Filesystem:
        return RecordingFilesystem(refuse_direct="write")


class TestLocalStoreWithShortCalls(LocalStoreContract):
    def filesystem(self) -> Filesystem:
        return RecordingFilesystem(max_call_nbytes=1 << 16)

    def payload(self, nbytes: int, seed: int = 0) -> memoryview:
        return aligned(nbytes, 0, seed)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
class TestLocalStoreOnSimulatedFilesystem(StoreContract):
    large_nbytes = (1 << 20) + 1

    @pytest.fixture
    def open_store(self, shift: int) -> Callable[[], Store]:
        self.shift = shift
        filesystem = SimulatedFilesystem(direct=True)
        return lambda: LocalStore("/runs/a", filesystem)

    def payload(self, nbytes: int, seed: int = 0) -> memoryview:
        return aligned(nbytes, self.shift, seed)


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: open_store(f"memory://{tmp_path.name}")


class TestTensorStoreFile(StoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: open_store(f"tensorstore+file://{tmp_path}/a b")


class TestOpenStore:
    def test_paths_and_urls_name_the_same_place(self, tmp_path: Path) -> None:
        root = tmp_path / "a b"
        open_store(root).put("k", memoryview(b"v"))
        quoted = str(root).replace(" ", "%20")
        names = [str(root), f"file://{root}", f"FILE://{quoted}", f"file://localhost{root}"]
        for name in [*names, open_store(root).url, f"tensorstore+file://{quoted}"]:
            assert open_store(name).get("k", 1) == b"v", name

    def test_a_relative_path_stays_where_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        store = open_store("runs/a")
        monkeypatch.chdir("/")
        store.put("k", memoryview(b"v"))
        assert (tmp_path / "runs/a/k").read_bytes() == b"v"

    @pytest.mark.parametrize(
        "url", ["", "s3://", "memory://", "file://", "file://host/a", "file://rel"]
    )
    def test_refuses_what_it_cannot_open(self, url: str) -> None:
        with pytest.raises(StoreError):
            open_store(url)

    def test_lists_the_known_schemes(self) -> None:
        with pytest.raises(StoreError, match=r"'ftp'.*file://, memory://, .*gs://, s3://"):
            open_store("ftp://name/a")

    def test_memory_stores_share_by_name_only(self, tmp_path: Path) -> None:
        one, same, other = (
            open_store(f"memory://{name}{tmp_path.name}") for name in ("a", "a", "b")
        )
        one.put("k", memoryview(b"v"))
        assert same.get("k", 1) == b"v"
        assert other.list("") == []

    @pytest.mark.parametrize("scheme", ["file", "tensorstore+file"])
    def test_reading_creates_nothing(self, tmp_path: Path, scheme: str) -> None:
        store = open_store(f"{scheme}://{tmp_path}/missing/a")
        assert store.list("") == []
        assert not store.has_length("k", 0)
        store.delete("k")
        with pytest.raises(ObjectNotFoundError, match="missing/a"):
            store.get("k", 1)
        assert list(tmp_path.iterdir()) == []

    def test_local_stores_need_no_tensorstore(self, tmp_path: Path) -> None:
        script = f"""
            import sys
            from asymcheck.stores import open_store
            open_store({str(tmp_path)!r}).put("k", memoryview(b"v"))
            assert "tensorstore" not in sys.modules
            open_store("memory://a")
            assert "tensorstore" in sys.modules
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


class TestDirectWrites:
    @pytest.mark.parametrize("shift", [0, 1, 2048])
    @pytest.mark.parametrize("tail", [0, 1, 4095])
    @pytest.mark.parametrize("body", [1 << 16, (1 << 20) - 4096, 1 << 20, 3 << 20])
    def test_files_have_exactly_the_data(
        self, tmp_path: Path, body: int, tail: int, shift: int
    ) -> None:
        filesystem = RecordingFilesystem()
        data = aligned(body + tail, shift)
        LocalStore(tmp_path, filesystem).put("k", data)
        assert filesystem.used_direct
        assert (tmp_path / "k").read_bytes() == data

    def test_small_objects_are_not_direct(self, tmp_path: Path) -> None:
        filesystem = RecordingFilesystem()
        LocalStore(tmp_path, filesystem).put("k", aligned(65535))
        assert not filesystem.used_direct

    @pytest.mark.parametrize("refuse", ["open", "write"])
    def test_a_refusal_is_asked_for_once(self, tmp_path: Path, refuse: str) -> None:
        filesystem = RecordingFilesystem(refuse_direct=refuse)
        store = LocalStore(tmp_path, filesystem)
        data = aligned(100_000)
        store.put("a", data)
        store.put("b", data)
        assert [bool(flags & os.O_DIRECT) for flags in filesystem.flags] == [True, False, False]
        assert store.get("a", 100_000) == store.get("b", 100_000) == bytes(data)
        assert temporaries(tmp_path) == []


class TestHostileDirectories:
    @pytest.fixture
    def outside(self, tmp_path: Path) -> Path:
        outside = tmp_path / "outside"
        (outside / "a").mkdir(parents=True)
        (outside / "secret").write_bytes(b"secret")
        return outside

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "root"
        root.mkdir()
        return root

    def test_linked_objects_are_refused(self, root: Path, outside: Path) -> None:
        (root / "k").symlink_to(outside / "secret")
        store = LocalStore(root)
        for attempt in (
            lambda: store.get("k", 100),
            lambda: store.get_range("k", 0, memoryview(bytearray(1))),
            lambda: store.has_length("k", 6),
        ):
            with pytest.raises(StoreError, match="symlink") as raised:
                attempt()
            assert not isinstance(raised.value, ObjectNotFoundError)
        assert store.list("") == []
        assert store.put_if_absent("k", memoryview(b"x")) is False
        store.put("k", memoryview(b"mine"))
        assert (outside / "secret").read_bytes() == b"secret"
        assert store.get("k", 4) == b"mine"

    def test_a_link_that_comes_between_is_not_followed(self, root: Path, outside: Path) -> None:
        class Swapping(Filesystem):
            def open(self, path: Path, flags: int) -> int:
                path.unlink()
                path.symlink_to(outside / "secret")
                return super().open(path, flags)

        (root / "k").write_bytes(b"harmless")
        with pytest.raises(StoreError, match="Symbolic links"):
            LocalStore(root, Swapping()).get("k", 100)

    def test_linked_directories_are_refused(self, root: Path, outside: Path) -> None:
        (root / "steps").mkdir()
        (root / "steps" / "1").symlink_to(outside)
        store = LocalStore(root)
        for attempt in (
            lambda: store.get("steps/1/secret", 100),
            lambda: store.has_length("steps/1/secret", 6),
            lambda: store.put("steps/1/new", memoryview(b"x")),
            lambda: store.put("steps/1/a/new", memoryview(b"x")),
            lambda: store.put_if_absent("steps/1/new", memoryview(b"x")),
            lambda: store.list("steps/1/"),
            lambda: store.delete("steps/1/secret"),
        ):
            with pytest.raises(StoreError, match="not a directory"):
                attempt()
        assert store.list("") == []
        assert sorted(path.name for path in outside.rglob("*")) == ["a", "secret"]
        assert temporaries(root) == []

    def test_linked_temporaries_are_refused(self, root: Path, outside: Path) -> None:
        (root / ".tmp").symlink_to(outside)
        store = LocalStore(root)
        with pytest.raises(StoreError, match="not a directory"):
            store.put("k", memoryview(b"x"))
        with pytest.raises(StoreError, match="not a directory"):
            store.clear_stale_temporaries()
        assert sorted(path.name for path in outside.rglob("*")) == ["a", "secret"]

    def test_the_root_itself_may_be_a_link(self, tmp_path: Path, root: Path) -> None:
        (tmp_path / "link").symlink_to(root)
        LocalStore(tmp_path / "link").put("k", memoryview(b"v"))
        assert LocalStore(root).get("k", 1) == b"v"

    def test_pipes_are_refused_and_do_not_block(self, root: Path) -> None:
        os.mkfifo(root / "k")
        store = LocalStore(root)
        with pytest.raises(StoreError, match="not a regular file"):
            store.get("k", 1)
        assert store.list("") == []

    def test_a_file_as_root_is_refused(self, root: Path) -> None:
        (root / "file").write_bytes(b"x")
        store = LocalStore(root / "file")
        for attempt in (
            lambda: store.list(""),
            lambda: store.get("k", 1),
            lambda: store.put("k", memoryview(b"x")),
        ):
            with pytest.raises(StoreError, match=r"(?i)not a directory") as raised:
                attempt()
            assert type(raised.value) is StoreError

    def test_an_object_is_no_directory(self, root: Path) -> None:
        store = LocalStore(root)
        store.put("a", memoryview(b"x"))
        with pytest.raises(StoreError, match="Not a directory"):
            store.put("a/b", memoryview(b"x"))
        store.put("c/d", memoryview(b"x"))
        with pytest.raises(StoreError, match="Is a directory"):
            store.put("c", memoryview(b"x"))
        assert store.list("") == ["a", "c/d"]
        assert store.list("a/") == []
        assert temporaries(root) == []

    def test_deep_and_foreign_names_are_passed_over(self, root: Path) -> None:
        deep = root
        for _ in range(300):
            deep = deep / "d"
        deep.mkdir(parents=True)
        (deep / "k").write_bytes(b"")
        for name in ("a b", "é", ".hidden", "-x", "good"):
            (root / name).write_bytes(b"")
        assert LocalStore(root).list("") == ["good"]


class TestTemporaries:
    def test_files_of_dead_processes_are_removed(self, tmp_path: Path) -> None:
        script = f"""
            import os, signal
            from asymcheck.stores import LocalStore
            from asymcheck.stores.filesystem import Filesystem
            class Killed(Filesystem):
                def sync(self, fd): os.kill(os.getpid(), signal.SIGKILL)
            LocalStore({str(tmp_path)!r}, Killed()).put("k", memoryview(bytes(100_000)))
        """
        run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
        assert run.returncode == -9
        assert len(temporaries(tmp_path)) == 1
        store = LocalStore(tmp_path)
        assert store.list("") == []
        assert store.clear_stale_temporaries() == 1
        assert temporaries(tmp_path) == []

    def test_files_of_living_processes_are_kept(self, tmp_path: Path) -> None:
        class Clearing(Filesystem):
            def rename(self, source: Path, target: Path) -> None:
                assert LocalStore(tmp_path).clear_stale_temporaries() == 0
                super().rename(source, target)

        store = LocalStore(tmp_path, Clearing())
        store.put("k", memoryview(b"v"))
        assert store.get("k", 1) == b"v"

    def test_files_of_other_machines_are_kept_for_an_hour(self, tmp_path: Path) -> None:
        LocalStore(tmp_path).put("k", memoryview(b"v"))
        young, old = (tmp_path / ".tmp" / f".0123-45-{name}.00" for name in ("67", "89"))
        for path in (young, old):
            path.write_bytes(b"x")
        an_hour_ago = path.stat().st_mtime - 3700
        os.utime(old, (an_hour_ago, an_hour_ago))
        assert LocalStore(tmp_path).clear_stale_temporaries() == 1
        assert temporaries(tmp_path) == [young]

    def test_a_writer_mistaken_for_dead_writes_again(self, tmp_path: Path) -> None:
        class Clearing(Filesystem):
            cleared = 0

            def rename(self, source: Path, target: Path) -> None:
                if not self.cleared:
                    self.cleared = 1
                    source.unlink()
                super().rename(source, target)

        store = LocalStore(tmp_path, Clearing())
        store.put("k", memoryview(b"v"))
        assert store.get("k", 1) == b"v"

    def test_nothing_to_clear_where_nothing_is(self, tmp_path: Path) -> None:
        assert LocalStore(tmp_path / "missing").clear_stale_temporaries() == 0
        assert list(tmp_path.iterdir()) == []

    def test_process_tokens(self) -> None:
        token = process_identity.token()
        space, pid, start = token.split("-")
        assert int(pid) == os.getpid()
        assert process_identity.is_gone(token) is False
        assert process_identity.is_gone(f"{space}-{pid}-{int(start) + 1}") is True
        assert process_identity.is_gone(f"0{space[1:]}x-{pid}-{start}") is None
        assert process_identity.is_gone("nonsense") is None
        child = subprocess.run(
            [sys.executable, "-c", "from asymcheck.stores import process_identity as p;"
             "print(p.token())"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert process_identity.is_gone(child.stdout.strip()) is True


class TestAdoption:
    def test_objects_live_as_long_as_any_store_has_them(self, tmp_path: Path) -> None:
        first, second = LocalStore(tmp_path / "1"), LocalStore(tmp_path / "2")
        for key in ("data/x/a", "data/x/b", "commits/1", "other"):
            first.put(key, memoryview(key.encode()))
        second.put("commits/1", memoryview(b"own"))
        second.adopt(tmp_path / "1", ["data/x/a", "data/x/b", "commits/1"])
        first.delete(*first.list(""))
        assert second.list("") == ["commits/1", "data/x/a", "data/x/b"]
        assert second.get("data/x/b", 100) == b"data/x/b"
        assert second.get("commits/1", 100) == b"own"

    def test_what_is_missing_or_cannot_be_linked_is_an_error(self, tmp_path: Path) -> None:
        first = LocalStore(tmp_path / "1")
        first.put("a/b", memoryview(b"x"))
        with pytest.raises(StoreError, match="No such file"):
            LocalStore(tmp_path / "2").adopt(tmp_path / "1", ["a/c"])
        without_links = LocalStore(tmp_path / "3", FaultyFilesystem("link", errno.EPERM))
        with pytest.raises(StorePermissionError, match="cannot link"):
            without_links.adopt(tmp_path / "1", ["a/b"])
        with pytest.raises(StoreError, match="relative path"):
            LocalStore(tmp_path / "2").adopt(tmp_path / "1", ["../1/a/b"])

    def test_names_are_durable_on_return(self) -> None:
        filesystem = SimulatedFilesystem()
        LocalStore("/1", filesystem).put("a/b", memoryview(b"x"))
        LocalStore("/2", filesystem).adopt(Path("/1"), ["a/b"])
        for seed in range(20):
            assert LocalStore("/2", filesystem.crash(seed)).get("a/b", 1) == b"x"


class TestRaces:
    def test_put_survives_the_removal_of_its_directory(self, tmp_path: Path) -> None:
        class Racing(Filesystem):
            races = 3

            def rename(self, source: Path, target: Path) -> None:
                if self.races:
                    self.races -= 1
                    target.parent.rmdir()
                super().rename(source, target)

        store = LocalStore(tmp_path, Racing())
        store.put("steps/1/k", memoryview(b"v"))
        assert store.get("steps/1/k", 1) == b"v"
        assert temporaries(tmp_path) == []

    def test_put_gives_up_in_the_end(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path, FaultyFilesystem("rename", errno.ENOENT))
        with pytest.raises(StoreError, match="No such file"):
            store.put("k", memoryview(b"v"))
        assert temporaries(tmp_path) == []

    def test_put_and_delete_in_one_directory(self, tmp_path: Path) -> None:
        failures: list[BaseException] = []

        def use(writer: int) -> None:
            store = LocalStore(tmp_path)
            try:
                for round in range(100):
                    store.put(f"a/b/{writer}", memoryview(b"%d" % round))
                    assert store.get(f"a/b/{writer}", 10) == b"%d" % round
                    store.delete(f"a/b/{writer}")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(writer,)) for writer in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert [path.name for path in tmp_path.iterdir()] == [".tmp"]

    def test_one_winner_among_processes(self, tmp_path: Path) -> None:
        script = """
            import sys
            from asymcheck.stores import LocalStore
            store = LocalStore(sys.argv[1])
            print("ready", flush=True)
            sys.stdin.readline()
            for n in range(50):
                print(int(store.put_if_absent(f"commits/{n}", memoryview(sys.argv[2].encode()))))
        """
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in "ab"
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        won = [process.communicate()[0].split() for process in processes]
        store = LocalStore(tmp_path)
        for n, (a, b) in enumerate(zip(*won, strict=True)):
            assert {a, b} == {"0", "1"}
            assert store.get(f"commits/{n}", 1) == (b"a" if a == "1" else b"b")


class TestFailures:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no right to mount a small tmpfs: {mounted.stderr.strip()}")
        yield disk
        subprocess.run(["umount", str(disk)], check=True)

    @pytest.mark.parametrize("scheme", ["file", "tensorstore+file"])
    def test_a_full_disk(self, small_disk: Path, scheme: str) -> None:
        store = open_store(f"{scheme}://{small_disk}/run")
        store.put("good", aligned(300_000))
        for write in (store.put, store.put_if_absent):
            with pytest.raises(StoreFullError) as raised:
                write("big", aligned(2_000_000))
            assert raised.value.object == "big"
        assert store.get("good", 300_000) == bytes(aligned(300_000))
        assert store.list("") == ["good"]

    def test_a_full_disk_is_reclaimed(self, small_disk: Path) -> None:
        store = LocalStore(small_disk / "run")
        store.put("good", aligned(300_000))
        free = os.statvfs(small_disk).f_bfree
        for _ in range(3):
            with pytest.raises(StoreFullError, match="Free space"):
                store.put("big", aligned(2_000_000))
        assert os.statvfs(small_disk).f_bfree == free
        assert temporaries(small_disk / "run") == []
        store.put("fits", aligned(400_000))

    def test_a_read_only_disk(self, small_disk: Path) -> None:
        store = LocalStore(small_disk / "run")
        store.put("good", memoryview(b"v"))
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        for change in (
            lambda: store.put("a", memoryview(b"x")),
            lambda: store.put_if_absent("a", memoryview(b"x")),
            lambda: store.delete("good"),
            lambda: LocalStore(small_disk / "new").put("a", memoryview(b"x")),
        ):
            with pytest.raises(StorePermissionError, match="read-only"):
                change()
        assert store.get("good", 1) == b"v"

    def test_a_limit_on_file_lengths(self, tmp_path: Path) -> None:
        script = f"""
            import resource
            from asymcheck.errors import StoreFullError
            from asymcheck.stores import LocalStore
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            store = LocalStore({str(tmp_path)!r})
            store.put("good", memoryview(bytes(90_000)))
            for nbytes in (120_000, 5_000_000):
                try:
                    store.put("big", memoryview(bytes(nbytes)))
                except StoreFullError as error:
                    assert "ulimit" in str(error)
                else:
                    raise SystemExit("no error")
            assert store.list("") == ["good"]
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
        assert temporaries(tmp_path) == []

    @pytest.mark.parametrize("scheme", ["file", "tensorstore+file"])
    def test_missing_rights(self, scheme: str) -> None:
        script = """
            import os, sys
            from asymcheck.errors import StorePermissionError
            from asymcheck.stores import open_store
            store = open_store(sys.argv[1])
            store.get("readable", 1)
            if os.getuid() == 0:
                os.setuid(65534)
            def refused(call, *args):
                try:
                    call(*args)
                except StorePermissionError as error:
                    return error
                raise SystemExit(f"not refused: {call}")
            assert store.get("readable", 1) == b"v"
            refused(store.put, "a", memoryview(b"x"))
            refused(store.put, "sub/a", memoryview(b"x"))
            refused(store.put_if_absent, "a", memoryview(b"x"))
            refused(store.get, "secret", 1)
            refused(store.delete, "readable")
        """
        with tempfile.TemporaryDirectory() as parent:
            root = Path(parent) / "root"
            root.mkdir()
            for name in ("readable", "secret"):
                (root / name).write_bytes(b"v")
            (root / "secret").chmod(0)
            root.chmod(0o555)
            Path(parent).chmod(0o755)
            url = f"{scheme}://{root}"
            subprocess.run([sys.executable, "-c", textwrap.dedent(script), url], check=True)
            root.chmod(0o755)

    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            (errno.ENOSPC, StoreFullError),
            (errno.EDQUOT, StoreFullError),
            (errno.EACCES, StorePermissionError),
            (errno.EROFS, StorePermissionError),
            (errno.EIO, StoreError),
            (errno.ESTALE, StoreError),
        ],
    )
    @pytest.mark.parametrize(
        "call", ["open", "pwrite", "truncate", "sync", "rename", "link", "make_directory"]
    )
    def test_errors_of_writes(
        self, tmp_path: Path, call: str, code: int, kind: type[StoreError]
    ) -> None:
        filesystem = FaultyFilesystem(call, code)
        store = LocalStore(tmp_path / "run", filesystem)
        write = store.put_if_absent if call == "link" else store.put
        descriptors = open_descriptors()
        with pytest.raises(kind) as raised:
            write("steps/1/k", aligned(100_001))
        assert type(raised.value) is kind
        assert raised.value.object == "steps/1/k"
        assert os.strerror(code) in str(raised.value)
        assert open_descriptors() == descriptors
        assert temporaries(tmp_path / "run") == []
        filesystem.times = 0
        assert store.list("") == []
        write("steps/1/k", aligned(100_001))
        assert store.get("steps/1/k", 100_001) == bytes(aligned(100_001))

    @pytest.mark.parametrize("call", ["status", "open", "pread"])
    def test_errors_of_reads(self, tmp_path: Path, call: str) -> None:
        LocalStore(tmp_path).put("k", memoryview(b"v"))
        store = LocalStore(tmp_path, FaultyFilesystem(call, errno.EIO, times=1))
        descriptors = open_descriptors()
        with pytest.raises(StoreError, match="kernel's log") as raised:
            store.get("k", 1)
        assert type(raised.value) is StoreError
        assert open_descriptors() == descriptors
        assert store.get("k", 1) == b"v"

    def test_a_failed_sync_of_a_new_directory_is_no_success(self, tmp_path: Path) -> None:
        filesystem = FaultyFilesystem("sync_directory", errno.EACCES)
        store = LocalStore(tmp_path / "run", filesystem)
        with pytest.raises(StorePermissionError):
            store.put("k", memoryview(b"v"))
        assert store.list("") == []

    def test_an_object_cut_while_it_is_read(self, tmp_path: Path) -> None:
        class Cutting(Filesystem):
            def open(self, path: Path, flags: int) -> int:
                os.truncate(path, 3)
                return super().open(path, flags)

        LocalStore(tmp_path).put("k", memoryview(b"0123456789"))
        with pytest.raises(StoreError, match="ends before the 10 bytes") as raised:
            LocalStore(tmp_path, Cutting()).get("k", 10)
        assert raised.value.found == 3

    def test_new_files_follow_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            LocalStore(tmp_path).put("a/b", memoryview(b"v"))
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o640
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750


class TestKeyValueStore:
    @pytest.mark.parametrize("write", ["put", "put_if_absent"])
    def test_a_stale_lock_publishes_no_wrong_length(self, tmp_path: Path, write: str) -> None:
        (tmp_path / "k.__lock").write_bytes(b"x" * 100)
        store = open_store(f"tensorstore+file://{tmp_path}")
        with pytest.raises(StoreError, match="another length") as raised:
            getattr(store, write)("k", memoryview(b"short"))
        assert raised.value.object == "k"
        assert "k.__lock" in str(raised.value)
        assert store.list("") == []
        getattr(store, write)("k", memoryview(b"short"))
        assert store.get("k", 100) == b"short"

    def test_names_that_are_no_keys_are_passed_over(self, tmp_path: Path) -> None:
        LocalStore(tmp_path).put("good", memoryview(b"v"))
        for name in ("a b", ".hidden"):
            (tmp_path / name).write_bytes(b"")
        assert open_store(f"tensorstore+file://{tmp_path}").list("") == ["good"]

    def test_names_its_place_in_errors(self) -> None:
        store = open_store("memory://name")
        with pytest.raises(ObjectNotFoundError, match="memory://name"):
            store.get("k", 1)
