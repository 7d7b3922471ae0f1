"""Runs of two processes, of torch and of JAX, against real servers: killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from object_urls import s3_url
from rank_processes import run_and_kill_after, run_to_the_end
from test_hdfs import url_of

import asymcheck

KILLS = [(3, 0.0), (3, 0.03), (6, 0.08)]  # steps after the newest one, and seconds after that
MORE_STEPS = 4


@pytest.fixture(params=["s3", "hdfs"])
def run_url(request: pytest.FixtureRequest) -> str:
    """Where a run is kept; empty."""
    if request.param == "s3":
        return s3_url(request.getfixturevalue("seaweed_server"))
    cluster, path = (request.getfixturevalue(name) for name in ("hdfs_cluster", "hdfs_path"))
    return url_of(cluster, "hdfs", path)


def digests(output: Path) -> list[str]:
    return [output.with_suffix(f".{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize("script", ["torch_run.py", "jax_run.py"])
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(
    run_url: str, script: str, tmp_path: Path
) -> None:
    newest = 0
    for after, delay_s in KILLS:
        durable = newest - newest % 3 + after
        line = f"durable {durable}"
        run_and_kill_after(script, line, delay_s, run_url, 100_000, tmp_path / "killed", ranks=2)
        with asymcheck.open_checkpoint(run_url) as checkpoint:
            checkpoint.verify()
            newest = checkpoint.step
            assert newest >= durable
            assert len(checkpoint.chain[0].manifests) == 2
    run_to_the_end(script, run_url, newest + MORE_STEPS, tmp_path / "killed", ranks=2)
    whole = tmp_path / "undisturbed", newest + MORE_STEPS, tmp_path / "whole"
    run_to_the_end(script, *whole, ranks=2)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
