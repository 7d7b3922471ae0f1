"""Training on a CUDA device: asynchronous copies, device generators, restore onto the device."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from torch import nn  # noqa: E402
from torch_runs import Run, copied, differences, seed_all  # noqa: E402

import asymcheck_torch  # noqa: E402
from asymcheck_torch.parts import whole  # noqa: E402
from asymcheck_torch.tensors import DeviceClocks, pinned, tensor_source  # noqa: E402


def build(fused=False):
    module = nn.Sequential(
        nn.Linear(512, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Dropout(0.2), nn.Linear(2048, 512)
    ).cuda()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=fused)

    def iterate(_i):
        x = torch.randn(64, 512, device="cuda")
        loss = (module(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Run(module, [optimizer], iterate)


def state_of(run):
    tensors = [run.module.state_dict(), run.optimizers[0].state_dict(), torch.cuda.get_rng_state()]
    return [copied(_on_host(t)) for t in tensors]


def _on_host(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("fused", [False, True])
def test_resume_on_the_device(fused):
    torch.use_deterministic_algorithms(True, warn_only=True)
    seed_all(1)
    reference = build(fused)
    losses = reference.train(0, 8)
    expected = state_of(reference)
    seed_all(1)
    run = build(fused)
    with run.attach(f"memory://cuda-{fused}"):
        run.train(0, 5)
    seed_all(9)
    resumed = build(fused)
    with resumed.attach(f"memory://cuda-{fused}") as ckpt:
        assert ckpt.restore() == 5
        step = resumed.optimizers[0].state[resumed.module[0].weight]["step"]
        assert step.is_cuda == fused
        assert resumed.train(5, 8) == losses[5:]
    assert differences(state_of(resumed), expected) == []


def test_snapshots_hold_the_values_right_after_the_update():
    seed_all(1)
    run = build()
    seen = {}
    run.optimizers[0].register_step_post_hook(
        lambda *_: seen.setdefault(len(seen) + 1, _on_host(run.module.state_dict()))
    )
    with run.attach("memory://cuda-seen", max_to_keep=None):
        run.train(0, 6)
    for step, expected in seen.items():
        saved = asymcheck_torch.load("memory://cuda-seen", step)
        assert differences(saved["params"] | saved["buffers"], dict(expected)) == []


def test_a_checkpoint_of_a_device_restores_on_the_host():
    run = build()
    with run.attach("memory://cuda-host"):
        run.train(0, 2)
    module = build().module.cpu()
    with asymcheck_torch.attach(module, url="memory://cuda-host") as ckpt:
        assert ckpt.restore() == 2
    assert differences(dict(module.state_dict()), dict(_on_host(run.module.state_dict()))) == []


def test_a_range_is_read_after_the_work_that_precedes_it():
    clocks = DeviceClocks()
    tensor = torch.zeros(1 << 22, device="cuda")
    source = tensor_source("x", whole(tensor, 0, 1, None), "x", (0, tensor.numel()), clocks)
    for _ in range(50):
        tensor += 1
    clocks.restart()
    source.renew()
    out = pinned(4 * 1000)
    source.read_into(500, 1000, out)
    assert np.all(out.view(np.float32) == 50)
