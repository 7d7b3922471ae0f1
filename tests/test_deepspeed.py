"""DeepSpeed engines: resumed bit for bit, and stored so that anything else can read them."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip(
    "deepspeed",
    reason="DeepSpeed is missing: DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install deepspeed",
)
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

import deepspeed_runs
from deepspeed_runs import Setting, start
from torch_runs import differences

PLAIN = {
    f"zero{stage}-{dtype}": Setting(stage, dtype)
    for stage in (3, 2, 1, 0)
    for dtype in ("fp32", "bf16")
}
ALL_OPTIONS = {
    f"options-{stage}": Setting(stage, groups=True, accumulate=2, clip=0.5, scheduler=True)
    for stage in (3, 2, 1, 0)
}
_ALWAYS_GATHERED = {
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 10**9,
}
OTHER = {
    "sgd-3": Setting(optimizer="sgd"),
    "sgd-2": Setting(2, optimizer="sgd"),
    "configured": Setting(optimizer="configured"),
    "persistent": Setting(zero=_ALWAYS_GATHERED),
    "persistent-bf16": Setting(dtype="bf16", zero=_ALWAYS_GATHERED),
    "sub-groups": Setting(groups=True, zero={"sub_group_size": 500}),
    "round-robin-2": Setting(2, groups=True, zero={"round_robin_gradients": True}),
    "round-robin-1": Setting(1, "bf16", groups=True, zero={"round_robin_gradients": True}),
    "zero-init": Setting(zero_init=True),
    "zero-init-bf16": Setting(dtype="bf16", zero_init=True, zero=_ALWAYS_GATHERED),
    "offload-3": Setting(dtype="bf16", zero={"offload_optimizer": {"device": "cpu"}}),
    "offload-2": Setting(2, groups=True, zero={"offload_optimizer": {"device": "cpu"}}),
    "offload-params": Setting(
        dtype="bf16",
        zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ),
    "bf16-sums-in-fp32": Setting(
        1, "bf16", groups=True, accumulate=2, more={"data_types": {"grad_accum_dtype": "fp32"}}
    ),
}
SETTINGS = PLAIN | ALL_OPTIONS | OTHER
WARM = 2  # updates of something else before restoring


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with a run of two ranks for every setting."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def saved(runs):
    """{setting: for each rank its state at STOP and at TOTAL, and its losses between}."""
    each = {name: (str(runs / name), setting) for name, setting in SETTINGS.items()}
    return _by_name(
        start(deepspeed_runs.of_all, runs / "save", deepspeed_runs.save_and_go_on, each)
    )


@pytest.fixture(scope="module")
def resumed(runs, saved):
    """The same after restoring: {(setting, updates before restoring): ...}."""
    each = {
        (name, warm): (str(runs / name), setting, warm)
        for name, setting in SETTINGS.items()
        for warm in (0, WARM)
    }
    return _by_name(start(deepspeed_runs.of_all, runs / "resume", deepspeed_runs.resume, each))


def _by_name(ranks):
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.parametrize("warm", [0, WARM], ids=["fresh", "warm"])
@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_bit_identical(saved, resumed, name, warm):
    for expected, found in zip(saved[name], resumed[name, warm], strict=True):
        at_stop, at_end, losses = expected
        at_start, end, losses_again = found
        assert differences(at_start, at_stop) == []
        assert differences(end, at_end) == []
        assert losses_again == losses
