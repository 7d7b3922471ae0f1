"""`gs://` on Google's own test server, which is not on PyPI: run by hand.

git clone https://github.com/googleapis/storage-testbench
pip install ./storage-testbench         # into an environment of its own
python storage-testbench/testbench_run.py 127.0.0.1 9000 10
STORAGE_TESTBENCH_URL=http://127.0.0.1:9000 pytest -m long tests/test_gcs_testbench.py
"""

from __future__ import annotations

import itertools
import json
import os
import time
import urllib.request
from collections.abc import Callable

import pytest
from crash_oracle import same
from sample_run import STEPS, state_at, write_run
from test_kill import finish, kill_again_and_again

from asymcheck import Checkpointer
from asymcheck.stores import Store, open_store
from asymcheck.testing import StoreContract

pytestmark = pytest.mark.long

_URL = os.environ.get("STORAGE_TESTBENCH_URL", "")
_numbers = itertools.count(int(time.time()))


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a run in a new bucket."""
    if not _URL:
        pytest.skip("STORAGE_TESTBENCH_URL does not say where Google's storage-testbench runs")
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", _URL)
    bucket = f"bucket-{next(_numbers)}"
    request = urllib.request.Request(
        f"{_URL}/storage/v1/b?project=tests",
        json.dumps({"name": bucket}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=60).close()
    return f"gs://{bucket}/runs/a"


class TestContract(StoreContract):
    large_nbytes = (8 << 20) + 1

    @pytest.fixture
    def open_store(self, url: str) -> Callable[[], Store]:
        return lambda: open_store(url)


def test_what_was_saved_comes_back(url: str) -> None:
    write_run(url)
    with Checkpointer(url) as checkpointer:
        assert checkpointer.steps() == list(STEPS)
        for step in STEPS:
            assert same(checkpointer.restore(step), state_at(step))


@pytest.mark.parametrize("strategy", ["delta", "asymcheck"])
def test_killed_at_any_moment(url: str, strategy: str) -> None:
    acknowledged = kill_again_and_again(url, seed=0, kills=3, strategy=strategy)
    finish(url, acknowledged, 3, strategy)
