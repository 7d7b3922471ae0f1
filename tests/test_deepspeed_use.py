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
from deepspeed_runs import Setting, of_all, start  # noqa: E402

import asymcheck  # noqa: E402


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the bit."""
    return [key for key in sorted(a.keys() | b.keys()) if not _same(a.get(key), b.get(key))]


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    return x == y


@pytest.fixture(scope="module", params=[3, 2, 1, 0], ids=lambda stage: f"zero{stage}")
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
    return json.loads((directory / "asymcheck.json").read_text())["asymcheck"]["step"]


def client_at(setting: Setting, rank: int) -> dict[str, Any]:
    """What DeepSpeed hands out: at stage 3 each rank's own, else that of rank 0."""
    return {"epoch": 9, "rank": rank % 2 if setting.stage == 3 else 0}


def test_the_latest_goes_on_bit_for_bit(saved, loaded):
    for rank, ((states, losses), said) in enumerate(zip(saved[2], loaded[1], strict=True)):
        path, client, at, end, later = said[0]
        assert Path(path).name == "again" and client == client_at(saved[1], rank)
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
        weights = [name for name in at if name.startswith(("model/", "params/", "buffers/"))]
        assert len(weights) > 3 and not set(weights) & set(wrong)
        assert [name for name in wrong if name.startswith("exp_avg")]
        assert ("counters" in wrong) == ("load_module_only" in LOADS[number])


@pytest.mark.parametrize("saved", [3, 2], indirect=True, ids=["zero3", "zero2"])
def test_at_another_world_size(saved, tmp_path):
    folder, setting, said = saved
    shutil.copytree(folder, tmp_path / "copy")
    where, loads = str(tmp_path / "copy"), [{"tag": "again"}]
    started = start(scripts.load, tmp_path / "load", where, setting, loads, world=3)
    for rank, ((_, client, at, *_), *_) in enumerate(started):
        assert differences(at, said[0][0][1]) == []
        assert client == client_at(setting, rank)


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


ANYWHERE = {
    "anywhere-3": Setting(3, accumulate=2),
    "anywhere-2": Setting(
        2, accumulate=2, more={"bf16": {"enabled": True, "check_grad_overflow": True}}
    ),
}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """What two ranks say of several runs: {name: [of each rank]}."""
    root = tmp_path_factory.mktemp("several")
    runs: dict[str, tuple[Any, ...]] = {
        name: (scripts.save_anywhere, setting) for name, setting in ANYWHERE.items()
    }
    runs |= {name: (scripts.fail_to_save, name) for name in ("raise", "warn")}
    runs |= {f"scale-{stage}": (scripts.scale_losses, Setting(stage)) for stage in (2, 3)}
    runs |= {"twice": (scripts.save_a_tag_twice,)}
    runs |= {"lost": (scripts.lose_the_disk,)}
    runs |= {"others": (scripts.take_tags_for_others,)}
    runs |= {"unseen": (scripts.load_where_one_rank_sees_nothing,)}
    placed = {name: (worker, f"{root}/{name}", *more) for name, (worker, *more) in runs.items()}
    said = start(of_all, root / "processes", placed)
    return {name: [of_rank[name] for of_rank in said] for name in runs}


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize("tag", ["skipped", "amid", "forward", "frozen"])
def test_a_save_anywhere_in_the_loop(several, name, tag):
    for found in several[name]:
        then, now = found[tag]
        assert then["counters"][:2] == now["counters"][:2]
        assert now["counters"][2] % now["counters"][0] == 0  # accumulation begins anew
        assert [key for key in differences(then, now) if key != "counters"] == []


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_failing_save_leaves_latest_and_the_next_one_is_good(several, on_error):
    for rank, (said, took_s, (then, now), client) in enumerate(several[on_error]):
        errors, latest = zip(*said, strict=True)
        assert latest == ("good", "good", "good", "good", "next")
        assert errors[0] == errors[4] == ""
        assert errors[1] == "SaveFailedError"
        assert errors[2] == ("StoreFullError" if rank == 0 else "SaveFailedError")
        assert errors[3] in ("SaveFailedError", "UnsupportedStateError")
        assert took_s < 30
        assert differences(then, now) == [] and client == {"rank": rank}


def test_a_tag_saved_again_at_another_stage(several):
    assert several["twice"] == [(4, 4), (4, 4)]


def test_a_lost_disk_costs_nothing_that_the_mirror_has(several):
    for then, now, steps in several["lost"]:
        assert differences(then, now) == []
        assert len(steps) == 1


def test_rank_0_says_for_all_what_a_tag_names(several):
    seen_by_rank_0 = ["here", "here"]
    seen_by_rank_1 = ["nothing", "CheckpointNotFoundError"]
    assert several["unseen"] == [seen_by_rank_0 + seen_by_rank_1] * 2


def test_a_tag_names_what_was_saved_or_loading_says_so(several):
    for rank, said in enumerate(several["others"]):
        assert said["own"] == said["saved again"] == ""
        assert said["another run's"] == said["natively saved since"] == "CheckpointNotFoundError"
        assert said["blocked"] == ("SaveFailedError" if rank else "StoreError")
        assert said["made by others"] == "" and said["latest"] == "made"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_dynamic_loss_scale_comes_back(several, stage):
    for saved, fresh, loaded in several[f"scale-{stage}"]:
        assert saved["cur_scale"] != fresh["cur_scale"]
        assert saved["cur_iter"] != fresh["cur_iter"]
        assert loaded == saved
