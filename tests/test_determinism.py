"""I7: the same states, schedule and decisions give the same packs, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_store import MemoryStore
from states import drifted, training_state
from test_snapshot import WINDOWS
from writers import Writers, split_view

from asymcheck import Always, AsymCheck, AsymCheckS, Checkpointer, CostModel, Never
from asymcheck.state import numpy_view

POLICIES = [Never(), Always("plane"), Always("delta"), Always("topk"), Always("zstd")]


def packs_of(
    policy: Any, threads: int, *, windows: int = 0, batched: bool = True
) -> dict[str, str]:
    """SHA-256 of every pack of four steps; `windows` of which opened, the rest at the barrier."""
    store = MemoryStore()
    kind = AsymCheck if batched else AsymCheckS
    state = training_state(0, 60_000)
    with Checkpointer(
        store,
        strategy=kind(policy=policy),
        encode_threads=threads,
        cost_model=CostModel(),
        max_host_bytes=4 << 20,
        max_chain=10,
        run_id="same",
    ) as checkpointer:
        for step in range(4):
            capture = checkpointer.begin(step, numpy_view(state), windows=WINDOWS)
            for ordinal in range(windows):
                capture.enter_window(ordinal)
                capture.leave_window()
            capture.finish()
            state = drifted(state, step)
    return {key: hashlib.sha256(store.objects[key]).hexdigest() for key in store.keys(".pack")}


@pytest.fixture(autouse=True)
def constant_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions and the size of packs follow what was measured: let nothing be learned."""
    for name in ("observe", "observe_write", "observe_ratio"):
        monkeypatch.setattr(CostModel, name, lambda *args, **more: None)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_threads_do_not_matter(policy: Any, batched: bool) -> None:
    one = packs_of(policy, 1, batched=batched)
    assert len(one) >= 4
    assert packs_of(policy, 4, batched=batched) == one
    assert packs_of(policy, 4, batched=batched, windows=4) == one


def test_other_states_give_other_packs() -> None:
    store_a, store_b = MemoryStore(), MemoryStore()
    for store, seed in ((store_a, 0), (store_b, 1)):
        with Checkpointer(store, run_id="same", cost_model=CostModel()) as checkpointer:
            checkpointer.save(0, training_state(seed))
    assert [store_a.objects[k] for k in store_a.keys(".pack")] != [
        store_b.objects[k] for k in store_b.keys(".pack")
    ]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import hashlib, json
import numpy as np
from asymcheck import Always, AsymCheck, Checkpointer, CostModel
from asymcheck.codecs import kernels
from memory_store import MemoryStore
from states import drifted, training_state

result = {"kernels": type(kernels.kernels()).__name__}
for name in ("observe", "observe_write", "observe_ratio"):
    setattr(CostModel, name, lambda *args, **more: None)
for codec in ("plane", "delta", "topk"):
    store = MemoryStore()
    state = training_state(0, 60_000)
    strategy = AsymCheck(policy=Always(codec))
    with Checkpointer(store, strategy=strategy, cost_model=CostModel(), run_id="same") as c:
        for step in range(3):
            c.save(step, state).wait()
            state = drifted(state, step)
    for key in store.keys(".pack"):
        result[codec + key] = hashlib.sha256(store.objects[key]).hexdigest()
print(json.dumps(result))
"""


def in_another_process(**environment: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout)


def test_numba_does_not_matter() -> None:
    pytest.importorskip("numba")
    compiled = in_another_process()
    plain = in_another_process(ASYMCHECK_NUMBA="0", PYTHONHASHSEED="77")
    assert (compiled.pop("kernels"), plain.pop("kernels")) == ("NumbaKernels", "NumpyKernels")
    assert compiled == plain
    assert len(plain) >= 9


def test_the_number_of_writers_does_not_matter_to_what_is_restored() -> None:
    """Written by N, restored at M: the same state, and each writer's packs are reproducible."""
    state = {"params": {"w": np.random.default_rng(0).random((100, 7))}, "step": 3}
    digests = []
    for writers in (1, 2, 3, 2):
        store = MemoryStore()
        with Writers(store, writers, cost_model=CostModel(), strategy="asymcheck-naive") as all_of:
            view = {**state, "ranks": {}}
            assert (
                all_of.save(0, lambda i, n=writers, v=view: split_view(v, i, n)) == [None] * writers
            )
        digests.append([store.objects[key] for key in store.keys(".pack")])
        restored = Checkpointer(store).restore()
        assert np.array_equal(restored["params"]["w"], state["params"]["w"])
        assert restored["step"] == 3
    assert digests[1] == digests[3]
    assert b"".join(digests[0]) == b"".join(digests[1]) == b"".join(digests[2])
