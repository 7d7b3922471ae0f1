"""Whole runs on object stores: saved, restored, inspected, cut off and killed."""

from __future__ import annotations

import itertools
import re
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from crash_oracle import same
from kill_writer import known_state, restored
from memory_store import MemoryStore
from object_urls import address, gs_url, s3_url
from reading_in_place import check_that_only_what_is_asked_for_is_read
from sample_run import STEPS, state_at, write_run
from servers.gcs import Fault, GcsServer
from servers.gcs_requests import Request
from servers.proxy import HttpProxy, Proxy
from servers.s3 import S3Server
from test_kill import check_newest, finish, kill_again_and_again, start
from writers import Writers

from asymcheck import Checkpointer, CostModel, open_checkpoint, open_store
from asymcheck.calibration import check_conditional_puts
from asymcheck.commit import commit_key, committed_steps, publish, retire
from asymcheck.errors import (
    SaveFailedError,
    StepExistsError,
    StoreError,
    StorePermissionError,
    StoreUnavailableError,
)
from asymcheck.retention import collect_orphans
from asymcheck.stores.base import Guarantees

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture(params=["gcs", "s3", "seaweed"])
def url(request: pytest.FixtureRequest) -> str:
    """Of an empty place on each server."""
    server = request.getfixturevalue(f"{request.param}_server")
    return gs_url(server) if request.param == "gcs" else s3_url(server)


class TestRuns:
    def test_what_was_saved_comes_back(self, url: str) -> None:
        write_run(url)
        with Checkpointer(url) as checkpointer:
            assert checkpointer.steps() == list(STEPS)
            for step in STEPS:
                assert same(checkpointer.restore(step), state_at(step))
        with open_checkpoint(url, step=STEPS[1]) as checkpoint:
            weight = state_at(STEPS[1])["params"]["weight"]
            assert np.array_equal(checkpoint["params/weight"][3:5, ::2], weight[3:5, ::2])
            checkpoint.verify()

    def test_only_what_is_asked_for_is_read(self, url: str) -> None:
        check_that_only_what_is_asked_for_is_read(url)

    def test_nothing_is_left_beside_the_steps(self, url: str) -> None:
        write_run(url, max_to_keep=1, max_chain=0)
        store = open_store(url)
        assert collect_orphans(store) == []
        kept = f"data/{STEPS[-1]:016d}-"
        assert [key for key in store.list("data/") if not key.startswith(kept)] == []
        assert store.list("runs/") == []

    def test_the_command_takes_urls(self, url: str, call: Callable[..., tuple[int, str, str]]):
        write_run(url)
        code, out, err = call("ls", url)
        assert (code, err) == (0, "")
        assert all(str(step) in out for step in STEPS)
        for arguments in (
            ("show", url, "--step", STEPS[0]),
            ("verify", url),
            ("diff", url, STEPS[0], STEPS[1], "--json"),
            ("gc", url, "--dry_run"),
            ("stats", url),
        ):
            code, _, err = call(*arguments)
            assert code in (0, 1) if arguments[0] == "diff" else code == 0, err

    def test_the_command_names_what_is_wrong(
        self, s3_server: S3Server, call: Callable[..., tuple[int, str, str]]
    ) -> None:
        missing = s3_url(s3_server).replace(s3_server.bucket, "no-such-bucket")
        code, _, err = call("ls", missing)
        assert code not in (0, 1)
        assert "Create the bucket" in err
        code, _, err = call("ls", s3_url(s3_server, nonsense=1))
        assert code not in (0, 1)
        assert "'nonsense'" in err

    def test_several_writers_share_a_run(self, url: str) -> None:
        state = {"w": np.arange(100_000, dtype=np.float32), "step": 7, "ranks": {}}
        with Writers(url, 3) as writers:
            assert writers.save_state(7, state) == [None] * 3
        with Checkpointer(url) as reader:
            assert same(reader.restore(), state)


