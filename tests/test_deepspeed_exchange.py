"""DeepSpeed's files: what engines saved comes in bit for bit, and they load what is exported."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_run import write_run

import asymcheck
import asymcheck.inspection.importing
from asymcheck.errors import SourceError, StoreError, UnsupportedStateError
from asymcheck.inspection.export import export

os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch = pytest.importorskip("torch", reason="torch is not installed")
deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from deepspeed_writer import Model  # noqa: E402

import asymcheck_torch  # noqa: E402
from asymcheck_torch import deepspeed_archive, inert_pickle  # noqa: E402
from asymcheck_torch.deepspeed_files import from_deepspeed  # noqa: E402

Call = Callable[..., tuple[int, str, str]]

WRITER = Path(__file__).with_name("deepspeed_writer.py")
DECAYS = [{"weight_decay": 0.1}, {"weight_decay": 0.0}]
RATES = [{"weight_decay": 0.1}, {"weight_decay": 0.0, "lr": 2e-3}]
SGD = {"optimizer": "SGD", "options": {"momentum": 0.9}, "moments": ["momentum_buffer"]}
ACCUMULATED = {
    "stage": 1,
    "dtype": "bf16",
    "config": {"data_types": {"grad_accum_dtype": "fp32"}},
}

SAVED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "stage0": {"stage": 0, "named": True},
        "stage0-bf16": {"stage": 0, "named": True, "dtype": "bf16", "frozen": False},
        "stage1": {"stage": 1, "groups": DECAYS},
        "stage1-bf16": {"stage": 1, "groups": RATES, "dtype": "bf16"},
        "stage2": {"stage": 2, "groups": DECAYS},
        "stage2-bf16": {"stage": 2, "dtype": "bf16"},
        "stage3": {"stage": 3, "groups": DECAYS},
        "stage3-bf16": {"stage": 3, "groups": RATES, "dtype": "bf16"},
        "accumulated": ACCUMULATED,
        "sub-groups": {"stage": 3, "sub_group_size": 50, "client_by_rank": True},
        "round-robin": {"stage": 2, "groups": DECAYS, "zero": {"round_robin_gradients": True}},
        "persistent": {"stage": 3, "zero": {"stage3_param_persistence_threshold": 1000}},
        "trained-whole": {"stage": 3, "frozen": False},
        "sgd": {"stage": 2, **SGD},
        "new": {"stage": 2, "steps": 0, "moments": []},
        "without-frozen": {"stage": 3, "saving": {"exclude_frozen_parameters": True}},
    },
    3: {
        "three-stage1": {"stage": 1, "groups": RATES},
        "three-stage3": {"stage": 3, "groups": RATES, "dtype": "bf16"},
    },
    1: {
        "one-stage2": {"stage": 2, "groups": DECAYS},
        "one-stage3": {"stage": 3, "groups": DECAYS},
    },
}
NAMES = [name for jobs in SAVED.values() for name in jobs]


def start(ranks: int, jobs: list[dict[str, Any]], directory: Path) -> None:
    """Have so many processes run the jobs, one after the other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"} | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "TORCH_EXTENSIONS_DIR": str(directory / "extensions"),
    }
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(ranks):
        env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (directory / f"log{rank}").open("wb") as log:
            command = [sys.executable, str(WRITER), json.dumps(jobs)]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, (directory / "log0").read_text()[-2000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of real engines after three updates, and beside them what the engines held."""
    root = tmp_path_factory.mktemp("saved")
    for ranks, jobs in SAVED.items():
        given = [
            {"steps": 3, "save": str(root / name), "state": str(root / f"{name}.pt")} | job
            for name, job in jobs.items()
        ]
        start(ranks, given, root)
    return root


def held(saved: Path, name: str) -> dict[str, Any]:
    """What an engine held, as DeepSpeed gave it."""
    return torch.load(saved / f"{name}.pt")


def bits(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype name, shape and bytes of a tensor or array."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return name, tuple(value.shape), raw
    array = np.asarray(value)
    return array.dtype.name, array.shape, array.tobytes()


def assert_bits(found: Any, expected: Any) -> None:
    """Mappings of the same arrays."""
    assert {n: bits(v)[:2] for n, v in found.items()} == {
        n: bits(v)[:2] for n, v in expected.items()
    }
    assert [n for n in expected if bits(found[n]) != bits(expected[n])] == []


def imported(source: Path, tmp_path: Path, step: int = 3) -> Path:
    run = tmp_path / "run"
    asymcheck.inspection.importing.import_checkpoint(source, "deepspeed", run, step)
    return run


def exported(run: Path, output: Path, step: int | None = None) -> Path:
    with asymcheck.open_checkpoint(run, step) as checkpoint:
        export(checkpoint, "deepspeed-universal", output, progress=False)
    return output


def copy_of(saved: Path, name: str, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be changed."""
    return Path(shutil.copytree(saved / name, tmp_path / "source"))


def model_files(source: Path) -> list[Path]:
    return sorted(source.glob("*/*_model_states.pt"))


def optimizer_files(source: Path) -> list[Path]:
    return sorted(source.glob("*/*_optim_states.pt"))


def rewrite(file: Path, change: Callable[[Any], None]) -> None:
    """Change what a file of `torch.save` holds."""
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)


