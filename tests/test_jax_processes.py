"""Several real JAX processes save one checkpoint, and others restore it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax_processes import TIMEOUT_S, run, start

import asymcheck
import asymcheck_jax


def bytes_read(said: list[str]) -> list[int]:
    lines = [line for text in said for line in text.splitlines() if line.startswith("read ")]
    return [int(line.split()[1]) for line in lines]


@pytest.mark.parametrize("writers", [2, 4])
def test_restored_by_other_numbers_of_processes(tmp_path: Path, writers: int) -> None:
    run("save", tmp_path, writers, 2)
    item = tmp_path / "3" / "default"
    with asymcheck.open_checkpoint(item) as checkpoint:
        manifests = checkpoint.chain[0].manifests
        assert len(manifests) == writers
        checkpoint.verify()
        stored = {path: leaf.spec.nbytes for path, leaf in checkpoint.chain[0].leaves.items()}
    assert sum(m.stats["raw_nbytes"] for m in manifests) == sum(stored.values())
    whole = bytes_read(run("restore", tmp_path, 1, 8))
    parts = bytes_read(run("restore", tmp_path, 2, 4))
    assert len(whole) == 1 and len(parts) == 2
    assert max(parts) < 0.75 * whole[0]  # nobody reads it all


def test_a_process_that_dies_in_a_save_leaves_no_step_and_hangs_nobody(tmp_path: Path) -> None:
    processes = start("die", tmp_path, 2, 2)
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == 9, said[1][-3000:]
    assert processes[0].returncode not in (0, None), said[0][-3000:]
    assert [path.name for path in tmp_path.iterdir() if path.name.isdigit()] == ["0"]
    with asymcheck.open_checkpoint(tmp_path / "0" / "default") as checkpoint:
        checkpoint.verify()


def test_a_step_that_orbax_has_not_named_is_none(tmp_path: Path) -> None:
    (process,) = start("unnamed", tmp_path, 1, 2)
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 9, said[-3000:]
    assert list(tmp_path.glob("1.*/default*/commits/*")), "the step was not even durable"
    handler = asymcheck_jax.AsymCheckHandler()
    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        assert manager.all_steps() == [0]
        with pytest.raises(FileNotFoundError):
            manager.restore(1, args=asymcheck_jax.AsymCheckRestore())
        manager.save(1, args=asymcheck_jax.AsymCheckSave({"w": np.arange(3)}))
        manager.wait_until_finished()
        found = manager.restore(1, args=asymcheck_jax.AsymCheckRestore())
    assert found["w"].tolist() == [0, 1, 2]


def test_what_cannot_be_stored_is_refused_by_every_process(tmp_path: Path) -> None:
    for said in run("refuse", tmp_path, 2, 2):
        lines = [line for line in said.splitlines() if line.startswith(("refused", "steps"))]
        assert lines == ["refused dates", "steps [1]", "refused of one process", "steps [1, 3]"]


def test_others_learn_what_one_process_cannot_save(tmp_path: Path) -> None:
    first, second = run("refuse_alone", tmp_path, 2, 2)
    assert "writer 1 gave the attempt up" in first and "[leaf odd]" in first
    assert "step 1 failed" in second and "[leaf odd]" in second
    assert "steps [0, 2]" in first and "steps [0, 2]" in second


def test_processes_that_differ_about_the_base_commit_nothing_unreadable(tmp_path: Path) -> None:
    for said in run("differ", tmp_path, 2, 2):
        (steps,) = (line for line in said.splitlines() if line.startswith("steps "))
        assert steps in ("steps [0, 2, 3]", "steps [0, 1, 2, 3]"), said


def test_processes_that_choose_differently_save_every_step(tmp_path: Path) -> None:
    for said in run("unlike", tmp_path, 2, 2):
        lines = [line for line in said.splitlines() if ": steps " in line]
        assert lines == ["never: steps [0, 1, 2, 3]", "sooner: steps [0, 1, 2, 3]"], said
    lengths = []
    for step in range(4):
        with asymcheck.open_checkpoint(tmp_path / "sooner" / str(step) / "default") as checkpoint:
            lengths.append(len(checkpoint.chain))
    assert lengths == [1, 2, 3, 4]