class TestLostAnswers:
    """A request was carried out, and its answer never came: TensorStore sends it again."""

    @pytest.mark.parametrize("name", ["commits/", r"\.pack", r"\.manifest", "runs/"])
    def test_a_step_is_committed_once(self, gcs_server: GcsServer, name: str) -> None:
        url = gs_url(gcs_server)
        with Checkpointer(url, cost_model=CostModel()) as checkpointer:
            gcs_server.reset("unanswered", action="insert", name=name)
            for step in (1, 2):
                checkpointer.save(step, known_state(step, 0)).wait()
            gcs_server.reset("unanswered", action="insert", name=name)
            checkpointer.save(3, known_state(3, 0)).wait()
        with Checkpointer(url) as reader:
            assert reader.steps() == [1, 2, 3]
            assert restored(reader.restore()) == (3, 0)

    @pytest.mark.parametrize("spoilt", [0, 1])
    def test_the_trial_of_conditional_puts_copes(
        self, gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch, spoilt: int
    ) -> None:
        store = open_store(gs_url(gcs_server))
        lost = Fault(None, "", re.compile(""), reset="unanswered")
        spoil(gcs_server, monkeypatch, "insert", range(spoilt, spoilt + 1), lost)
        check_conditional_puts(store, "a", 0)
        assert store.list("") == []

    def test_publishing_is_not_mistaken_for_anothers(self, s3_server: S3Server) -> None:
        with Proxy(address(s3_server.url)) as proxy:
            store = open_store(s3_url(s3_server, endpoint=proxy.url))
            proxy.cut("down", after_nbytes=1)
            publish(store, 5, b"the record")
            with pytest.raises(StepExistsError):
                publish(store, 5, b"another")

    def test_a_retired_record_is_out_of_the_way(self, gcs_server: GcsServer) -> None:
        store = open_store(gs_url(gcs_server))
        store.put(commit_key(5), memoryview(b"damaged"))
        gcs_server.reset("unanswered", action="insert", name="damaged/")
        retire(store, 5)
        (key,) = store.list("")
        assert key.startswith("damaged/")
        assert store.get(key, 100) == b"damaged"

    def test_a_writer_that_gives_up_is_heard(self, gcs_server: GcsServer) -> None:
        state = {"w": np.arange(100_000, dtype=np.float32), "ranks": {}}
        with Writers(gs_url(gcs_server), 2) as writers:
            gcs_server.fail("forbidden", action="insert", name=r"w00001-\d+\.pack$", times=None)
            gcs_server.reset("unanswered", action="insert", name=r"\.abort$")
            failed = writers.save_state(7, state)
            assert "writer 1 gave the attempt up" in str(failed[0])
            assert "may not do this" in str(failed[1])
            gcs_server.heal()
            assert writers.save_state(8, state) == [None, None]

    def test_a_commit_that_cannot_be_known_keeps_its_objects(self, gcs_server: GcsServer) -> None:
        """The record stands, but every answer to it is lost: its packs must stay, too."""
        url = gs_url(gcs_server, retries=1)
        with Checkpointer(url, cost_model=CostModel()) as checkpointer:
            checkpointer.save(1, known_state(1, 0)).wait()
            gcs_server.reset("unanswered", action="insert", name="commits/", times=None)
            pending = checkpointer.save(2, known_state(2, 0))
            with pytest.raises(SaveFailedError) as raised:
                pending.wait()
            gcs_server.heal()
            assert isinstance(raised.value.__cause__, StoreUnavailableError)
            checkpointer.save(3, known_state(3, 0)).wait()
        with Checkpointer(url) as reader:
            assert reader.steps() == [1, 2, 3]
            for step in (1, 2, 3):
                assert restored(reader.restore(step)) == (step, 0)