# -- import ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_import(call: Call, saved: Path, tmp_path: Path, name: str) -> None:
    """Everything that DeepSpeed says the engine held, by logical names."""
    code, out, err = call("import", saved / name, tmp_path / "run", "--from=deepspeed", "--json")
    assert (code, err) == (0, "")
    with asymcheck.open_checkpoint(tmp_path / "run") as checkpoint:
        assert json.loads(out)["leaves"] == len(checkpoint)
        assert len(checkpoint) < 200
        checkpoint.verify()
        found = checkpoint.state()
    expected = held(saved, name)
    job = next(jobs[name] for jobs in SAVED.values() if name in jobs)
    assert found["params"].pop("head.weight") is found["params"]["embed.weight"]
    if name == "without-frozen":
        expected["params"] = {n: v for n, v in expected["params"].items() if "fixed" not in n}
    assert list(found["params"]) == list(expected["params"])
    if job["stage"] > 0:
        assert_bits(found["params"], expected["params"])
        for key in job.get("moments", ["exp_avg", "exp_avg_sq"]):
            assert_bits(found[key], expected[key])
    assert {bits(step) for step in found.get("step", {}).values()} == {
        bits(np.float32(step)) for step in expected["steps"]
    }
    own = found["ranks"]["0"]
    buffers = found["buffers"] if "buffers" in found else own["buffers"]
    del expected["buffers"]["forgotten"]
    assert_bits(buffers, expected["buffers"])
    assert_options(found["optimizers"], expected["options"])
    assert found["world_size"] == next(n for n, jobs in SAVED.items() if name in jobs)
    assert_engine(found, expected, job)


def assert_options(optimizers: Any, expected: list[dict[str, Any]]) -> None:
    assert len(optimizers) == 1
    assert (optimizers[0]["other"], optimizers[0]["shared"]) == ({}, {})
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizers[0]["param_groups"]]
    assert groups == expected


def assert_engine(found: Any, expected: Any, job: dict[str, Any]) -> None:
    engine = found["engine"]
    assert found["module_extra"] == {}
    assert engine["global_steps"] == expected["global_steps"] == job.get("steps", 3)
    assert engine["global_samples"] == 4 * found["world_size"] * engine["global_steps"]
    assert engine["skipped_steps"] == 0
    assert engine["lr_scheduler"] == expected["lr_scheduler"]
    client = dict(engine["client_state"])
    assert bits(client.pop("seen")) == bits(np.arange(4, dtype="f4"))
    assert client.pop("nested") == {"a": (1, None, "b")}
    assert client == {"epoch": 3} | ({"rank": 0} if job.get("client_by_rank") else {})


def test_stage_0_takes_masters_and_moments_of_torch(saved: Path) -> None:
    """DeepSpeed's own calls do not give them; the file of the same run at stage 0 does."""
    for name in ("stage0", "stage0-bf16"):
        found = from_deepspeed(saved / name)
        optimizer = torch.load(saved / name / "global_step3" / "mp_rank_00_model_states.pt")
        optimizer = optimizer["optimizer"]
        base = optimizer.get("optimizer_state_dict", optimizer)
        names = base["param_groups"][0]["param_names"]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            expected = {names[i]: entry[key] for i, entry in base["state"].items()}
            assert_bits(found[key], expected)
        if name == "stage0-bf16":
            masters = dict(zip(names, optimizer["fp32_groups"][0], strict=True))
            masters["head.weight"] = masters["embed.weight"]
            assert_bits(found["params"], masters)


def test_ranks_keep_what_is_their_own(saved: Path) -> None:
    """In stage 3 every rank saves its buffers and client state."""
    ranks = from_deepspeed(saved / "sub-groups")["ranks"]
    assert [ranks[rank]["client_state"]["rank"] for rank in ("0", "1")] == [0, 1]
    running = [ranks[rank]["buffers"]["running"] for rank in ("0", "1")]
    assert not np.array_equal(*running)
    files = sorted((saved / "sub-groups" / "global_step3").glob("*_model_states.pt"))
    own = [torch.load(file)["module"]["running"] for file in files]
    assert [bits(array) for array in running] == [bits(array) for array in own]
    one = from_deepspeed(saved / "one-stage3")
    assert one["ranks"] == {"0": {"extra": {}}}


def test_the_directory_of_one_checkpoint(saved: Path) -> None:
    found = from_deepspeed(saved / "stage3" / "global_step3")
    assert_bits(found["params"], from_deepspeed(saved / "stage3")["params"])


