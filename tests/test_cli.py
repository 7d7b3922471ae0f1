"""The command line: what it shows, what it writes as JSON, and its exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from sample_run import STEPS, state_at, write_run

import asymcheck
from asymcheck.cli import COMMANDS, Command, _guarded
from asymcheck.commit import commit_key
from asymcheck.inspection.text import duration, printable, size, table
from asymcheck.inspection.values import MAX_PIECE_SIZE, StatisticsBuilder, pieces
from asymcheck.inspection.verification import verify
from asymcheck.manifest import data_prefix
from asymcheck.records import header
from asymcheck.stores import LocalStore

Call = Callable[..., tuple[int, str, str]]

RAW_NBYTES = 2 * 64 * 33 * 4 + 50 * 2 + 8 + 8 + 2 + 8 + 3
"""Of `state_at`: weight and first moment, bias, count, phase, mask, fp8, rng."""


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test changes."""
    root = tmp_path_factory.mktemp("shared") / "run"
    write_run(root)
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run to damage."""
    write_run(tmp_path / "run")
    return tmp_path / "run"


def packs(run: Path, step: int) -> list[Path]:
    return sorted(run.glob(f"data/{step:016d}-*/*.pack"))


def flip_byte(path: Path, offset: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# -- usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("help", ["--help", "-h", "help"])
def test_help_names_every_command_and_exit_code(call: Call, help: str) -> None:
    code, out, err = call(help)
    assert (code, err) == (0, "")
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)
    assert re.search(r"^2 +usage", out, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(call: Call, name: str) -> None:
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: asymcheck {name} {COMMANDS[name].arguments}")
    assert "--json" in out
    assert COMMANDS[name].summary in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is missing"),
        (["lss", "RUN"], "no command 'lss'"),
        (["ls"], "usage: asymcheck ls URL"),
        (["ls", "RUN", "x"], "usage: asymcheck ls URL"),
        (["ls", "RUN", "--step=3"], "ls has no flag --step, only"),
        (["show", "RUN", "--step=x"], "step"),
        (["show", "RUN", "--step"], "Missing value"),
        (["show", "RUN", "--step=11"], "no step 11"),
        (["show", "RUN", "params/wieght"], "Similar: params/weight"),
        (["verify", "RUN", "--all", "--step=10"], "exclude each other"),
        (["copy", "RUN"], "usage: asymcheck copy SOURCE TARGET"),
        (["copy", "RUN", "NOWHERE", "--all", "--step=10"], "exclude each other"),
        (["copy", "RUN", "NOWHERE", "--step=11"], "no step 11"),
        (["copy", "RUN", "RUN"], "the same place"),
        (["copy", "NOWHERE", "RUN"], "no checkpoint in file://"),
        (["copy", "NOWHERE", "RUN", "--all"], "no checkpoint in file://"),
        (["copy", "RUN", "ftp://x"], "unknown kind of store"),
        (["diff", "RUN", "10"], "usage: asymcheck diff"),
        (["diff", "RUN", "10", "x"], "not the number of a step"),
        (["export", "RUN", "--to=npz"], "--output"),
        (["export", "RUN", "--to=pickle", "--output=x"], "pickle"),
        (["ls", "NOWHERE"], "no checkpoint in file://"),
        (["gc", "NOWHERE"], "no run in file://"),
        (["verify", "NOWHERE", "--all"], "no checkpoint in file://"),
        (["ls", "ftp://x"], "unknown kind of store"),
    ],
)
def test_usage_errors_are_one_line(
    call: Call, shared_run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"RUN": str(shared_run), "NOWHERE": str(tmp_path / "nowhere")}
    code, out, err = call(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("asymcheck: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "nowhere").exists()


def test_missing_library(
    call: Call, shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = tmp_path / "x"
    code, _, err = call("export", shared_run, "--to=safetensors", f"--output={target}")
    assert code == 2
    assert "pip install 'asymcheck[export]'" in err
    code, _, err = call("stats", shared_run, f"--plot={target}.png")
    assert code == 2
    assert "pip install 'asymcheck[plot]'" in err
    assert list(tmp_path.iterdir()) == []


# -- ls, show ----------------------------------------------------------------------------------


def test_ls(call: Call, shared_run: Path) -> None:
    code, out, err = call("ls", shared_run)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:2] == ["STEP", "KIND"]
    assert [row[0] for row in rows[1:]] == [str(step) for step in STEPS]
    assert [row[1] for row in rows[1:]] == ["base", "increment", "increment", "base"]
    assert rows[3][2] == "2"  # depth
    assert '{"epoch": 1}' in out


def test_ls_json(call: Call, shared_run: Path) -> None:
    code, out, err = call("ls", shared_run, "--json")
    assert (code, err) == (0, "")
    steps = json.loads(out)["steps"]
    assert [s["parent"] for s in steps] == [None, 10, 20, None]
    assert [s["depth"] for s in steps] == [0, 1, 2, 0]
    with asymcheck.open_checkpoint(shared_run, 40) as checkpoint:
        raw_nbytes = sum(leaf.nbytes for leaf in checkpoint.values())
    stored_nbytes = sum(path.stat().st_size for path in packs(shared_run, 40))
    assert steps[3]["raw_nbytes"] == raw_nbytes
    assert steps[3]["stored_nbytes"] == stored_nbytes
    assert steps[3]["metadata"] == {"epoch": 4}
    assert steps[3]["writers"] == 1
    assert 0 <= steps[3]["age_s"] < 600


def test_ls_shows_damaged_records(call: Call, run: Path) -> None:
    flip_byte(run / commit_key(20), 200)
    code, out, _ = call("ls", run)
    assert code == 1
    assert re.search(r"^ +20  damaged", out, re.MULTILINE)
    assert re.search(r"^step 20: .*commit record.* sealed", out, re.MULTILINE)


def test_show_step(call: Call, shared_run: Path) -> None:
    code, out, _ = call("show", shared_run, "--step=30")
    assert code == 0
    assert "increment 2" in out
    assert "decodes from steps 20, 10" in out
    row = next(line for line in out.splitlines() if line.startswith("params/weight"))
    assert re.search(r"float32 +\[64, 33\] +8.2 KiB .* delta +params/tied", row)
    code, out, _ = call("show", shared_run, "--json")
    shown = json.loads(out)
    assert shown["summary"]["step"] == 40
    leaves = {leaf["path"]: leaf for leaf in shown["leaves"]}
    assert leaves["params/weight"]["codecs"] == {"plane": 64 * 33 * 4}
    assert leaves["params/empty"]["shape"] == [0, 3]
    assert leaves["optimizer/fp8"]["dtype"] == "float8_e4m3fn"


def test_show_leaf(call: Call, shared_run: Path) -> None:
    weight = state_at(40)["params"]["weight"]
    code, out, _ = call("show", shared_run, "params/tied", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["leaf"]["path"] == "params/weight"
    statistics = shown["statistics"]
    assert statistics["count"] == weight.size
    assert statistics["minimum"] == weight.min()
    assert statistics["mean"] == pytest.approx(weight.mean(dtype=np.float64))
    assert statistics["standard_deviation"] == pytest.approx(weight.std(dtype=np.float64))
    assert shown["first"][0] == str(weight[0, 0])
    code, out, _ = call("show", shared_run, "optimizer/count")
    assert code == 0
    assert f"maximum    {2**62 + 40}\n" in out


@pytest.mark.parametrize("leaf", ["params/empty", "optimizer/phase", "optimizer/mask"])
def test_show_leaf_of_every_kind(call: Call, shared_run: Path, leaf: str) -> None:
    code, out, _ = call("show", shared_run, leaf)
    assert code == 0
    assert f"{leaf} at step 40" in out


def test_show_counts_nan_and_infinity(call: Call, tmp_path: Path) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 3, -5], np.float32)
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"x": values})
    code, out, _ = call("show", tmp_path / "run", "x", "--json")
    assert code == 0
    found = json.loads(out)["statistics"]
    assert (found["nans"], found["infinities"], found["zeros"]) == (1, 2, 2)
    assert (found["minimum"], found["maximum"]) == (-5, 3)


def test_show_of_damaged_bytes(call: Call, run: Path) -> None:
    flip_byte(packs(run, 40)[0])
    code, out, err = call("show", run, "params/weight")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert ".pack" in err


# -- verify ------------------------------------------------------------------------------------


def test_verify(call: Call, shared_run: Path) -> None:
    code, out, err = call("verify", shared_run, "--all")
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [f"step {s}" for s in STEPS]
    code, out, _ = call("verify", shared_run, "--json")
    assert code == 0
    assert json.loads(out)["steps"] == [
        {"step": 40, "good": True, "raw_nbytes": RAW_NBYTES, "damage": []}
    ]


def test_verify_names_every_damaged_step_and_object(call: Call, run: Path) -> None:
    damaged = [packs(run, 10)[0], packs(run, 30)[0]]
    for path in damaged:
        flip_byte(path)
    code, out, _ = call("verify", run, "--all", "--json")
    assert code == 1
    steps = {s["step"]: s for s in json.loads(out)["steps"]}
    assert [step for step, verdict in steps.items() if verdict["good"]] == [40]
    keys = [path.relative_to(run).as_posix() for path in damaged]
    assert {d["object"] for d in steps[30]["damage"]} == set(keys)
    assert {(d["step"], d["object"]) for d in steps[20]["damage"]} == {(10, keys[0])}
    code, out, _ = call("verify", run, "--step=30")
    assert code == 1
    assert "step 30: BAD" in out
    assert all(key in out for key in keys)
    assert call("verify", run)[0] == 0


@pytest.mark.parametrize("nbytes", [-1, 1])
def test_verify_finds_wrong_lengths(call: Call, run: Path, nbytes: int) -> None:
    path = packs(run, 40)[0]
    data = path.read_bytes()
    path.write_bytes(data[:nbytes] if nbytes < 0 else data + b"x")
    code, out, _ = call("verify", run)
    assert code == 1
    assert path.name in out


@pytest.mark.parametrize("kind", ["manifest", "pack", "commit"])
def test_verify_finds_what_is_missing(call: Call, run: Path, kind: str) -> None:
    path = run / commit_key(20) if kind == "commit" else next(run.glob(f"data/{20:016}-*/*.{kind}"))
    path.unlink()
    code, out, _ = call("verify", run, "--step=30")
    assert code == 1
    assert ("step 20" if kind == "commit" else path.name) in out
    assert call("verify", run, "--step=10")[0] == 0


def test_verify_decodes_as_few_leaves_as_needed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of the chain is read once, neighbours together."""
    read: list[int] = []
    store = LocalStore(run)
    get_range = store.get_range

    def counted(key: str, offset: int, out: memoryview) -> None:
        if key.endswith(".pack"):
            read.append(len(out))
        get_range(key, offset, out)

    monkeypatch.setattr(store, "get_range", counted)
    assert verify(store, [10, 20, 30]).good
    with asymcheck.open_checkpoint(run, 30) as checkpoint:
        blocks = [stored.block for index in checkpoint.chain for stored in index.blocks()]
    assert sum(read) == sum(block.nbytes for block in blocks)
    assert len(read) <= len(blocks) / 2