class TestOutages:
    def test_a_step_that_failed_is_invisible_and_the_next_one_is_whole(
        self, s3_server: S3Server
    ) -> None:
        with HttpProxy(address(s3_server.url)) as proxy:
            url = s3_url(s3_server, endpoint=proxy.url, retries=1)
            with Checkpointer(url, cost_model=CostModel()) as checkpointer:
                checkpointer.save(1, known_state(1, 0)).wait()
                proxy.answer(503, times=None)
                with pytest.raises(SaveFailedError, match="503"):
                    checkpointer.save(2, known_state(2, 0)).wait()
                proxy.heal()
                checkpointer.save(3, known_state(3, 0)).wait()
                assert checkpointer.steps() == [1, 3]
        with Checkpointer(s3_url(s3_server)) as reader:
            assert restored(reader.restore()) == (3, 0)
            collect_orphans(open_store(s3_url(s3_server)))
            assert restored(reader.restore(1)) == (1, 0)

    def test_a_refused_listing_deletes_nothing(
        self, gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when credentials expire: what no list names would be collected."""
        write_run(gs_url(gcs_server), steps=tuple(range(1, 9)))
        store = open_store(gs_url(gcs_server))
        before = gcs_server.contents()
        gcs_server.requests.clear()
        assert collect_orphans(store) == []
        listings = len([r for r in gcs_server.requests if r.action == "list"])
        assert listings > 3  # that of data/ has several pages
        refused = Fault(None, "", re.compile(""), "forbidden")
        for allowed in range(listings):
            with monkeypatch.context() as patch:
                spoil(gcs_server, patch, "list", range(allowed, 1000), refused)
                with pytest.raises(StorePermissionError):
                    collect_orphans(store)
            assert gcs_server.contents() == before


def spoil(
    server: GcsServer, patch: pytest.MonkeyPatch, action: str, which: range, fault: Fault
) -> None:
    """Let this happen to those requests for an action, counted from now on, from 0."""
    numbers = itertools.count()

    def next_fault(request: Request) -> Fault | None:
        return fault if request.action == action and next(numbers) in which else None

    patch.setattr(server, "next_fault", next_fault)


class IgnorantStore(MemoryStore):
    """A fake of a server that ignores conditions, in memory: it overwrites and says True."""

    guarantees = Guarantees("one assignment", "none", True, True, False, tried_first=True)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        self.put(key, data)
        return True


class LyingStore(MemoryStore):
    """A fake of a server that overwrites and says that it did not."""

    guarantees = Guarantees("one assignment", "none", True, True, False, tried_first=True)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        there = key in self.objects
        self.put(key, data)
        return not there


class Unconditional(HttpProxy):
    """Passes uploads on without their conditions, as old servers of S3's protocol take them."""

    async def _pass_up(self, client, server, allowance, down) -> None:
        await super()._pass_up(client, _WithoutConditions(server), allowance, down)


class _WithoutConditions:
    def __init__(self, server) -> None:
        self._server = server

    def write(self, data: bytes) -> None:
        self._server.write(data.replace(b"if-none-match: *\r\n", b""))

    def __getattr__(self, name: str) -> object:
        return getattr(self._server, name)


class TestIgnoredConditions:
    @pytest.mark.parametrize("store", [IgnorantStore(), LyingStore()])
    def test_are_found_out(self, store: MemoryStore) -> None:
        with pytest.raises(StoreError, match=r"ignores conditional puts.*Update the server"):
            check_conditional_puts(store, "a", 0)
        assert store.list("") == []

    def test_a_store_that_is_known_is_not_tried(self, store: MemoryStore) -> None:
        check_conditional_puts(store, "a", 0)
        assert store.calls == []

    def test_no_run_begins_on_such_a_server(self, s3_server: S3Server) -> None:
        with Unconditional(address(s3_server.url)) as proxy:
            url = s3_url(s3_server, endpoint=proxy.url)
            store = open_store(url)
            assert store.put_if_absent("k", memoryview(b"first"))
            assert store.put_if_absent("k", memoryview(b"second"))  # it really ignores them
            with (
                Checkpointer(url) as checkpointer,
                pytest.raises(StoreError, match="ignores conditional puts"),
            ):
                checkpointer.save(1, known_state(1, 0))
            with Checkpointer(url, on_error="warn") as checkpointer:
                assert not checkpointer.save(1, known_state(1, 0)).done()
            assert committed_steps(store) == []
            assert [key for key in store.list("") if key != "k"] == []

    def test_cost_five_requests_once(self, s3_server: S3Server) -> None:
        with HttpProxy(address(s3_server.url)) as proxy:
            url = s3_url(s3_server, endpoint=proxy.url)
            with Checkpointer(url, cost_model=CostModel()) as checkpointer:
                for step in (1, 2, 3):
                    checkpointer.save(step, known_state(step, 0)).wait()
            assert len([request for request in proxy.requests if "probe" in request]) == 5


@pytest.fixture
def slow_s3(s3_server: S3Server) -> Iterator[str]:
    """A run's URL; uploads take so long that a kill mostly comes in the middle of some."""
    with Proxy(address(s3_server.url), nbytes_per_s=4e6) as proxy:
        yield s3_url(s3_server, endpoint=proxy.url)


class TestKills:
    @pytest.mark.parametrize("strategy", ["delta", "asymcheck"])
    def test_killed_at_any_moment(self, slow_s3: str, strategy: str) -> None:
        acknowledged = kill_again_and_again(slow_s3, seed=0, kills=3, strategy=strategy)
        finish(slow_s3, acknowledged, 3, strategy)

    @pytest.mark.parametrize("put", [r"data/\S+\.pack", r"data/\S+\.manifest", "commits/"])
    def test_killed_in_the_middle_of_a_put(self, s3_server: S3Server, put: str) -> None:
        """The upload has begun and its end never comes: as if it had never been."""
        url = s3_url(s3_server)
        with Checkpointer(url, cost_model=CostModel()) as checkpointer:
            checkpointer.save(1, known_state(1, 0)).wait()
        with Stuck(address(s3_server.url), put) as proxy:
            process = start(s3_url(s3_server, endpoint=proxy.url), 0, "delta")
            assert proxy.arrived.wait(60)
            process.kill()
            out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        assert "restored 1 0" in out
        assert "durable" not in out
        check_newest(url, {1: 0})
        assert committed_steps(open_store(url)) == [1]
        finish(url, {1: 0}, 1, "delta")


class Stuck(HttpProxy):
    """Passes the head of an upload on whose name matches, and nothing of its body."""

    def __init__(self, target: tuple[str, int], put: str) -> None:
        super().__init__(target)
        self.arrived = threading.Event()
        self._put = re.compile(rf"PUT /\S*{put}".encode())

    async def _pass_up(self, client, server, allowance, down) -> None:
        await super()._pass_up(client, _Stuck(server, self._put, self.arrived), allowance, down)


class _Stuck:
    def __init__(self, server, put: re.Pattern[bytes], arrived: threading.Event) -> None:
        self._server = server
        self._put = put
        self._arrived = arrived
        self._stuck = False

    def write(self, data: bytes) -> None:
        if self._stuck:
            return
        self._server.write(data)
        if self._put.match(data):
            self._stuck = True
            self._arrived.set()

    def __getattr__(self, name: str) -> object:
        return getattr(self._server, name)