def test_without_deepspeed(saved: Path, tmp_path: Path) -> None:
    """The import needs no DeepSpeed and loads none."""
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from asymcheck.cli import main\n"
        f"code = main(['asymcheck', 'import', {str(saved / 'stage2')!r}, "
        f"{str(tmp_path / 'run')!r}, '--from=deepspeed'])\n"
        "assert not [name for name in sys.modules if name.startswith('deepspeed.')]\n"
        "sys.exit(code)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)
    with asymcheck.open_checkpoint(tmp_path / "run") as checkpoint:
        assert bits(checkpoint["exp_avg/out.weight"][...]) == bits(
            held(saved, "stage2")["exp_avg"]["out.weight"]
        )


def test_a_dynamic_loss_scale(saved: Path, tmp_path: Path) -> None:
    """As fp16 has it, which CPUs do not: put into the file of another run."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2**16, 1000, 1, 2, False)
    scaler.cur_iter, scaler.last_overflow_iter = 7, 5

    def change(state: Any) -> None:
        state["optimizer_state_dict"]["loss_scaler"] = scaler

    source = copy_of(saved, "stage2", tmp_path)
    for file in optimizer_files(source):
        rewrite(file, change)
    members = from_deepspeed(source)["engine"]["loss_scaler"]
    assert members == {k: v for k, v in vars(scaler).items() if k != "dtype"}
    output = exported(imported(source, tmp_path), tmp_path / "out")
    back = torch.load(output / "global_step3" / "zero" / "optimizer_state.pt", weights_only=False)
    assert type(back["loss_scaler"]) is DynamicLossScaler
    assert vars(back["loss_scaler"]) == vars(scaler)
    assert back["dynamic_loss_scale"] is True


def test_extra_state_of_modules(saved: Path, tmp_path: Path) -> None:
    def change(state: Any) -> None:
        state["module"]["norm._extra_state"] = {"seen": torch.ones(2)}
        state["module"]["_extra_state"] = 3

    source = copy_of(saved, "stage2", tmp_path)
    rewrite(model_files(source)[0], change)
    found = from_deepspeed(source)
    assert found["module_extra"].keys() == {"norm", ""}
    assert found["module_extra"][""] == 3
    assert bits(found["module_extra"]["norm"]["seen"]) == bits(np.ones(2, "f4"))
    assert_bits(found["params"], from_deepspeed(saved / "stage2")["params"])


# -- export ------------------------------------------------------------------------------------

LOADED: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        ("stage0", {"stage": 1}),
        ("stage1", {"stage": 2, "groups": DECAYS}),
        ("stage1", {"stage": 3, "groups": DECAYS}),
        ("stage1-bf16", {"stage": 1, "groups": RATES, "dtype": "bf16"}),
        ("stage2", {"stage": 1, "groups": DECAYS}),
        ("stage2-bf16", {"stage": 3, "dtype": "bf16"}),
        ("stage3", {"stage": 2, "groups": DECAYS}),
        ("stage3", {"stage": 3, "groups": DECAYS, "sub_group_size": 50}),
        ("three-stage3", {"stage": 1, "groups": RATES, "dtype": "bf16"}),
        ("accumulated", ACCUMULATED),
        ("sgd", {"stage": 1, **SGD}),
        ("new", {"stage": 1, "moments": []}),
        ("attached", {"stage": 2, "groups": DECAYS}),
    ],
    1: [
        ("stage2", {"stage": 3, "groups": DECAYS}),
        ("stage3-bf16", {"stage": 2, "groups": RATES, "dtype": "bf16"}),
        ("three-stage1", {"stage": 1, "groups": RATES}),
        ("attached", {"stage": 3, "groups": DECAYS}),
    ],
}
LOADS = [(ranks, number) for ranks, loads in LOADED.items() for number in range(len(loads))]
UNLOADABLE = {
    "groups with other rates": ("stage1-bf16", {"stage": 3, "groups": RATES, "dtype": "bf16"}),
    "another optimizer": ("sgd", {"stage": 3, **SGD}),
    "before the first update": ("new", {"stage": 3}),
}
CONTINUED = {
    "stage2": {"stage": 2, "groups": DECAYS},
    "stage3": {"stage": 3, "groups": DECAYS, "own_steps": True},
}


@pytest.fixture(scope="module")
def loaded(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What engines hold that DeepSpeed has loaded universal checkpoints into."""
    root = tmp_path_factory.mktemp("loaded")
    attached = {"stage": 3, "groups": DECAYS, "steps": 3, "attach": str(root / "attached-run")}
    jobs = [attached | {"state": str(saved / "attached.pt")}]
    jobs += [
        job | {"steps": 5, "state": str(root / f"{name}-whole.pt")}
        for name, job in CONTINUED.items()
    ]
    start(2, jobs, root)
    sources = {source for loads in LOADED.values() for source, _ in loads}
    for name in sources:
        (root / name).mkdir()
        run = root / "attached-run" if name == "attached" else imported(saved / name, root / name)
        exported(run, root / f"{name}-out")
    for ranks, loads in LOADED.items():
        jobs = [
            load(root / f"{source}-out", root / f"{ranks}-{number}.pt", job)
            for number, (source, job) in enumerate(loads)
        ]
        if ranks == 2:
            for name, (source, job) in UNLOADABLE.items():
                given = load(root / f"{source}-out", root / f"{name}.pt", job)
                jobs.append(given | {"fails": True})
            for name, job in CONTINUED.items():
                given = load(root / f"{name}-out", root / f"{name}-continued.pt", job)
                jobs.append(given | {"steps": 2})
        start(ranks, jobs, root)
    return root