def test_verify_in_small_batches(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asymcheck.inspection.verification._BATCH_NBYTES", 64 * 33 * 4)
    assert verify(LocalStore(run), [10, 30]).good
    flip_byte(packs(run, 10)[0])
    assert [verdict.good for verdict in verify(LocalStore(run), [10, 30]).steps] == [False, False]


def write_lossy(run: Path, codec: str, max_chain: int = 20) -> dict[int, Any]:
    """The true states of two steps of a weight with its moments, a mask, and an empty leaf."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.02, 20_000).astype(np.float32)
    states: dict[int, Any] = {}
    strategy = asymcheck.AsymCheck(policy=asymcheck.Always(codec))
    with asymcheck.Checkpointer(run, strategy=strategy, max_chain=max_chain) as checkpointer:
        for step in range(2):
            weight = weight + rng.normal(0, 1e-4, weight.size).astype(np.float32)
            first = rng.normal(0, 1e-3, weight.size).astype(np.float32)
            states[step] = {
                "params": {"w": weight, "mask": weight > 0, "empty": weight[:0]},
                "exp_avg": {"w": first},
                "exp_avg_sq": {"w": first**2},
            }
            checkpointer.save(step, states[step]).wait()
    return states


@pytest.mark.parametrize("codec", ["bf16", "int8", "rounded", "excp", "topk"])
def test_verify_reports_the_fidelity_of_each_leaf(call: Call, tmp_path: Path, codec: str) -> None:
    states = write_lossy(tmp_path, codec)
    code, out, _ = call("verify", tmp_path, "--json")
    [verdict] = json.loads(out)["steps"]
    assert (code, verdict["good"]) == (0, True)
    assert verdict["fidelity"]["exact_leaves"] == 2
    lossy = {found["leaf"]: found for found in verdict["fidelity"]["lossy"]}
    assert lossy.keys() == {"params/w", "exp_avg/w", "exp_avg_sq/w"}
    with asymcheck.open_checkpoint(tmp_path) as checkpoint:
        for path, found in lossy.items():
            kind, name = path.split("/")
            true = states[1][kind][name].astype(np.float64)
            error = np.abs(checkpoint[path][...].astype(np.float64) - true)
            assert error.max() > 0
            assert (found["codec"], found["absolute"]) == (codec, error.max())
            if codec == "topk":
                assert found["relative"] is None
            else:
                assert found["relative"] == (error / np.abs(true)).max()
    code, out, _ = call("verify", tmp_path)
    head, *lines = out.splitlines()
    assert head.startswith("step 1: good")
    assert [line.split(":")[0].strip() for line in lines] == [*lossy, "exact"]
    assert lines[-1] == "  exact: 2 leaves"
    assert ("relative at most" in out) == (codec != "topk")
    for line, found in zip(lines, lossy.values(), strict=False):
        shown = re.search(rf": {codec}, error at most ([^ ,]+)", line)
        assert shown is not None
        assert found["absolute"] <= float(shown[1]) <= 1.01 * found["absolute"]


def test_verify_of_lossless_steps_says_nothing_of_fidelity(call: Call, tmp_path: Path) -> None:
    write_lossy(tmp_path, "topk")
    assert "exact" not in call("verify", tmp_path, "--step=0")[1]  # the base
    assert "fidelity" not in call("verify", tmp_path, "--step=0", "--json")[1]


def test_verify_finds_damage_of_lossy_steps(call: Call, tmp_path: Path) -> None:
    write_lossy(tmp_path, "int8")
    flip_byte(packs(tmp_path, 1)[0], 3)
    code, out, _ = call("verify", tmp_path)
    assert code == 1
    assert "step 1: BAD" in out and "error at most" not in out


def test_fidelity_that_cannot_be_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lossy(tmp_path, "int8")
    monkeypatch.setattr("asymcheck.inspection.fidelity.MAX_FIDELITY_NBYTES", 20)
    [verdict] = verify(LocalStore(tmp_path), [1]).steps
    assert not verdict.good
    assert "does not state its bound" in str(verdict.damage[0])


def test_verify_names_every_damaged_manifest(call: Call, tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "v1" / "writers" / "run"
    shutil.copytree(golden, tmp_path / "run")
    first, second = sorted(tmp_path.glob("run/data/*1-golden*/*.manifest"))
    flip_byte(first, 100)
    second.unlink()
    code, out, _ = call("verify", tmp_path / "run", "--step=2")
    assert code == 1
    assert out.count(first.name) == out.count(second.name) == 1


# -- copy --------------------------------------------------------------------------------------


def test_copy_of_the_newest_step(call: Call, shared_run: Path, tmp_path: Path) -> None:
    code, out, err = call("copy", shared_run, tmp_path / "to")
    assert (code, err) == (0, "")
    assert re.match(r"step 40: .* KiB in 3 objects\ncopied 1 step, .* KiB, to file:///", out)
    code, out, _ = call("verify", tmp_path / "to", "--all")
    assert (code, out.count("good")) == (0, 1)
    code, out, _ = call("copy", shared_run, tmp_path / "to")
    assert code == 0
    assert out.startswith("step 40: there already\ncopied 0 steps, 0 B, to file:///")


def test_copy_of_a_step_and_of_all(call: Call, shared_run: Path, tmp_path: Path) -> None:
    code, out, err = call("copy", shared_run, tmp_path / "to", "--step=20", "--json")
    assert (code, err) == (0, "")
    assert [(s["step"], s["copied"]) for s in json.loads(out)["steps"]] == [(10, True), (20, True)]
    code, out, err = call("copy", shared_run, tmp_path / "to", "--all", "--json", "--progress")
    copies = json.loads(out)
    assert code == 0
    assert [s["copied"] for s in copies["steps"]] == [False, False, True, True]
    assert copies["target"] == (tmp_path / "to").as_uri()
    assert "copying step 40: 100 % of" in err
    files = [p for p in shared_run.rglob("*.*") if p.is_file() and re.search("00[34]0[-.]", str(p))]
    sent = sum(path.stat().st_size for path in files)
    assert sum(step["sent_nbytes"] for step in copies["steps"]) == sent
    assert {p.relative_to(tmp_path / "to") for p in (tmp_path / "to").rglob("*.*")} == {
        p.relative_to(shared_run) for p in shared_run.rglob("*.*")
    }


def test_copy_of_damaged_steps(call: Call, run: Path, tmp_path: Path) -> None:
    """Nothing of them is committed; what decodes from them stays behind, too."""
    (pack,) = packs(run, 40)
    flip_byte(pack)
    code, out, err = call("copy", run, tmp_path / "to", "--step=40")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert pack.name in err
    assert call("ls", tmp_path / "to")[0] == 2
    code, out, err = call("copy", run, tmp_path / "to")
    assert code == 1
    assert re.match(r"step 10: .*\nstep 20: .*\nstep 30: .*\nstep 40: NOT COPIED, damage: ", out)
    assert pack.name in out
    flip_byte(packs(run, 10)[0])
    code, out, _ = call("copy", run, tmp_path / "other", "--all", "--json")
    copies = json.loads(out)
    assert (code, copies["steps"]) == (1, [])
    kept_out = [(found["step"], found["damage"]["step"]) for found in copies["uncopied"]]
    assert kept_out == [(10, 10), (20, 10), (30, 10), (40, 40)]
    out = call("copy", run, tmp_path / "other", "--all")[1]
    assert re.search(r"^step 30: NOT COPIED, damage of step 10: data/", out, re.MULTILINE)


def test_copy_over_another_run(call: Call, shared_run: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "to", (40,))
    code, out, err = call("copy", shared_run, tmp_path / "to", "--all")
    assert (code, out) == (2, "")
    assert shared_run.as_uri() in err and (tmp_path / "to").as_uri() in err


# -- gc ----------------------------------------------------------------------------------------


def make_orphans(run: Path) -> list[Path]:
    orphan = run / data_prefix(50, "deadbeef-000000") / "w00000-000000.pack"
    temporary = run / ".tmp" / ".0000000000000000-1-1.abcdef"
    for path in (orphan, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    os.utime(temporary, (0, 0))
    return [orphan, temporary]


def test_gc(call: Call, run: Path) -> None:
    orphans = make_orphans(run)
    before = sorted(run.rglob("*"))
    code, out, _ = call("gc", run, "--dry_run", "--json")
    would = json.loads(out)
    assert code == 0
    assert sorted(run.rglob("*")) == before
    code, out, _ = call("gc", run, "--json")
    did = json.loads(out)
    assert code == 0
    assert did["objects"] == would["objects"] == [orphans[0].relative_to(run).as_posix()]
    assert did["temporaries"] == would["temporaries"] == 1
    assert did["nbytes"] == would["nbytes"] == 2000
    assert not any(path.exists() for path in orphans)
    assert call("verify", run, "--all")[0] == 0
    code, out, _ = call("gc", run)
    assert (code, out) == (0, "removed 0 objects, 0 leases, 0 temporary files, 0 B\n")


def test_gc_leaves_live_runs_alone(call: Call, run: Path) -> None:
    with asymcheck.Checkpointer(run, run_id="alive") as checkpointer:
        checkpointer.save(50, state_at(50)).wait()
        half_done = run / data_prefix(60, "alive-000001") / "w00000-000000.pack"
        half_done.parent.mkdir()
        half_done.write_bytes(b"x")
        code, out, _ = call("gc", run, "--json")
        assert code == 0
        assert json.loads(out)["objects"] == []
        assert half_done.exists()
    code, out, _ = call("gc", run, "--json")
    assert json.loads(out)["objects"] == [half_done.relative_to(run).as_posix()]


def test_gc_removes_nothing_beside_a_damaged_record(call: Call, run: Path) -> None:
    orphan, _ = make_orphans(run)
    flip_byte(run / commit_key(20), 200)
    code, out, _ = call("gc", run)
    assert code == 1
    assert "the commit records of steps 20 are damaged" in out
    assert orphan.exists()


def test_gc_in_a_store_that_is_not_local(call: Call) -> None:
    url = "memory://gc-of-memory"
    store = asymcheck.open_store(url)
    key = data_prefix(1, "dead-000000") + "w00000-000000.pack"
    store.put(key, memoryview(b"x"))
    for flag, left in (("--dry_run", [key]), ("--nodry_run", [])):
        code, out, _ = call("gc", url, flag, "--json")
        found = json.loads(out)
        assert (code, found["objects"], found["nbytes"]) == (0, [key], None)
        assert store.list("data/") == left


# -- stats -------------------------------------------------------------------------------------


def test_stats(call: Call, shared_run: Path) -> None:
    code, out, _ = call("stats", shared_run)
    assert code == 0
    assert re.search(r"^delta +params +float32 +16.5 KiB .* % +2  always delta$", out, re.MULTILINE)
    code, out, _ = call("stats", shared_run, "--step=20", "--json")
    costs = json.loads(out)
    assert [s["step"] for s in costs["steps"]] == [20]
    assert costs["steps"][0]["durable_after_s"] > 0
    coded = {(c["codec"], c["kind"], c["dtype"]): c for c in costs["codings"]}
    assert coded["delta", "params", "float32"]["raw_nbytes"] == 64 * 33 * 4
    assert coded["delta", "params", "float32"]["decisions"] == 1
    assert coded["delta", "params", "float32"]["reasons"] == ["always delta"]


def test_stats_count_the_bytes_of_the_packs(call: Call, shared_run: Path) -> None:
    costs = json.loads(call("stats", shared_run, "--json")[1])
    on_disk = {step: sum(path.stat().st_size for path in packs(shared_run, step)) for step in STEPS}
    for step in costs["steps"]:
        assert sum(step["stored_nbytes_by_codec"].values()) == on_disk[step["step"]]
    assert sum(c["stored_nbytes"] for c in costs["codings"]) == sum(on_disk.values())
    assert sum(c["raw_nbytes"] for c in costs["codings"]) == RAW_NBYTES * len(STEPS)
    assert costs["steps"][0]["stored_nbytes_by_codec"].keys() == {"plane", "raw"}
    assert costs["steps"][1]["stored_nbytes_by_codec"].keys() == {"delta", "raw"}


def test_stats_agree_with_the_leaves(call: Call, shared_run: Path) -> None:
    costs = json.loads(call("stats", shared_run, "--step=30", "--json")[1])
    leaves = json.loads(call("show", shared_run, "--step=30", "--json")[1])["leaves"]
    raw: Counter[tuple[str, str]] = Counter()
    stored: Counter[tuple[str, str]] = Counter()
    for leaf in leaves:
        place = leaf["path"].split("/")[0], leaf["dtype"]
        raw[place] += leaf["raw_nbytes"]
        stored[place] += leaf["stored_nbytes"]
    for coding in costs["codings"]:
        place = coding["kind"], coding["dtype"]
        raw[place] -= coding["raw_nbytes"]
        stored[place] -= coding["stored_nbytes"]
    assert not any(raw.values()) and not any(stored.values())


def test_stats_of_blocks_that_no_codec_made_smaller(call: Call, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    strategy = asymcheck.AsymCheck(policy=asymcheck.Always("zstd"))
    with asymcheck.Checkpointer(tmp_path, strategy=strategy) as checkpointer:
        checkpointer.save(1, {"noise": noise})
    codings = json.loads(call("stats", tmp_path, "--json")[1])["codings"]
    found = {c["codec"]: (c["raw_nbytes"], c["stored_nbytes"], c["decisions"]) for c in codings}
    assert found == {"raw": (5000, 5000, 0), "zstd": (0, 0, 1)}
    assert "not made smaller by a codec" in call("stats", tmp_path)[1]


def test_stats_draws_the_run(call: Call, shared_run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "run.png"
    assert call("stats", shared_run, f"--plot={picture}")[0] == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1500, 1200)  # pixels


def test_stats_of_a_damaged_step(call: Call, run: Path) -> None:
    next(run.glob(f"data/{20:016}-*/*.manifest")).unlink()
    code, out, _ = call("stats", run)
    assert code == 1
    assert "step 20: a manifest is missing" in out
    assert re.search(r"^ +40  base", out, re.MULTILINE)


# -- errors and the process --------------------------------------------------------------------


def test_a_store_that_fails(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    code, out, err = call("ls", tmp_path / "file")
    assert (code, out) == (3, "")
    assert err.startswith("asymcheck: ")
    assert err.count("\n") == 1


def test_output_that_cannot_be_written(call: Call, shared_run: Path, tmp_path: Path) -> None:
    code, _, err = call("export", shared_run, "--to=npz", f"--output={tmp_path}/no/x.npz")
    assert code == 3
    assert "cannot write" in err
    assert call("stats", shared_run, f"--plot={tmp_path}/no/x.png")[0] == 3
    assert call("stats", shared_run, f"--plot={tmp_path}/x.foo")[0] == 3
    assert list(tmp_path.iterdir()) == []


def test_a_later_version_is_no_damage(call: Call, run: Path) -> None:
    path = run / commit_key(40)
    body = path.read_bytes().partition(b"\n")[2]
    path.write_bytes(header("commit", 2, body) + body)
    code, out, err = call("show", run)
    assert (code, out) == (3, "")
    assert "another format version" in err
    code, out, _ = call("verify", run)
    assert code == 1
    assert "another format version" in out


def test_damage_is_an_error_to_diff(call: Call, run: Path) -> None:
    flip_byte(packs(run, 40)[0])
    code, out, err = call("diff", run, 10, 40)
    assert (code, out) == (3, "")
    assert "step 40" in err


def test_output_cannot_control_a_terminal(call: Call, tmp_path: Path) -> None:
    name = "\x1b[31mred\x07\u202e\ud800"
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {name: np.ones(3)}, metadata={"\x1b": "\x9b"})
    for arguments in (["ls"], ["show"], ["verify"], ["stats"]):
        code, out, err = call(arguments[0], tmp_path / "run")
        assert (code, err) == (0, "")
        assert all(c.isprintable() or c == "\n" for c in out)
    code, out, _ = call("show", tmp_path / "run", "--json")
    assert json.loads(out)["leaves"][0]["path"] == name


def test_json_has_no_nan(call: Call, tmp_path: Path) -> None:
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"x": np.array([1e308, -1e308])})
        checkpointer.save(2, {"x": np.array([-1e308, 1e308])})
    code, out, _ = call("diff", tmp_path / "run", 1, 2, "--json")
    assert code == 1
    assert json.loads(out, parse_constant=pytest.fail)["changed"][0]["max_abs"] is None


def test_progress_only_on_request(call: Call, shared_run: Path) -> None:
    code, out, err = call("verify", shared_run, "--json", "--progress")
    assert code == 0
    assert json.loads(out)
    assert "verifying step 40: 100 % of 16.6 KiB" in err
    assert call("verify", shared_run, "--json")[2] == ""
    assert "reading records: 100 % of 4 steps" in call("ls", shared_run, "--progress")[2]
    assert (
        "reading records: 100 % of 1 step,"
        in call("stats", shared_run, "--step=10", "--progress")[2]
    )


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asymcheck", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


def test_as_a_process(shared_run: Path) -> None:
    done = process("ls", shared_run)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("STEP")
    done = process("ls", shared_run.parent / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("asymcheck: there is no checkpoint")
    assert process("--version").stdout.strip() == asymcheck.__version__
    assert process("verify", shared_run, "--verbosity=1", "--all").returncode == 0


def test_broken_pipe(shared_run: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m asymcheck show {shared_run} --json | true"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 if it had written everything before `true` ended


def test_broken_pipe_exit_code(shared_run: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "asymcheck", "ls", str(shared_run)],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_that_only_knows_ascii(tmp_path: Path) -> None:
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"größe": np.ones(3)})
    done = process("show", tmp_path / "run", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "asymcheck: interrupted\n"),
        (RuntimeError("a bug"), 3, "Traceback"),
        (MemoryError(), 3, "asymcheck: MemoryError\n"),
    ],
)
def test_whatever_happens(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(_: object) -> int:
        raise error

    broken = dataclasses.replace(COMMANDS["ls"], run=fail)
    monkeypatch.setitem(cast("dict[str, Command]", COMMANDS), "ls", broken)
    assert _guarded(["asymcheck", "ls", "x"]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(message)


def test_progress_on_a_terminal(shared_run: Path) -> None:
    reading, writing = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "asymcheck", "verify", str(shared_run), "--json"],
        stdout=subprocess.PIPE,
        stderr=writing,
        check=False,
        timeout=120,
    )
    os.close(writing)
    shown = os.read(reading, 4096).decode()
    os.close(reading)
    assert done.returncode == 0
    assert json.loads(done.stdout)["steps"][0]["good"]
    assert "\r\x1b[Kverifying step 40: 100 %" in shown
    assert shown.endswith("\r\x1b[K")  # and wiped away


# -- the parts ---------------------------------------------------------------------------------


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "3.0 GiB",
    ]
    assert [duration(s) for s in (0.0123, 5, 600, 7200, 864000)] == [
        "12.3 ms",
        "5.0 s",
        "10.0 min",
        "2.0 h",
        "10.0 d",
    ]


def test_tables_align() -> None:
    assert list(table(("A", "BB"), [("x", "1"), ("yyy", "22")], left="A")) == [
        "A    BB",
        "x     1",
        "yyy  22",
    ]
    assert list(table(("A",), [])) == []


def test_printable_keeps_what_is() -> None:
    assert printable("größe 日本") == "größe 日本"
    assert printable("a\nb\x1b") == "a\\nb\\x1b"


@pytest.mark.parametrize(
    "shape",
    [(), (0, 5), (7,), (MAX_PIECE_SIZE + 3,), (3, MAX_PIECE_SIZE // 2 + 1), (2, 2, MAX_PIECE_SIZE)],
)
def test_pieces_cover_once_and_are_bounded(shape: tuple[int, ...]) -> None:
    seen = np.zeros(shape, np.uint8)
    for piece in pieces(shape):
        assert seen[piece].size <= MAX_PIECE_SIZE
        seen[piece] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint8", "float16", "complex64", "bfloat16"])
def test_statistics_do_not_depend_on_the_pieces(dtype: str) -> None:
    from asymcheck.state import dtype_of

    values = np.random.default_rng(1).standard_normal(1000) * 10
    array = np.abs(values).astype(np.int64) if dtype in ("int64", "uint8") else values
    array = array.astype(dtype_of(dtype))
    whole, parts = StatisticsBuilder(), StatisticsBuilder()
    whole.add(array)
    for part in np.split(array, [1, 10, 500]):
        parts.add(part)
    a, b = whole.build(), parts.build()
    assert (a.count, a.zeros, a.minimum, a.maximum) == (b.count, b.zeros, b.minimum, b.maximum)
    assert a.mean == pytest.approx(b.mean)
    assert a.standard_deviation == pytest.approx(b.standard_deviation)
    plain = np.abs(array.astype(complex)) if dtype == "complex64" else array.astype(np.float64)
    assert a.standard_deviation == pytest.approx(plain.std())
