"""The DeepSpeed example, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("deepspeed", reason="DS_BUILD_OPS=0 pip install deepspeed==0.19.8")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.timeout(600)
def test_a_rank_is_killed_in_a_save_and_the_run_resumes(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "train_deepspeed.py", "--steps=8", "--directory"]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("yes") == 4
