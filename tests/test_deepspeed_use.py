"""Scripts that call save_checkpoint and load_checkpoint of a DeepSpeed engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed", reason="DS_BUILD_OPS=0 pip install deepspeed==0.19.8")

import deepspeed_scripts as scripts  # noqa: E402
from deepspeed_runs import Setting, start  # noqa: E402

import asymcheck  # noqa: E402


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the bit."""
    return [key for key in sorted(a.keys() | b.keys()) if not _same(a.get(key), b.get(key))]


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    return x == y


@pytest.fixture(scope="module", params=[3, 2], ids=lambda stage: f"zero{stage}")
def saved(request, tmp_path_factory):
    """A script of two ranks: its folder, its setting, and what its ranks say."""
    folder = tmp_path_factory.mktemp("scripts")
    setting = Setting(stage=request.param, scheduler=True)
    said = start(scripts.save, folder / "save", str(folder), setting)
    return folder, setting, said


LOADS = [
    {},
    {"tag": "global_step2"},
    {"tag": "global_step3", "load_module_only": True},
    {"tag": "global_step3", "load_optimizer_states": False},
]


@pytest.fixture(scope="module")
def loaded(saved, tmp_path_factory):
    """Where another script went on, and what its ranks say of `LOADS`."""
    folder, setting, _ = saved
    copy = tmp_path_factory.mktemp("loads") / "copy"
    shutil.copytree(folder, copy)
    return copy, start(scripts.load, copy / "load", str(copy), setting, LOADS)


def test_latest_is_what_was_saved_last_and_durable(saved):
    folder, _, _ = saved
    tags = folder / "tags"
    assert (tags / "latest").read_text() == "again"
    steps = [_step(tags / tag) for tag in ("global_step2", "global_step3", "again")]
    assert steps == sorted(set(steps))
    for step in steps:
        with asymcheck.open_checkpoint(folder / "run", step=step) as checkpoint:
            checkpoint.verify()


def _step(directory: Path) -> int:
    (file, *_) = sorted(directory.glob("*_model_states.pt"))
    return json.loads(file.read_text())["asymcheck"]["step"]


def test_the_latest_goes_on_bit_for_bit(saved, loaded):
    for (states, losses), said in zip(saved[2], loaded[1], strict=True):
        path, client, at, end, later = said[0]
        assert Path(path).name == "again" and client == {"epoch": 9}
        assert differences(at, states[1]) == [] and differences(end, states[2]) == []
        assert later == losses


def test_an_older_tag_in_an_engine_that_has_trained(saved, loaded):
    for (states, _), said in zip(saved[2], loaded[1], strict=True):
        path, client, at, _end, _losses = said[1]
        assert Path(path).name == "global_step2"
        assert client == {"epoch": 2, "note": "first"}
        assert differences(at, states[0]) == []


def test_training_on_from_an_older_tag_leaves_the_newer_ones(loaded):
    tags = loaded[0] / "tags"
    assert _step(tags / "after") > _step(tags / "again")
    for tag in ("global_step3", "again", "after"):
        with asymcheck.open_checkpoint(loaded[0] / "run", step=_step(tags / tag)) as checkpoint:
            checkpoint.verify()


@pytest.mark.parametrize("number", [2, 3])
def test_weights_without_the_optimizer(saved, loaded, number):
    for (states, _), said in zip(saved[2], loaded[1], strict=True):
        _path, _client, at, _end, _losses = said[number]
        wrong = differences(at, states[1])
        assert not [name for name in wrong if name.startswith(("model/", "master/", "seen"))]
        assert [name for name in wrong if name.startswith("exp_avg")]
        assert ("counters" in wrong) == ("load_module_only" in LOADS[number])


@pytest.mark.parametrize("saved", [3], indirect=True, ids=["zero3"])
def test_at_another_world_size(saved, tmp_path):
    folder, setting, said = saved
    shutil.copytree(folder, tmp_path / "copy")
    where, loads = str(tmp_path / "copy"), [{"tag": "global_step3"}]
    for found in start(scripts.load, tmp_path / "load", where, setting, loads, world=3):
        assert differences(found[0][2], said[0][0][1]) == []


def test_what_cannot_be_loaded(tmp_path):
    setting = Setting(stage=0)
    for errors in start(scripts.load_nothing, tmp_path / "load", str(tmp_path), setting, world=1):
        assert errors == ["(None, None)", "CheckpointNotFoundError", "ValueError"]


@pytest.mark.parametrize("saved", [2], indirect=True, ids=["zero2"])
def test_other_files_are_deepspeeds_own(saved):
    folder, _, said = saved
    model = torch.load(folder / "weights" / "model.bin", weights_only=True)
    expected = {k.removeprefix("model/"): v for k, v in said[0][0][1].items() if "model/" in k}
    assert all(torch.equal(model[name], value) for name, value in expected.items())