def load(output: Path, state: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Load a universal checkpoint into an engine that was initialised otherwise."""
    module = output / (output / "latest_universal").read_text() / "module.pt"
    given = {"universal": str(output), "module": str(module), "state": str(state), "seed": 5}
    return given | job


@pytest.mark.parametrize(("ranks", "number"), LOADS)
def test_deepspeed_loads_a_universal_checkpoint(
    saved: Path, loaded: Path, ranks: int, number: int
) -> None:
    source, job = LOADED[ranks][number]
    found = torch.load(loaded / f"{ranks}-{number}.pt")
    expected = held(saved, source)
    for kind in ("params", *job.get("moments", ["exp_avg", "exp_avg_sq"])):
        if source != "stage0":  # DeepSpeed gives no moments of stage 0
            assert_bits(found[kind], expected[kind])
    if source == "stage0":
        state = from_deepspeed(saved / "stage0")
        assert_bits(found["exp_avg"], state["exp_avg"])
        del state["params"]["head.weight"]
        assert_bits(found["params"], state["params"])
    assert_bits(found["buffers"], expected["buffers"])
    assert set(found["steps"]) == set(expected["steps"])
    assert [without_names(o) for o in found["options"]] == [
        without_names(o) for o in expected["options"]
    ]
    assert found["global_steps"] == expected["global_steps"]
    assert found["lr_scheduler"] == expected["lr_scheduler"]
    if source != "attached":
        assert bits(found["client_state"]["seen"]) == bits(np.arange(4, dtype="f4"))
        assert found["client_state"]["nested"] == {"a": (1, None, "b")}
    if job.get("dtype") == "bf16":
        assert_bits(found["lp"], {n: v.bfloat16() for n, v in expected["params"].items()})


def without_names(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "param_names"}


@pytest.mark.parametrize("name", CONTINUED)
def test_training_goes_on_as_if_it_had_not_stopped(loaded: Path, name: str) -> None:
    found = torch.load(loaded / f"{name}-continued.pt")
    expected = torch.load(loaded / f"{name}-whole.pt")
    for kind in ("params", "exp_avg", "exp_avg_sq", "buffers"):
        assert_bits(found[kind], expected[kind])
    assert found["steps"] == expected["steps"]
    assert found["options"] == expected["options"]


@pytest.mark.parametrize("name", UNLOADABLE)
def test_what_stage_3_would_load_wrongly_it_refuses(loaded: Path, name: str) -> None:
    assert torch.load(loaded / f"{name}.pt") == {"error": "KeyError('optimizer_state_dict')"}


def test_what_is_in_a_universal_checkpoint(saved: Path, tmp_path: Path, call: Call) -> None:
    run, output = imported(saved / "stage3", tmp_path), tmp_path / "out"
    code, out, err = call("export", run, "--to=deepspeed-universal", f"--output={output}", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    files = [file for file in output.rglob("*") if file.is_file()]
    assert report["nbytes"] == sum(file.stat().st_size for file in files)
    zero = output / "global_step3" / "zero"
    trained = ["body.bias", "body.weight", "embed.weight", "norm.bias", "norm.weight", "out.weight"]
    assert sorted(p.name for p in zero.iterdir() if p.is_dir()) == trained
    for name in trained:
        found = {file.stem: torch.load(file) for file in (zero / name).iterdir()}
        assert found.keys() == {"fp32", "exp_avg", "exp_avg_sq", "step"}
        expected = held(saved, "stage3")
        assert bits(found["fp32"]["param"]) == bits(expected["params"][name])
        assert bits(found["exp_avg"]["param"]) == bits(expected["exp_avg"][name])
        assert bits(found["step"]) == bits(np.float32(3))
    module = torch.load(output / "global_step3" / "module.pt")
    assert module.keys() == {"fixed.weight", "fixed.bias", "running", "passes"}
    again = exported(run, tmp_path / "again")
    for file in files:
        assert file.read_bytes() == (again / file.relative_to(output)).read_bytes()


def plain_run(tmp_path: Path, dtype: Any = torch.float32) -> tuple[Path, Any, Any]:
    """A run without DeepSpeed, and its module and optimizer."""
    torch.manual_seed(3)
    model = Model().to(dtype)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1
    )
    url = tmp_path / "plain"
    with asymcheck_torch.attach(model, optimizer, url=str(url)) as checkpointer:
        tokens = torch.arange(6)
        torch.nn.functional.cross_entropy(model(tokens).float(), tokens).backward()
        optimizer.step()
        checkpointer.wait()
    return url, model, optimizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_without_deepspeed_is_exported(tmp_path: Path, dtype: str) -> None:
    """bfloat16 becomes float32, which holds it exactly; there is no schedule to load."""
    url, model, optimizer = plain_run(tmp_path, getattr(torch, dtype))
    output = exported(url, tmp_path / "out")
    job = {"stage": 2, "loading": {"load_lr_scheduler_states": False}}
    start(1, [load(output, tmp_path / "loaded.pt", job)], tmp_path)
    found = torch.load(tmp_path / "loaded.pt")
    named = dict(model.named_parameters())
    assert_bits(found["params"], {name: p.float() for name, p in named.items()})
    for key in ("exp_avg", "exp_avg_sq"):
        moments = {n: optimizer.state[p][key].float() for n, p in named.items() if p.requires_grad}
        assert_bits(found[key], moments)
    assert (found["steps"], found["global_steps"]) == ([1.0], 1)
    assert found["options"][0]["weight_decay"] == 0.1


def test_safetensors_of_an_imported_step(call: Call, saved: Path, tmp_path: Path) -> None:
    """What a reader of safetensors does to get a module's parameters by their names."""
    library = pytest.importorskip("safetensors", reason="safetensors is not installed")
    run, file = imported(saved / "stage3", tmp_path), tmp_path / "model.safetensors"
    code, _, err = call("export", run, "--to=safetensors", f"--output={file}")
    assert (code, err) == (0, "")
    with library.safe_open(file, "pt") as tensors:
        aliases = json.loads(tensors.metadata()["asymcheck"])["aliases"]
        paths = [*tensors.keys(), *aliases]
        weights = {
            path.removeprefix("params/"): tensors.get_tensor(aliases.get(path, path))
            for path in paths
            if path.startswith("params/")
        }
    model = Model()
    result = model.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["running", "passes"]
    assert_bits(dict(model.named_parameters()), held(saved, "stage3")["params"])


def state_of(params: Any, **more: Any) -> dict[str, Any]:
    """A training state of these parameters, all of them trained."""
    group = {"lr": 0.1, "params": list(params)}
    return {
        "params": params,
        "optimizers": [{"param_groups": [group], "other": {}, "shared": {}}],
        "world_size": 1,
        "buffers": {},
        "ranks": {"0": {"extra": {}}},
    } | more


ONES = np.ones(3, "f4")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": ONES}, "not one of a training run"),
        ([ONES], "not one of a training run"),
        (state_of([ONES]), "not one of a training run"),
        (state_of({"a": ONES}, optimizers=[{}]), "not one of a training run"),
        (state_of({"a": ONES}, exp_avg={"b": ONES}), "not one of a training run"),
        (state_of({"a": ONES}, exp_avg={"a": 1.0}), "not one of a training run"),
        (state_of({"a": ONES}, optimizers=[]), "one optimizer"),
        (state_of({"../a": ONES}), "directory"),
        (state_of({"..": ONES}), "directory"),
        (state_of({"a" * 256: ONES}), "directory"),
        (state_of({"a": np.ones(3)}), "params/a"),
        (state_of({"a": ONES}, exp_avg={"a": ONES[:2]}), "exp_avg/a"),
        (state_of({"a": ONES}, step={"a": ONES + 1}), "step/a"),
        (state_of({"a": ONES}, **{"x/y": {"a": ONES + 1}}), "x~1y/a"),
        (
            state_of(
                {"a": ONES, "b": ONES + 1}, step={"a": np.float32(1).reshape(()), "b": ONES[0]}
            ),
            "not one of a training run",
        ),
        (
            state_of(
                {"a": ONES, "b": ONES + 1}, step={"a": np.array(1, "f4"), "b": np.array(2, "f4")}
            ),
            "updates of a group",
        ),
        (state_of({"a": ONES}, engine={"client_state": {"module": 1}}), "values of this name"),
    ],
)
def test_what_deepspeed_cannot_hold_is_refused(
    call: Call, tmp_path: Path, state: Any, message: str
) -> None:
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, state)
    output = tmp_path / "a" / "out"
    output.parent.mkdir()
    code, out, err = call(
        "export", tmp_path / "run", "--to=deepspeed-universal", f"--output={output}"
    )
    assert (code, out) == (3, "")
    assert message in err
    assert list(output.parent.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "run"]


