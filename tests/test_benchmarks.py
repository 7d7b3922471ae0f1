"""The benchmarks run, and find the bytes that they should; nothing is asked of their times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install 'asymcheck[torch]'")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, output: Path, *arguments: str) -> Any:
    command = [sys.executable, str(BENCHMARKS / script), "--output", str(output), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=output.parent)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(output.with_suffix(".json").read_text())


def test_coding(tmp_path: Path) -> None:
    """A small model after five steps: an increment is mostly its gradient, in bfloat16."""
    text = tmp_path / "text"
    text.write_text(Path(__file__).parents[1].joinpath("docs", "format.md").read_text() * 4)
    options = ["--small", "--gradients", "bfloat16", "--step", "5"]
    options += ["--repeats", "1", "--chain", "2", "--text", str(text)]
    (rows,) = run("coding.py", tmp_path / "coding.json", *options)["runs"].values()
    ratio = {(row["kind"], row["gap"], row["coder"]): row["ratio"] for row in rows}
    assert ratio["state", 1, "replay"] < 0.13
    assert ratio["state", 1, "captured"] < 0.13
    assert ratio["params", 1, "replay"] < 0.001  # derived
    assert ratio["state", "full", "plane"] < 0.9
    assert all(row["chain_gb_s"] > 0 for row in rows if "chain_gb_s" in row)


@pytest.mark.parametrize("store", ["file", "gs"])
def test_stores(tmp_path: Path, store: str) -> None:
    options = ["--stores", store, "--rounds", "1", "--mib", "64", "--leaves", "500"]
    (result,) = run("stores.py", tmp_path / "stores", *options, "--seconds", "0.5")
    assert result["store"] == store
    assert all(len(each["write"]) == len(each["read"]) == 3 for each in result["plain"])
    assert [sorted(each) for each in result["asymcheck"]] == [["read", "write"]]
    assert result["small"]["ours_us"] > 0
    table = (tmp_path / "stores.md").read_text()
    assert table.count(f"| {store} |") == 2


def test_torch_single(tmp_path: Path) -> None:
    """Behind a link on which a checkpoint takes longer than a step, and with a core left over."""
    options = ["--small", "--rounds", "1", "--steps", "2", "--every-list", "1", "--threads", "1"]
    options += ["--write-mbps", "400", "--variants", "none", "asymcheck-naive"]
    found = run("torch_single.py", tmp_path / "single", *options)
    plain, naive = found["rows"]
    (_, ran) = found["runs"]
    assert naive["step_ratio"] == naive["step_s"] / plain["step_s"] > 0
    assert ran["codecs"] == ["raw"]
    assert naive["stored_nbytes"] > 100e6  # of 10 M parameters with their moments
    assert min(ran["durable_s"]) >= naive["stored_nbytes"] / 400e6  # no less than the link takes
