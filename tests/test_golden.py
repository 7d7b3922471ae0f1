"""Golden checkpoints of every format version keep loading, bit for bit; see make_golden.py."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_golden import DTYPES

import asymcheck
from asymcheck.cli import main
from asymcheck.errors import AsymCheckError, CheckpointNotFoundError, CorruptionError

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path for path in GOLDEN.iterdir() if path.is_dir())
CASES = [path.parent for version in VERSIONS for path in sorted(version.glob("*/expected.json"))]
MAX_NBYTES = 200_000


@pytest.fixture(params=CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def case(request: pytest.FixtureRequest) -> Path:
    return request.param


def read_expected(case: Path) -> tuple[list[int], dict[int, Any], bytes]:
    """The good steps, the states, and the bytes of their arrays."""
    expected = json.loads((case / "expected.json").read_text())
    if "states_of" in expected:
        _, states, content = read_expected(case.parent / expected["states_of"])
        return expected["good"], states, content
    with np.load(case / "expected.npz") as archive:
        content = archive["content"].tobytes()
    return expected["good"], {int(s): state for s, state in expected["states"].items()}, content


def assert_is(found: Any, expected: Any, content: bytes, known: dict[int, Any], path: str) -> None:
    """Types, order, bits, and that what was one array is one."""
    kind, *rest = expected
    if kind == "ndarray":
        offset, dtype, shape = rest
        assert type(found) is np.ndarray, path
        assert (found.dtype.name, list(found.shape)) == (dtype, shape), path
        assert found.tobytes() == content[offset : offset + found.nbytes], path
        assert found.size == 0 or known.setdefault(offset, found) is found, path
        return
    if kind == "scalar":
        assert isinstance(found, np.generic), path
        assert [found.dtype.name, np.asarray(found).tobytes().hex()] == rest, path
        return
    assert type(found).__name__ == kind, path
    if kind in ("dict", "OrderedDict", "Counter"):
        assert list(found) == [key for key, _ in rest[0]], path
        for key, item in rest[0]:
            assert_is(found[key], item, content, known, f"{path}/{key!r}")
    elif kind in ("list", "tuple"):
        assert len(found) == len(rest[0]), path
        for i, (item, wanted) in enumerate(zip(found, rest[0], strict=True)):
            assert_is(item, wanted, content, known, f"{path}/{i}")
    else:
        assert (found.hex() if kind == "bytes" else repr(found)) == rest[0], path


def test_every_version_has_all_cases() -> None:
    assert [version.name for version in VERSIONS] == ["v1"]
    assert {case.name for case in CASES} == {
        "dtypes",
        "nested",
        "root",
        "chain",
        "writers",
        "missing_pack",
        "missing_manifest",
        "missing_base",
        "torn_commit",
        "left_behind",
    }


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_nobody_has_changed_them(version: Path) -> None:
    sums = dict(
        reversed(line.split()) for line in (version / "SHA256SUMS").read_text().splitlines()
    )
    files = {
        path.relative_to(version).as_posix(): path.read_bytes()
        for path in version.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS"
    }
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == sums
    assert sum(map(len, files.values())) < MAX_NBYTES


def test_good_steps_load_bit_for_bit(case: Path) -> None:
    good, states, content = read_expected(case)
    for step in good:
        with asymcheck.open_checkpoint(case / "run", step) as checkpoint:
            assert_is(checkpoint.state(), states[step], content, {}, f"step {step}")
            assert checkpoint.metadata == {"step": step, "note": "größe"}


@pytest.mark.parametrize("name", ["dtypes", "chain"])
def test_leaves_and_rows_load_by_themselves(name: str) -> None:
    run = golden_run(name)
    for step in asymcheck.Checkpointer(run).steps():
        with asymcheck.open_checkpoint(run, step) as checkpoint:
            state = checkpoint.state()
            for path, lazy in checkpoint.items():
                kind, leaf = path.split("/")
                whole = np.asarray(state[kind][leaf])
                assert np.asarray(lazy).tobytes() == whole.tobytes()
                rows = (slice(1, 3),) if whole.ndim else ()
                assert np.asarray(lazy[rows]).tobytes() == whole[rows].tobytes()


def test_restore_takes_the_newest_good_step(case: Path, tmp_path: Path) -> None:
    good, states, content = read_expected(case)
    shutil.copytree(case / "run", tmp_path / "run")
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        if not good:
            with pytest.raises(CheckpointNotFoundError, match="no checkpoint is whole"):
                checkpointer.restore()
            return
        assert_is(checkpointer.restore(), states[max(good)], content, {}, "newest")


@pytest.mark.parametrize("name", ["chain", "writers", "missing_pack", "torn_commit"])
def test_training_goes_on(name: str, tmp_path: Path) -> None:
    case = GOLDEN / "v1" / name
    good, states, content = read_expected(case)
    run = tmp_path / "run"
    shutil.copytree(case / "run", run)
    with asymcheck.Checkpointer(run) as checkpointer:
        checkpointer.restore()
        checkpointer.save(max(states) + 1, {"x": np.ones(3)}).wait()
        assert checkpointer.steps() == [*good, max(states) + 1]
    for step in good:
        with asymcheck.open_checkpoint(run, step) as checkpoint:
            assert_is(checkpoint.state(), states[step], content, {}, f"step {step}")


def test_verify_agrees(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, states, _ = read_expected(case)
    code = main(["asymcheck", "verify", str(case / "run"), "--all", "--json"])
    verdicts = {v["step"]: v["good"] for v in json.loads(capsys.readouterr().out)["steps"]}
    assert [step for step, is_good in verdicts.items() if is_good] == good
    assert code == (0 if good == [*states] else 1)


def golden_run(name: str) -> Path:
    return GOLDEN / "v1" / name / "run"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing_pack", CorruptionError, "w00001-000000.pack"),
        ("missing_manifest", CorruptionError, "w00001.manifest"),
        ("missing_base", CorruptionError, "step 1"),
        ("torn_commit", CorruptionError, "commit record"),
    ],
)
def test_a_damaged_step_asked_for_by_number(
    name: str, error: type[AsymCheckError], message: str
) -> None:
    with (
        pytest.raises(error, match=message),
        asymcheck.open_checkpoint(golden_run(name), 2) as checkpoint,
    ):
        checkpoint.state()


def test_leaves_beside_a_missing_pack_still_load() -> None:
    with asymcheck.open_checkpoint(golden_run("missing_pack"), 2) as checkpoint:
        assert checkpoint["first/only"][...].tolist() == [2, 2, 2]
        assert checkpoint["sharded"][:2].shape == (2, 5)
        with pytest.raises(CorruptionError):
            checkpoint["second/only"][...]
        with pytest.raises(CorruptionError):
            checkpoint["sharded"][2:]


def test_lossy_leaves_kept_their_largest_changes() -> None:
    with asymcheck.open_checkpoint(golden_run("chain"), 2) as checkpoint:
        index = checkpoint.chain[0]
        codecs = {stored.box.leaf.path: stored.codec for stored in index.blocks()}
        assert {codec.id for codec in codecs.values()} == {"raw", "zstd", "plane", "delta", "topk"}
        assert [path for path, codec in codecs.items() if codec.lossy] == ["topk/f32", "topk/i32"]


def test_two_writers_and_boxes() -> None:
    with asymcheck.open_checkpoint(golden_run("writers"), 2) as checkpoint:
        index = checkpoint.chain[0]
        assert len(index.manifests) == 2
        assert len(index.leaves["sharded"].boxes) == 2
        (replicas,) = index.leaves["replicated"].boxes.values()
        assert [stored.block.count for stored in replicas.blocks] == [60, 41]


def test_what_dead_runs_left_is_collected(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(golden_run("left_behind"), run)
    assert main(["asymcheck", "gc", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objects"] == []  # its lease cannot be read
    shutil.rmtree(run / "runs")
    assert main(["asymcheck", "gc", str(run), "--json"]) == 0
    removed = json.loads(capsys.readouterr().out)["objects"]
    assert len(removed) == 6
    assert all("-dead-" in key for key in removed)
    assert (run / "notes.txt").exists()
    assert main(["asymcheck", "verify", str(run), "--all"]) == 0


def test_every_dtype_in_every_codec_that_needs_no_parent() -> None:
    with asymcheck.open_checkpoint(golden_run("dtypes"), 0) as checkpoint:
        found = {(b.box.leaf.dtype, b.codec.id) for b in checkpoint.chain[0].blocks()}
    codecs = ("raw", "zstd", "plane")
    assert found == {(dtype, codec) for dtype in DTYPES for codec in codecs}