def test_another_state_is_refused(call: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "run", (10,))
    output = tmp_path / "out"
    code, _, err = call(
        "export", tmp_path / "run", "--to=deepspeed-universal", f"--output={output}"
    )
    assert code == 3
    assert "not one of a training run" in err


def test_a_full_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no limits of the process here")
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, state_of({"a": np.ones(100_000, "f4")}))
    (tmp_path / "out").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with asymcheck.open_checkpoint(tmp_path / "run") as checkpoint:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(StoreError, match="cannot write"):
                export(checkpoint, "deepspeed-universal", tmp_path / "out" / "x", progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


# -- what is refused ---------------------------------------------------------------------------


def refusal(source: Path) -> str:
    """Why a checkpoint is refused, without its path."""
    with pytest.raises(SourceError) as caught:
        from_deepspeed(source)
    return str(caught.value).replace(str(source), "")


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def evil_client(state: Any, evil: Evil) -> None:
    state["mine"] = [evil]


def evil_config(state: Any, evil: Evil) -> None:
    state["ds_config"] = {"a": evil}


def evil_module(state: Any, evil: Evil) -> None:
    state["module"]["body.bias"].mine = evil  # an attribute of a tensor


@pytest.mark.parametrize("name", ["stage0", "stage2", "stage3"])
@pytest.mark.parametrize("put", [evil_client, evil_config, evil_module])
def test_evil_files_are_refused_and_run_nothing(
    call: Call, saved: Path, tmp_path: Path, name: str, put: Callable[[Any, Evil], None]
) -> None:
    made = tmp_path / "made"
    source = copy_of(saved, name, tmp_path)
    rewrite(model_files(source)[-1], lambda state: put(state, Evil(made)))
    code, out, err = call("import", source, tmp_path / "run", "--from=deepspeed")
    assert (code, out) == (1, "")
    assert "pathlib.Path" in err or "getattr" in err
    assert not made.exists()
    assert not (tmp_path / "run").exists()
    torch.load(model_files(source)[-1], weights_only=False)
    assert made.exists(), "the pickle was harmless"


@pytest.mark.parametrize("name", ["stage2", "stage3"])
def test_evil_optimizer_states(saved: Path, tmp_path: Path, name: str) -> None:
    made = tmp_path / "made"
    source = copy_of(saved, name, tmp_path)
    scaler = deepspeed.runtime.fp16.loss_scaler.LossScaler()
    scaler.mine = Evil(made)

    def change(state: Any) -> None:
        state["optimizer_state_dict"]["loss_scaler"] = scaler

    rewrite(optimizer_files(source)[1], change)
    assert re.search(r"pathlib\.Path|getattr", refusal(source))
    assert not made.exists()


def repickled(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the pickle of a file of `torch.save`, checksums and all."""
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members:
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins setattr",
        "os system",
        "torch load",
        "torch.serialization load",
        "torch._utils _rebuild_sparse_tensor",
        "torch.storage _load_from_bytes",
        "copyreg _reconstructor",
        "functools partial",
        "numpy.core.multiarray scalar",
        "deepspeed.runtime.engine DeepSpeedEngine",
        "deepspeed.runtime.zero.config __builtins__",
    ],
)
def test_files_refer_to_nothing_else(saved: Path, tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    source = copy_of(saved, "stage2", tmp_path)
    repickled(model_files(source)[0], lambda _: f"c{module}\n{attribute}\n.".encode())
    assert f"found {module}.{attribute}" in refusal(source)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02]r\xff\xff\xff\x7f.", "LONG_BINPUT"),  # a memo of 2^31 entries
        (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f].", "more memory"),  # a frame of 2^63 bytes
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "malformed"),  # 2^63 bytes
        (b"\x80\x05\x96" + bytes(8) + b".", "BYTEARRAY8"),
        (b"(ios\nsystem\n.", "INST"),
        (b"(cbuiltins\neval\no.", "OBJ"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nVfromkeys\ntR.", "getattr"),
        (b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\nV__init__\ntR.", "getattr"),
        (b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.", "nests tuples"),  # to be hashed
        (b"\x80\x02})" + b"q\x00h\x00\x86" * 1_000_000 + b"K\x01s.", "nests tuples"),
        (b"ctorch\nSize\n(]V0\natR.", "torch.Size"),  # may hold numbers only
        (b"Pstorage\n.", "PERSID"),
        (b"(Vx\nQ.", "malformed"),
        (b"(Vstorage\nVfloat32\nV0\nVcpu\nK\x01tQ.", "no storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR.", "malformed"),
        (b"", "malformed"),
        (b".", "malformed"),
        (b"\x80\x02}.", "malformed"),
        (b"\x80\x02K\x01.", "malformed"),
    ],
)
def test_hostile_pickles(saved: Path, tmp_path: Path, data: bytes, message: str) -> None:
    source = copy_of(saved, "stage2", tmp_path)
    repickled(model_files(source)[0], lambda _: data)
    assert message in refusal(source)


def test_nothing_outlives_a_pickle(saved: Path, tmp_path: Path) -> None:
    """State given to what stands for a class stays with this one use of it."""
    give = b"(dVargs\nK\x07sVkind\nK\x07sVstate\nK\x07sb."
    for name in ("torch._utils\n_rebuild_tensor_v2", "torch\nSize", "collections\nOrderedDict"):
        source = copy_of(saved, "stage2", tmp_path / name.split()[1])
        whole = {id(c): dict(vars(c)) for c in stand_ins()}
        repickled(model_files(source)[0], lambda _, n=name: b"c" + n.encode() + b"\n" + give)
        with pytest.raises(SourceError):
            from_deepspeed(source)
        assert {id(c): dict(vars(c)) for c in stand_ins()} == whole


def stand_ins() -> list[type]:
    names = deepspeed_archive.NAMES.values()
    return [inert_pickle.Record, *(each for each in names if isinstance(each, type))]


def test_truncated_and_changed_files(saved: Path, tmp_path: Path) -> None:
    """Whatever is cut off or changed: it is noticed, or is nothing that is used."""
    whole = from_deepspeed(saved / "stage2")
    generator = np.random.default_rng(0)
    for kind in (model_files, optimizer_files):
        source = copy_of(saved, "stage2", tmp_path / kind.__name__)
        file = kind(source)[0]
        data = file.read_bytes()
        for length in range(0, len(data), 97):
            file.write_bytes(data[:length])
            with pytest.raises(SourceError):
                from_deepspeed(source)
        for _ in range(200):
            changed = bytearray(data)
            changed[generator.integers(len(data))] ^= generator.integers(1, 256)
            file.write_bytes(changed)
            assert_noticed(source, whole)


def assert_noticed(source: Path, whole: Any) -> None:
    try:
        found = from_deepspeed(source)
    except SourceError:
        return
    for kind in ("params", "exp_avg", "exp_avg_sq", "step", "buffers"):
        assert_bits(found[kind], whole[kind])
    assert repr(found["optimizers"]) == repr(whole["optimizers"])


def test_pickles_with_any_byte_changed(saved: Path, tmp_path: Path) -> None:
    """With a checksum that fits: they give something or are refused, and nothing is run."""
    generator = np.random.default_rng(1)
    for name, kind in (("stage2", model_files), ("stage3", optimizer_files)):
        source = copy_of(saved, name, tmp_path / name)
        file = kind(source)[0]
        data = file.read_bytes()
        for _ in range(150):
            position, value = generator.random(), generator.integers(1, 256)

            def change(pickled: bytes, p: float = position, v: int = int(value)) -> bytes:
                changed = bytearray(pickled)
                changed[int(p * len(changed))] ^= v
                return bytes(changed)

            file.write_bytes(data)
            repickled(file, change)
            with suppress(SourceError, UnsupportedStateError):
                found = from_deepspeed(source)
                assert sum(array.nbytes for array in found["params"].values()) < 4 * len(data)


def test_compressed_members_are_refused(saved: Path, tmp_path: Path) -> None:
    """A member may then be far larger than its file."""
    source = copy_of(saved, "stage2", tmp_path)
    file = model_files(source)[0]
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    assert "compressed" in refusal(source)


def _huge_shape(model: Any, _: Any) -> None:
    model["param_shapes"][0]["embed.weight"] = torch.Size([2**45])


def _huge_piece(_: Any, optimizer: Any) -> None:
    mapping = optimizer["param_slice_mappings"][0]
    next(iter(mapping.values())).numel = 2**45


def _huge_both(model: Any, optimizer: Any) -> None:
    _huge_shape(model, optimizer)
    optimizer["param_slice_mappings"][0]["embed.weight"].numel = 2**45 - 2
    optimizer["single_partition_of_fp32_groups"][0] = torch.zeros(1).expand(2**45)


def _negative_piece(_: Any, optimizer: Any) -> None:
    next(iter(optimizer["param_slice_mappings"][0].values())).start = -1


def _overlap(_: Any, optimizer: Any) -> None:
    for piece in optimizer["param_slice_mappings"][0].values():
        piece.start = 0


def _gap(_: Any, optimizer: Any) -> None:
    next(iter(optimizer["param_slice_mappings"][0].values())).numel -= 1


def _another_name(_: Any, optimizer: Any) -> None:
    mapping = optimizer["param_slice_mappings"][0]
    mapping["other"] = mapping.pop("embed.weight")


def _no_master(_: Any, optimizer: Any) -> None:
    optimizer["single_partition_of_fp32_groups"].pop()


def _short_master(_: Any, optimizer: Any) -> None:
    masters = optimizer["single_partition_of_fp32_groups"]
    masters[0] = masters[0][:5].clone()


def _other_dtype(_: Any, optimizer: Any) -> None:
    masters = optimizer["single_partition_of_fp32_groups"]
    masters[0] = masters[0].double()


def _other_step(_: Any, optimizer: Any) -> None:
    optimizer["base_optimizer_state"]["state"][0]["step"] += 1


def _no_moments(_: Any, optimizer: Any) -> None:
    del optimizer["base_optimizer_state"]["state"][0]["exp_avg"]


def _matrix_moments(_: Any, optimizer: Any) -> None:
    state = optimizer["base_optimizer_state"]["state"][0]
    state["exp_avg"] = state["exp_avg"].reshape(2, -1)


def _other_world(model: Any, _: Any) -> None:
    model["dp_world_size"] = 4


def _other_count(_: Any, optimizer: Any) -> None:
    optimizer["partition_count"] = [4, 4]


def _elastic(_: Any, optimizer: Any) -> None:
    optimizer["base_optimizer_state"] = []


def _model_parallel(model: Any, _: Any) -> None:
    model["mp_world_size"] = 2


def _experts(model: Any, _: Any) -> None:
    model["num_experts"] = [4]


def _pipeline(model: Any, _: Any) -> None:
    model["module"] = None


def _object(model: Any, _: Any) -> None:
    model["mine"] = deepspeed.runtime.fp16.loss_scaler.LossScaler()


def _dtype(model: Any, _: Any) -> None:
    model["mine"] = torch.float16


def _deep(model: Any, _: Any) -> None:
    value: Any = []
    for _ in range(100):
        value = [value]
    model["mine"] = value


def _shared_many_times(model: Any, _: Any) -> None:
    value: Any = ["x"]
    for _ in range(50):
        value = [value, value]
    model["mine"] = value


def _expanded(model: Any, _: Any) -> None:
    model["mine"] = torch.zeros(1).expand(2**45)


def _repeated(model: Any, _: Any) -> None:
    base = torch.zeros(10_000)
    model["mine"] = [base[i:] for i in range(5000)]


def _unknown_option(_: Any, optimizer: Any) -> None:
    group = optimizer["base_optimizer_state"]["param_groups"][0]
    group["mine"] = deepspeed.runtime.fp16.loss_scaler.LossScaler()


def _groups_of_others(_: Any, optimizer: Any) -> None:
    optimizer["base_optimizer_state"]["param_groups"].pop()


def _tie_to_nothing(model: Any, _: Any) -> None:
    model["shared_params"] = {"head.weight": "nothing"}


def _no_shapes(model: Any, _: Any) -> None:
    model["param_shapes"] = None


def _no_parameter(model: Any, _: Any) -> None:
    del model["module"]["embed.weight"]
    del model["module"]["head.weight"]


CHANGES = [change for name, change in list(globals().items()) if name[0] == "_" and name[1] != "_"]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_inconsistent_files(
    saved: Path, tmp_path: Path, change: Callable[[Any, Any], None]
) -> None:
    source = copy_of(saved, "stage2", tmp_path)
    model, optimizer = model_files(source)[0], optimizer_files(source)[0]
    states = [torch.load(file, weights_only=False) for file in (model, optimizer)]
    change(states[0], states[1]["optimizer_state_dict"])
    for file, state in zip((model, optimizer), states, strict=True):
        torch.save(state, file)
    with pytest.raises(SourceError):
        from_deepspeed(source)


def test_missing_and_stray_files(saved: Path, tmp_path: Path) -> None:
    source = copy_of(saved, "stage3", tmp_path)
    tag = source / "global_step3"
    strays = {
        "zero_pp_rank_2_mp_rank_00_optim_states.pt": "another number of ranks",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": "two files are the same rank's",
        "zero_pp_rank_0_mp_rank_01_model_states.pt": "model parallelism",
        "zero_pp_rank_9_mp_rank_00_model_states.pt": "missing",
    }
    for name, message in strays.items():
        shutil.copy(optimizer_files(source)[1], tag / name)
        assert message in refusal(source)
        (tag / name).unlink()
    from_deepspeed(source)
    for file in model_files(source) + optimizer_files(source):
        file.rename(tag / "aside")
        assert re.search(r"are missing|of another number of ranks", refusal(source))
        (tag / "aside").rename(file)
    for name, message in (("zero", "universal"), ("offloaded_tensors", "NVMe")):
        (tag / name).mkdir()
        assert message in refusal(source)
        (tag / name).rmdir()
    for file in model_files(source):
        file.unlink()
    assert "no model states" in refusal(source)


def test_files_of_two_checkpoints(saved: Path, tmp_path: Path) -> None:
    """As a rank leaves them that died while the tag was written again."""
    source = copy_of(saved, "stage3", tmp_path)

    def change(state: Any) -> None:
        state["global_steps"] = 2

    rewrite(model_files(source)[1], change)
    assert "not of one checkpoint" in refusal(source)


@pytest.mark.parametrize(
    "tag", ["../other", "/etc", "..", ".", "", "a/b", "a\\b", "a\0b", "\udcff"]
)
def test_latest_names_a_directory_beside_it(saved: Path, tmp_path: Path, tag: str) -> None:
    source = copy_of(saved, "stage2", tmp_path)
    copy_of(saved, "stage2", tmp_path / "other")
    (source / "latest").write_bytes(tag.encode(errors="surrogateescape"))
    with pytest.raises(SourceError):
        from_deepspeed(source)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "latest").write_text("global_step1")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mp_rank_00_model_states.pt").write_text("{}")
    legacy = tmp_path / "legacy" / "mp_rank_00_model_states.pt"
    legacy.parent.mkdir()
    torch.save({}, legacy, _use_new_zipfile_serialization=False)
    for name in ("file", "empty", "dangling", "text", "legacy", "nowhere"):
        with pytest.raises(SourceError):
            from_deepspeed(tmp_path / name)
